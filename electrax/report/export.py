"""What a person sees of an export: the files with their sizes, what goes in and comes out, and how to load it."""

import json
import pathlib

from electrax.convert.export import DESCRIPTION_FILE, ONNX_FILE, STABLEHLO_FILE, WEIGHTS_FILE, ExportConfig
from electrax.experiment.saved import export
from electrax.report.common import show_line


def export_and_report(config: ExportConfig) -> None:
    """The command `export`."""
    out = export(config)
    show_line("from", config.model)
    show_line("to", f"{out} ({config.format})")
    for path in sorted(out.iterdir()):
        show_line("file", f"{path.name}, {_size(path.stat().st_size)}")
    if config.format == "safetensors":
        _show_code("import electrax", f"model = electrax.load({str(out)!r})")
        return
    about = json.loads((out / DESCRIPTION_FILE).read_text("utf-8"))
    for kind in ("inputs", "outputs"):
        for name, array in about[kind].items():
            shape = ", ".join(map(str, array["shape"]))
            show_line(kind.removesuffix("s"), f"{name}: {array['dtype']} [{shape}]")
    show_line("length", f"at most {about['max_length']} tokens; padding is {about['special_ids']['pad']}")
    _show_code(*(_onnx_code if config.format == "onnx" else _stablehlo_code)(out, list(about["inputs"])))


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _show_code(*lines: str) -> None:
    for line in lines:
        show_line("" if line is not lines[0] else "to load it", line)


def _stablehlo_code(out: pathlib.Path, inputs: list[str]) -> tuple[str, ...]:
    program, weights = str(out / STABLEHLO_FILE), str(out / WEIGHTS_FILE)
    return (
        "import pathlib, jax.export, safetensors.numpy",
        f"program = jax.export.deserialize(bytearray(pathlib.Path({program!r}).read_bytes()))",
        f"outputs = jax.jit(program.call)(safetensors.numpy.load_file({weights!r}), {', '.join(inputs)})",
    )


def _onnx_code(out: pathlib.Path, inputs: list[str]) -> tuple[str, ...]:
    given = ", ".join(f"{name!r}: {name}" for name in inputs)
    return (
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({str(out / ONNX_FILE)!r})",
        f"outputs = session.run(None, {{{given}}})",
    )
