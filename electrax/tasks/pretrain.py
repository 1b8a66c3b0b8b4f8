"""Replaced-token detection joined with the generator's masked language model (ELECTRA), or masked LM alone (BERT)."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from electrax.data.batches import eval_batches, train_rows
from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings, EncoderConfig
from electrax.models.generator import Generator
from electrax.models.masks import document_index, document_mask, document_positions, padding_mask, segment_ids
from electrax.tasks import corruption
from electrax.tasks.base import Batch, Mean, Metrics, Params

EPSILON = 1e-6  # the reference adds it to every denominator


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is hidden and what is learned. `rtd`: generator and discriminator; `mlm`: one full-size masked LM."""

    kind: Literal["rtd", "mlm"] = "rtd"
    mask_prob: float = 0.15  # share of a row's tokens that are predicted
    keep_prob: float = 0.15  # of those, the share that stays visible to the generator
    random_prob: float = 0.0  # of those, the share shown as a random token (BERT: 0.1, with keep_prob 0.1)
    temperature: float = 1.0  # of the generator's samples; 0 is the arg max
    disallow_correct: bool = False
    generator_weight: float = 1.0
    discriminator_weight: float = 50.0


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
    With `mlm` there is no discriminator, and the generator has the discriminator's shape.
    """

    objective: ObjectiveConfig
    discriminator: EncoderConfig
    generator: EncoderConfig
    special: SpecialIds
    layout: Literal["packed", "segments"]
    shared_embeddings: bool = True
    faithful: bool = False
    corpus: Any = dataclasses.field(default=None, repr=False, compare=False)
    batch_size: int = 0
    eval_rows: int = 0
    seed: int = 0

    # -- parameters ---------------------------------------------------------------------------------------------------

    @property
    def detects(self) -> bool:
        return self.objective.kind == "rtd"

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
        params["generator"] = Generator(self.generator).init(generator_key, own, word, real)["params"]
        if self.detects:
            params["discriminator"] = Discriminator(self.discriminator).init(discriminator_key, embedded, real)[
                "params"
            ]
        return params

    # -- corruption ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, keys: Key[Array, "B"]) -> Batch:
        """Masks the rows and weighs them: every leaf keeps the row axis, and weights sum to one over the whole batch.

        The generator's mean is over the used slots, the discriminator's over all real tokens with [CLS] and [SEP].
        """
        ids = batch["ids"].astype(jnp.int32)
        prepared = jax.vmap(self._mask_row)(ids, keys)
        used, real = prepared["used"], ids != self.special.pad
        return prepared | {
            "slot_weight": used / (jnp.sum(used) + EPSILON),
            "token_weight": real / (jnp.sum(real) + EPSILON),
        }

    def _mask_row(self, ids: Int[Array, "L"], key: Key[Array, ""]) -> dict[str, jax.Array]:
        o, special = self.objective, self.special
        slots_key, hide_key, sample_key, random_key, dropout_key = jax.random.split(key, 5)
        real = ids != special.pad
        # [UNK] may be chosen, as in the reference
        candidates = real & (ids != special.cls) & (ids != special.sep) & (ids != special.mask)
        slots, used = corruption.choose_slots(
            slots_key,
            candidates,
            jnp.sum(real),
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
        return {
            "ids": ids,
            "masked": corruption.write_at(ids, slots, shown, hidden),
            "slots": slots,
            "used": used,
            "hidden": hidden & (shown == special.mask),
            "sample_key": sample_key,
            "dropout_seed": jax.random.bits(dropout_key, (2,), jnp.uint32),
        }

    # -- the two towers -----------------------------------------------------------------------------------------------

    def _context(self, ids: Int[Array, "B L"]):
        """Attention mask, type ids and positions; all from the original ids, since a sample may be any token."""
        s = self.special
        if self.layout == "packed":
            documents = document_index(ids, s.cls, s.pad)
            return document_mask(documents), None, document_positions(ids, s.cls)
        return padding_mask(ids != s.pad), segment_ids(ids, s.sep, s.pad), None

    def _generate(self, params: Params, prepared: Batch, context, train: bool) -> Float[Array, "B M V"]:
        mask, types, positions = context
        source = "embeddings" if self.shared_embeddings else "generator_embeddings"
        embeddings = Embeddings(self.discriminator if self.shared_embeddings else self.generator)
        embedded = embeddings.apply({"params": params[source]}, prepared["masked"], types, positions)
        return Generator(self.generator).apply(
            {"params": params["generator"]},
            embedded,
            params[source]["word"],
            mask,
            prepared["slots"],
            positions,
            prepared["dropout_seed"][:, 0] if train else None,
        )

    def _corrupt(self, prepared: Batch, logits: Float[Array, "B M V"]):
        """The rows with every used slot (the kept ones too) replaced by a sample; no gradient passes."""
        o = self.objective
        original = jnp.take_along_axis(prepared["ids"], prepared["slots"], axis=1)
        draw = jax.vmap(lambda key, row, true: corruption.sample(key, row, true, o.temperature, o.disallow_correct))
        sampled = draw(prepared["sample_key"], jax.lax.stop_gradient(logits), original)
        corrupted = jax.vmap(corruption.write_at)(prepared["ids"], prepared["slots"], sampled, prepared["used"])
        return sampled, corrupted

    def _discriminate(self, params: Params, corrupted, prepared: Batch, context, train: bool) -> Float[Array, "B L"]:
        mask, types, positions = context
        embedded = Embeddings(self.discriminator).apply({"params": params["embeddings"]}, corrupted, types, positions)
        seed = prepared["dropout_seed"][:, 1] if train else None
        return Discriminator(self.discriminator).apply(
            {"params": params["discriminator"]}, embedded, mask, positions, seed
        )

    def _forward(self, params: Params, prepared: Batch, train: bool):
        """Loss (a sum over the rows), metrics, and by row what the area under the curve is made of."""
        o, used, hidden = self.objective, prepared["used"], prepared["hidden"]
        context = self._context(prepared["ids"])
        logits = self._generate(params, prepared, context, train)
        original = jnp.take_along_axis(prepared["ids"], prepared["slots"], axis=1)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, original)
        loss = o.generator_weight * jnp.sum(cross_entropy * prepared["slot_weight"])
        correct = jnp.argmax(logits, axis=-1) == original
        metrics = {
            "mlm_loss": Mean.of(cross_entropy, used),
            "mlm_accuracy": Mean.of(correct, used),
            "masked_accuracy": Mean.of(correct, hidden),
        }
        arrays = {"hidden_token": jnp.where(hidden, original, -1)}
        if not self.detects:
            return loss, metrics, arrays
        sampled, corrupted = self._corrupt(prepared, logits)
        real, replaced = prepared["ids"] != self.special.pad, corrupted != prepared["ids"]
        score = self._discriminate(params, corrupted, prepared, context, train)
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
        arrays |= {"score": score, "replaced": replaced, "real": real, "corrupted": corrupted, "ids": prepared["ids"]}
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
                f"the generator is at unigram level: it names {figures['masked_accuracy']:.1%} of the masked-out "
                f"tokens, always guessing the most frequent one {figures['unigram_accuracy']:.1%}"
            )
        if self.detects and (figures["rtd_auc"] < 0.55 or not figures["rtd_recall"] > 0):
            found.append(
                f"the discriminator stays at the majority class: AUC {figures['rtd_auc']:.3f} (chance 0.5), "
                f"it finds {figures['rtd_recall']:.1%} of the replaced tokens"
            )
        return found

    # -- data ---------------------------------------------------------------------------------------------------------

    def train_batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Token ids [B, L] of one step, or of some of its rows."""
        numbers = train_rows(step, self.batch_size, self.corpus.size("train"), self.seed)[rows]
        return {"ids": self.corpus.rows("train", numbers)}

    def eval_batches(self, rows: slice = slice(None)) -> Iterator[tuple[Batch, Int[np.ndarray, "B"]]]:
        """Held-out rows; one that only fills the last batch is all padding and so counts nothing."""
        size = min(self.eval_rows or self.corpus.size("valid"), self.corpus.size("valid"))
        for numbers in eval_batches(size, self.batch_size):
            numbers = numbers[rows]
            yield {"ids": self.corpus.rows("valid", numbers)}, numbers


def area_under_curve(score: Float[np.ndarray, "N"], positive: Bool[np.ndarray, "N"]) -> float:
    """Exact area under the ROC curve: P(score of a positive > score of a negative), ties half; NaN without both."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # mean rank of tied scores
    return float((rank[place][positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
