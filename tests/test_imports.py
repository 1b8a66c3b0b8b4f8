"""Imports go one way, downwards, and the heavy libraries come in late and in one place each."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "electrax"

# The first prefix that fits decides; `__init__` may hand on any public name.
LEVELS = (
    ("electrax.cli", 5),
    ("electrax.report", 5),
    ("electrax.__main__", 5),
    ("electrax.experiment", 4),
    ("electrax.inference", 3),
    ("electrax.convert", 3),
    ("electrax.training.loop", 3),
    ("electrax.training", 1),
    ("electrax.tasks.base", 1),
    ("electrax.tasks.metrics", 1),
    ("electrax.tasks.tags", 1),
    ("electrax.tasks.answers", 1),
    ("electrax.tasks", 2),
    ("electrax.models", 0),
    ("electrax.data", 0),
    ("electrax.config", 0),
    ("electrax.storage", 0),
    ("electrax.xla_flags", 0),
    ("electrax", 6),
)
ONLY_IN = {
    "orbax": ("electrax.training.checkpoint",),
    "tensorflow_datasets": ("electrax.data",),
    "tokenizers": ("electrax.data",),
    "sentencepiece": ("electrax.data",),
    "rich": ("electrax.report", "electrax.training.tracking"),
    "tyro": ("electrax.cli",),
    "tensorboardX": ("electrax.training.tracking",),
    "pyarrow": ("electrax.data",),
    "onnx": ("electrax.convert",),
    "apache_beam": ("electrax.data.beam",),
    "onnxruntime": ("electrax.convert",),
    "etils": ("electrax.storage",),
    "fsspec": ("electrax.storage",),
}
LAZY = (
    "apache_beam",
    "tensorflow_datasets",
    "tokenizers",
    "sentencepiece",
    "pyarrow",
    "onnx",
    "onnxruntime",
    "fsspec",
    "gcsfs",
)


def modules():
    """(name, syntax tree) of every module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree, package="electrax"):
    """(line, dotted name) of each import; `from a import b` is a.b where that is a module, else a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
                is_module = node.module.split(".")[0] == package and (
                    inner.is_dir() or inner.with_suffix(".py").exists()
                )
                yield node, f"{node.module}.{alias.name}" if is_module else node.module


def within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def level(name):
    return next(number for prefix, number in LEVELS if within(name, prefix))


def test_the_walk_finds_the_modules_and_their_imports():
    found = {name: {imported for _, imported in imports(tree)} for name, tree in modules()}
    assert "electrax.training.loop" in found["electrax.experiment.run"]
    assert "electrax.data.prepare" in found["electrax.report.pretrain"]  # from electrax.data import prepare
    assert "orbax.checkpoint" in found["electrax.training.checkpoint"]


def test_no_module_imports_one_of_a_higher_level():
    upward = [
        f"{name}:{node.lineno} imports {imported}"
        for name, tree in modules()
        for node, imported in imports(tree)
        if within(imported, "electrax") and level(imported) > level(name)
    ]
    assert upward == []


def test_nothing_reads_the_wall_clock_which_may_jump():
    read = [
        f"{name}:{node.lineno}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns", "datetime.now")
    ]
    assert read == []


def test_the_loop_knows_no_objective():
    trees = dict(modules())
    tasks = {name for _, name in imports(trees["electrax.training.loop"]) if within(name, "electrax.tasks")}
    assert tasks == {"electrax.tasks.base"}


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_own_place_only(library):
    users = {name for name, tree in modules() for _, imported in imports(tree) if within(imported, library)}
    assert users, f"nothing imports {library}"
    assert [name for name in users if not any(within(name, place) for place in ONLY_IN[library])] == []


@pytest.mark.parametrize("library", LAZY)
def test_a_heavy_library_is_imported_inside_functions_only(library):
    at_top = [
        f"{name}:{node.lineno}"
        for name, tree in modules()
        for statement in tree.body
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        for node, imported in imports(ast.Module([statement], []))
        if within(imported, library)
    ]
    assert at_top == []


def loaded_by(statement):
    code = f"{statement}; import sys; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_loads_neither_jax_nor_a_data_library():
    loaded = loaded_by("import electrax")
    assert "electrax" in loaded
    assert not loaded & {"jax", "flax", "optax", "orbax", "numpy", "rich", "tyro", "tensorboardX", *LAZY}


def test_importing_the_experiment_loads_nothing_that_only_the_command_line_needs():
    loaded = loaded_by("import electrax.experiment.saved")
    assert "jax" in loaded
    assert not loaded & {"tyro", "tensorboardX", *LAZY}  # rich comes with flax
