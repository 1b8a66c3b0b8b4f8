"""Checkpoints: saved in the background by orbax, each with a checksum manifest, verified before they are read."""

import dataclasses
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as managers

from electrax.config import AnyPath, UserError
from electrax.data.outside import is_file_name, read_object
from electrax.storage import absolute, file_sha256, files_below, make_folder, write_atomically
from electrax.tasks.base import Params
from electrax.training.processes import agreed, is_first, together
from electrax.training.sharding import params_sharding
from electrax.training.state import TrainState

log = logging.getLogger("electrax")
MANIFEST = "checksums.json"
# Orbax cuts what several devices hold into a slice for each to write, which compiles a program a slice. Below this
# number of bytes one device writes it all.
_SLICE = 1 << 20
_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE))
)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps; the last step is always saved
    keep: int = 2  # latest ones; the best evaluated one stays beside them

    def __post_init__(self):
        if self.keep < 1:
            raise UserError(f"checkpoint.keep must be at least 1, not {self.keep}")


class Checkpoints:
    """The checkpoints of one run directory.

    A checkpoint counts once its manifest is there: a kill at any moment leaves either a whole verified checkpoint or
    one that `restore` skips. Damaged ones are renamed, never deleted. Each keeps the hash of the run's `tokenizer`.
    """

    def __init__(self, directory: AnyPath, keep: int, tokenizer: str = ""):
        self.directory = absolute(directory)
        make_folder(self.directory)
        self._keep, self._tokenizer = keep, tokenizer
        self._sealing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._manager: ocp.CheckpointManager | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            best = managers.BestN(get_metric_fn=_score, n=1)
            policy = managers.AnyPreservationPolicy([managers.LatestN(self._keep), best])
            # `policy` alone decides what is kept, but without `best_fn` orbax would not write the scores down
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=_score, cleanup_tmp_directories=True
            )
            writer = ocp.PyTreeCheckpointHandler(type_handler_registry=_HANDLERS)
            handlers = dict.fromkeys(("params", "optimizer"), writer)
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        return self._manager

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete, in order."""
        names = (path.parent.name for path in self.directory.glob(f"*/{MANIFEST}"))
        return agreed(lambda: sorted(int(name) for name in names if name.isdecimal()))

    def best(self) -> tuple[int, float] | None:
        """(step, score) of the best evaluated checkpoint, the first of equals; None where there is none."""
        scores = {step: score for step in self.steps() if (score := self.score(step)) is not None}
        return max(scores.items(), key=lambda scored: scored[1], default=None)

    def score(self, step: int) -> float | None:
        """What the checkpoint of a step scored; None where it was not evaluated."""
        manager = self._open()
        return agreed(lambda: (manager.metrics(step) or {}).get("score"))

    def save(self, step: int, state: TrainState, score: float | None = None) -> None:
        """Returns once the state is copied; writing and sealing go on in the background. `score`: higher is better."""
        self.wait()
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _items(state).items()}
        if not self._open().save(
            step, args=ocp.args.Composite(**items), metrics={"score": score, "step": step}, force=True
        ):
            raise RuntimeError(f"orbax did not save step {step} in {self.directory}")
        self._sealing = threading.Thread(target=self._seal, args=(step,), name="electrax-checkpoint")
        self._sealing.start()

    def _seal(self, step: int) -> None:
        try:
            self._open().wait_until_finished()
            if is_first():  # orbax has waited for the others' parts
                write_manifest(self.directory / str(step), self._tokenizer)
        except BaseException as error:  # reported by wait(), in the thread that can act on it
            self._failure = error

    def wait(self) -> None:
        """Until everything is on disk. Raises UserError where writing failed (a full disk), in every process."""
        with together():
            self._finish()

    def _finish(self) -> None:
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise UserError(f"{self.directory}: the checkpoint could not be written: {failure}") from failure

    def restore(self, abstract: TrainState) -> tuple[int, TrainState] | None:
        """The newest checkpoint that is whole, on the shardings of `abstract`; None where there is none.

        A damaged or half-written one is renamed to STEP.damaged with a warning, and the one before it is used.
        """
        return restore_newest(self.directory, abstract, set_aside)

    def close(self) -> None:
        """Needs no other process, so that one that fails can end."""
        self._finish()
        if self._manager is not None:
            self._manager.close()
            self._manager = None


def _score(metrics: dict[str, float | None]) -> tuple[float, int]:
    """What was not evaluated is never the best; of equals the first is."""
    score, step = metrics["score"], metrics.get("step", 0)
    return (-math.inf, step) if score is None else (score, -step)


def _items(state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps apart, so that a model can be loaded without its optimizer."""
    return {"params": state.params, "optimizer": {"step": state.step, "opt_state": state.opt_state}}


def restore_newest(
    directory: AnyPath, abstract: TrainState, on_damage: Callable[[AnyPath], None] = lambda path: None
) -> tuple[int, TrainState] | None:
    """(step, state) of the newest whole checkpoint; warns of each damaged one and hands it to `on_damage`.

    Raises UserError where the state in it has another shape than `abstract`.
    """
    found = _read_newest(directory, _items(abstract), on_damage)
    return found and (found[0], TrainState(params=found[1]["params"], **found[1]["optimizer"]))


def restore_newest_params(directory: AnyPath, mesh: Mesh, latest: int | None = None) -> tuple[int, Params] | None:
    """(step, parameters) of the newest whole checkpoint, of step `latest` at most, whatever their shapes; changes
    nothing in the directory."""
    for path in _newest_whole(directory, lambda path: None, latest):
        kept = ocp.StandardCheckpointHandler().metadata(absolute(path) / "params").tree
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), kept)
        tree = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            params_sharding(shapes, mesh),
        )
        with ocp.StandardCheckpointer() as reader:
            return int(path.name), reader.restore(absolute(path) / "params", tree)
    return None


def _read_newest(
    directory: AnyPath, items: dict[str, Any], on_damage: Callable[[AnyPath], None]
) -> tuple[int, dict[str, Any]] | None:
    for path in _newest_whole(directory, on_damage):
        for name, tree in items.items():
            misfit = _misfit(absolute(path) / name, tree)
            if misfit is not None:
                raise UserError(f"{path}: does not fit this run's model or optimizer: {misfit}")
        with ocp.StandardCheckpointer() as reader:
            return int(path.name), {name: reader.restore(absolute(path) / name, tree) for name, tree in items.items()}
    return None


def _newest_whole(
    directory: AnyPath, on_damage: Callable[[AnyPath], None], latest: int | None = None
) -> Iterator[AnyPath]:
    steps = agreed(lambda: sorted((int(p.name) for p in directory.glob("*") if p.name.isdecimal()), reverse=True))
    for step in steps:
        if latest is not None and step > latest:
            continue
        path = directory / str(step)
        damage = agreed(find_damage, path)
        if damage is None:
            yield path
        else:
            log.warning("%s: %s; an earlier checkpoint is used", path, damage)
            agreed(on_damage, path)


def _misfit(path: AnyPath, wanted: Any) -> str | None:
    """The first array of a checkpoint's item that is not as `wanted`. Orbax would cast a wrong dtype in silence."""
    if not path.is_dir():
        return f"it has no {path.name}"
    kept, needed = _described(ocp.StandardCheckpointHandler().metadata(path).tree), _described(wanted)
    for name in sorted(kept | needed):
        there, here = kept.get(name, "missing"), needed.get(name, "missing")
        if there != here:
            return f"{path.name}/{name} is {there} there, {here} here"
    return None


def _described(tree: Any) -> dict[str, str]:
    """Dtype and shape of each array by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = ((jax.tree_util.keystr(key, simple=True, separator="/"), leaf) for key, leaf in leaves)
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named}


def write_manifest(path: AnyPath, tokenizer: str = "") -> None:
    """SHA-256 of every file of a checkpoint, and the tokenizer's, put in place atomically."""
    files = {name: file for name, file in files_below(path).items() if file.name != MANIFEST}
    entries = {name: {"sha256": file_sha256(file)} for name, file in files.items()}
    write_atomically(path / MANIFEST, json.dumps({"files": entries, "tokenizer": tokenizer}, indent=1))


def tokenizer_hash(path: AnyPath) -> str:
    """That of the tokenizer whose ids a whole checkpoint was trained on; empty where it was not kept."""
    return read_object(path / MANIFEST).get("tokenizer", "")


def find_damage(path: AnyPath) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is as it was written."""
    if not (path / MANIFEST).is_file():
        return "half-written (it has no checksum manifest)"
    try:
        files = read_object(path / MANIFEST, files=dict)["files"]
        wanted = {name: entry["sha256"] for name, entry in files.items()}
    except (UserError, KeyError, TypeError):
        return f"damaged ({MANIFEST} cannot be read)"
    if not wanted:
        return f"damaged ({MANIFEST} names no file)"
    for name, sha256 in wanted.items():
        file = path / name
        if not all(is_file_name(part) for part in name.split("/")):
            return f"damaged ({MANIFEST} names {name!r}, which is no file in it)"
        if not file.is_file():
            return f"damaged ({name} is missing)"
        if file_sha256(file) != sha256:
            return f"damaged ({name} differs from its checksum)"
    return None


def set_aside(path: AnyPath) -> None:
    """Renames a checkpoint, so that its step can be saved again and nothing is lost."""
    target, number = path.with_name(path.name + ".damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged{number}")
    path.rename(target)
