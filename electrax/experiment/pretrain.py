"""Composes the parts: configs into objects, objects into a run. The one place where a name becomes an object."""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from electrax.config import UserError, build, read_toml, to_toml
from electrax.data.corpus import MANIFEST_FILE, Corpus, sample_path
from electrax.data.prepare import PrepareConfig, Progress, prepare
from electrax.data.shards import write_atomically
from electrax.data.tokenizer import Tokenizer
from electrax.inference.model import PretrainedModel
from electrax.models.flops import pretraining_step
from electrax.models.sizes import GeneratorConfig, ModelConfig, discriminator_shape, generator_shape
from electrax.tasks.base import Batch, Params
from electrax.tasks.corruption import slot_count
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from electrax.training.checkpoint import CheckpointConfig, Checkpoints, restore_newest_params
from electrax.training.evaluate import make_evaluate
from electrax.training.loop import EvalConfig, LogConfig, Record, train
from electrax.training.optim import OptimizerConfig, make_optimizer
from electrax.training.sharding import MeshConfig, local_rows, make_mesh, put_batch, row_ways
from electrax.training.state import (
    TrainState,
    abstract_params,
    abstract_state,
    choose_microbatch,
    fresh_state,
    make_step,
)

# entered around a preparation, gives what `prepare` reports its progress to
Watcher = contextlib.AbstractContextManager[Callable[[Progress], None]]
QUIET: Watcher = contextlib.nullcontext(lambda _: None)
CONFIG_FILE, RESULTS_FILE = "config.toml", "results.json"
MAY_CHANGE = {"workdir", "steps", "epochs", "init_from", "checkpoint", "eval", "log", "mesh"}  # when a run is resumed


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text. What is not prepared yet is prepared into the work directory first, as these keys say; a prepared
    directory's manifest says them itself."""

    path: str = ""  # a prepared directory, a text file, a folder, a glob, or "sample"
    tokenizer: str = "wordpiece"  # wordpiece, bpe, unigram or sentencepiece-bpe to train one, or a path to load one
    vocab_size: int = 30522  # of a tokenizer to train
    lowercase: bool = True  # for wordpiece and vocab.txt
    layout: Literal["packed", "segments"] = "packed"  # documents end to end, or the reference's sentence pairs
    max_length: int = 128  # tokens in a row
    holdout: float = 0.01  # share of documents kept for evaluation


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run. `steps`, or `epochs` over the training rows."""

    task: Literal["pretrain"] = "pretrain"
    workdir: str = ""  # where everything of the run is kept; a run that is there is continued
    seed: int = 0  # of weights, data order, masks, samples and dropout
    steps: int = 0  # updates
    epochs: float = 0.0  # over the training rows, instead of steps
    batch_size: int = 128  # rows of a step, over all devices
    init_from: str = ""  # work directory of a run to take the weights from
    faithful: bool = False  # the reference's known flaws too
    model: ModelConfig = ModelConfig()
    generator: GeneratorConfig = GeneratorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not self.workdir:
            raise UserError("workdir is empty; say where the run shall be kept, as in --workdir runs/first")
        if (self.steps > 0) == (self.epochs > 0):
            raise UserError(
                f"exactly one of steps and epochs must be above 0, not steps {self.steps} and epochs {self.epochs}"
            )
        for key, value in {
            "batch_size": self.batch_size,
            "log.every": self.log.every,
            "eval.every": self.eval.every,
        }.items():
            if value < 1:
                raise UserError(f"{key} must be at least 1, not {value}")
        for key in ("mask_prob", "keep_prob", "random_prob"):
            if not 0 <= getattr(self.objective, key) <= 1:
                raise UserError(f"objective.{key} must lie between 0 and 1, not {getattr(self.objective, key)}")


def open_corpus(config: PretrainConfig, progress: Watcher) -> tuple[PretrainConfig, Corpus]:
    """The rows that `data.path` names, prepared first where it names text, and the config with what they are."""
    data, workdir = config.data, pathlib.Path(config.workdir)
    if not data.path:
        raise UserError('data.path is empty; it names a prepared directory, a text, or "sample" for the bundled books')
    path = pathlib.Path(data.path)
    if not (path / MANIFEST_FILE).is_file():
        texts = str(sample_path()) if data.path == "sample" else data.path
        path = workdir / "data"
        options = {f.name: getattr(data, f.name) for f in dataclasses.fields(data) if f.name != "path"}
        wanted = PrepareConfig(texts=(texts,), out=str(path), seed=config.seed, **options)
        if not (path / MANIFEST_FILE).is_file():
            workdir.mkdir(parents=True, exist_ok=True)
            with progress as report:
                prepare(wanted, report)
        corpus = Corpus.open(path)
        check_prepared(wanted, corpus)
    else:
        corpus = Corpus.open(path)
    manifest = corpus.manifest
    for split in ("train", "valid"):
        if not corpus.size(split):
            raise UserError(f"{path}: the split {split} has no rows; prepare more text or a larger --holdout")
    kept = dataclasses.replace(
        data, vocab_size=manifest.vocab_size, layout=manifest.layout, max_length=manifest.max_length
    )
    return dataclasses.replace(config, data=kept), corpus


def check_prepared(wanted: PrepareConfig, corpus: Corpus) -> None:
    """Raises UserError where the rows kept in a work directory were made with other settings than these."""
    made, manifest = corpus.manifest.config, corpus.manifest
    for key in ("tokenizer", "vocab_size", "lowercase", "layout", "max_length", "holdout"):
        # config.toml has the vocabulary's real size, which may be smaller than the one asked for
        if getattr(wanted, key) not in (made[key], getattr(manifest, key, made[key])):
            raise UserError(
                f"{corpus.directory} was prepared with data.{key} = {made[key]!r}, now {getattr(wanted, key)!r}; "
                "take another workdir, or remove that directory"
            )
    if pathlib.Path(wanted.texts[0]).name != pathlib.Path(made["texts"][0]).name:
        raise UserError(
            f"{corpus.directory} was prepared from {made['texts'][0]}, not from {wanted.texts[0]}; "
            "take another workdir, or remove that directory"
        )


def make_task(
    config: PretrainConfig, vocab_size: int, special_ids: dict[str, int], corpus: Corpus | None
) -> PretrainTask:
    """The objective over a vocabulary. Without a corpus it can do everything but read batches."""
    if config.data.max_length > config.model.max_length:
        raise UserError(
            f"model.max_length is {config.model.max_length}, but the rows have {config.data.max_length} tokens"
        )
    if not slot_count(config.data.max_length, config.objective.mask_prob):
        raise UserError(
            f"objective.mask_prob {config.objective.mask_prob} of data.max_length {config.data.max_length} tokens "
            "leaves no position to predict"
        )
    discriminator = discriminator_shape(config.model, vocab_size)
    masked_lm_alone = config.objective.kind == "mlm"
    generator = discriminator if masked_lm_alone else generator_shape(config.model, config.generator, discriminator)
    return PretrainTask(
        objective=config.objective,
        discriminator=discriminator,
        generator=generator,
        special=SpecialIds(**{role: special_ids[role] for role in ("pad", "cls", "sep", "mask")}),
        layout=config.data.layout,
        shared_embeddings=masked_lm_alone or config.generator.embeddings == "shared",
        faithful=config.faithful,
        corpus=corpus,
        batch_size=config.batch_size,
        eval_rows=config.eval.rows,
        seed=config.seed,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a training needs, made and checked."""

    config: PretrainConfig
    task: PretrainTask
    tokenizer: Tokenizer
    mesh: Mesh
    microbatch: int
    steps: int
    start: int
    state: TrainState
    step_function: Callable
    evaluate: Callable[[Params], tuple[dict[str, float], dict[str, np.ndarray]]]
    checkpoints: Checkpoints
    flops_per_step: float

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.data.max_length

    def compiled(self) -> tuple["Run", int]:
        """The run with its step compiled, and the bytes of a device that the step needs (0: not known)."""
        example = put_batch(self.task.train_batch(self.start, local_rows(self.config.batch_size)), self.mesh)
        step = self.step_function.lower(self.state, example).compile()
        memory = step.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0
        return dataclasses.replace(self, step_function=step), needed

    def train(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Record]:
        return train(
            self.task,
            self.state,
            self.step_function,
            self.evaluate,
            self.checkpoints,
            self.mesh,
            steps=self.steps,
            eval_every=self.config.eval.every,
            save_every=self.config.checkpoint.every,
            log_every=self.config.log.every,
            stop=stop,
        )


def set_up(config: PretrainConfig, progress: Watcher = QUIET) -> Run:
    """Prepares what is not there yet and checks that everything fits, before step 0. Resumes from the newest whole
    checkpoint of the work directory; otherwise starts fresh, from the weights of `init_from` if given."""
    mesh = make_mesh(config.mesh)
    ways = row_ways(mesh)
    if config.batch_size % ways:
        larger = math.ceil(config.batch_size / ways) * ways
        raise UserError(
            f"batch_size {config.batch_size} does not divide over {ways} devices; the next one that does is {larger}"
        )
    config, corpus = open_corpus(config, progress)
    tokenizer = corpus.tokenizer()
    steps = config.steps or math.ceil(config.epochs * corpus.size("train") / config.batch_size)
    keep_config(config, tokenizer)
    task = make_task(config, tokenizer.vocab_size, tokenizer.special_ids, corpus)
    microbatch = choose_microbatch(
        config.optimizer.microbatch, config.batch_size // ways, config.data.max_length, jax.default_backend()
    )
    optimizer = make_optimizer(config.optimizer, steps, config.faithful)
    example = {"ids": corpus.rows("train", np.zeros(config.batch_size, np.int64))}
    abstract = abstract_state(task, optimizer, example, mesh)
    checkpoints = Checkpoints(pathlib.Path(config.workdir) / "checkpoints", config.checkpoint.keep)
    restored = checkpoints.restore(abstract)
    start, state = restored or (0, fresh_state(task, optimizer, example, abstract, config.seed))
    if restored is None and config.init_from:
        state = state.replace(params=initial_params(config.init_from, abstract.params, mesh))
    step_function = make_step(task, optimizer, abstract, mesh, microbatch, config.seed)
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
        evaluate=make_evaluate(task, mesh),
        checkpoints=checkpoints,
        flops_per_step=pretraining_step(
            task.generator,
            task.discriminator if task.detects else None,
            config.batch_size,
            config.data.max_length,
            slot_count(config.data.max_length, config.objective.mask_prob),
        ),
    )


def keep_config(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Writes config.toml and the tokenizer into the work directory. Raises UserError where checkpoints are kept there
    of a run that this one does not continue."""
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / CONFIG_FILE).is_file() and any((workdir / "checkpoints").glob("[0-9]*")):
        before, now = dataclasses.asdict(read_config(workdir)), dataclasses.asdict(config)
        for key, old, new in _differences(before, now):
            if key.split(".")[0] not in MAY_CHANGE and key != "optimizer.microbatch":
                raise UserError(
                    f"{workdir} holds a run with {key} = {old!r}, now {new!r}; take another workdir for a new run"
                )
        if Tokenizer.load(workdir).sha256 != tokenizer.sha256:
            raise UserError(f"{workdir} holds a run with another tokenizer than that of {config.data.path}")
    tokenizer.save(workdir)
    write_atomically(workdir / CONFIG_FILE, to_toml(config))


def _differences(before: dict, now: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in now.items():
        if isinstance(value, dict):
            yield from _differences(before[key], value, f"{prefix}{key}.")
        elif before[key] != value:
            yield prefix + key, before[key], value


def read_config(workdir: str | os.PathLike) -> PretrainConfig:
    """The resolved config of a run; raises UserError where the directory holds none."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the work directory of an electrax run")
    return build(PretrainConfig, read_toml(path), str(path))


def load_params(workdir: str | os.PathLike, mesh: Mesh | None = None) -> tuple[int, Params]:
    """(step, parameters) of the newest whole checkpoint of a run, on a mesh (default: the first device)."""
    config, tokenizer = read_config(workdir), Tokenizer.load(workdir)
    task = make_task(config, tokenizer.vocab_size, tokenizer.special_ids, None)
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    example: Batch = {"ids": np.zeros((1, config.data.max_length), np.uint16)}
    abstract = abstract_params(task, example, mesh)
    restored = restore_newest_params(pathlib.Path(workdir) / "checkpoints", abstract)
    if restored is None:
        raise UserError(f"{workdir}: no checkpoint yet")
    return restored


def initial_params(workdir: str, like: Params, mesh: Mesh) -> Params:
    """The parameters of another run, if they have the shapes of `like`."""
    params = load_params(workdir, mesh)[1]
    if jax.tree.map(lambda leaf: leaf.shape, params) != jax.tree.map(lambda leaf: leaf.shape, like):
        raise UserError(f"init_from {workdir}: its model has other shapes or parts than this run's")
    return params


def evaluate_newest(config: PretrainConfig) -> tuple[PretrainTask, Tokenizer, Record]:
    """The newest whole checkpoint of a run on the held-out rows that `data` names."""
    mesh = make_mesh(config.mesh)
    config, corpus = open_corpus(config, QUIET)
    tokenizer = corpus.tokenizer()
    if Tokenizer.load(config.workdir).sha256 != tokenizer.sha256:
        raise UserError(f"{config.data.path}: prepared with another tokenizer than the model in {config.workdir}")
    task = make_task(config, tokenizer.vocab_size, tokenizer.special_ids, corpus)
    step, params = load_params(config.workdir, mesh)
    return task, tokenizer, Record(step, "eval", *make_evaluate(task, mesh)(params))


def load(workdir: str | os.PathLike) -> PretrainedModel:
    """A trained model from the work directory of a run: its newest whole checkpoint and its tokenizer."""
    config, tokenizer = read_config(workdir), Tokenizer.load(workdir)
    task = make_task(config, tokenizer.vocab_size, tokenizer.special_ids, None)
    return PretrainedModel(
        load_params(workdir)[1],
        tokenizer,
        task.generator,
        task.discriminator if task.detects else None,
        config.data.max_length,  # later positions were never trained
    )
