"""Every parameter of a model by its name in electrax and by its names in Transformers' ELECTRA and BERT.

One table serves both directions. A Linear of torch has its kernel as [out, in] and a bias [out]; here kernels are
[in, out], those of queries, keys and values [D, H, 3, K], of the attention's output [H, K, D]. The word table is padded
here to a multiple of 128 rows, with zeros.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from electrax.config import UserError
from electrax.models.encoder import EncoderConfig
from electrax.tasks.base import Params

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Entry:
    """A parameter: `path` here, `names` there (three where one is a fused product), the `axes` of each of those by
    their key in config.json, and how the arrays become one another (what is never written has no `split`)."""

    path: str
    names: tuple[str, ...]
    axes: tuple[str | int, ...]
    join: Callable[[Arrays], np.ndarray]
    split: Callable[[np.ndarray], Arrays] | None = None


def plain(path: str, name: str, *axes: str | int) -> Entry:
    return Entry(path, (name,), axes, lambda theirs: theirs[0], lambda ours: [ours])


def dense(path: str, name: str, into: str | int, out_of: str | int) -> list[Entry]:
    kernel = Entry(f"{path}/kernel", (f"{name}.weight",), (out_of, into), lambda t: t[0].T, lambda o: [o.T])
    return [kernel, plain(f"{path}/bias", f"{name}.bias", out_of)]


def norm(path: str, name: str, width: str) -> list[Entry]:
    return [plain(f"{path}/scale", f"{name}.weight", width), plain(f"{path}/bias", f"{name}.bias", width)]


def by_vocabulary(path: str, name: str, encoder: EncoderConfig, *axes: str) -> Entry:
    """Padded rows are zeros here and do not exist there."""
    missing, size = encoder.padded_vocab_size - encoder.vocab_size, encoder.vocab_size

    def join(theirs: Arrays) -> np.ndarray:
        return np.pad(theirs[0], [(0, missing)] + [(0, 0)] * (theirs[0].ndim - 1))

    return Entry(path, (name,), ("vocab_size", *axes), join, lambda ours: [ours[:size]])


def embeddings(path: str, prefix: str, encoder: EncoderConfig, width: str) -> list[Entry]:
    name = f"{prefix}embeddings"
    return [
        by_vocabulary(f"{path}/word", f"{name}.word_embeddings.weight", encoder, width),
        plain(f"{path}/position", f"{name}.position_embeddings.weight", "max_position_embeddings", width),
        plain(f"{path}/type", f"{name}.token_type_embeddings.weight", "type_vocab_size", width),
        *norm(f"{path}/norm", f"{name}.LayerNorm", width),
    ]


def encoder(path: str, prefix: str, config: EncoderConfig) -> Iterator[Entry]:
    """The projection of the embeddings and the layers."""
    if config.embedding_width != config.width:
        yield from dense(f"{path}/embeddings_project", f"{prefix}embeddings_project", "embedding_size", "hidden_size")
    heads, width = config.heads, config.width
    for i in range(config.layers):
        ours, theirs = f"{path}/layer_{i}", f"{prefix}encoder.layer.{i}"
        yield from _queries_keys_values(f"{ours}/attention/qkv", f"{theirs}.attention.self", heads, width)
        yield Entry(
            f"{ours}/attention/output/kernel",
            (f"{theirs}.attention.output.dense.weight",),
            ("hidden_size", "hidden_size"),
            lambda t: t[0].T.reshape(heads, width // heads, width),
            lambda o: [o.reshape(width, width).T],
        )
        yield plain(f"{ours}/attention/output/bias", f"{theirs}.attention.output.dense.bias", "hidden_size")
        yield from norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm", "hidden_size")
        yield from dense(f"{ours}/up", f"{theirs}.intermediate.dense", "hidden_size", "intermediate_size")
        yield from dense(f"{ours}/down", f"{theirs}.output.dense", "intermediate_size", "hidden_size")
        yield from norm(f"{ours}/output_norm", f"{theirs}.output.LayerNorm", "hidden_size")


def _queries_keys_values(path: str, name: str, heads: int, width: int) -> Iterator[Entry]:
    each = width // heads

    def join_kernels(theirs: Arrays) -> np.ndarray:
        return np.stack([t.T.reshape(width, heads, each) for t in theirs], axis=2)

    def split_kernel(ours: np.ndarray) -> Arrays:
        return [ours[:, :, i].reshape(width, width).T for i in range(3)]

    parts = [f"{name}.{part}" for part in ("query", "key", "value")]
    weights, biases = (tuple(f"{part}.{kind}" for part in parts) for kind in ("weight", "bias"))
    yield Entry(f"{path}/kernel", weights, ("hidden_size", "hidden_size"), join_kernels, split_kernel)
    yield Entry(
        f"{path}/bias",
        biases,
        ("hidden_size",),
        lambda theirs: np.stack([t.reshape(heads, each) for t in theirs], axis=1),
        lambda ours: [ours[:, i].reshape(width) for i in range(3)],
    )


def masked_lm_head(path: str, family: str, config: EncoderConfig, width: str) -> list[Entry]:
    """`width` is the key of the embeddings' width. The output layer's kernel is the word table."""
    if family == "electra":
        transform, layer_norm, bias = (
            "generator_predictions.dense",
            "generator_predictions.LayerNorm",
            "generator_lm_head.bias",
        )
    else:
        head = "cls.predictions"
        transform, layer_norm, bias = f"{head}.transform.dense", f"{head}.transform.LayerNorm", f"{head}.bias"
    return [
        *dense(f"{path}/dense", transform, "hidden_size", width),
        *norm(f"{path}/norm", layer_norm, width),
        by_vocabulary(f"{path}/output_bias", bias, config),
    ]


def replaced_token_head(path: str) -> list[Entry]:
    return [
        *dense(f"{path}/dense", "discriminator_predictions.dense", "hidden_size", "hidden_size"),
        *dense(f"{path}/output", "discriminator_predictions.dense_prediction", "hidden_size", 1),
    ]


def task_head(architecture: str, outputs: int) -> list[Entry]:
    """What stands on the encoder in a fine-tuned model."""
    match architecture:
        case "ElectraForSequenceClassification":
            dense_name, output_name = "classifier.dense", "classifier.out_proj"
        case "ElectraForMultipleChoice":
            dense_name, output_name = "sequence_summary.summary", "classifier"
        case "BertForSequenceClassification" | "BertForMultipleChoice":
            dense_name, output_name = "bert.pooler.dense", "classifier"
        case "ElectraForTokenClassification" | "BertForTokenClassification":
            dense_name, output_name = "", "classifier"
        case "ElectraForQuestionAnswering" | "BertForQuestionAnswering":
            dense_name, output_name = "", "qa_outputs"
        case _:
            raise ValueError(architecture)
    first = dense("head/dense", dense_name, "hidden_size", "hidden_size") if dense_name else []
    return [*first, *dense("head/output", output_name, "hidden_size", outputs)]


def to_params(entries: list[Entry], theirs: dict[str, np.ndarray], sizes: Mapping[str, int], source: str) -> Params:
    """The tree of all entries, whose tensors leave `theirs`: with a copy of each, memory would be needed twice. Raises
    UserError naming the tensor that is missing, or the key of config.json that its shape contradicts."""
    tree: Params = {}
    for entry in entries:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in entry.axes)
        found = [_checked(theirs, name, shape, entry, source) for name in entry.names]
        *parents, leaf = entry.path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = np.ascontiguousarray(entry.join(found), dtype=np.float32)
    return tree


def _checked(theirs: dict[str, np.ndarray], name: str, shape: tuple[int, ...], entry: Entry, source: str) -> np.ndarray:
    if name not in theirs:
        raise UserError(f"{source}: the tensor {name} is missing")
    array = theirs.pop(name)
    if array.shape != shape:
        keys = " and ".join(
            f"{axis} {size}" if isinstance(axis, str) else f"{size} outputs"
            for axis, size, there in zip(entry.axes, shape, (*array.shape, *shape), strict=False)
            if array.ndim != len(shape) or size != there
        )
        raise UserError(f"{source}: {name} has the shape {list(array.shape)}, which does not fit its config's {keys}")
    return array


def from_params(entries: list[Entry], params: Params) -> dict[str, np.ndarray]:
    """Arrays by Transformers' names; contiguous, float32."""
    theirs: dict[str, np.ndarray] = {}
    for entry in entries:
        leaf = params
        for key in entry.path.split("/"):
            leaf = leaf[key]
        for name, array in zip(entry.names, entry.split(np.asarray(leaf, np.float32)), strict=True):
            theirs[name] = np.ascontiguousarray(array)
    return theirs
