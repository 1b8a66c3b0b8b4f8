"""What the fine-tuning tasks share: the encoder under a head, dropout seeds, weights of rows, and their batches."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from electrax.data.encoded import RowBatches
from electrax.data.parallel import PairBatches
from electrax.models.encoder import Embeddings, Encoder, EncoderConfig
from electrax.models.flops import encoder_forward
from electrax.models.masks import padding_mask, segment_ids
from electrax.tasks.base import Batch, Params

LESS_IS_BETTER = ("loss", "mse")


@dataclasses.dataclass(frozen=True)
class FinetuneTask:
    """The pretrained encoder with a fresh head. Parameter tree: `embeddings`, `discriminator` and `head`.

    A batch has `ids` [B, L] and `weight` [B], 0 for rows that only fill it up. Losses are means over the rows (words,
    questions), or sums under `faithful`, as the reference's.
    """

    encoder: EncoderConfig
    pad_id: int
    sep_id: int
    train: RowBatches | PairBatches | None = dataclasses.field(default=None, repr=False, compare=False)
    dev: RowBatches | PairBatches | None = dataclasses.field(default=None, repr=False, compare=False)
    batch_size: int = 0
    seed: int = 0
    faithful: bool = False
    freeze_embeddings: bool = False
    freeze_layers: int = 0
    metric: str = ""  # which figure of an evaluation is the score

    def head(self) -> nn.Module:
        raise NotImplementedError

    # -- parameters ---------------------------------------------------------------------------------------------------

    def init(self, key: Key[Array, ""], batch: Batch) -> Params:
        embeddings_key, encoder_key, head_key = jax.random.split(key, 3)
        ids = jnp.asarray(batch["ids"][:1], jnp.int32).reshape(-1, batch["ids"].shape[-1])[:1]
        mask = padding_mask(ids != self.pad_id)
        embeddings = Embeddings(self.encoder).init(embeddings_key, ids)["params"]
        embedded = Embeddings(self.encoder).apply({"params": embeddings}, ids)
        encoder, variables = Encoder(self.encoder).init_with_output(encoder_key, embedded, mask)
        head = self.head().init(head_key, encoder)["params"]
        return {"embeddings": embeddings, "discriminator": {"encoder": variables["params"]}, "head": head}

    def is_frozen(self, path: tuple[str, ...]) -> bool:
        """Embeddings with their projection, and the first layers, as configured."""
        if path[0] == "embeddings" or "embeddings_project" in path:
            return self.freeze_embeddings
        layer = next((int(name.removeprefix("layer_")) for name in path if name.startswith("layer_")), None)
        return layer is not None and layer < self.freeze_layers

    first: ClassVar[int | None] = None  # tokens whose hidden states the head reads; None: all

    def hidden(
        self, params: Params, ids: Int[Array, "B L"], seed: Any = None, types: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B N D"]:
        """Last hidden states of the `first` tokens; `types` default to those of a pair. What is frozen gets no
        gradient, nor costs one."""
        frozen = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                jax.lax.stop_gradient(leaf) if self.is_frozen(tuple(str(key.key) for key in path)) else leaf
            ),
            {name: params[name] for name in ("embeddings", "discriminator")},
        )
        types = segment_ids(ids, self.sep_id, self.pad_id) if types is None else types
        embedded = Embeddings(self.encoder).apply({"params": frozen["embeddings"]}, ids, types)
        mask = padding_mask(ids != self.pad_id)
        encoder = {"params": frozen["discriminator"]["encoder"]}
        return Encoder(self.encoder).apply(encoder, embedded, mask, None, seed, first=self.first)

    def forward_flops(self) -> float:
        """Of a training row at its own length, on average."""
        return self._encoder_flops(self.encoder, self.first)

    def train_flops(self) -> float:
        """The same with the backward pass: twice the forward one, but for frozen layers, which at most pass a gradient
        on to the embeddings."""
        first = self.first if self.freeze_layers == self.encoder.layers else None
        projection = self._encoder_flops(dataclasses.replace(self.encoder, layers=0), None)
        frozen = self._encoder_flops(dataclasses.replace(self.encoder, layers=self.freeze_layers), first)
        left_out = 2 * frozen if self.freeze_embeddings else frozen - projection
        return 3 * self.forward_flops() - left_out

    def _encoder_flops(self, encoder: EncoderConfig, first: int | None) -> float:
        assert self.train is not None
        lengths, counts = np.unique(self._encoded_lengths(), return_counts=True)
        texts = zip(lengths.tolist(), counts.tolist(), strict=True)
        return sum(count * n * encoder_forward(encoder, n, first) for n, count in texts) / len(self.train.rows)

    def _encoded_lengths(self) -> Int[np.ndarray, " T"]:
        """Of each text that the encoder reads."""
        return self.train.rows.text_lengths

    # -- rows ---------------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, keys: Key[Array, "B"]) -> Batch:
        """Adds each row's dropout seeds and its share of the loss."""
        weight = batch["weight"]
        share = weight if self.faithful else weight / jnp.maximum(jnp.sum(weight), 1.0)
        seeds = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
        return batch | {"share": share, "dropout_seed": seeds}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures of an evaluation that can be the score."""
        raise NotImplementedError

    def tables(self, arrays: dict[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
        """Tables of an evaluation by their names, such as one row a class."""
        return {}

    def diagnose(self, figures: dict[str, float], arrays: dict[str, np.ndarray]) -> list[str]:
        """What did not train, in words; empty where it did."""
        return []

    def score(self, figures: dict[str, float]) -> float:
        """A figure that is not a number, as the correlation with a constant, is the worst."""
        figure = -figures[self.metric] if self.metric in LESS_IS_BETTER else figures[self.metric]
        return -math.inf if math.isnan(figure) else figure

    def train_batch(self, step: int, rows: slice = slice(None)) -> Batch:
        return self.train.train_batch(step, self.seed, rows)

    def eval_batches(self, rows: slice = slice(None)) -> Iterator[tuple[Batch, Int[np.ndarray, "B"]]]:
        return self.dev.eval_batches(rows)
