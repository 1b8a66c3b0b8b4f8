"""The models written as ONNX, node by node.

A converter of JAX programs would have to follow every change of JAX and pins other versions of its libraries. The
graph of an encoder is small, and written by hand it has the operations and patterns that runtimes optimise and
quantise: one product with constant weights for each layer, LayerNormalization, Softmax. Only `onnx` is needed.
"""

import logging
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from electrax.config import UserError
from electrax.convert.export import (
    ONNX_FILE,
    Graph,
    Model,
    dimensions,
    encoder_of,
    graph_of,
    need,
    outputs_of,
    write_description,
)
from electrax.inference.classifier import Classifier
from electrax.inference.model import PretrainedModel
from electrax.inference.reader import Reader
from electrax.inference.tagger import Tagger
from electrax.inference.template import TemplateClassifier
from electrax.models.attention import rotate
from electrax.models.encoder import EncoderConfig
from electrax.models.spans import WITHHELD
from electrax.storage import new_directory, on_this_machine
from electrax.tasks.answer import AnswerTask
from electrax.tasks.base import Params

OPSET, IR_VERSION = 17, 8  # the first with LayerNormalization, and the format's version of that time
INT64 = 7  # onnx.TensorProto.INT64
LOWEST = np.finfo(np.float32).min


class Nodes:
    """A graph that grows: a call adds a node and returns the name of its output. Arrays become constants."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __call__(self, operation: str, *inputs: str | np.ndarray | np.generic, outputs: int = 1, **attributes: Any):
        from onnx import helper

        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        made = [f"{operation}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operation, names, made, **attributes))
        return made[0] if outputs == 1 else made

    def constant(self, value: np.ndarray | np.generic) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def name(self, x: str, name: str) -> None:
        """Make it an output of the graph."""
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [x], [name]))

    # -- shapes -------------------------------------------------------------------------------------------------------

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps a dimension, -1 is what remains."""
        return self("Reshape", x, np.array(shape, np.int64))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self("Unsqueeze", x, np.array(axes, np.int64))

    def squeeze(self, x: str, *axes: int) -> str:
        return self("Squeeze", x, np.array(axes, np.int64))

    def halves(self, x: str) -> tuple[str, str]:
        """Of the last axis."""
        return tuple(self("Split", x, outputs=2, axis=-1))

    def best(self, x: str, count: int) -> tuple[str, str]:
        """The largest of the last axis, and their places."""
        return tuple(self("TopK", x, np.array([count], np.int64), outputs=2, axis=-1))

    def first(self, x: str) -> str:
        """[B, L, …] -> [B, …] of the first token."""
        return self("Gather", x, np.array(0, np.int64), axis=1)

    # -- layers -------------------------------------------------------------------------------------------------------

    def linear(self, x: str, kernel: np.ndarray, bias: np.ndarray | None = None) -> str:
        y = self("MatMul", x, np.float32(kernel))
        return y if bias is None else self("Add", y, np.float32(bias))

    def dense(self, x: str, params: Params) -> str:
        return self.linear(x, *_arrays(params, "kernel", "bias"))

    def gelu(self, x: str) -> str:
        cdf = self(
            "Mul", self("Add", self("Erf", self("Mul", x, np.float32(0.5**0.5))), np.float32(1)), np.float32(0.5)
        )
        return self("Mul", x, cdf)

    def norm(self, x: str, params: Params, config: EncoderConfig) -> str:
        scale, bias = _arrays(params, "scale", "bias")
        epsilon = config.norm().epsilon
        return self("LayerNormalization", x, scale, *([] if bias is None else [bias]), axis=-1, epsilon=epsilon)

    def rms_norm(self, x: str, params: Params) -> str:
        mean = self("ReduceMean", self("Mul", x, x), axes=[-1], keepdims=1)
        size = self("Sqrt", self("Add", mean, np.float32(1e-6)))
        return self("Mul", self("Div", x, size), *_arrays(params, "scale"))


def _arrays(params: Params, *names: str) -> list[np.ndarray | None]:
    return [np.asarray(params[name], np.float32) if name in params else None for name in names]


# -- encoder ----------------------------------------------------------------------------------------------------------


class Rows:
    """What the ids [B, L] say: `real` tokens, and the `types` of pairs as in `electrax.models.masks`."""

    def __init__(self, add: Nodes, ids: str, special_ids: dict[str, int], max_length: int):
        self.ids, self._add, self._sep, self._longest = ids, add, np.int64(special_ids["sep"]), max_length
        self.real = add("Not", add("Equal", ids, np.int64(special_ids["pad"])))
        self.length = add("Slice", add("Shape", ids), np.array([1], np.int64), np.array([2], np.int64))

    def pair_types(self) -> str:
        add = self._add
        separators = add("Cast", add("Equal", self.ids, self._sep), to=INT64)
        before = add("Sub", add("CumSum", separators, np.int64(1)), separators)
        return add("Where", self.real, add("Min", before, np.int64(1)), np.int64(0))

    def head_of(self, table: np.ndarray) -> str:
        """As many of its rows as there are tokens; a longer text than the model takes finds too few and fails."""
        return self._add("Slice", table[: self._longest], np.array([0], np.int64), self.length)


def _embeddings(add: Nodes, config: EncoderConfig, params: Params, rows: Rows, types: str | int) -> str:
    x = add("Gather", np.float32(params["word"])[: config.vocab_size], rows.ids)
    if not config.traits.rotary:
        x = add("Add", x, rows.head_of(np.float32(params["position"])))
    table = np.float32(params["type"])
    x = add("Add", x, add("Gather", table, types) if isinstance(types, str) else table[types])
    return add.norm(x, params["norm"], config)


def _encoder(add: Nodes, config: EncoderConfig, params: Params, x: str, rows: Rows) -> str:
    if config.embedding_width != config.width:
        x = add.dense(x, params["embeddings_project"])
    mask, turns = add.unsqueeze(rows.real, 1, 2), _turns(config, rows) if config.traits.rotary else None
    for i in range(config.layers):
        layer = params[f"layer_{i}"]
        attention_norm, output_norm = layer["attention_norm"], layer["output_norm"]
        if config.traits.pre_norm:
            h = add.norm(x, attention_norm, config)
            x = add("Add", x, _attention(add, config, layer["attention"], h, mask, turns))
            h = add.norm(x, output_norm, config)
            x = add("Add", x, _feed_forward(add, layer, h))
        else:
            x = add("Add", x, _attention(add, config, layer["attention"], x, mask, None))
            x = add.norm(x, attention_norm, config)
            x = add.norm(add("Add", x, _feed_forward(add, layer, x)), output_norm, config)
    return add.norm(x, params["final_norm"], config) if config.traits.pre_norm else x


def _feed_forward(add: Nodes, layer: Params, x: str) -> str:
    if "gate" not in layer:
        return add.dense(add.gelu(add.dense(x, layer["up"])), layer["down"])
    return add.dense(add("Mul", add.gelu(add.dense(x, layer["gate"])), add.dense(x, layer["up"])), layer["down"])


def _attention(
    add: Nodes, config: EncoderConfig, params: Params, x: str, mask: str, turns: tuple[str, str] | None
) -> str:
    width, heads = config.width, config.heads
    kernel, bias = _arrays(params["qkv"], "kernel", "bias")  # [D, H, 3, K], [H, 3, K]
    parts = []
    for i, name in enumerate(("query", "key", "value")):
        part = add.linear(x, kernel[:, :, i].reshape(width, width), None if bias is None else bias[:, i].reshape(width))
        part = add.reshape(part, 0, 0, heads, width // heads)
        if f"{name}_norm" in params:
            part = add.rms_norm(part, params[f"{name}_norm"])
        if turns and name != "value":
            part = _rotate(add, part, *turns)
        parts.append(add("Transpose", part, perm=[0, 2, 3, 1] if name == "key" else [0, 2, 1, 3]))
    query, key, value = parts
    scores = add("Mul", add("MatMul", query, key), np.float32((width // heads) ** -0.5))
    weights = add("Softmax", add("Where", mask, scores, LOWEST), axis=-1)
    mixed = add.reshape(add("Transpose", add("MatMul", weights, value), perm=[0, 2, 1, 3]), 0, 0, width)
    kernel, bias = _arrays(params["output"], "kernel", "bias")  # [H, K, D], [D]
    return add.linear(mixed, kernel.reshape(width, width), bias)


def _turns(config: EncoderConfig, rows: Rows) -> tuple[str, str]:
    """Cosine and sine [L, 1, K/2] of each position: where `rotate` moves the vector (1, 0)."""
    half = config.width // config.heads // 2
    unit = jnp.concatenate([jnp.ones((1, config.max_length, 1, half)), jnp.zeros((1, config.max_length, 1, half))], -1)
    turned = np.asarray(rotate(unit, jnp.arange(config.max_length)[None]))[0]
    return rows.head_of(turned[..., :half]), rows.head_of(turned[..., half:])


def _rotate(add: Nodes, x: str, cos: str, sin: str) -> str:
    a, b = add.halves(x)
    first = add("Sub", add("Mul", a, cos), add("Mul", b, sin))
    return add("Concat", first, add("Add", add("Mul", a, sin), add("Mul", b, cos)), axis=-1)


# -- heads ------------------------------------------------------------------------------------------------------------


def _outputs(add: Nodes, model: Model, params: Params) -> dict[str, str]:
    """The nodes of what `graph_of` names."""
    config, rows = encoder_of(model), Rows(add, "ids", model.tokenizer.special_ids, model.max_length)
    match model:
        case PretrainedModel():
            types = "types"
        case Tagger(task=task):
            types = int(task.faithful)
        case _:
            types = rows.pair_types()
    tower = params["discriminator"] if "discriminator" in params else params["generator"]
    embedded = _embeddings(add, config, params["embeddings"], rows, types)
    hidden = _encoder(add, config, tower["encoder"], embedded, rows)
    match model:
        case PretrainedModel():
            shown = {"hidden": add("Where", add.unsqueeze(rows.real, 2), hidden, np.float32(0))}
            if "head" not in tower:
                return shown
            if "generator" not in params:
                return shown | {"replaced": _replaced(add, hidden, tower["head"])}
            head, x = tower["head"], add.gelu(add.dense(hidden, tower["head"]["dense"]))
            word = np.float32(params["embeddings"]["word"])[: config.vocab_size]
            bias = np.float32(head["output_bias"])[: config.vocab_size]
            return shown | {"vocabulary": add.linear(add.norm(x, head["norm"], config), word.T, bias)}
        case TemplateClassifier():
            return {"replaced": _replaced(add, hidden, tower["head"])}
        case Classifier(task=task):
            return {"logits": _output_head(add, add.first(hidden), params["head"], task.style)}
        case Tagger():
            return {"logits": _output_head(add, hidden, params["head"], "linear")}
        case Reader(task=task):
            return _spans(add, task, params["head"], hidden, rows, types)


def _replaced(add: Nodes, hidden: str, params: Params) -> str:
    return add.squeeze(add.dense(add.gelu(add.dense(hidden, params["dense"])), params["output"]), 2)


def _output_head(add: Nodes, x: str, params: Params, style: str) -> str:
    if style != "linear":
        x = add.dense(x, params["dense"])
        x = add("Tanh", x) if style == "pooled" else add.gelu(x)
    return add.dense(x, params["output"])


def _spans(add: Nodes, task: AnswerTask, params: Params, hidden: str, rows: Rows, types: str) -> dict[str, str]:
    place = add("Range", np.int64(0), add.squeeze(rows.length, 0), np.int64(1))
    allowed = add("Or", add("Equal", types, np.int64(1)), add("Equal", place, np.int64(0)))
    withheld = add("Where", allowed, np.float32(0), np.float32(WITHHELD))
    if task.style == "plain":
        start, end = (add("Add", add.squeeze(x, 2), withheld) for x in add.halves(add.dense(hidden, params["output"])))
        return {"start": start, "end": end, "null": add("Add", add.first(start), add.first(end))}

    def starts(hidden: str, withheld: str) -> str:
        return add("Add", add.squeeze(add.dense(hidden, params["start"]), 2), withheld)

    start = starts(hidden, withheld)
    likely = add("MatMul", add.unsqueeze(add("Softmax", start, axis=-1), 1), hidden)
    cls = add.unsqueeze(add.first(hidden), 1)
    null = add.squeeze(_pair_score(add, params["answerable"], cls, likely), 1, 2)
    # longer by the beam than the row is, so that K of any row can be chosen
    hidden = add("Pad", hidden, np.array([0, 0, 0, 0, task.beam, 0], np.int64))
    withheld = add("Pad", withheld, np.array([0, 0, 0, task.beam], np.int64), np.float32(WITHHELD))
    score, first = add.best(add("LogSoftmax", starts(hidden, withheld), axis=-1), task.beam)
    states = add("GatherND", hidden, add.unsqueeze(first, 2), batch_dims=1)
    ends = add("Add", _pair_score(add, params["end"], states, hidden), add.unsqueeze(withheld, 1))
    end_score, last = add.best(add("LogSoftmax", ends, axis=-1), task.beam)
    score = add("Add", add.unsqueeze(score, 2), end_score)
    return {"start": start, "null": null, "beam_start": first, "beam_end": last, "beam_score": score}


def _pair_score(add: Nodes, params: Params, a: str, b: str) -> str:
    """[B, K, D] and [B, L, D] -> [B, K, L]."""
    one, two = add.unsqueeze(add.dense(a, params["first"]), 2), add.unsqueeze(add.dense(b, params["second"]), 1)
    return add.squeeze(add.dense(add.gelu(add("Add", one, two)), params["output"]), 3)


# -- files ------------------------------------------------------------------------------------------------------------


def export_onnx(model: Model, out: str | os.PathLike, int8: bool = False) -> pathlib.Path:
    """Makes the directory `out` with model.onnx, float32 whatever the model computes in, for batches and lengths of any
    size up to max_length. Inputs and outputs are those of `graph_of`, whole numbers as int64; ids beyond the vocabulary
    are an error when it runs.

    `int8` quantises the products' weights beforehand and lets the runtime quantise activations in each call. Raises
    UserError where `out` is there already.
    """
    need("onnx", "onnx", *(["onnxruntime"] if int8 else []))
    import onnx

    if encoder_of(model).traits.bare:
        raise UserError(f'the body "{encoder_of(model).body}" is not exported as ONNX; expected the format stablehlo')
    graph = graph_of(model)
    proto = _model_proto(model, graph)
    onnx.checker.check_model(proto, full_check=True)
    with new_directory(on_this_machine(out)) as folder:
        if int8:
            _quantize(proto, folder / ONNX_FILE)
        else:
            onnx.save(proto, folder / ONNX_FILE)
        write_description(folder, model, graph, "onnx", "int64")
    return pathlib.Path(out)


def _quantize(proto: Any, path: pathlib.Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it advises to infer shapes first, which products do not need
    try:
        # the range of 7 bits is as exact, and safe on processors whose sums of 8-bit products saturate
        quantize_dynamic(proto, path, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, reduce_range=True)
    finally:
        logging.disable(logging.NOTSET)


def _model_proto(model: Model, graph: Graph) -> Any:
    from onnx import TensorProto, helper

    kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT64}
    add = Nodes()
    for name, node in _outputs(add, model, graph.params).items():
        add.name(node, name)
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in graph.inputs]
    outputs = [
        helper.make_tensor_value_info(name, kinds[str(spec.dtype)], dimensions(spec))
        for name, spec in outputs_of(graph, model.max_length).items()
    ]
    body = helper.make_graph(add.nodes, "electrax", inputs, outputs, add.constants)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(body, opset_imports=[opset], ir_version=IR_VERSION, producer_name="electrax")
