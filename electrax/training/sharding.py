"""One mesh, one table: which axis of which parameter lies on which mesh axis."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from electrax.config import UserError

BATCH_AXES = ("data", "fsdp")

ENCODER = r"((discriminator/|generator/(backward_)?)encoder|decoder)"

# (pattern of the whole parameter path, mesh axis of each array axis). Exactly one row fits a parameter. Moments of the
# optimizer are matched by the parameter's path at the end of theirs.
TABLE: tuple[tuple[str, P], ...] = (
    (r"((generator|target)_)?embeddings/word", P("fsdp", None)),
    (r"((generator|target)_)?embeddings/(position|type)", P(None, "fsdp")),
    (rf"{ENCODER}/embeddings_project/kernel", P("fsdp", None)),
    (rf"{ENCODER}/layer_\d+/attention/qkv/kernel", P("fsdp", "model", None, None)),
    (rf"{ENCODER}/layer_\d+/attention/qkv/bias", P("model", None, None)),
    (rf"{ENCODER}/layer_\d+/cross_attention/query/kernel", P("fsdp", "model", None)),
    (rf"{ENCODER}/layer_\d+/cross_attention/query/bias", P("model", None)),
    (rf"{ENCODER}/layer_\d+/cross_attention/key_value/kernel", P("fsdp", "model", None, None)),
    (rf"{ENCODER}/layer_\d+/cross_attention/key_value/bias", P("model", None, None)),
    (rf"{ENCODER}/layer_\d+/(cross_)?attention/output/kernel", P("model", None, "fsdp")),
    (rf"{ENCODER}/layer_\d+/(up|gate)/kernel", P("fsdp", "model")),
    (rf"{ENCODER}/layer_\d+/(up|gate)/bias", P("model")),
    (rf"{ENCODER}/layer_\d+/down/kernel", P("model", "fsdp")),
    (r"(generator|discriminator)/head/dense/kernel", P("fsdp", None)),
    (r"(generator/)?head/output_bias", P("fsdp")),
    (r"discriminator/head/output/kernel", P("fsdp", None)),
    (r".*/((cross_)?attention/output|embeddings_project|down|head/dense|head/output)/bias", P()),
    (r"head/(\w+/)*kernel", P("fsdp", None)),
    (r"head/(?!.*norm/)(\w+/)*bias", P()),
    (r".*norm/(scale|bias)", P()),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. `data` 0: all that the other two leave."""

    data: int = 0
    fsdp: int = 1
    model: int = 1


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The global mesh `data` x `fsdp` x `model` over the given devices (default: all)."""
    devices = jax.devices() if devices is None else devices
    rest = config.fsdp * config.model
    if min(config.fsdp, config.model) < 1 or len(devices) % rest:
        raise UserError(f"mesh.fsdp {config.fsdp} x mesh.model {config.model} does not divide {len(devices)} devices")
    data = config.data or len(devices) // rest
    if data * rest != len(devices):
        raise UserError(
            f"mesh.data {data} x fsdp {config.fsdp} x model {config.model} is not the number of devices, {len(devices)}"
        )
    # Auto axes: linen's lookups and scatters do not type-check under the default, Explicit. A TPU's devices come in the
    # order of its links.
    shape, names = (data, config.fsdp, config.model), (*BATCH_AXES, "model")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def row_ways(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over `data` and `fsdp`; `leading` axes before the row axis are not divided."""
    return NamedSharding(mesh, P(*[None] * leading, BATCH_AXES))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, leading: int = 0) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays; `leading` axes come before that of the rows."""
    sharding = batch_sharding(mesh, leading)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def put_everywhere(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds whole, on the devices of all of them."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_rows(batch_size: int, mesh: Mesh) -> slice:
    """The rows of a batch that this process reads, those of its devices. UserError where they don't lie together."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = {row for (part,) in held for row in range(batch_size)[part]}
    if len(rows) != max(rows) + 1 - min(rows):
        raise UserError("mesh: the rows of a process would not lie together; make mesh.model a divisor of its devices")
    return slice(min(rows), max(rows) + 1)


def spec_of(path: str) -> P:
    """The one row of the table that fits a parameter path. Raises UserError where none or several do."""
    found = [spec for pattern, spec in TABLE if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise UserError(f"parameter {path} fits {len(found)} rows of the sharding table; exactly one is needed")
    return found[0]


def over_rows(sharding: NamedSharding) -> P:
    """The sharding's spec with the axes alone over which a batch's rows are divided, and several devices lie."""
    return P(*(axis if axis in BATCH_AXES and sharding.mesh.shape[axis] > 1 else None for axis in sharding.spec))


def params_sharding(params: Any, mesh: Mesh) -> Any:
    """A NamedSharding a leaf. Raises UserError that names the parameter whose axis does not divide evenly."""

    def leaf_sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = spec_of(name)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                raise UserError(
                    f"parameter {name} {tuple(leaf.shape)}: {size} is not divisible by mesh.{axis} {mesh.shape[axis]}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, params)


def like_params(tree: Any, params: Any, sharding: Any, mesh: Mesh) -> Any:
    """Shardings of a state: subtrees shaped like the parameters follow them, everything else is on every device."""
    structure = jax.tree.structure(params)

    def subtree(node):
        if jax.tree.structure(node) == structure:
            return sharding
        return jax.tree.map(lambda _: NamedSharding(mesh, P()), node)

    return jax.tree.map(subtree, tree, is_leaf=lambda node: jax.tree.structure(node) == structure)
