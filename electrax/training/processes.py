"""Several processes as one run. JAX's runtime connects them; what only one may do, process 0 does for all."""

import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state  # JAX has no public name for its key-value store

from electrax.config import UserError

Value = TypeVar("Value")
FOREVER_MS = 7 * 24 * 3600 * 1000  # a peer that has died ends this process long before
# environment variables that say where a process belongs; the first set one counts
VARIABLES = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS"),
    "num_processes": ("JAX_NUM_PROCESSES", "NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"),
    "process_id": ("JAX_PROCESS_ID", "PROCESS_ID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX"),
}
KUBEFLOW = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")  # names so common that they count only together
_turns = itertools.count()
_deciding = False  # process 0 is within `agreed`, where no other process follows


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """This process's place among those of a run. What is left out comes from the environment or the cluster."""

    coordinator: str = ""  # HOST:PORT where process 0 listens
    num_processes: int = 0
    process_id: int = -1
    heartbeat_seconds: int = 100  # after which a silent process counts as dead, and the others end

    def __post_init__(self):
        if self.heartbeat_seconds < 1:
            raise UserError(f"heartbeat_seconds must be at least 1, not {self.heartbeat_seconds}")
        if self.num_processes and self.process_id >= self.num_processes:
            raise UserError(f"process_id {self.process_id} must be below num_processes, {self.num_processes}")


def from_environment(config: ProcessConfig) -> ProcessConfig:
    """The config with what the environment's variables say in place of what was left out."""
    unset, found = ProcessConfig(), {}
    left_out = () if all(os.environ.get(name) for name in KUBEFLOW) else KUBEFLOW
    for key, names in VARIABLES.items():
        name = next((name for name in names if os.environ.get(name) and name not in left_out), None)
        if name is None or getattr(config, key) != getattr(unset, key):
            continue
        try:
            found[key] = type(getattr(unset, key))(os.environ[name])
        except ValueError:
            raise UserError(f"{name}={os.environ[name]}: expected a whole number") from None
    if ":" not in found.get("coordinator", ":"):
        found["coordinator"] += ":" + os.environ.get("COORDINATOR_PORT", "6666")
    return dataclasses.replace(config, **found)


def join(config: ProcessConfig) -> bool:
    """Connects this process with the others; False where there are none. Must come before JAX's first computation.

    They are found by the config and the environment's variables, or by JAX under SLURM, Open MPI and on TPU VMs. Raises
    UserError where something is left out, and where they don't come together within five minutes.
    """
    config = from_environment(config)
    place = {
        "coordinator_address": config.coordinator or None,
        "num_processes": config.num_processes or None,
        "process_id": config.process_id if config.process_id >= 0 else None,
    }
    on_cluster = _on_slurm() or "OMPI_MCA_orte_hnp_uri" in os.environ or _on_tpu()
    if place["coordinator_address"] is None and not on_cluster:
        if (config.num_processes or 1) > 1:
            raise UserError("coordinator is missing; expected HOST:PORT of process 0 for a run of several processes")
        return False
    missing = [name for name in ("num_processes", "process_id") if place[name] is None]
    if missing and not on_cluster:
        raise UserError(f"{' and '.join(missing)} missing; expected both beside coordinator {config.coordinator}")
    if config.num_processes == 1:
        return False
    # without the cluster's guesses every process uses all devices that it sees
    known = {} if missing or on_cluster else {"cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            **place,
            **known,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=config.heartbeat_seconds,
        )
    except (RuntimeError, ValueError, OSError) as error:
        address = config.coordinator or "the coordinator"
        raise UserError(f"{address}: the processes did not come together: {str(error).splitlines()[0]}") from error
    return jax.process_count() > 1


def _on_slurm() -> bool:
    """Whether this is one of the tasks of a step (`srun`), and not the script that starts them."""
    return "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"


def _on_tpu() -> bool:
    has_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    is_used = os.environ.get("JAX_PLATFORMS", "tpu") == "tpu" and importlib.util.find_spec("libtpu") is not None
    return has_tpu and is_used


def is_first() -> bool:
    """Whether this is process 0, which alone writes and shows."""
    return jax.process_index() == 0


def agreed(make: Callable[..., Value], *arguments: Any) -> Value:
    """What `make(*arguments)` gives in process 0 (something JSON can hold), in every process.

    The others wait for it and don't call it. What is raised there is a UserError in the others. All processes must come
    to the same calls of this and of `together` in the same order, so what may differ between them is agreed on first.
    """
    global _deciding
    if jax.process_count() == 1 or _deciding:
        return make(*arguments)
    client, key = global_state.client, f"electrax/{next(_turns)}"
    if not is_first():
        outcome = json.loads(client.blocking_key_value_get(key, FOREVER_MS))
        if "error" in outcome:
            raise UserError(outcome["error"])
        return outcome["value"]
    try:
        _deciding = True
        value = make(*arguments)
    except BaseException as error:
        client.key_value_set(key, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    finally:
        _deciding = False
    client.key_value_set(key, json.dumps({"value": value}))
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What raises UserError in one process raises it in all of them, at the end of the block."""
    if jax.process_count() == 1:
        yield
        return
    client, key = global_state.client, f"electrax/{next(_turns)}"
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    client.key_value_set(f"{key}/{jax.process_index()}", str(own or ""))
    said: list[Any] = [client.blocking_key_value_get(f"{key}/{i}", FOREVER_MS) for i in range(jax.process_count())]
    if own is not None:
        raise own
    for number, message in enumerate(said):
        if message:
            raise UserError(f"process {number}: {message}")
