"""A corpus of made-up sentences and a model small enough to compile in seconds."""

import dataclasses
import random
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from electrax.config import build, merge
from electrax.data.corpus import Corpus
from electrax.data.prepare import PrepareConfig, prepare
from electrax.experiment.config import PretrainConfig
from electrax.experiment.pretrain import make_task
from electrax.tasks.pretrain import PretrainTask
from electrax.training.optim import make_optimizer
from electrax.training.sharding import MeshConfig, make_mesh, put_batch, row_ways
from electrax.training.state import TrainState, abstract_state, fresh_state, make_step

# dropout is on; the heads and widths divide over two and eight devices
TINY = {
    "steps": 100,
    "batch_size": 8,
    "model": {"size": "tiny", "layers": 1, "width": 32, "heads": 2, "embedding_width": 16, "max_length": 32},
    "generator": {"width": 16, "heads": 2, "layers": 1},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
}


def sentences(documents: int) -> str:
    chance = random.Random(0)
    words = [chance.choice("bdfgklmnprst") + vowel + chance.choice("klmnrst") for vowel in "aeiou" for _ in range(12)]
    lines = lambda: (" ".join(chance.choices(words, k=chance.randint(3, 9))) for _ in range(chance.randint(2, 8)))  # noqa: E731
    return "\n\n".join("\n".join(lines()) for _ in range(documents))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """About 140 training and 19 held-out rows of 32 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(sentences(120))
    texts, out = (str(folder / "text.txt"),), str(folder / "rows")
    prepare(PrepareConfig(texts=texts, out=out, vocab_size=100, max_length=32, holdout=0.125, workers=1))
    return Corpus.open(out)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The parts of a tiny run, without a work directory."""

    corpus: Corpus

    def values(self, **changes: Any) -> dict:
        return merge(merge(TINY, {"data": {"path": str(self.corpus.directory), "max_length": 32}}), changes)

    def task(self, **changes: Any) -> PretrainTask:
        config = build(PretrainConfig, self.values(workdir="unused", **changes), "the test")
        manifest = self.corpus.manifest
        return make_task(config, manifest.vocab_size, manifest.special_ids, self.corpus)

    def mesh(self, data: int = 1, fsdp: int = 1, model: int = 1) -> Mesh:
        return make_mesh(MeshConfig(data, fsdp, model), jax.devices()[: data * fsdp * model])

    def start(self, task: PretrainTask, mesh: Mesh, microbatch: int = 0, seed: int = 0):
        """(state at step 0, step function, abstract state); a micro-batch is all rows of a device by default."""
        config = build(PretrainConfig, self.values(workdir="unused"), "the test")
        optimizer, example = make_optimizer(config.optimizer, config.steps), self.batch(task, 0)
        abstract = abstract_state(task, optimizer, example, mesh)
        state = fresh_state(task, optimizer, example, abstract, seed)
        step = make_step(task, optimizer, abstract, mesh, microbatch or task.batch_size // row_ways(mesh), seed)
        return state, step, abstract

    def batch(self, task: PretrainTask, step: int) -> dict[str, np.ndarray]:
        return task.train_batch(step)

    def run(self, task: PretrainTask, mesh: Mesh, microbatch: int = 0, steps: int = 3):
        """(losses, metrics of the last step, state) after some steps."""
        state, step_function, _ = self.start(task, mesh, microbatch)
        losses, metrics = [], {}
        for step in range(steps):
            state, loss, metrics = step_function(state, put_batch(self.batch(task, step), mesh))
            losses.append(float(loss))
        return losses, {name: float(m.total) / float(m.weight) for name, m in metrics.items()}, state


@pytest.fixture(scope="session")
def tiny(corpus) -> Tiny:
    return Tiny(corpus)


def numpy_leaves(state: TrainState) -> dict[str, np.ndarray]:
    """Every array of a state on the host, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="session", name="numpy_leaves")
def numpy_leaves_fixture():
    return numpy_leaves
