"""What a run can be told: the keys of its TOML file and of the command line, with their defaults."""

import dataclasses
import os
from typing import Literal

import jax

from electrax.config import AnyPath, UserError, build, check_seed, read_toml
from electrax.data.outside import is_file_name, read_object
from electrax.data.templates import check_template
from electrax.experiment.examples import ExamplesConfig
from electrax.experiment.run import CONFIG_FILE, RESULTS_FILE, differences, is_among
from electrax.models.attention import GPU_ATTENTION
from electrax.models.heads import HeadStyle
from electrax.models.sizes import GeneratorConfig, ModelConfig
from electrax.storage import on_this_machine, path_of
from electrax.tasks.pretrain import ObjectiveConfig
from electrax.tasks.rewrite import DecoderWeights
from electrax.training.checkpoint import CheckpointConfig
from electrax.training.loop import EvalConfig, LogConfig
from electrax.training.optim import OptimizerConfig
from electrax.training.sharding import MeshConfig

NULL_THRESHOLDS = {"joint": -2.75, "plain": 0.0}  # the reference's, and that of equal scores


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
    init_from: str = ""  # work directory of a run, or a model of another format, whose weights are the start
    profile: bool = False  # trace a few steps and show where their time goes
    dry_run: bool = False  # only show what a step needs of each device, also of devices that are not there
    steps_per_dispatch: int = 0  # steps that one call takes where nothing is due between them; 0: as suits the device
    rows_on_device: Literal["auto", "always", "never"] = "auto"  # training rows; auto: if few for a GPU
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
        check_seed(self.seed)
        if self.profile:
            on_this_machine(self.workdir, "the trace of --profile")
        if (self.steps > 0) == (self.epochs > 0):
            raise UserError(
                f"exactly one of steps and epochs must be above 0, not steps {self.steps} and epochs {self.epochs}"
            )
        for key, value in {
            "batch_size": self.batch_size,
            "log.every": self.log.every,
            "eval.every": self.eval.every,
            "checkpoint.every": self.checkpoint.every,
        }.items():
            if value < 1:
                raise UserError(f"{key} must be at least 1, not {value}")
        shortest = min(self.log.every, self.eval.every, self.checkpoint.every)
        if not 0 <= self.steps_per_dispatch <= shortest:
            raise UserError(
                f"steps_per_dispatch must lie between 0 and the {shortest} steps after which a log line, an evaluation "
                f"or a checkpoint is due, not {self.steps_per_dispatch}"
            )
        for key in ("mask_prob", "keep_prob", "random_prob", "causal_share"):
            if not 0 <= getattr(self.objective, key) <= 1:
                raise UserError(f"objective.{key} must lie between 0 and 1, not {getattr(self.objective, key)}")

    @property
    def is_causal_alone(self) -> bool:
        """Whether all there is is one left-to-right LM."""
        return self.objective.kind == "mlm" and self.generator.kind == "causal"


@dataclasses.dataclass(frozen=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    """As in pretraining, with fine-tuning's defaults."""

    learning_rate: float = 0.0  # 0: the paper's for the model's size
    layer_decay: float = 0.0  # 0: the paper's for the model's size
    warmup_steps: float = 0.0
    warmup_share: float = 0.1  # of all steps, where warmup_steps is 0
    weight_decay: float = 0.0  # the paper's; faithful makes it the reference's 0.01


@dataclasses.dataclass(frozen=True)
class FinetuneEvalConfig:
    every: int = 0  # steps; 0: once an epoch
    patience: int = 0  # evaluations without a better score after which training ends and the best is kept; 0: never

    def __post_init__(self):
        if self.every < 0 or self.patience < 0:
            found = f"{self.every} and {self.patience}"
            raise UserError(f"eval.every and eval.patience must not be negative, not {found}")


@dataclasses.dataclass(frozen=True)
class FinetuneCheckpointConfig(CheckpointConfig):
    every: int = 0  # steps; 0: with each evaluation
    keep: int = 2  # latest ones; the best evaluated one stays beside them


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What the head's outputs are; the sizes come from the data."""

    # one class, several labels, a number, or the number of the right one among choices, counted from 0
    kind: Literal["classes", "labels", "number", "choice"] = "classes"
    style: HeadStyle = "linear"  # dense: as Transformers' classification head
    template: str = ""  # few-shot: which label's word looks original here, as in "{text} It was {label}."; no new head
    words: tuple[str, ...] = ()  # of the classes in the template, in their order; default: their names
    spans: Literal["joint", "plain"] = "joint"  # the paper's head of question answering, or two logits a token
    no_answer: bool = False  # questions may be without an answer (SQuAD 2.0)
    null_threshold: float | None = None  # a null score above it means no answer; default: joint -2.75, plain 0
    max_answer: int = 30  # tokens
    n_best: int = 20  # answers kept of a question
    constrained: bool = True  # only tag sequences that the scheme allows

    def __post_init__(self):
        if self.max_answer < 1 or self.n_best < 1:
            found = f"{self.max_answer} and {self.n_best}"
            raise UserError(f"head.max_answer and head.n_best must be at least 1, not {found}")


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Learning from a fine-tuned classifier's probabilities too."""

    path: str = ""  # its work directory
    weight: float = 0.5  # of its part in the loss
    temperature: float = 2.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What writes, in the task rewrite: as wide as the encoder that it reads."""

    layers: int = 0  # 0: as many as the encoder
    weights: DecoderWeights = "encoder"  # start as the encoder's layers, share them, or start as they are drawn
    tokenizer: str = ""  # of the target; default: the source's; else a kind to train on the targets, or a path
    vocab_size: int = 8000  # of a tokenizer to train
    max_length: int = 64  # tokens of an output
    label_smoothing: float = 0.1
    beams: int = 4  # of the search for the best output; 1: always the likeliest token
    length_penalty: float = 1.0  # the score is the log-probability over ((5 + tokens) / 6) to this power
    coverage_penalty: float = 0.0  # of what is left unread: times the source tokens' sum of log(min(attention, 1))

    def __post_init__(self):
        if self.layers < 0 or self.max_length < 2 or self.beams < 1:
            raise UserError(
                "decoder.layers must not be negative, decoder.max_length at least 2 and decoder.beams at least 1, not "
                f"{self.layers}, {self.max_length} and {self.beams}"
            )
        if self.coverage_penalty < 0:
            raise UserError(f"decoder.coverage_penalty must not be negative, not {self.coverage_penalty}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"decoder.label_smoothing must be at least 0 and below 1, not {self.label_smoothing}")


TEXT_COLUMNS = {
    "classify": ((1, 2), "one column, or two of a pair"),
    "choice": (range(3, 1000), "a context and two choices or more"),
    "tag": ((1,), "the one of the words"),
    "answer": ((2,), "that of the question and that of the context"),
    "rewrite": ((1,), "one"),
}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run. Without `init_from` the model of [model] starts from random weights."""

    task: Literal["classify", "tag", "answer", "rewrite"] = "classify"  # texts, words, questions on a text, or to texts
    workdir: str = ""  # where everything of the run is kept; a run that is there is continued
    seed: int = 0  # of the head, data order and dropout
    seeds: int = 1  # models to train, with seed, seed + 1, …
    seeds_at_once: int = 0  # models trained side by side; 0: as many as fit on an accelerator, one on a CPU
    steps: int = 0  # updates; 0: as epochs say
    epochs: float = 3.0  # over the training rows
    batch_size: int = 32  # rows of a step, over all devices
    init_from: str = ""  # work directory of a run, or a model of another format, whose weights are the start
    profile: bool = False  # trace a few steps and show where their time goes; of one seed
    dry_run: bool = False  # only show what a step needs of each device, also of devices that are not there
    faithful: bool = False  # the reference's way: summed loss, layer-wise decay off by one
    metric: str = ""  # the score; default: the benchmark's, or accuracy, f1 (tags, answers), bleu, spearman, micro_f1
    freeze_embeddings: bool = False  # they and their projection stay as they are
    freeze_layers: int = 0  # so many layers stay as they are, from the first on
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    decoder: DecoderConfig = DecoderConfig()
    data: ExamplesConfig = ExamplesConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    checkpoint: FinetuneCheckpointConfig = FinetuneCheckpointConfig()
    eval: FinetuneEvalConfig = FinetuneEvalConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not self.workdir:
            raise UserError("workdir is empty; say where the run shall be kept, as in --workdir runs/first")
        check_seed(self.seed, self.seeds)
        if self.profile:
            on_this_machine(self.workdir, "the trace of --profile")
        if self.steps <= 0 and self.epochs <= 0:
            raise UserError(f"steps or epochs must be above 0, not {self.steps} and {self.epochs}")
        for key, value in {"batch_size": self.batch_size, "seeds": self.seeds, "log.every": self.log.every}.items():
            if value < 1:
                raise UserError(f"{key} must be at least 1, not {value}")
        if self.profile and self.seeds > 1:
            raise UserError(f"profile is for one model; expected seeds 1, not {self.seeds}")
        for key, value in {"seeds_at_once": self.seeds_at_once, "freeze_layers": self.freeze_layers}.items():
            if value < 0:
                raise UserError(f"{key} must not be negative, but is {value}")
        if self.task == "rewrite" and (len(self.data.text) != 1 or self.data.format not in ("table", "parallel")):
            raise UserError(
                "the task rewrite reads a table or parallel files, and data.text names one column or ending"
            )
        if self.data.format == "table" and (self.data.path or self.task == "classify"):
            kind = "choice" if self.task == "classify" and self.head.kind == "choice" else self.task
            texts, (wanted, expected) = len(self.data.text), TEXT_COLUMNS[kind]
            if texts not in wanted:
                raise UserError(f"data.text names {texts} columns; expected {expected}")
        if self.task != "classify" and (self.teacher.path or self.head.style != "linear"):
            raise UserError(f"teacher.path and head.style are for the task classify, not {self.task}")
        if self.head.template:
            if self.task != "classify" or self.head.kind != "classes" or self.head.style != "linear":
                raise UserError("head.template is for the task classify with head.kind classes and no head.style")
            if not self.init_from or self.teacher.path:
                raise UserError("head.template needs init_from, a pretrained discriminator, and takes no teacher.path")
            check_template(self.head.template, self.head.words or ("one", "another"))  # the names of classes differ
        elif self.head.words:
            raise UserError("head.words are those of a head.template, which is empty")
        if not 0 <= self.teacher.weight <= 1 or self.teacher.temperature <= 0:
            raise UserError("teacher.weight must lie between 0 and 1, and teacher.temperature above 0")
        if self.teacher != TeacherConfig() and not self.teacher.path:
            raise UserError("teacher.weight and teacher.temperature are those of a teacher.path, which is empty")


AnyConfig = PretrainConfig | FinetuneConfig
# keys that may be other ones when a trained model is evaluated
EVALUATED = {
    "workdir",
    "data",
    "eval",
    "batch_size",
    "mesh",
    "model.attention",
    "model.residual",
    "model.compute_dtype",
}
EVALUATED |= {"metric", "head.null_threshold", "head.max_answer", "head.n_best", "head.constrained"}
EVALUATED |= {"decoder.beams", "decoder.length_penalty", "decoder.coverage_penalty", "decoder.max_length"}
EVALUATED |= {"head.no_answer", "seed", "objective.mask_prob", "objective.keep_prob", "objective.random_prob"}
EVALUATED |= {"objective.causal_share", "objective.vocabulary_rows"}


def read_config(workdir: str | os.PathLike) -> AnyConfig:
    """The resolved config of a run; raises UserError where the directory holds none."""
    path = path_of(workdir) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the work directory of an electrax run")
    values = read_toml(path)
    return build(PretrainConfig if values.get("task") == "pretrain" else FinetuneConfig, values, str(path))


def check_evaluated(config: AnyConfig) -> None:
    """Raises UserError where the trained model of the work directory cannot be evaluated as this config says."""
    before = dataclasses.asdict(read_config(config.workdir))
    for key, old, new in differences(before, dataclasses.asdict(config)):
        if not is_among(key, EVALUATED):
            raise UserError(f"{key} {new!r}: the model was trained with {old!r}, which evaluate cannot change")


def computed_in(config: AnyConfig, compute_dtype: str | None) -> AnyConfig:
    """With matrix products in float32 or bfloat16 (None leaves them as they are; another is a UserError), and attention
    and residuals that this machine has."""
    if compute_dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"compute_dtype: expected float32 or bfloat16, not {compute_dtype!r}")
    changes = {} if compute_dtype is None else {"compute_dtype": compute_dtype}
    if config.model.attention in GPU_ATTENTION and (jax.default_backend() != "gpu" or compute_dtype == "float32"):
        changes["attention"] = "plain"
    if jax.default_backend() != "gpu":
        changes["residual"] = "plain"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def finished(workdir: str | os.PathLike) -> AnyPath:
    """Where the model is: the work directory itself, or of several seeds that of the best one."""
    workdir = path_of(workdir)
    if read_config(workdir).seeds == 1:
        return workdir
    if not (workdir / RESULTS_FILE).is_file():
        raise UserError(f"{workdir}: its seeds are not all trained yet; run its command again")
    best = read_object(workdir / RESULTS_FILE).get("best")
    if not is_file_name(best):
        raise UserError(f"{workdir / RESULTS_FILE}: expected the name of a folder beside it as the best run")
    return workdir / best
