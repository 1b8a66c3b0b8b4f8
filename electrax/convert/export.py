"""Trained models as files that run without electrax: what they compute, StableHLO, and a checked way to call them."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from electrax.config import UserError
from electrax.convert.safetensors import read_safetensors, write_safetensors
from electrax.inference.classifier import Classifier
from electrax.inference.model import PretrainedModel
from electrax.inference.reader import Reader
from electrax.inference.tagger import Tagger
from electrax.inference.template import TemplateClassifier
from electrax.models.discriminator import ReplacedTokenHead
from electrax.models.encoder import Embeddings, Encoder, EncoderConfig
from electrax.models.generator import MaskedLMHead
from electrax.models.masks import padding_mask
from electrax.storage import file_sha256, new_directory, on_this_machine, write_atomically
from electrax.tasks.answer import AnswerTask
from electrax.tasks.base import Params

DESCRIPTION_FILE = "export.json"
STABLEHLO_FILE, WEIGHTS_FILE, ONNX_FILE = "model.stablehlo", "weights.safetensors", "model.onnx"
PLATFORMS = ("cpu", "cuda", "tpu")

Model = PretrainedModel | Classifier | Tagger | Reader


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """A trained model as files that other programs run. `stablehlo` keeps it for JAX on CPUs, GPUs and TPUs, `onnx` for
    ONNX Runtime and its like, `safetensors` as a small directory for electrax itself."""

    model: str = ""  # work directory of a run, or a model of another format
    out: str = ""  # a new or empty directory
    format: Literal["stablehlo", "onnx", "safetensors"] = "stablehlo"  # for JAX, ONNX Runtime, or electrax
    int8: bool = False  # onnx: products in 8 bits, weights quantised beforehand and activations in each call
    bf16: bool = False  # safetensors: weights in 16 bits, half the size

    def __post_init__(self):
        for key, only in (("int8", "onnx"), ("bf16", "safetensors")):
            if getattr(self, key) and self.format != only:
                raise UserError(f"{key} is for format {only}, not {self.format}")


class Graph(NamedTuple):
    """A model as one function `forward(params, **inputs)` of int32 arrays [B, L] to named outputs."""

    forward: Callable[..., dict[str, jax.Array]]
    params: Params  # those that `forward` needs
    inputs: tuple[str, ...]
    about: dict[str, Any]  # what the outputs mean


# -- what is computed -------------------------------------------------------------------------------------------------


def graph_of(model: Model) -> Graph:
    """The outputs of each kind of model, float32, from `ids` padded with pad_id:

    - pretrained (with the input `types`, 0 for a single text): `hidden` [B, L, D], zeros at padding, and `replaced`
      [B, L], above 0 where a token was replaced (not of Electric, where it needs the generator's part). A masked LM
      alone has `vocabulary` [B, L, V] in its place.
    - classifier: `logits` [B, C]; each choice of a question is a row of its own, with one logit. One with a template
      has `replaced` [B, L]; a class's logit is minus their mean at the tokens of its word in the template.
    - tagger: `logits` [B, L, C], which mean something at the first pieces of words.
    - reader: `start` [B, L] and `null` [B], the higher, the less there is an answer. The plain head has `end` [B, L].
      The paper's has none, as its end depends on the start, but the K best spans: `beam_start` [B, K], `beam_end`
      and `beam_score` [B, K, K] (log-probabilities). What cannot begin or end an answer has 1000 less.
    """
    match model:
        case PretrainedModel():
            return _pretrained_graph(model)
        case TemplateClassifier(task=task):
            task, about = _plain(task), {"task": "classify", "kind": "template", "labels": list(task.classes)}
            about |= {"template": model.template, "words": list(model.words)}

            def forward(params: Params, ids: jax.Array) -> dict[str, jax.Array]:
                head = {"params": params["discriminator"]["head"]}
                return {"replaced": task.head().apply(head, task.hidden(params, ids))}
        case Classifier(task=task):
            choice, scale = task.kind == "choice", {"scale": task.scale} if task.kind == "number" else {}
            task, about = _plain(task), {"task": "classify", "kind": task.kind, "labels": list(task.classes), **scale}

            def forward(params: Params, ids: jax.Array) -> dict[str, jax.Array]:
                return {"logits": task.logits(params, {"ids": ids[:, None] if choice else ids})}
        case Tagger(task=task):
            task, about = _plain(task), {"task": "tag", "labels": list(task.tags), "scheme": task.scheme}

            def forward(params: Params, ids: jax.Array) -> dict[str, jax.Array]:
                return {"logits": task.logits(params, {"ids": ids})}
        case Reader(task=task):
            task, about = _plain(task), {"task": "answer", "max_answer": task.max_answer}
            if task.no_answer:
                about["null_threshold"] = task.null_threshold

            def forward(params: Params, ids: jax.Array) -> dict[str, jax.Array]:
                return _spans(task, params, ids)

    return Graph(forward, model.params, ("ids",), about)


def _inputs(graph: Graph, max_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = jax.export.symbolic_shape("batch, length", constraints=[f"length <= {max_length}"])
    return dict.fromkeys(graph.inputs, jax.ShapeDtypeStruct(shape, jnp.int32))


def outputs_of(graph: Graph, max_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Type and shape of each output; dimensions may be symbols."""
    return jax.eval_shape(graph.forward, graph.params, **_inputs(graph, max_length))


def dimensions(spec: jax.ShapeDtypeStruct) -> list[int | str]:
    """The shape, with names for the symbols."""
    return [size if isinstance(size, int) else str(size) for size in spec.shape]


def encoder_of(model: Model) -> EncoderConfig:
    return (model.discriminator or model.generator) if isinstance(model, PretrainedModel) else model.task.encoder


def portable(encoder: EncoderConfig) -> EncoderConfig:
    """The same function in operations that every platform has, its layers one after the other."""
    return dataclasses.replace(encoder, attention="plain", scan_layers=False, remat=False)


def _plain(task):
    return dataclasses.replace(task, encoder=portable(task.encoder), train=None, dev=None)


def _pretrained_graph(model: PretrainedModel) -> Graph:
    if model.discriminator is None and model.generator_kind != "masked":
        kind = model.generator_kind
        raise UserError(f"a {kind} LM alone cannot be exported; expected a model with a discriminator, or a masked LM")
    config, pad_id, detects = portable(encoder_of(model)), model.tokenizer.pad_id, model._detects
    tower = "generator" if model.discriminator is None else "discriminator"

    def forward(params: Params, ids: jax.Array, types: jax.Array) -> dict[str, jax.Array]:
        real = ids != pad_id
        embedded = Embeddings(config).apply({"params": params["embeddings"]}, ids, types)
        hidden = Encoder(config).apply({"params": params[tower]["encoder"]}, embedded, padding_mask(real))
        outputs = {"hidden": jnp.where(real[..., None], hidden.astype(jnp.float32), 0.0)}
        if tower == "generator":
            head, word = {"params": params[tower]["head"]}, params["embeddings"]["word"]
            outputs["vocabulary"] = MaskedLMHead(config).apply(head, hidden, word)[..., : config.vocab_size]
        elif detects:
            outputs["replaced"] = ReplacedTokenHead(config).apply({"params": params[tower]["head"]}, hidden)
        return outputs

    parts = ("encoder", "head") if tower == "generator" or detects else ("encoder",)
    params = {"embeddings": model.params["embeddings"], tower: {part: model.params[tower][part] for part in parts}}
    return Graph(forward, params, ("ids", "types"), {"task": "pretrain"})


def _spans(task: AnswerTask, params: Params, ids: Int[Array, "B L"]) -> dict[str, jax.Array]:
    head, variables = task.head(), {"params": params["head"]}
    hidden, mask = task.hidden(params, ids), task._mask(ids)
    found = head.apply(variables, hidden, mask)
    if task.style == "plain":
        return found._asdict()
    # longer by the beam than the row is, so that K of any row can be chosen
    more = (0, 0), (0, task.beam)
    beams = head.apply(variables, jnp.pad(hidden, (*more, (0, 0))), jnp.pad(mask, more), task.beam, method=head.beams)
    named = {"beam_start": beams.start, "beam_end": beams.end, "beam_score": beams.score}
    return {"start": found.start, "null": found.null, **named}


# -- files ------------------------------------------------------------------------------------------------------------


def export_stablehlo(model: Model, out: str | os.PathLike) -> pathlib.Path:
    """Makes the directory `out` for JAX on a CPU, GPU or TPU, batches and lengths of any size up to max_length:

        from jax import export
        from safetensors.numpy import load_file
        program = export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
        outputs = jax.jit(program.call)(load_file("weights.safetensors"), ids)

    with int32 `ids`, and `types` after them for a pretrained model; no code of electrax is needed. Raises UserError
    where `out` is there already.
    """
    graph = graph_of(model)
    leaves, tree = jax.tree.flatten_with_path(graph.params)
    weights = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    names = list(weights)

    def run(weights: dict[str, jax.Array], *inputs: jax.Array) -> dict[str, jax.Array]:
        params = jax.tree.unflatten(tree, [weights[name] for name in names])
        return graph.forward(params, **dict(zip(graph.inputs, inputs, strict=True)))

    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    program = jax.export.export(jax.jit(run), platforms=PLATFORMS)(shapes, *_inputs(graph, model.max_length).values())
    with new_directory(on_this_machine(out)) as folder:
        (folder / STABLEHLO_FILE).write_bytes(program.serialize())
        write_safetensors(folder / WEIGHTS_FILE, {name: np.asarray(leaf) for name, leaf in weights.items()})
        write_description(folder, model, graph, "stablehlo", "int32")
    return pathlib.Path(out)


def write_description(folder: pathlib.Path, model: Model, graph: Graph, kind: str, integers: str) -> None:
    """export.json, and the tokenizer beside it. A dimension is a number or a name; `integers` is the type of ids."""
    outputs = {
        name: {"dtype": integers if spec.dtype == jnp.int32 else str(spec.dtype), "shape": dimensions(spec)}
        for name, spec in outputs_of(graph, model.max_length).items()
    }
    description = {
        "format": kind,
        "inputs": {name: {"dtype": integers, "shape": ["batch", "length"]} for name in graph.inputs},
        "outputs": outputs,
        "max_length": model.max_length,
        "vocab_size": encoder_of(model).vocab_size,
        "special_ids": model.tokenizer.special_ids,
        **graph.about,
        "tokenizer": model.tokenizer.save(folder).name,
        "sha256": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
        "electrax": importlib.metadata.version("electrax"),
        "jax": jax.__version__,
    }
    write_atomically(folder / DESCRIPTION_FILE, json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def need(extra: str, *libraries: str) -> None:
    """Raises UserError for those that are not installed, naming the extra of electrax that brings them."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise UserError(f"format {extra} needs other libraries: pip install {names}, or uv run --extra {extra} …")


# -- afterwards -------------------------------------------------------------------------------------------------------


class Exported:
    """An exported model. `about` is its export.json."""

    def __init__(self, about: dict[str, Any], run: Callable[..., dict[str, np.ndarray]]):
        self.about, self._run = about, run

    def __call__(self, ids: np.ndarray, types: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The outputs by name, from whole numbers [B, L]. `types` (default 0) are an input of pretrained models only;
        the others find them.

        Raises UserError for ids that the model cannot take.
        """
        inputs = {"ids": self._checked("ids", ids, self.about["vocab_size"])}
        if "types" in self.about["inputs"]:
            types = np.zeros_like(inputs["ids"]) if types is None else types
            inputs["types"] = self._checked("types", types, 2)
            if inputs["types"].shape != inputs["ids"].shape:
                raise UserError(f"types: expected the shape of ids, {inputs['ids'].shape}, not {inputs['types'].shape}")
        elif types is not None:
            raise UserError("types: this model finds them from the separators in ids; leave them out")
        return self._run(**inputs)

    def _checked(self, name: str, values: np.ndarray, size: int) -> np.ndarray:
        values, longest = np.asarray(values), self.about["max_length"]
        if values.dtype.kind not in "iu":
            raise UserError(f"{name}: expected whole numbers, not {values.dtype}")
        if values.ndim != 2 or not values.size:
            raise UserError(f"{name}: expected at least one row, as an array [batch, length], not {values.shape}")
        if values.shape[1] > longest:
            raise UserError(f"{name}: rows of {values.shape[1]} tokens, but the model takes at most {longest}")
        if values.min() < 0 or values.max() >= size:
            wrong = values[(values < 0) | (values >= size)][0]
            raise UserError(f"{name}: expected numbers from 0 to {size - 1}, found {wrong}")
        return values.astype(self.about["inputs"][name]["dtype"])


def load_exported(directory: str | os.PathLike) -> Exported:
    """A model that `electrax export` wrote as stablehlo or onnx, ready to be called (onnx needs onnxruntime).

    Raises UserError where a file is missing or is not what it should be.
    """
    folder = pathlib.Path(directory)
    described = folder / DESCRIPTION_FILE
    runs = {"stablehlo": (_stablehlo, STABLEHLO_FILE, WEIGHTS_FILE), "onnx": (_onnx, ONNX_FILE)}
    try:
        about = json.loads(described.read_text("utf-8"))
        run, *files = runs[about["format"]]
        checksums = {name: about["sha256"][name] for name in (*files, about["tokenizer"])}
        missing = {"inputs", "max_length", "vocab_size"} - set(about)
    except OSError as error:
        raise UserError(f"{described}: cannot be read ({error.strerror}); expected an exported model") from None
    except (ValueError, KeyError, TypeError):
        missing = {"format", "sha256"}
    if missing:
        raise UserError(f"{described}: not the description of an exported model, with {', '.join(sorted(missing))}")
    for name, checksum in checksums.items():
        # a program with a flipped bit may well run and be wrong
        if not (folder / name).is_file() or file_sha256(folder / name) != checksum:
            raise UserError(f"{folder / name}: missing, or not as it was written; copy it again")
    return Exported(about, run(folder, list(about["inputs"])))


def _stablehlo(folder: pathlib.Path, inputs: list[str]) -> Callable[..., dict[str, np.ndarray]]:
    program = jax.jit(jax.export.deserialize(bytearray((folder / STABLEHLO_FILE).read_bytes())).call)
    weights = jax.device_put(read_safetensors(folder / WEIGHTS_FILE))
    return lambda **given: jax.device_get(program(weights, *[given[name] for name in inputs]))


def _onnx(folder: pathlib.Path, inputs: list[str]) -> Callable[..., dict[str, np.ndarray]]:
    need("onnx", "onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda **given: dict(zip(names, session.run(names, given), strict=True))
