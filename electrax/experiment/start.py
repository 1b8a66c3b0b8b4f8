"""The weights a run starts from: those of another model, put in the place of the drawn ones."""

import logging
import pathlib

import jax
import numpy as np
from jaxtyping import Array, Float

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import AnyConfig, FinetuneConfig, PretrainConfig, finished, read_config
from electrax.experiment.foreign import as_workdir
from electrax.experiment.run import load_params
from electrax.models.encoder import EncoderConfig
from electrax.models.sizes import discriminator_shape, generator_shape
from electrax.tasks.base import Params
from electrax.training.sharding import put_everywhere

log = logging.getLogger("electrax")
# what two encoders must have in common; the vocabulary and the number of positions may differ
SHAPE = ("body", "layers", "width", "heads", "feed_forward", "embedding_width", "qk_norm")


def start_of(init_from: str) -> pathlib.Path:
    """The run whose weights `init_from` names; of a fine-tuning over several seeds the best one."""
    workdir = as_workdir(init_from)
    return finished(workdir) if isinstance(read_config(workdir), FinetuneConfig) else workdir


def start_weights(config: PretrainConfig, tokenizer: Tokenizer, drawn: Params) -> Params:
    """The drawn weights with those of `config.init_from` in their place, as far as it has them; warns of what is new.

    A token keeps its row of the word table (and its output bias) by its name, a position by its number; the others
    stay as they are drawn. The encoder of a masked LM alone becomes the discriminator's, and the other way round.
    Raises UserError naming the key in which the two models' shapes differ.
    """
    workdir = start_of(config.init_from)
    before, known = read_config(workdir), Tokenizer.load(workdir)
    params = jax.tree.map(np.asarray, load_params(workdir)[1])
    here, there = _towers(config, drawn), _towers(before, params)
    main, source = next(iter(here)), next(iter(there))
    _check(config.init_from, "model", there[source], here[main])
    old_rows, new_rows = shared_tokens(known, tokenizer)
    fresh = tokenizer.vocab_size - len(new_rows)
    taken = {
        **drawn,
        "embeddings": taken_embeddings(params["embeddings"], drawn["embeddings"], old_rows, new_rows),
        main: {**drawn[main], "encoder": params[source]["encoder"]},
    }
    new_parts = []
    if main == "discriminator":
        if "head" in params.get(main, {}):
            taken[main]["head"] = params[main]["head"]
        else:
            new_parts.append("the discriminator's head")
    if "generator" in there and main == source and before.generator.kind == config.generator.kind:
        _check(config.init_from, "generator", there["generator"], here["generator"])
        taken["generator"] = _with_head(params["generator"], drawn["generator"], old_rows, new_rows)
        if "generator_embeddings" in drawn:
            own = params.get("generator_embeddings", params["embeddings"])
            taken["generator_embeddings"] = taken_embeddings(own, drawn["generator_embeddings"], old_rows, new_rows)
    else:
        new_parts.append("the generator" if main == "discriminator" else "the masked-LM head")
    if new_parts:
        log.warning("init_from %s: %s it does not have, drawn anew", config.init_from, " and ".join(new_parts))
    if fresh:
        log.warning("init_from %s: %d of %d tokens are new to it", config.init_from, fresh, tokenizer.vocab_size)
    return _placed(taken, drawn)


def _towers(config: AnyConfig, params: Params) -> dict[str, EncoderConfig]:
    """The shape of each tower that there are parameters of, the main one first."""
    discriminator = discriminator_shape(config.model, 1)
    if "discriminator" not in params:
        return {"generator": discriminator}
    towers = {"discriminator": discriminator}
    if isinstance(config, PretrainConfig) and "generator" in params:
        towers["generator"] = generator_shape(config.model, config.generator, discriminator)
    return towers


def _check(source: str, section: str, there: EncoderConfig, here: EncoderConfig) -> None:
    for key in SHAPE:
        if getattr(there, key) != getattr(here, key):
            raise UserError(
                f"init_from {source}: its {section}.{key} is {getattr(there, key)}, this run's {getattr(here, key)}"
            )


def shared_tokens(known: Tokenizer, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of the tokens that both vocabularies have, there and here; special ones by their role."""
    numbers = {piece: number for number, piece in enumerate(known.pieces(range(known.vocab_size)))}
    here = {number: numbers.get(piece) for number, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size)))}
    here |= {tokenizer.special_ids[role]: known.special_ids[role] for role in tokenizer.special_ids}
    shared = [(there, number) for number, there in here.items() if there is not None]
    return [there for there, _ in shared], [number for _, number in shared]


def _rows(
    params: Float[np.ndarray, "_ ..."], drawn: Float[Array, "_ ..."], old: list[int], new: list[int]
) -> Float[np.ndarray, "_ ..."]:
    changed = np.array(drawn)
    changed[new] = params[old]
    return changed


def taken_embeddings(params: Params, drawn: Params, old: list[int], new: list[int]) -> Params:
    """The rows `old` of the word table as `new`, and the positions that both have; the others as they are drawn. Where
    the drawn ones live."""
    changed = {**params, "word": _rows(params["word"], drawn["word"], old, new)}
    if "position" in drawn:
        places = list(range(min(len(params["position"]), len(drawn["position"]))))
        changed["position"] = _rows(params["position"], drawn["position"], places, places)
    return _placed(changed, drawn)


def same_shapes(a: Params, b: Params) -> bool:
    return jax.tree.map(lambda leaf: leaf.shape, a) == jax.tree.map(lambda leaf: leaf.shape, b)


def _placed(taken: Params, drawn: Params) -> Params:
    return jax.tree.map(lambda leaf, like: put_everywhere(np.asarray(leaf), like.sharding), taken, drawn)


def _with_head(params: Params, drawn: Params, old: list[int], new: list[int]) -> Params:
    head = {**params["head"]}
    head["output_bias"] = _rows(head["output_bias"], drawn["head"]["output_bias"], old, new)
    return {**params, "head": head}
