"""The training state and the step: one jitted function for every task."""

import contextlib
import ctypes
import math
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from electrax.config import UserError
from electrax.models.flops import peak_flops
from electrax.tasks.base import Batch, Mean, Metrics, Params, Task
from electrax.training.optim import global_norm
from electrax.training.sharding import BATCH_AXES, batch_sharding, like_params, over_rows, params_sharding, row_ways

MOST_TOGETHER = 32  # steps in a call
CALL_SECONDS = 2.0  # a stop waits for two calls
UTILISATION = 0.15  # of a device's peak, that even a small model reaches


@flax.struct.dataclass
class TrainState:
    step: Any  # int32 scalar: updates done, also the position in the data
    params: Params
    opt_state: Any


def _placed(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def abstract_state(task: Task, optimizer: optax.GradientTransformation, batch: Batch, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing anything."""

    def build():
        params = task.init(jax.random.key(0), batch)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shapes = jax.eval_shape(build)
    shardings = like_params(shapes, shapes.params, params_sharding(shapes.params, mesh), mesh)
    return jax.tree.map(_placed, shapes, shardings)


def fresh_state(
    task: Task, optimizer: optax.GradientTransformation, batch: Batch, abstract: TrainState, seed: int
) -> TrainState:
    """Step 0 with parameters drawn from the seed, made where they will live."""

    def build(seed):
        params = task.init(jax.random.key(seed), batch)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = jax.tree.map(lambda s: s.sharding, abstract)
    return jax.jit(build, out_shardings=shardings)(np.uint32(seed))


def choose_microbatch(config_rows: int, rows: int, length: int, platform: str) -> int:
    """Rows of a device in one pass: as configured, or for a CPU about 512 tokens, whose activations stay in its cache.

    Raises UserError where the configured number does not divide the device's rows.
    """
    if config_rows:
        if rows % config_rows:
            near = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= config_rows)
            raise UserError(
                f"optimizer.microbatch {config_rows} does not divide the {rows} rows of a device; {near} does"
            )
        return config_rows
    if platform != "cpu":
        return rows
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(1, 512 // length))


def choose_together(config_steps: int, intervals: Sequence[int], device: jax.Device, flops: float) -> int:
    """Steps that one call takes: as configured, or one on a CPU. On an accelerator, where a call costs the host as much
    as a small step takes, the most up to MOST_TOGETHER that divide the intervals at which something is due and are
    likely to be over in CALL_SECONDS. `flops` are those of a step on one device."""
    if config_steps or device.platform == "cpu":
        return config_steps or 1
    most = CALL_SECONDS * UTILISATION * peak_flops(device, "bfloat16") / flops
    return max(n for n in range(1, MOST_TOGETHER + 1) if n == 1 or (n <= most and math.gcd(*intervals) % n == 0))


def gradients(task: Task, params: Params, prepared: Batch, mesh: Mesh, microbatch: int):
    """Gradient, loss and metrics of a prepared batch, added over its micro-batches (`microbatch` rows a device).

    Every device adds up its own rows' gradients, and these are exchanged once, whatever the number of micro-batches:
    summed over `data`, and over `fsdp` left divided as the parameters are, which are gathered once before.
    """
    if row_ways(mesh) == 1:
        return _own_gradients(task, params, prepared, microbatch)
    specs = jax.tree.map(over_rows, params_sharding(params, mesh))

    def exchange(params: Params, prepared: Batch):
        whole = jax.tree.map(_gather, params, specs)
        grads, loss, metrics = _own_gradients(task, whole, prepared, microbatch)
        return jax.tree.map(_scatter_sum, grads, specs), *jax.lax.psum((loss, metrics), BATCH_AXES)

    return jax.shard_map(
        exchange,
        mesh=mesh,
        in_specs=(specs, batch_sharding(mesh).spec),
        out_specs=(specs, P(), P()),
        axis_names=set(BATCH_AXES),  # what lies on `model` is the compiler's
        check_vma=False,
    )(params, prepared)


def _own_gradients(task: Task, params: Params, prepared: Batch, microbatch: int):
    """The sums over the rows given, `microbatch` of them in one pass."""
    compute = jax.value_and_grad(task.loss, has_aux=True)
    if jax.tree.leaves(prepared)[0].shape[0] == microbatch:
        (loss, metrics), grads = compute(params, prepared)
        return grads, loss, metrics

    def add(total, micro):
        (loss, metrics), grads = compute(params, micro)
        return jax.tree.map(jnp.add, total, grads), (loss, metrics)

    cut = jax.tree.map(lambda leaf: leaf.reshape(-1, microbatch, *leaf.shape[1:]), prepared)
    grads, each = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), cut)
    return grads, *jax.tree.map(lambda x: jnp.sum(x, axis=0), each)


def _gather(part: jax.Array, spec: P) -> jax.Array:
    """A parameter of which each device along `fsdp` holds a part, whole."""
    return part if "fsdp" not in spec else jax.lax.all_gather(part, "fsdp", axis=spec.index("fsdp"), tiled=True)


def _scatter_sum(gradient: jax.Array, spec: P) -> jax.Array:
    """The sum over the devices, each of which along `fsdp` keeps its parameter's part."""
    if "fsdp" not in spec:
        return jax.lax.psum(gradient, BATCH_AXES)
    part = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
    return jax.lax.psum(part, "data")


class Request(NamedTuple):
    """A step that a run waits for; the state is given away."""

    step: int  # that of the state, on the host
    state: TrainState
    batch: Batch


StepResult = tuple[TrainState, Float[Array, ""], Metrics]
StepResults = tuple[TrainState, Float[Array, "n"], Metrics]  # of n steps


class Step:
    """(state, batch) -> (state, loss, metrics), compiled once for each shape of batch; the state given is donated.

    `function` is (state, batch, seed) -> the same, not compiled; `shardings` are those of the state.
    """

    def __init__(self, function: Callable, shardings: TrainState, seed: int):
        self.function, self.shardings, self.seed = function, shardings, np.uint32(seed)
        self._jitted = jax.jit(function, donate_argnums=0, out_shardings=(shardings, None, None))
        self._jitted_several = jax.jit(self._scan, donate_argnums=0, out_shardings=(shardings, None, None))
        self._compiled: dict[tuple, jax.stages.Compiled] = {}
        self._begun: dict[tuple, futures.Future[jax.stages.Compiled]] = {}

    def begin(self, state: TrainState, batch: Batch, several: bool = False) -> None:
        """Begins what `compiled` will wait for: tracing is done on return, compiling goes on in a thread."""
        pool = futures.ThreadPoolExecutor(1)
        self._begun[_shapes(batch, several)] = pool.submit(self._lowered(state, batch, several).compile)
        pool.shutdown(wait=False)

    def compiled(self, state: TrainState, batch: Batch, several: bool = False) -> jax.stages.Compiled:
        shapes = _shapes(batch, several)
        if shapes not in self._compiled:
            begun = self._begun.pop(shapes, None)
            self._compiled[shapes] = begun.result() if begun else self._lowered(state, batch, several).compile()
            return_memory()
        return self._compiled[shapes]

    def _lowered(self, state: TrainState, batch: Batch, several: bool) -> jax.stages.Lowered:
        return (self._jitted_several if several else self._jitted).lower(state, batch, self.seed)

    def __call__(self, state: TrainState, batch: Batch) -> StepResult:
        return self.compiled(state, batch)(state, batch, self.seed)

    def several(self, state: TrainState, batches: Batch) -> StepResults:
        """As many steps as the first axis of `batches` is long, in one call; losses and metrics are stacked."""
        return self.compiled(state, batches, several=True)(state, batches, self.seed)

    def _scan(self, state: TrainState, batches: Batch, seed: jax.Array | np.uint32) -> StepResults:
        def step(state: TrainState, batch: Batch):
            state, *results = self.function(state, batch, seed)
            return state, results

        state, (losses, metrics) = jax.lax.scan(step, state, batches)
        return state, losses, metrics


def _shapes(batch: Batch, several: bool) -> tuple:
    return several, *(leaf.shape for leaf in jax.tree.leaves(batch))


def return_memory() -> None:
    """Hands what the compiler has freed back to the system, which glibc would keep: several times what a small step
    needs. Does nothing with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def make_step(
    task: Task, optimizer: optax.GradientTransformation, abstract: TrainState, mesh: Mesh, microbatch: int, seed: int
) -> Step:
    """One update of any task; `microbatch` as in `choose_microbatch`. Where the loss or the gradient's norm is not
    finite the step counts, but changes neither parameters nor moments.

    Row i of step s gets the key fold_in(fold_in(key(seed), s), i), whatever the devices and micro-batches. The seed is
    an argument of the compiled function, so that runs that differ in it alone share one compilation.
    """
    ways, platform = row_ways(mesh), mesh.devices.flat[0].platform

    def step(state: TrainState, batch: Batch, seed: jax.Array):
        rows, *tokens = batch["ids"].shape
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
        with jax.named_scope("prepare"):
            prepared = jax.lax.with_sharding_constraint(task.prepare(batch, keys), batch_sharding(mesh))
        part = choose_microbatch(microbatch, rows // ways, math.prod(tokens), platform)
        grads, loss, metrics = gradients(task, state.params, prepared, mesh, part)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            norm = global_norm(grads)
            metrics = metrics | {"gradient_norm": Mean(norm, jnp.ones(()))}
            # an update from a loss or gradient that is not finite would never be undone
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            new = optax.apply_updates(state.params, updates), opt_state
            old = state.params, state.opt_state
            params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        return TrainState(state.step + 1, params, opt_state), loss, metrics

    return Step(step, jax.tree.map(lambda s: s.sharding, abstract), seed)
