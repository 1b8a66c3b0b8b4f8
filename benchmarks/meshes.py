"""Whether every mesh of 1, 2, 4 and 8 (virtual) devices trains alike.

    python -m benchmarks.meshes [--steps 20]

A small pretraining with dropout takes the same steps on each. Shown are the greatest difference of any loss from that
of one device, and whether a second run gives the same bits.
"""

import argparse
import pathlib
import tempfile

import jax
import numpy as np

from benchmarks.report import environment, write

TOLERANCE = 1e-5  # relative, float32
CONFIG = {
    "batch_size": 8,
    "workdir": "none",
    "model": {"size": "tiny", "layers": 2, "width": 64, "heads": 8, "embedding_width": 32, "max_length": 32},
    "generator": {"width": 32, "heads": 8, "layers": 1},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
}


def shapes() -> list[tuple[int, int, int]]:
    sizes = (1, 2, 4, 8)
    found = [(d, f, m) for d in sizes for f in sizes for m in sizes if d * f * m in sizes]
    return sorted(found, key=lambda shape: (np.prod(shape), shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    from electrax.config import build
    from electrax.data.corpus import Corpus, sample_path
    from electrax.data.prepare import PrepareConfig, prepare
    from electrax.experiment.config import PretrainConfig
    from electrax.experiment.pretrain import make_task
    from electrax.report.common import show_table
    from electrax.training.optim import make_optimizer
    from electrax.training.sharding import MeshConfig, make_mesh, put_batch, row_ways
    from electrax.training.state import abstract_state, fresh_state, make_step

    with tempfile.TemporaryDirectory() as folder:
        out = str(pathlib.Path(folder) / "rows")
        prepare(PrepareConfig((str(sample_path()),), out, vocab_size=1000, max_length=32, workers=1))
        corpus = Corpus.open(out)
        values = CONFIG | {"steps": arguments.steps, "data": {"path": out, "max_length": 32}}
        config = build(PretrainConfig, values, "the benchmark")
        task = make_task(config, corpus.manifest.vocab_size, corpus.manifest.special_ids, corpus)
        optimizer = make_optimizer(config.optimizer, config.steps)

        def losses(mesh, microbatch: int) -> list[list[float]]:
            """Of two runs with one compiled step."""
            abstract = abstract_state(task, optimizer, task.train_batch(0), mesh)
            step = make_step(task, optimizer, abstract, mesh, microbatch, 0)
            runs = []
            for _ in range(2):
                state = fresh_state(task, optimizer, task.train_batch(0), abstract, 0)
                runs.append([])
                for number in range(arguments.steps):
                    state, loss, _ = step(state, put_batch(task.train_batch(number), mesh))
                    runs[-1].append(float(loss))
            return runs

        results, expected = {}, None
        for shape in shapes():
            mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
            rows = task.batch_size // row_ways(mesh)
            for microbatch in {rows, max(1, rows // 2)}:
                first, again = losses(mesh, microbatch)
                expected = expected or first
                apart = float(np.max(np.abs(np.array(first) / np.array(expected) - 1)))
                name = f"{'x'.join(map(str, shape))}, {rows // microbatch} micro-batch" + "es" * (rows > microbatch)
                results[name] = {"apart": apart, "repeats": first == again}
                print(name, results[name], flush=True)
        rows = [(name, f"{found['apart']:.1e}", str(found["repeats"])) for name, found in results.items()]
        show_table(f"{arguments.steps} steps", ("mesh data x fsdp x model", "apart", "same bits again"), rows)
    write("meshes.json", {"environment": environment(), "steps": arguments.steps, "results": results})
    if not all(found["apart"] < TOLERANCE and found["repeats"] for found in results.values()):
        raise SystemExit(f"not every mesh is within {TOLERANCE} of one device and repeats itself")


if __name__ == "__main__":
    main()
