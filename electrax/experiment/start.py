"""The weights a run starts from: those of another model, put in the place of the drawn ones."""

import dataclasses
import logging

import jax
import numpy as np
from jaxtyping import Array, Float

from electrax.config import AnyPath, UserError
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import AnyConfig, FinetuneConfig, PretrainConfig, finished, read_config
from electrax.experiment.foreign import as_workdir
from electrax.experiment.run import load_params
from electrax.models.encoder import EncoderConfig
from electrax.models.sizes import GeneratorConfig, discriminator_shape, generator_shape
from electrax.tasks.base import Params
from electrax.training.sharding import put_everywhere

log = logging.getLogger("electrax")
# what two encoders must have in common; the vocabulary and the number of positions may differ
SHAPE = ("body", "layers", "width", "heads", "feed_forward", "embedding_width", "qk_norm")


def start_of(init_from: str) -> AnyPath:
    """The run whose weights `init_from` names; of a fine-tuning over several seeds the best one."""
    workdir = as_workdir(init_from)
    return finished(workdir) if isinstance(read_config(workdir), FinetuneConfig) else workdir


def with_generator_shape(config: PretrainConfig) -> PretrainConfig:
    """The config with the shape of the language model that `generator.init_from` names. Raises UserError where it is
    none, or has not the number that a key asks for."""
    asked = config.generator
    if not asked.init_from:
        return config
    source = f"generator.init_from {asked.init_from}"
    before = read_config(start_of(asked.init_from))
    if not isinstance(before, PretrainConfig) or before.objective.kind != "mlm":
        raise UserError(f'{source}: expected a language model alone (GPT-2, or trained with objective.kind "mlm")')
    if config.objective.kind == "mlm":
        raise UserError(f'{source}: objective.kind "mlm" has no discriminator beside it; expected init_from')
    there, plain = discriminator_shape(before.model, 1), GeneratorConfig()
    if there.embedding_width != there.width:
        widths = f"its embeddings are {there.embedding_width} wide, its states {there.width}"
        raise UserError(f"{source}: {widths}; expected the same, as of every generator with embeddings of its own")
    shape = {key: getattr(there, key) for key in SHAPE if hasattr(plain, key)}
    shape |= {"kind": before.generator.kind, "embeddings": "separate"}
    for key, value in shape.items():
        if getattr(asked, key) not in (getattr(plain, key), value):
            raise UserError(f"{source}: its {key} is {value}, this run's generator.{key} {getattr(asked, key)}")
    generator = dataclasses.replace(asked, **shape)
    _check(source, "model", there, generator_shape(config.model, generator, discriminator_shape(config.model, 1)))
    return dataclasses.replace(config, generator=generator)


def start_weights(config: PretrainConfig, tokenizer: Tokenizer, drawn: Params) -> Params:
    """The drawn weights with those of `init_from`, and of `generator.init_from`, in their place."""
    if config.init_from:
        drawn = _started(config, tokenizer, drawn)
    return _with_generator(config, tokenizer, drawn) if config.generator.init_from else drawn


def _with_generator(config: PretrainConfig, tokenizer: Tokenizer, drawn: Params) -> Params:
    """The weights with those of a language model as the generator's, whose tokens must be the run's."""
    source = config.generator.init_from
    workdir = start_of(source)
    known = Tokenizer.load(workdir)
    pieces = [each.pieces(range(each.vocab_size)) for each in (known, tokenizer)]
    if pieces[0] != pieces[1] or known.special_ids != tokenizer.special_ids:
        raise UserError(
            f"generator.init_from {source}: its vocabulary of {known.vocab_size} tokens is not the run's, of "
            f"{tokenizer.vocab_size}; expected a text prepared with its tokenizer, as by --data.tokenizer {source}"
        )
    params = jax.tree.map(np.asarray, load_params(workdir)[1])
    every = list(range(tokenizer.vocab_size))
    own = taken_embeddings(params["embeddings"], drawn["generator_embeddings"], every, every)
    return {**drawn, "generator": _placed(params["generator"], drawn["generator"]), "generator_embeddings": own}


def _started(config: PretrainConfig, tokenizer: Tokenizer, drawn: Params) -> Params:
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
    _check(f"init_from {config.init_from}", "model", there[source], here[main])
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
    own = bool(config.generator.init_from)  # the generator's weights come from elsewhere
    if "generator" in there and main == source and before.generator.kind == config.generator.kind and not own:
        _check(f"init_from {config.init_from}", "generator", there["generator"], here["generator"])
        taken["generator"] = _with_head(params["generator"], drawn["generator"], old_rows, new_rows)
        if "generator_embeddings" in drawn:
            separate = params.get("generator_embeddings", params["embeddings"])
            drawn_embeddings = drawn["generator_embeddings"]
            taken["generator_embeddings"] = taken_embeddings(separate, drawn_embeddings, old_rows, new_rows)
    elif not own:
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
            raise UserError(f"{source}: its {section}.{key} is {getattr(there, key)}, this run's {getattr(here, key)}")


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
    if "head" not in params:  # a bare body's has no parameters
        return params
    head = {**params["head"]}
    head["output_bias"] = _rows(head["output_bias"], drawn["head"]["output_bias"], old, new)
    return {**params, "head": head}
