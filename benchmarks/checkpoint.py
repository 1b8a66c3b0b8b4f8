"""What saving costs the loop, and how long restoring takes, at the shape of ELECTRA-Small.

    python -m benchmarks.checkpoint [--rounds 5] [--rows 8]

The same steps with and without a checkpoint, in alternation: the save goes on in the background while they run. What it
costs is spread over the default interval between checkpoints.
"""

import argparse
import pathlib
import tempfile
import time

import jax
import numpy as np

from benchmarks.report import environment, shown, spread, write
from electrax import cli
from electrax.config import find_config, load
from electrax.experiment.config import PretrainConfig
from electrax.experiment.pretrain import set_up
from electrax.report.common import show_table
from electrax.training.checkpoint import CheckpointConfig, Checkpoints

STEPS = 12  # in which a save is over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    arguments = parser.parse_args()
    cli.use_compilation_cache()
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--data.path=sample",
            "--data.vocab_size=30522",
            f"--workdir={folder}/run",
            f"--batch_size={arguments.rows}",
        ]
        run = set_up(load(PretrainConfig, find_config("small", "pretrain"), options))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.state)
        state, batch = run.state, run.example_batch()
        state, loss, _ = run.step_function(state, batch)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        seconds: dict[str, list[float]] = {"steps": [], "steps and a save": [], "the call": [], "restoring": []}
        for number in range(arguments.rounds):
            for name in ("steps", "steps and a save"):
                checkpoints = Checkpoints(pathlib.Path(folder) / f"{name}-{number}", keep=1)
                jax.block_until_ready(loss)
                began = time.perf_counter()
                if name == "steps and a save":
                    checkpoints.save(int(state.step), state)
                    seconds["the call"].append(time.perf_counter() - began)
                for _ in range(STEPS):
                    state, loss, _ = run.step_function(state, batch)
                jax.block_until_ready(loss)
                checkpoints.wait()
                seconds[name].append(time.perf_counter() - began)
                if name == "steps and a save":
                    began = time.perf_counter()
                    restored = checkpoints.restore(abstract)
                    assert restored is not None
                    jax.block_until_ready(restored[1])
                    seconds["restoring"].append(time.perf_counter() - began)
                    del restored
                checkpoints.close()
    extra = [b - a for a, b in zip(seconds["steps"], seconds["steps and a save"], strict=True)]
    step = float(np.median(seconds["steps"])) / STEPS
    every = CheckpointConfig().every
    share = spread([one / (every * step) for one in extra])
    rows = [(name, shown(spread(values))) for name, values in {**seconds, "a save costs": extra}.items()]
    rows += [("a step", f"{step:.2f}"), (f"share of {every} steps", shown(share, 5))]
    show_table(
        f"{size / 1e6:,.0f} MB, {STEPS} steps of {arguments.rows} rows, seconds", ("", "median [least, greatest]"), rows
    )
    figures = {"bytes": size, "rows": arguments.rows, "steps": STEPS, "seconds": seconds, "extra": extra}
    write("checkpoint.json", {"environment": environment(), **figures, "share_of_default_interval": share})


if __name__ == "__main__":
    main()
