"""A training put together: everything the loop needs, made and checked before step 0, for every task."""

import dataclasses
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Set
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from electrax.config import AnyPath, UserError, build, read_toml, to_toml
from electrax.convert.weights import read_tree
from electrax.data.outside import read_object
from electrax.data.tokenizer import Tokenizer
from electrax.models.attention import GPU_ATTENTION
from electrax.storage import make_folder, on_this_machine, path_of, write_atomically
from electrax.tasks.base import Batch, Params, Task
from electrax.training.checkpoint import Checkpoints, find_damage, restore_newest_params, tokenizer_hash
from electrax.training.evaluate import make_evaluate
from electrax.training.feed import Feed, host_feed
from electrax.training.lockstep import JointStep, lockstep
from electrax.training.loop import Interrupted, Record, train
from electrax.training.optim import make_optimizer
from electrax.training.processes import agreed
from electrax.training.sharding import (
    MeshConfig,
    local_rows,
    make_mesh,
    params_sharding,
    put_batch,
    put_everywhere,
    row_ways,
)
from electrax.training.state import (
    Request,
    Step,
    StepResult,
    TrainState,
    abstract_state,
    choose_microbatch,
    fresh_state,
    make_step,
)
from electrax.training.window import NonFiniteLoss

CONFIG_FILE, RESULTS_FILE = "config.toml", "results.json"
HEAD_FILE = "head.json"  # what a fine-tuned head's outputs mean
WEIGHTS_FILE = "model.safetensors"  # of a model without checkpoints
# keys that may be other ones when a run is resumed
MAY_CHANGE = {"workdir", "profile", "dry_run", "seeds", "seeds_at_once", "steps", "epochs", "checkpoint", "eval", "log"}
MAY_CHANGE |= {"mesh", "steps_per_dispatch", "rows_on_device", "optimizer.microbatch", "optimizer.max_skipped"}
MEMORY_SHARE = 0.8  # of an accelerator that models side by side may take; the rest is for evaluation


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a training needs, made and checked."""

    config: Any
    task: Task
    tokenizer: Tokenizer
    mesh: Mesh
    microbatch: int
    steps: int
    start: int
    state: TrainState
    step_function: Step
    feed: Feed
    evaluate: Callable[[Params], tuple[dict[str, float], dict[str, np.ndarray]]]
    checkpoints: Checkpoints
    flops_per_step: float
    tokens_per_step: float
    eval_every: int
    save_every: int
    patience: int
    steps_per_dispatch: int
    example: Batch  # of the largest shape, all of its rows

    def memory(self) -> int:
        """Compiles the step for the largest batch; the bytes of a device that it needs (0: not known). Where some steps
        are taken one by one beside calls of several, that program too, which would else stop the run for minutes."""
        due = (self.start, self.steps, self.eval_every, self.save_every, self.config.log.every)
        if any(step % self.steps_per_dispatch for step in due):
            self.step_function.compiled(self.state, self.example_batch())
        return _needed(self._compiled())

    def _compiled(self) -> jax.stages.Compiled:
        several = self.steps_per_dispatch > 1
        return self.step_function.compiled(self.state, self.example_batch(self.steps_per_dispatch), several)

    def example_batch(self, steps: int = 1) -> Batch:
        return batch_like(self.example, self.mesh, steps)

    def models_at_once(self) -> int:
        """How many models like this one an accelerator has room to train side by side; 1 on a CPU, which would not be
        quicker so."""
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else 0
        memory = self._compiled().memory_analysis() if limit else None
        if memory is None:
            return 1
        # the states are there twice: each by itself, and all of them stacked
        model = 2 * memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return max(1, int(MEMORY_SHARE * limit / model))

    def train(
        self, stop: Callable[[], bool] = lambda: False, alone: bool = True, step: Callable | None = None
    ) -> Generator[Record | Request, StepResult | None, None]:
        """The records of a run alone; of one among others also the steps that are to be taken for it. `step` in the
        place of the run's own does the same."""
        return train(
            self.task,
            self.state,
            (step or self.step_function) if alone else None,
            self.evaluate,
            self.checkpoints,
            self.feed,
            steps=self.steps,
            eval_every=self.eval_every,
            save_every=self.save_every,
            log_every=self.config.log.every,
            patience=self.patience,
            steps_per_dispatch=1 if step else self.steps_per_dispatch,
            max_skipped=self.config.optimizer.max_skipped,
            stop=stop,
        )


def batch_like(example: Batch, mesh: Mesh, steps: int) -> Batch:
    """That batch on the devices, or as those of several steps."""
    rows = local_rows(len(example["ids"]), mesh)
    batch = {name: values[rows] for name, values in example.items()}
    if steps == 1:
        return put_batch(batch, mesh)
    return put_batch({name: np.stack([values] * steps) for name, values in batch.items()}, mesh, leading=1)


def assemble(
    config: Any,
    task: Task,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    example: Batch,
    steps: int,
    flops_per_step: float,
    tokens_per_step: float,
    eval_every: int,
    save_every: int,
    patience: int = 0,
    steps_per_dispatch: int = 1,
    feed: Feed | None = None,
    initial: Callable[[Params], Params] | None = None,
    is_frozen: Callable[[tuple[str, ...]], bool] = lambda path: False,
    early: bool = False,
) -> Run:
    """Resumes from the newest whole checkpoint of the work directory; otherwise starts fresh, with the weights that
    `initial` makes of the drawn ones. `example` is a batch of the largest shape. With `early` the step is compiled
    while the state is made."""
    example = jax.tree.map(np.asarray, example)
    rows, *tokens = example["ids"].shape
    microbatch = choose_microbatch(
        config.optimizer.microbatch, rows // row_ways(mesh), math.prod(tokens), mesh.devices.flat[0].platform
    )
    optimizer = make_optimizer(config.optimizer, steps, config.faithful, is_frozen)
    abstract = abstract_state(task, optimizer, example, mesh)
    step_function = make_step(task, optimizer, abstract, mesh, config.optimizer.microbatch, config.seed)
    if early:
        step_function.begin(abstract, batch_like(example, mesh, steps_per_dispatch), steps_per_dispatch > 1)
    checkpoints = Checkpoints(path_of(config.workdir) / "checkpoints", config.checkpoint.keep, tokenizer.sha256)
    restored = checkpoints.restore(abstract)
    start, state = restored or (0, fresh_state(task, optimizer, example, abstract, config.seed))
    if restored is None and initial is not None:
        state = state.replace(params=initial(state.params))
    return Run(
        config=config,
        task=task,
        tokenizer=tokenizer,
        mesh=mesh,
        microbatch=microbatch,
        steps=steps,
        start=start,
        state=state,
        step_function=step_function,
        feed=feed or host_feed(task.train_batch, task.batch_size, mesh),
        evaluate=make_evaluate(task, mesh),
        checkpoints=checkpoints,
        flops_per_step=flops_per_step,
        tokens_per_step=tokens_per_step,
        eval_every=eval_every,
        save_every=save_every,
        patience=patience,
        steps_per_dispatch=steps_per_dispatch,
        example=example,
    )


def _needed(step: jax.stages.Compiled) -> int:
    memory = step.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0


def side_by_side(runs: Mapping[str, Run]) -> tuple[JointStep, int]:
    """The step of several runs of one model and one data, compiled for their largest batch, and the bytes of a device
    that it needs (0: not known)."""
    step = JointStep({name: run.step_function for name, run in runs.items()})
    unfinished = [name for name, run in runs.items() if run.start < run.steps] or list(runs)
    batches = {name: runs[name].example_batch() for name in unfinished}
    requests = {name: Request(runs[name].start, runs[name].state, batches[name]) for name in unfinished}
    return step, _needed(step.compiled(requests))


def train_side_by_side(
    runs: Mapping[str, Run], step: JointStep, stop: Callable[[], bool] = lambda: False
) -> Iterator[tuple[str, Record | NonFiniteLoss | Interrupted]]:
    """The records of all runs, each with the run's name. A loss that is not finite ends the one run; after a stop every
    run saves and ends."""
    stopping = False

    def take(requests: Mapping[str, Request]) -> dict[str, StepResult]:
        nonlocal stopping
        stopping = stop()  # asked once for all of them, so that they are saved at one step
        return step(requests)

    trained = {name: run.train(lambda: stopping, alone=False) for name, run in runs.items()}
    return lockstep(trained, take, (NonFiniteLoss, Interrupted))


def mesh_for(config: Any) -> Mesh:
    """The mesh of a config. Raises UserError where the batch does not divide over it, or it has not the attention."""
    mesh = make_mesh(config.mesh)
    platform = mesh.devices.flat[0].platform
    for key, of_gpu, instead in (("attention", GPU_ATTENTION, "plain or xla"), ("residual", ("fused",), "plain")):
        value = getattr(config.model, key)
        if value in of_gpu and platform != "gpu":
            raise UserError(f"model.{key} {value} needs an NVIDIA GPU, not a {platform}; expected {instead}")
        if value == "fused" and config.mesh.model > 1:
            raise UserError(f"model.{key} fused computes whole layers; expected mesh.model 1, or {instead}")
    ways = row_ways(mesh)
    if config.batch_size % ways:
        larger = math.ceil(config.batch_size / ways) * ways
        raise UserError(
            f"batch_size {config.batch_size} does not divide over {ways} devices; the next one that does is {larger}"
        )
    return mesh


def check_dropout(config: Any) -> None:
    """Raises UserError for attention that cannot train with the dropout that is asked for. A run that is there already
    goes on as it began, with plain attention."""
    model = config.model
    if model.attention in ("xla", "cudnn") and model.attention_dropout and not holds_run(config.workdir):
        raise UserError(
            f"model.attention {model.attention} has no dropout of its weights; expected model.attention_dropout 0, or "
            "attention plain or fused"
        )


def keep_config(config: Any, tokenizer: Tokenizer, data: str, steps: int) -> None:
    """Writes config.toml and the tokenizer (that of `data`) into the work directory. Raises UserError where
    checkpoints are kept there of a run that this one, of so many steps, does not continue."""
    workdir = path_of(config.workdir)

    def keep() -> None:
        make_folder(workdir)
        if holds_run(workdir):
            check_continued(config)
            check_steps(workdir, steps)
            known = Tokenizer.load(workdir)
            if known.sha256 != tokenizer.sha256:
                raise UserError(f"{workdir / known.file_name}: not the tokenizer of {data}; take another workdir")
        tokenizer.save(workdir)
        write_atomically(workdir / CONFIG_FILE, to_toml(config))

    agreed(keep)


def check_steps(workdir: AnyPath, steps: int) -> None:
    """Raises UserError where the run that is kept there has taken more."""
    names = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
    taken = max((int(name) for name in names if name.isdecimal()), default=0)
    if taken > steps:
        raise UserError(f"{workdir}: trained for {taken} steps already; expected no fewer, not {steps}")


def holds_run(workdir: str | os.PathLike) -> bool:
    """Whether a checkpoint of a run is kept there, which the next training continues."""
    workdir = path_of(workdir)
    return agreed(lambda: (workdir / CONFIG_FILE).is_file() and any((workdir / "checkpoints").glob("[0-9]*")))


def kept_tokenizer(workdir: str | os.PathLike) -> Tokenizer:
    """That of the run that is kept there. Raises UserError where its checkpoints were trained with another one."""
    workdir = path_of(workdir)
    tokenizer = Tokenizer.load(workdir)
    whole = [path for path in (workdir / "checkpoints").glob("[0-9]*") if find_damage(path) is None]
    if whole and tokenizer.sha256 not in map(tokenizer_hash, whole):
        raise UserError(f"{workdir / tokenizer.file_name}: damaged, or not the tokenizer of the run's checkpoints")
    return tokenizer


def check_continued(config: Any) -> None:
    """Raises UserError where config.toml of the work directory is that of a run that this one does not continue."""
    workdir = path_of(config.workdir)
    before = read_toml(workdir / CONFIG_FILE)
    if before.get("task") != config.task:
        raise UserError(f"{workdir / CONFIG_FILE} holds a run of the task {before.get('task')!r}; take another workdir")
    before = dataclasses.asdict(build(type(config), before, str(workdir / CONFIG_FILE)))
    for key, old, new in differences(before, dataclasses.asdict(config)):
        if not is_among(key, MAY_CHANGE):
            raise UserError(
                f"{workdir / CONFIG_FILE} holds a run with {key} = {old!r}, now {new!r}; take another workdir"
            )


def is_among(key: str, keys: Set[str]) -> bool:
    """Whether the key of a config or its section is one of `keys`."""
    return not {key, key.split(".")[0]}.isdisjoint(keys)


def differences(before: dict, now: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) where two configs as dictionaries differ."""
    for key, value in now.items():
        if isinstance(value, dict):
            yield from differences(before[key], value, f"{prefix}{key}.")
        elif before[key] != value:
            yield prefix + key, before[key], value


def load_params(workdir: str | os.PathLike, mesh: Mesh | None = None, latest: int | None = None) -> tuple[int, Params]:
    """(step, parameters) of the newest whole checkpoint of a run (of step `latest` at most), or of a converted model
    (step 0), on a mesh (default: the first device). Raises UserError where there is none, or where the tokenizer beside
    it is another one than it was trained with."""
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    checkpoints, weights = path_of(workdir) / "checkpoints", path_of(workdir) / WEIGHTS_FILE
    restored = restore_newest_params(checkpoints, mesh, latest)
    if restored is not None:
        wanted = tokenizer_hash(checkpoints / str(restored[0]))
    elif weights.is_file():
        on_this_machine(weights, "a converted model")
        params, metadata = read_tree(weights)
        placed = jax.tree.map(put_everywhere, params, params_sharding(params, mesh))
        restored, wanted = (0, placed), metadata.get("tokenizer", "")
    else:
        raise UserError(f"{workdir}: no checkpoint yet")
    if wanted and Tokenizer.load(workdir).sha256 != wanted:
        raise UserError(f"{workdir}: its tokenizer is not the one that its weights were trained with")
    return restored


def trained(workdir: AnyPath, mesh: Mesh | None = None, step: int | None = None) -> tuple[int, Params]:
    """(step, parameters) of a step, or of the one that the results were measured on: the best, where training was
    stopped early."""
    results = workdir / RESULTS_FILE
    if step is None and results.is_file():
        step = read_object(results, step=int)["step"]
    return load_params(workdir, mesh, latest=step)
