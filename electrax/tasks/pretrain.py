"""Replaced-token detection joined with the generator's masked language model (ELECTRA), noise-contrastive estimation
of what a token's probability in its place is (Electric), or a language model alone (BERT, GPT)."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Int64, Key

from electrax.data.batches import eval_batches, train_rows
from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings, EncoderConfig
from electrax.models.flops import pretraining_step
from electrax.models.generator import Generator, MaskedLMHead
from electrax.models.masks import document_index, document_mask, document_positions, padding_mask, segment_ids
from electrax.models.sizes import GeneratorKind
from electrax.tasks import corruption
from electrax.tasks.base import Batch, Mean, Metrics, Params
from electrax.tasks.metrics import area_under_curve
from electrax.tasks.vocabulary import by_rows, cross_entropy, is_largest, rows_at_once

EPSILON = 1e-6  # the reference adds it to every denominator


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is hidden and what is learned. `rtd`: generator and discriminator; `mlm`: one full-size LM alone, masked or
    as generator.kind says.

    `electric` (Clark et al. 2020, "Pre-training Transformers as energy-based cloze models"): the discriminator tells
    samples from text, a sample that equals the original too, given how likely the generator finds the token.
    """

    kind: Literal["rtd", "mlm", "electric"] = "rtd"
    mask_prob: float = 0.15  # share of a row's tokens that are chosen: predicted, and replaced by samples
    keep_prob: float = 0.15  # of those, the share that stays visible to the generator
    random_prob: float = 0.0  # of those, the share shown as a random token (BERT: 0.1, with keep_prob 0.1)
    causal_loss: Literal["all", "chosen"] = "all"  # tokens a left-to-right LM learns from: all but [CLS], or the chosen
    causal_share: float = 1 / 16  # of the rows that a hybrid generator reads from left to right; GPT-BERT's
    temperature: float = 1.0  # of the generator's samples; 0 is the arg max
    disallow_correct: bool = False
    generator_weight: float = 1.0
    discriminator_weight: float = 50.0
    vocabulary_rows: int = 0  # rows whose logits over the vocabulary are held at once; 0: as many as a GiB holds


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    pad: int
    cls: int
    sep: int
    mask: int


@dataclasses.dataclass(frozen=True)
class PretrainTask:
    """ELECTRA pretraining as a Task over rows of token ids.

    Parameter tree: `embeddings`, `generator` and `discriminator` (and `generator_embeddings` where they are separate).
    With `mlm` there is no discriminator, and the generator has the discriminator's shape. A `two_tower` generator has a
    `backward_encoder` beside its `encoder`; a `shared` one has a `head` alone and uses the discriminator's `encoder`.
    """

    objective: ObjectiveConfig
    discriminator: EncoderConfig
    generator: EncoderConfig
    special: SpecialIds
    layout: Literal["packed", "segments"]
    shared_embeddings: bool = True
    generator_kind: GeneratorKind = "masked"
    faithful: bool = False
    corpus: Any = dataclasses.field(default=None, repr=False, compare=False)
    batch_size: int = 0
    eval_rows: int = 0
    seed: int = 0

    # -- parameters ---------------------------------------------------------------------------------------------------

    @property
    def detects(self) -> bool:
        return self.objective.kind != "mlm"

    @property
    def electric(self) -> bool:
        return self.objective.kind == "electric"

    @property
    def two_tower(self) -> bool:
        return self.generator_kind == "two_tower"

    @property
    def predicts_all(self) -> bool:
        """Whether there are logits at every place of a row, or at the slots alone."""
        return self.electric or (self.generator_kind in ("causal", "hybrid") and self.objective.causal_loss == "all")

    def flops(self, rows: int, length: int) -> float:
        """Of a training step in matrix products."""
        slots = length if self.predicts_all else corruption.slot_count(length, self.objective.mask_prob)
        discriminator = self.discriminator if self.detects else None
        return pretraining_step(self.generator, discriminator, rows, length, slots, towers=2 if self.two_tower else 1)

    def init(self, key: Key[Array, ""], batch: Batch) -> Params:
        ids = jnp.asarray(batch["ids"][:1], jnp.int32)
        embedded_key, generator_key, discriminator_key, separate_key = jax.random.split(key, 4)
        real = padding_mask(ids != self.special.pad)
        embeddings = Embeddings(self.discriminator)
        params = {"embeddings": embeddings.init(embedded_key, ids)["params"]}
        embedded = embeddings.apply({"params": params["embeddings"]}, ids)
        own, word = embedded, params["embeddings"]["word"]
        if not self.shared_embeddings:
            separate = Embeddings(self.generator)
            params["generator_embeddings"] = separate.init(separate_key, ids)["params"]
            own = separate.apply({"params": params["generator_embeddings"]}, ids)
            word = params["generator_embeddings"]["word"]
        params["generator"] = self._generator().init(generator_key, own, word, real)["params"]
        if self.generator_kind == "shared":
            del params["generator"]["encoder"]
        if self.detects:
            params["discriminator"] = Discriminator(self.discriminator).init(discriminator_key, embedded, real)[
                "params"
            ]
        return params

    def _generator(self) -> Generator:
        return Generator(self.generator, self.generator_kind, wrap=self.faithful and self.two_tower)

    def generator_params(self, params: Params) -> Params:
        """All that the generator computes with but the embeddings; a bare body's head has no parameters."""
        shared = {"encoder": params["discriminator"]["encoder"]} if self.generator_kind == "shared" else {}
        return {"head": {}} | params["generator"] | shared

    # -- corruption ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, keys: Key[Array, "B"]) -> Batch:
        """Masks the rows and weighs them: every leaf keeps the row axis, and weights sum to one over the whole batch.

        The generator's mean is over the used slots (`slot_weight`), or where it predicts every place over all tokens
        that count there (`place_weight`), the discriminator's over all real ones with [CLS] and [SEP] (`token_weight`).
        """
        ids = batch["ids"].astype(jnp.int32)
        prepared = jax.vmap(self._mask_row)(ids, keys)
        counted = {"slot_weight": prepared["used"], "token_weight": ids != self.special.pad}
        if self.predicts_all:
            counted["place_weight"] = self._candidates(ids) if self.electric else self._continuations(prepared)
        return prepared | {name: each / (jnp.sum(each) + EPSILON) for name, each in counted.items()}

    def _candidates(self, ids: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Tokens that may be chosen; [UNK] is one, as in the reference."""
        s = self.special
        return (ids != s.pad) & (ids != s.cls) & (ids != s.sep) & (ids != s.mask)

    def _continuations(self, prepared: Batch) -> Bool[Array, "B L"] | Float[Array, "B L"]:
        """Tokens that stand after others of their text: all but the [CLS] that each text begins with. In a hybrid's
        masked rows those that are chosen, and each of its rows counts the same, however many tokens it predicts."""
        ids = prepared["ids"]
        tokens = (ids != self.special.pad) & (ids != self.special.cls)
        if self.generator_kind != "hybrid":
            return tokens
        chosen = jax.vmap(corruption.marked)(ids, prepared["slots"], prepared["used"])
        return _evenly(jnp.where(prepared["causal"][:, None], tokens, chosen))

    def _mask_row(self, ids: Int[Array, "L"], key: Key[Array, ""]) -> dict[str, jax.Array]:
        o, special = self.objective, self.special
        slots_key, hide_key, sample_key, random_key, dropout_key, causal_key = jax.random.split(key, 6)
        slots, used = corruption.choose_slots(
            slots_key,
            self._candidates(ids),
            jnp.sum(ids != special.pad),
            o.mask_prob,
            corruption.slot_count(ids.shape[0], o.mask_prob),
            with_replacement=self.faithful,
        )
        fate = jax.random.uniform(hide_key, slots.shape)
        hidden = used & (fate >= o.keep_prob)
        shown = jnp.full_like(slots, special.mask)
        if o.random_prob:
            token = jax.random.randint(random_key, slots.shape, 0, self.generator.vocab_size)
            shown = jnp.where(fate < o.keep_prob + o.random_prob, token, shown)
        masked = corruption.write_at(ids, slots, shown, hidden)
        hidden &= shown == special.mask
        prepared = {
            "ids": ids,
            "masked": masked,
            "slots": slots,
            "used": used,
            "hidden": hidden,
            "sample_key": sample_key,
            "dropout_seed": jax.random.bits(dropout_key, (2,), jnp.uint32),
        }
        # what sees no token that it predicts needs none masked out
        if self.generator_kind in ("two_tower", "causal"):
            prepared |= {"masked": ids, "hidden": used}
        if self.generator_kind == "hybrid":
            causal = jax.random.uniform(causal_key) < o.causal_share
            prepared |= {"masked": jnp.where(causal, ids, masked), "hidden": jnp.where(causal, used, hidden)}
            prepared["causal"] = causal
        return prepared

    # -- the two towers -----------------------------------------------------------------------------------------------

    def _context(self, ids: Int[Array, "B L"]):
        """Attention mask, type ids and positions; all from the original ids, since a sample may be any token."""
        s = self.special
        if self.layout == "packed":
            documents = document_index(ids, s.cls, s.pad)
            return document_mask(documents), None, document_positions(ids, s.cls)
        return padding_mask(ids != s.pad), segment_ids(ids, s.sep, s.pad), None

    def _generate(self, params: Params, prepared: Batch, context, train: bool) -> Float[Array, "B N E"]:
        """The generator's states at the slots, or at every place; the vocabulary comes in `_predict`."""
        mask, types, positions = context
        embeddings = Embeddings(self.discriminator if self.shared_embeddings else self.generator)
        table = params[self._embeddings_of_generator]
        embedded = embeddings.apply({"params": table}, prepared["masked"], types, positions)
        return self._generator().apply(
            {"params": self.generator_params(params)},
            embedded,
            mask,
            None if self.predicts_all else prepared["slots"],
            positions,
            prepared["dropout_seed"][:, 0] if train else None,
            prepared["causal"] if self.generator_kind == "hybrid" else None,
            method="states",
        )

    @property
    def _embeddings_of_generator(self) -> str:
        return "embeddings" if self.shared_embeddings else "generator_embeddings"

    def _predict(self, params: Params, rows: Batch) -> Batch:
        """All that needs logits over the vocabulary, for some `rows` of a prepared batch with the generator's `state`:
        the cross entropy and whether the true token is the likeliest, at each state and at each slot, and what
        `_corrupt` makes of the logits at the slots."""
        word, head = params[self._embeddings_of_generator]["word"], self.generator_params(params)["head"]
        with jax.named_scope("vocabulary"):
            logits = MaskedLMHead(self.generator).apply({"params": head}, rows["state"], word, method="logits")
            original = jnp.take_along_axis(rows["ids"], rows["slots"], axis=1)
            at_slots, target = logits, original
            if self.predicts_all:
                at_slots, target = jnp.take_along_axis(logits, rows["slots"][..., None], axis=1), rows["ids"]
            found = {
                "cross_entropy": cross_entropy(logits, target),
                "is_largest": is_largest(logits, target),
                "is_largest_at_slots": is_largest(at_slots, original),
            }
        if self.detects:
            with jax.named_scope("sampling"):
                found |= self._corrupt(rows, jax.lax.stop_gradient(at_slots))
            if self.electric:
                found["noise_log_odds"] = self._noise_log_odds(logits, found["corrupted"])
        return found

    def _corrupt(self, rows: Batch, logits: Float[Array, "B M V"]) -> Batch:
        """Samples at the slots, the rows with every used slot (the kept ones too) replaced by its sample, and which
        tokens count as replaced: those that changed, or with Electric all that were chosen."""
        o = self.objective
        original = jnp.take_along_axis(rows["ids"], rows["slots"], axis=1)
        draw = jax.vmap(
            lambda key, row, true: corruption.sample(
                key, row, true, o.temperature, o.disallow_correct, with_gumbel=self.faithful
            )
        )
        sampled = draw(rows["sample_key"], logits, original)
        corrupted = jax.vmap(corruption.write_at)(rows["ids"], rows["slots"], sampled, rows["used"])
        replaced = corrupted != rows["ids"]
        if self.electric:
            replaced = jax.vmap(corruption.marked)(rows["ids"], rows["slots"], rows["used"])
        return {"sampled": sampled, "corrupted": corrupted, "replaced": replaced}

    def _noise_log_odds(self, logits: Float[Array, "B L V"], corrupted: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """log q(x) + log(p / (1 - p)) of the token x that stands at each place, where q is what the generator gives it
        and p is mask_prob: what Electric's discriminator need not learn. No gradient passes."""
        log_q = -cross_entropy(jax.lax.stop_gradient(logits), corrupted)
        return log_q + math.log(self.objective.mask_prob / (1 - self.objective.mask_prob))

    def _discriminate(self, params: Params, corrupted, prepared: Batch, context, train: bool) -> Float[Array, "B L"]:
        mask, types, positions = context
        embedded = Embeddings(self.discriminator).apply({"params": params["embeddings"]}, corrupted, types, positions)
        seed = prepared["dropout_seed"][:, 1] if train else None
        return Discriminator(self.discriminator).apply(
            {"params": params["discriminator"]}, embedded, mask, positions, seed
        )

    def _forward(self, params: Params, prepared: Batch, train: bool):
        """Loss (a sum over the rows), metrics, and by row what the area under the curve is made of."""
        o, ids, used, hidden = self.objective, prepared["ids"], prepared["used"], prepared["hidden"]
        context = self._context(ids)
        rows = {name: prepared[name] for name in ("ids", "slots", "used", "sample_key")}
        rows["state"] = self._generate(params, prepared, context, train)
        held = rows_at_once(*rows["state"].shape[:2], self.generator.padded_vocab_size, self.objective.vocabulary_rows)
        found = by_rows(lambda some: self._predict(params, some), rows, held)
        original = jnp.take_along_axis(ids, prepared["slots"], axis=1)
        weight = prepared["place_weight" if self.predicts_all else "slot_weight"]
        loss = o.generator_weight * jnp.sum(found["cross_entropy"] * weight)
        counted = _evenly(weight > 0) if self.predicts_all and self.generator_kind == "hybrid" else weight > 0
        metrics = {
            "mlm_loss": Mean.of(found["cross_entropy"], counted),
            "mlm_accuracy": Mean.of(found["is_largest"], counted),
            "masked_accuracy": Mean.of(found["is_largest_at_slots"], hidden),
        }
        arrays = {"hidden_token": jnp.where(hidden, original, -1)}
        if not self.detects:
            return loss, metrics, arrays
        sampled, corrupted, replaced = (found[name] for name in ("sampled", "corrupted", "replaced"))
        real = ids != self.special.pad
        score = self._discriminate(params, corrupted, prepared, context, train)
        if self.electric:
            score += found["noise_log_odds"]
        binary = optax.sigmoid_binary_cross_entropy(score, replaced.astype(jnp.float32))
        loss += o.discriminator_weight * jnp.sum(binary * prepared["token_weight"])
        flagged = score > 0  # a logit of exactly 0 counts as "original", as the reference rounds it
        metrics |= {
            "sampled_accuracy": Mean.of(sampled == original, used),
            "replaced_share": Mean.of(replaced, real),
            "rtd_loss": Mean.of(binary, real),
            "rtd_accuracy": Mean.of(flagged == replaced, real),
            "rtd_precision": Mean.of(replaced, real & flagged),
            "rtd_recall": Mean.of(flagged, real & replaced),
        }
        arrays |= {"score": score, "replaced": replaced, "real": real, "corrupted": corrupted, "ids": ids}
        return loss, metrics, arrays

    def loss(self, params: Params, prepared: Batch) -> tuple[Float[Array, ""], Metrics]:
        loss, metrics, _ = self._forward(params, prepared, train=True)
        return loss, metrics

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, params: Params, prepared: Batch) -> tuple[Metrics, dict[str, jax.Array]]:
        _, metrics, arrays = self._forward(params, prepared, train=False)
        return metrics, arrays

    def summarize(self, means: dict[str, float], arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """Adds the loss, the exact AUC, and what the best guess without context reaches on the same tokens."""
        o = self.objective
        hidden = arrays["hidden_token"]
        counts = np.bincount(hidden[hidden >= 0])
        share = counts[counts > 0] / max(counts.sum(), 1)
        figures = {"loss": o.generator_weight * means["mlm_loss"], **means}
        if self.detects:
            figures["loss"] += o.discriminator_weight * means["rtd_loss"]
            real = arrays["real"]
            figures["rtd_auc"] = area_under_curve(arrays["score"][real], arrays["replaced"][real])
        figures["unigram_accuracy"] = float(share.max(initial=0.0))
        figures["unigram_loss"] = float(-np.sum(share * np.log(share)))
        return figures

    def score(self, figures: dict[str, float]) -> float:
        return -figures["loss"]

    def diagnose(self, figures: dict[str, float]) -> list[str]:
        """What did not learn, in words; empty where everything did."""
        found = []
        if figures["masked_accuracy"] < 1.2 * figures["unigram_accuracy"]:
            found.append(
                f"the generator is at unigram level: it names {figures['masked_accuracy']:.1%} of the hidden "
                f"tokens, always guessing the most frequent one {figures['unigram_accuracy']:.1%}"
            )
        if self.detects and (figures["rtd_auc"] < 0.55 or not figures["rtd_recall"] > 0):
            found.append(
                f"the discriminator stays at the majority class: AUC {figures['rtd_auc']:.3f} (chance 0.5), "
                f"it finds {figures['rtd_recall']:.1%} of the replaced tokens"
            )
        return found

    # -- data ---------------------------------------------------------------------------------------------------------

    def train_numbers(self, step: int) -> Int64[np.ndarray, " B"]:
        """The numbers of the rows of one step."""
        return train_rows(step, self.batch_size, self.corpus.size("train"), self.seed)

    def train_batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Token ids [B, L] of one step, or of some of its rows."""
        return {"ids": self.corpus.rows("train", self.train_numbers(step)[rows])}

    def eval_batches(self, rows: slice = slice(None)) -> Iterator[tuple[Batch, Int[np.ndarray, "B"]]]:
        """Held-out rows; one that only fills the last batch is all padding and so counts nothing."""
        size = min(self.eval_rows or self.corpus.size("valid"), self.corpus.size("valid"))
        for numbers in eval_batches(size, self.batch_size):
            numbers = numbers[rows]
            yield {"ids": self.corpus.rows("valid", numbers)}, numbers


def _evenly(counted: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """Weights that are alike within a row and add up to one in each."""
    return counted / jnp.maximum(1, jnp.sum(counted, axis=1, keepdims=True))
