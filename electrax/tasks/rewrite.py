"""From one text to another: translation, summaries, headlines. The pretrained encoder with a decoder that reads it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from electrax.data.tokenizer import Tokenizer
from electrax.models.attention import KeyValues
from electrax.models.decoding import Decoded, beam_search, decode
from electrax.models.encoder import Embeddings, Encoder, EncoderConfig, project_memory
from electrax.models.flops import encoder_forward, masked_lm_forward
from electrax.models.generator import MaskedLMHead
from electrax.models.masks import one_way_mask, padding_mask
from electrax.tasks import texts as scorers
from electrax.tasks.base import Batch, Mean, Metrics, Params
from electrax.tasks.finetune import FinetuneTask
from electrax.tasks.vocabulary import by_rows, cross_entropy, is_largest, rows_at_once

DecoderWeights = Literal["encoder", "shared", "fresh"]


@dataclasses.dataclass(frozen=True)
class RewriteTask(FinetuneTask):
    """Rows have `ids` [B, S], the source, and `target` [B, T], both as [CLS] … [SEP].

    Parameter tree: `embeddings` and `discriminator/encoder` as everywhere, `decoder`, whose layers are those of an
    encoder with `cross_attention`, and `head`, which the word table makes into logits. `target_embeddings` are there
    where the target has a vocabulary of its own. With `weights` "shared" the decoder's layers have of their own only
    what the encoder's do not. The length of an output is at most `most` tokens.
    """

    decoder: EncoderConfig = None  # type: ignore[assignment]
    cls_id: int = 0
    end_id: int = 0  # the target's [SEP]
    target_pad_id: int = 0
    own_vocabulary: bool = False
    weights: DecoderWeights = "encoder"
    label_smoothing: float = 0.1
    most: int = 64
    beams: int = 4
    length_penalty: float = 1.0
    coverage_penalty: float = 0.0
    tokenizer: Tokenizer | None = dataclasses.field(default=None, repr=False, compare=False)  # the target's
    references: Sequence[tuple[str, ...]] = dataclasses.field(default=(), repr=False, compare=False)  # of the dev rows

    # -- parameters ---------------------------------------------------------------------------------------------------

    def head(self) -> MaskedLMHead:
        return MaskedLMHead(self.decoder)

    def init(self, key: Key[Array, ""], batch: Batch) -> Params:
        encoder_key, decoder_key, table_key, head_key = jax.random.split(key, 4)
        ids = jnp.zeros((1, 2), jnp.int32)
        embeddings = Embeddings(self.encoder).init(jax.random.fold_in(encoder_key, 0), ids)["params"]
        embedded = Embeddings(self.encoder).apply({"params": embeddings}, ids)
        mask = jnp.ones((1, 1, 1, 2), bool)
        memory, encoder = Encoder(self.encoder).init_with_output(encoder_key, embedded, mask)
        params = {"embeddings": embeddings, "discriminator": {"encoder": encoder["params"]}}
        if self.own_vocabulary:
            params["target_embeddings"] = Embeddings(self.decoder).init(table_key, ids)["params"]
        table = params[self._table]
        looked_up = Embeddings(self.decoder).apply({"params": table}, ids)
        hidden, decoder = Encoder(self.decoder).init_with_output(
            decoder_key, looked_up, mask, None, None, memory, jnp.ones((1, 1, 1, 2), bool)
        )
        params["decoder"] = decoder["params"]
        if self.weights == "shared":
            params["decoder"] = {
                name: _own(part, encoder["params"].get(name)) for name, part in decoder["params"].items()
            }
            params["decoder"] = {name: part for name, part in params["decoder"].items() if part}
        params["head"] = self.head().init(head_key, hidden, table["word"])["params"]
        return params

    @property
    def _table(self) -> str:
        return "target_embeddings" if self.own_vocabulary else "embeddings"

    def is_frozen(self, path: tuple[str, ...]) -> bool:
        """Of the encoder, as in every fine-tuning; the decoder learns."""
        return path[0] in ("embeddings", "discriminator") and super().is_frozen(path)

    def decoder_params(self, params: Params) -> Params:
        """All that the decoder's layers compute with."""
        if self.weights != "shared":
            return params["decoder"]
        encoder = params["discriminator"]["encoder"]
        names = {*params["decoder"], *(name for name in encoder if not name.startswith("layer_"))}
        return {name: {**encoder.get(name, {}), **params["decoder"].get(name, {})} for name in names}

    def forward_flops(self) -> float:
        """Of a training row at its own lengths, on average."""
        assert self.train is not None
        d, total = self.decoder, 0
        for source, target in self.train.rows.lengths.tolist():
            cross = d.layers * 4 * d.width * (d.width * (source + target) + source * target)
            own = encoder_forward(d, target) + masked_lm_forward(d)
            total += source * encoder_forward(self.encoder, source) + target * own + cross
        return total / len(self.train.rows)

    def _encoded_lengths(self) -> Int[np.ndarray, " T"]:
        return self.train.rows.source.text_lengths

    # -- training -----------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, keys: Key[Array, "B"]) -> Batch:
        """Every target token has the same share of the loss."""
        weight = self._weight(batch)
        share = weight if self.faithful else weight / jnp.maximum(jnp.sum(weight), 1.0)
        return super().prepare(batch, keys) | {"share": share}

    def _weight(self, batch: Batch) -> Float[Array, "B U"]:
        """1 for what is to be predicted: every target token but the first."""
        return (batch["target"][:, 1:] != self.target_pad_id) * batch["weight"][:, None]

    def logits(self, params: Params, prepared: Batch, train: bool = False) -> Float[Array, "B U V"]:
        """Of each target token but the first, from the source and the target tokens before it."""
        return self._output(params, self._states(params, prepared, train))

    def _states(self, params: Params, prepared: Batch, train: bool) -> Float[Array, "B U E"]:
        """What `_output` makes into logits."""
        ids, target = prepared["ids"].astype(jnp.int32), prepared["target"].astype(jnp.int32)[:, :-1]
        body, top = prepared["dropout_seed"].T if train else (None, None)
        memory = self.hidden(params, ids, body)
        embedded = Embeddings(self.decoder).apply({"params": params[self._table]}, target)
        mask = one_way_mask(padding_mask(target != self.target_pad_id))
        hidden = Encoder(self.decoder).apply(
            {"params": self.decoder_params(params)}, embedded, mask, None, top, memory, padding_mask(ids != self.pad_id)
        )
        return self.head().apply({"params": params["head"]}, hidden, method="transform")

    def _output(self, params: Params, states: Float[Array, "B U E"]) -> Float[Array, "B U V"]:
        word = params[self._table]["word"]
        with jax.named_scope("vocabulary"):
            return self.head().apply({"params": params["head"]}, states, word, method="logits")

    def _predict(self, params: Params, prepared: Batch, train: bool = False) -> Batch:
        """All that needs logits, of each target token but the first: its cross entropy, the same with the target
        `smoothed`, and whether it is the likeliest."""
        rows = {"state": self._states(params, prepared, train), "target": prepared["target"][:, 1:].astype(jnp.int32)}

        def predict(rows: Batch) -> Batch:
            logits, target = self._output(params, rows["state"]), rows["target"]
            with jax.named_scope("vocabulary"):
                return {
                    "smoothed": cross_entropy(logits, target, self.label_smoothing, self.decoder.vocab_size),
                    "cross_entropy": cross_entropy(jax.lax.stop_gradient(logits), target),
                    "is_largest": is_largest(logits, target),
                }

        return by_rows(predict, rows, rows_at_once(*rows["target"].shape, self.decoder.padded_vocab_size))

    def loss(self, params: Params, prepared: Batch) -> tuple[Float[Array, ""], Metrics]:
        found, weight = self._predict(params, prepared, train=True), self._weight(prepared)
        return jnp.sum(found["smoothed"] * prepared["share"]), {
            "token_loss": Mean.of(found["cross_entropy"], weight),
            "accuracy": Mean.of(found["is_largest"], weight),
        }

    # -- decoding -----------------------------------------------------------------------------------------------------

    def rewrite(self, params: Params, ids: Int[Array, "B S"], beams: int | None = None, n_best: int = 1) -> Decoded:
        """The `n_best` best outputs of each source, [B, n_best, most]; one beam is greedy decoding."""
        beams = beams or self.beams
        covers = beams > 1 and self.coverage_penalty > 0
        step, cache, first = self._start(params, ids, beams, covers)
        if beams == 1:
            found = decode(step, cache, first, self.most, self.end_id, self.target_pad_id)
            return jax.tree.map(lambda leaf: leaf[:, None], found)
        return beam_search(
            step, cache, first, self.most, self.end_id, self.target_pad_id,
            beams=beams, n_best=n_best, length_penalty=self.length_penalty, penalty=self._coverage if covers else None,
        )  # fmt: skip

    def _coverage(self, cache: Any) -> Float[Array, "R"]:
        """What of the source an output left unread costs it: the sum over the source's tokens of log(min(attention that
        the token got, 1)), times the `coverage_penalty` (Wu et al. 2016, section 7)."""
        _, (attended, real) = cache
        missing = jnp.log(jnp.clip(attended, jnp.finfo(jnp.float32).tiny, 1.0))
        return self.coverage_penalty * jnp.sum(jnp.where(real, missing, 0.0), axis=-1)

    def _start(self, params: Params, ids: Int[Array, "B S"], beams: int, covers: bool = False):
        """The step of decoding, the empty cache, and the first tokens; `beams` rows of the cache for each source. If it
        `covers`, the cache has beside the layers' what the last layer has read of each source token so far, and which
        tokens are real."""
        c, table, layers = self.decoder, {"params": params[self._table]}, self.decoder_params(params)
        rows, repeat = ids.shape[0], functools.partial(jnp.repeat, repeats=beams, axis=0)
        memory = jax.tree.map(repeat, project_memory(c, layers, self.hidden(params, ids)))
        memory_mask = repeat(padding_mask(ids != self.pad_id))
        empty = jnp.zeros((rows * beams, self.most, c.heads, c.width // c.heads), c.activation_dtype)
        cache = [KeyValues(empty, empty)] * c.layers
        if covers:
            cache = cache, (jnp.zeros(memory_mask[:, 0, 0].shape), memory_mask[:, 0, 0])

        def step(cache, tokens, place):
            cache, coverage = cache if covers else (cache, None)
            positions = jnp.broadcast_to(place, (tokens.shape[0], 1))
            embedded = Embeddings(c).apply(table, tokens[:, None], None, positions)
            mask = jnp.broadcast_to(jnp.arange(self.most) <= place, (tokens.shape[0], 1, 1, self.most))
            (hidden, cache), seen = Encoder(c).apply(
                {"params": layers}, embedded, mask, positions, None, memory, memory_mask, cache, place,
                mutable=["attended"] if covers else [],
            )  # fmt: skip
            if covers:
                attended, real = coverage
                cache = cache, (attended + seen["attended"]["weights"][0][:, 0], real)
            logits = self.head().apply({"params": params["head"]}, hidden, table["params"]["word"])
            return logits[:, 0], cache

        return step, cache, jnp.full((rows,), self.cls_id, jnp.int32)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, params: Params, prepared: Batch) -> tuple[Metrics, dict[str, jax.Array]]:
        found, weight = self._predict(params, prepared), self._weight(prepared)
        means = {
            "loss": Mean.of(found["cross_entropy"], weight),
            "accuracy": Mean.of(found["is_largest"], weight),
        }
        if self.metric in ("loss", "accuracy"):
            return means, {}
        found = self.rewrite(params, prepared["ids"].astype(jnp.int32))
        return means, {"output": found.ids[:, 0]}

    def summarize(self, means: dict[str, float], arrays: dict[str, np.ndarray]) -> dict[str, float]:
        return means | (scorers.figures(self.metric, *self._texts(arrays)) if "output" in arrays else {})

    def _texts(self, arrays: dict[str, np.ndarray]) -> tuple[list[str], Sequence[tuple[str, ...]]]:
        """The outputs and their references; the arrays have the dev rows in order."""
        assert self.tokenizer is not None
        return [self.tokenizer.decode(ids) for ids in arrays["output"]], self.references[: len(arrays["output"])]

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*scorers.METRICS, "accuracy", "loss")

    def tables(self, arrays: dict[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
        """How the metric was computed, and the first outputs beside their references."""
        if "output" not in arrays:
            return {}
        outputs, references = self._texts({name: rows[:5] for name, rows in arrays.items()})
        examples = [{"output": out, "reference": true[0]} for out, true in zip(outputs, references, strict=True)]
        return {"signature": scorers.signatures(self.metric, max(map(len, self.references))), "examples": examples}

    def diagnose(self, figures: dict[str, float], arrays: dict[str, np.ndarray]) -> list[str]:
        """What did not train, in words; empty where it did."""
        if "output" in arrays and len(arrays["output"]) > 1 and len(np.unique(arrays["output"], axis=0)) == 1:
            return ["it writes the same for every text"]
        return []


def _own(part: Params, shared: Params | None) -> Params:
    """What of a decoder's part the encoder has not."""
    return {name: leaf for name, leaf in part.items() if shared is None or name not in shared}
