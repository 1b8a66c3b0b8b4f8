"""Few-shot classification: which of several words in a template looks original to the pretrained discriminator."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from electrax.models.discriminator import ReplacedTokenHead
from electrax.tasks.base import Batch, Params
from electrax.tasks.classify import ClassifyTask


@dataclasses.dataclass(frozen=True)
class TemplateTask(ClassifyTask):
    """Xia et al., 2022, "Prompting ELECTRA": no new parameters, the head is the discriminator's own.

    Rows have ids and `spans` [B, n, L], the text in the template with the word of each class, `spans` 1 at the word's
    tokens and 0 elsewhere, and `label` int32. Parameter tree: `embeddings` and the whole `discriminator`.
    """

    first = None

    def head(self) -> ReplacedTokenHead:
        return ReplacedTokenHead(self.encoder)

    def init(self, key: Key[Array, ""], batch: Batch) -> Params:
        params = super().init(key, batch)
        head = params.pop("head")
        return {**params, "discriminator": {**params["discriminator"], "head": head}}

    def logits(self, params: Params, prepared: Batch, train: bool = False) -> Float[Array, "B n"]:
        """How original each word looks: minus the mean logit of its tokens, as the reference has it."""
        ids, spans = prepared["ids"].astype(jnp.int32), prepared["spans"].astype(jnp.float32)
        seed = jnp.repeat(prepared["dropout_seed"][:, 0], ids.shape[1]) if train else None
        hidden = self.hidden(params, ids.reshape(-1, ids.shape[-1]), seed)
        replaced = self.head().apply({"params": params["discriminator"]["head"]}, hidden).reshape(ids.shape)
        return -jnp.sum(replaced * spans, axis=-1) / jnp.maximum(jnp.sum(spans, axis=-1), 1.0)

    def _losses(self, logits: Float[Array, "B n"], prepared: Batch) -> Float[Array, " B"]:
        """Binary cross entropy, averaged over the words: that of the right class is original, the others replaced."""
        original = jax.nn.one_hot(prepared["label"], logits.shape[1])
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, original), axis=-1)
