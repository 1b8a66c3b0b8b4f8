"""What a run would need of each device and exchange between them, found without training."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.extend.backend import clear_backends
from jax.sharding import Mesh

from electrax.experiment.config import AnyConfig
from electrax.experiment.run import check_dropout, mesh_for
from electrax.tasks.base import Batch, Task
from electrax.training.collectives import Collective, collectives
from electrax.training.optim import make_optimizer
from electrax.training.sharding import MeshConfig, batch_sharding, row_ways
from electrax.training.state import abstract_state, choose_microbatch, make_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes are bytes of one device."""

    mesh: tuple[int, ...]
    devices: str
    microbatch: int  # rows
    parameters: int
    optimizer: int
    batch: int
    activations: int  # gradients and whatever else the step holds for a while
    collectives: tuple[Collective, ...]  # of one step


def plan_mesh(config: AnyConfig) -> tuple[Mesh, bool]:
    """The mesh of a config, and whether its devices are only imagined: as many CPUs take the place of those that are
    not there. Nothing may have been computed before."""
    wanted = math.prod(getattr(config.mesh, field.name) for field in dataclasses.fields(MeshConfig))
    imagined = wanted > len(jax.devices())
    if imagined:
        clear_backends()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", wanted)
    check_dropout(config)
    return mesh_for(config), imagined


def plan_run(config: Any, task: Task, example: Batch, mesh: Mesh, steps: int, imagined: bool) -> Plan:
    """Compiles the step for `example`, a batch of the largest shape. Imagined devices take all their rows in one pass,
    as accelerators do."""
    rows, *tokens = example["ids"].shape
    own, platform = rows // row_ways(mesh), "imagined" if imagined else mesh.devices.flat[0].platform
    microbatch = choose_microbatch(config.optimizer.microbatch, own, math.prod(tokens), platform)
    optimizer = make_optimizer(config.optimizer, steps, config.faithful)
    state = abstract_state(task, optimizer, example, mesh)
    placed = batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed) for name, a in example.items()}
    compiled = make_step(task, optimizer, state, mesh, microbatch, config.seed).compiled(state, batch)
    memory = compiled.memory_analysis()
    device = mesh.devices.flat[0]
    return Plan(
        mesh=mesh.devices.shape,
        devices="imagined devices, compiled for CPUs" if imagined else f"{device.device_kind} ({device.platform})",
        microbatch=microbatch,
        parameters=_held(state.params),
        optimizer=_held(state.opt_state),
        batch=_held(batch),
        activations=memory.temp_size_in_bytes if memory else 0,
        collectives=tuple(collectives(compiled.as_text())),
    )


def _held(tree: Any) -> int:
    """Bytes of one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
