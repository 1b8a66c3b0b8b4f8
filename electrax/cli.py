"""argv and environment end here: `electrax COMMAND …`."""

import contextlib
import dataclasses
import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from electrax.config import UserError
from electrax.xla_flags import use_flags

USAGE = """usage: electrax COMMAND …

  prepare   TEXT… --out DIR [--tokenizer …]      text -> tokenizer + token shards
  pretrain  CONFIG [--section.key value …]       train generator and discriminator; run again to continue
  finetune  CONFIG [--section.key value …]       train a classifier, tagger, reader or translator; the same
  evaluate  WORKDIR [--section.key value …]      the figures of a trained model on held-out or dev rows
  predict   WORKDIR INPUT [--key value …]        one line or row in, one JSON object out
  generate  MODEL --prompt TEXT [--key value …]  texts that a causal language model writes on
  score     MODEL INPUT [--by …] [--key value …] perplexity, pseudo-log-likelihood or originality of texts
  augment   DATASET --out FILE --generator MODEL   new examples made of old ones, to fine-tune or pretrain on
  convert   FROM TO [--key value …]              Hugging Face or TensorFlow to electrax, electrax to Hugging Face
  export    MODEL OUT [--format …]               a trained model as StableHLO, ONNX or safetensors

electrax COMMAND --help shows every option. --debug (anywhere) shows the traceback of an error.

Several processes can be one pretrain, finetune or evaluate. Under SLURM, Open MPI and on TPU VMs they find each other;
elsewhere each is started with --coordinator HOST:PORT --num_processes N --process_id I (or JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES, JAX_PROCESS_ID). --heartbeat_seconds 100: after so long a process that has died ends the others."""


# a full disk, a quota, a file too large for it, a directory that is read-only or another user's
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
OUT_OF_MEMORY = "the device has too little memory"
SMALLER = "; expected a smaller optimizer.microbatch, batch_size or data.max_length"
TRAINING = ("pretrain", "finetune", "evaluate")  # commands that several processes may run together


def main() -> None:
    """Exit status 0; 2 for wrong input, in one line; 130 after a stop that saved; 1 for a fault of electrax."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    use_flags()
    try:
        sys.exit(run(arguments))
    except UserError as error:
        if debug:
            raise
        print(f"electrax: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # the reader of our output, `head` say, has gone; Python must not fail again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except RuntimeError as error:
        if debug or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        smaller = SMALLER if arguments[0] in TRAINING else ""
        print(f"electrax: {OUT_OF_MEMORY}{smaller} ({_first_line(error)})", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if debug or error.errno not in STORAGE:
            raise
        print(f"electrax: {error.filename or 'storage'}: {error.strerror}; what was saved is whole", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("electrax: stopped", file=sys.stderr)
        sys.exit(130)


def _first_line(error: Exception) -> str:
    return str(UserError(str(error).partition("\n")[0]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line (without the program's name); returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "prepare": prepare_command,
        "pretrain": pretrain_command,
        "finetune": finetune_command,
        "evaluate": evaluate_command,
        "predict": predict_command,
        "generate": generate_command,
        "score": score_command,
        "augment": augment_command,
        "convert": convert_command,
        "export": export_command,
    }
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        raise UserError(f"{name}: no such command; expected one of {', '.join(commands)}")
    return commands[name](_join_others(rest) if name in TRAINING else rest)


def _join_others(arguments: Sequence[str]) -> list[str]:
    """Makes this process one of several where the arguments or the surroundings say so; the other arguments."""
    if {"-h", "--help"} & set(arguments):
        return list(arguments)
    from electrax.config import build, parse_overrides
    from electrax.training.processes import ProcessConfig, is_first, join

    names = {f"--{field.name}" for field in dataclasses.fields(ProcessConfig)}
    own, rest, left = [], [], list(arguments)
    while left:
        word = left.pop(0)
        if word.partition("=")[0] not in names:
            rest.append(word)
            continue
        own += [word] if "=" in word or not left else [word, left.pop(0)]
    if join(build(ProcessConfig, parse_overrides(own), "command line")) and not is_first():
        from electrax.report.common import console

        console.quiet = True
        logging.getLogger("electrax").setLevel(logging.ERROR)
    return rest


def _positional(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first --option, and the rest."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("--") or word == "-h"), len(arguments))
    return list(arguments[:first]), list(arguments[first:])


def _help(cls: type, program: str, arguments: Sequence[str]) -> bool:
    """Prints every option of a config dataclass if help is asked for."""
    if not {"-h", "--help"} & set(arguments):
        return False
    import tyro

    with contextlib.suppress(SystemExit):  # tyro's way to end after help
        tyro.cli(tyro.conf.FlagConversionOff[cls], prog=program, args=["--help"], use_underscores=True)
    return True


def use_compilation_cache() -> None:
    """Compiled programs are kept in the user's cache directory, so that the next start is quick; in one where others
    could have put a program they are not."""
    import jax

    from electrax.storage import own_cache

    if not jax.config.jax_compilation_cache_dir:
        try:
            jax.config.update("jax_compilation_cache_dir", str(own_cache("jax")))
            # by JAX's default only what took a second is kept, which of prediction's many small programs few do
            if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        except (OSError, UserError) as error:
            logging.getLogger("electrax").warning("compiled programs are not kept: %s", error)


def prepare_command(arguments: Sequence[str]) -> int:
    from electrax.config import build, parse_overrides
    from electrax.data.prepare import PrepareConfig, prepare
    from electrax.report.pretrain import PrepareProgress, show_prepared

    if _help(PrepareConfig, "electrax prepare TEXT…", arguments):
        return 0
    texts, options = _positional(arguments)
    values = parse_overrides(options)
    if not texts or "out" not in values:
        raise UserError("prepare: expected TEXT… --out DIR (files, folders, globs or tfds:NAME)")
    config = build(PrepareConfig, {**values, "texts": texts}, "command line")
    with PrepareProgress() as progress:
        result = prepare(config, progress)
    show_prepared(config.out, result)
    return 0


def _config(cls: type, kind: str, arguments: Sequence[str]):
    """The config that the first word names, with the rest over it."""
    from electrax.config import find_config, load

    names, options = _positional(arguments)
    if len(names) != 1:
        raise UserError(f"{kind}: expected one CONFIG (a shipped name or a TOML file), then --section.key value …")
    return load(cls, find_config(names[0], kind), options)


def pretrain_command(arguments: Sequence[str]) -> int:
    from electrax.experiment.config import PretrainConfig

    if _help(PretrainConfig, "electrax pretrain CONFIG", arguments):
        return 0
    config = _config(PretrainConfig, "pretrain", arguments)
    use_compilation_cache()
    from electrax.report.pretrain import pretrain_and_report

    return pretrain_and_report(config, shlex.join(["electrax", "pretrain", *arguments]))


def finetune_command(arguments: Sequence[str]) -> int:
    from electrax.experiment.config import FinetuneConfig

    command = shlex.join(["electrax", "finetune", *arguments])
    if _is_glue(arguments):
        from electrax.experiment.glue import GlueConfig

        if _help(GlueConfig, f"electrax finetune {arguments[0]}", arguments):
            return 0
        config = _config(GlueConfig, "finetune", arguments)
        use_compilation_cache()
        from electrax.report.glue import glue_and_report

        return glue_and_report(config, command)
    if _help(FinetuneConfig, "electrax finetune CONFIG", arguments):
        return 0
    config = _config(FinetuneConfig, "finetune", arguments)
    use_compilation_cache()
    from electrax.report.finetune import finetune_and_report

    return finetune_and_report(config, command)


def _is_glue(arguments: Sequence[str]) -> bool:
    """Whether the config is one of GLUE as a whole, which has keys of its own."""
    from electrax.config import find_config, read_toml

    names, _ = _positional(arguments)
    return len(names) == 1 and read_toml(find_config(names[0], "finetune")).get("task") == "glue"


def evaluate_command(arguments: Sequence[str]) -> int:
    from electrax.config import load
    from electrax.experiment.config import FinetuneConfig, PretrainConfig, check_evaluated, read_config
    from electrax.experiment.run import CONFIG_FILE
    from electrax.storage import path_of

    names, options = _positional(arguments)
    if len(names) != 1:
        if _help(PretrainConfig, "electrax evaluate WORKDIR (of a pretraining)", arguments):
            return 0
        raise UserError("evaluate: expected one WORKDIR, then --section.key value …")
    kind = type(read_config(names[0]))
    if _help(kind, f"electrax evaluate {names[0]}", arguments):
        return 0
    config = load(kind, path_of(names[0]) / CONFIG_FILE, [*options, f"--workdir={names[0]}"])
    check_evaluated(config)
    use_compilation_cache()
    from electrax.report import finetune, pretrain

    report = finetune if kind is FinetuneConfig else pretrain
    return report.evaluate_and_report(config)


def _two_words(cls: type, usage: str, keys: tuple[str, str], more: str, arguments: Sequence[str]):
    """The config of a command that takes two words, `usage` in upper case, for two of its keys; None after help."""
    from electrax.config import build, parse_overrides

    if _help(cls, f"electrax {usage}", arguments):
        return None
    words, options = _positional(arguments)
    if len(words) != 2:
        command, _, expected = usage.partition(" ")
        raise UserError(f"{command}: expected {expected} ({more}), then --key value …")
    return build(cls, {**parse_overrides(options), **dict(zip(keys, words, strict=True))}, "command line")


def predict_command(arguments: Sequence[str]) -> int:
    from electrax.inference.predict import PredictConfig

    more = "a file, or - for lines of standard input"
    config = _two_words(PredictConfig, "predict WORKDIR INPUT", ("model", "input"), more, arguments)
    if config is None:
        return 0
    use_compilation_cache()
    from electrax.experiment.finetuned import text_columns
    from electrax.experiment.saved import load
    from electrax.inference.batching import use_batch_tokens
    from electrax.inference.predict import predict_lines

    use_batch_tokens(config.batch_tokens)
    columns = text_columns(config.model)
    reranker = load(config.reranker) if config.reranker else None
    if reranker is not None and not hasattr(reranker, "originality"):
        raise UserError(f"reranker {config.reranker}: expected a pretrained model")
    for line in predict_lines(load(config.model, config.compute_dtype or None), config, columns, reranker):
        print(line, flush=True)
    return 0


def generate_command(arguments: Sequence[str]) -> int:
    from electrax.config import build, parse_overrides
    from electrax.inference.write import GenerateConfig, generate_lines

    if _help(GenerateConfig, "electrax generate MODEL", arguments):
        return 0
    words, options = _positional(arguments)
    if len(words) != 1:
        raise UserError("generate: expected one MODEL, then --prompt TEXT or --input FILE")
    config = build(GenerateConfig, {**parse_overrides(options), "model": words[0]}, "command line")
    return _show_lines(generate_lines, config)


def score_command(arguments: Sequence[str]) -> int:
    from electrax.inference.write import ScoreConfig, score_lines

    more = "a .txt file, or - for lines of standard input"
    config = _two_words(ScoreConfig, "score MODEL INPUT", ("model", "input"), more, arguments)
    if config is None:
        return 0
    from electrax.inference.batching import use_batch_tokens

    use_batch_tokens(config.batch_tokens)
    return _show_lines(score_lines, config)


def _show_lines(lines: Callable, config) -> int:
    use_compilation_cache()
    from electrax.experiment.saved import load
    from electrax.inference.model import PretrainedModel

    model = load(config.model)
    if not isinstance(model, PretrainedModel):
        raise UserError(f"{config.model}: expected a pretrained model; predict is for fine-tuned ones")
    for line in lines(model, config):
        print(line, flush=True)
    return 0


def augment_command(arguments: Sequence[str]) -> int:
    from electrax.config import build, parse_overrides
    from electrax.experiment.augment import AugmentConfig, augment

    if _help(AugmentConfig, "electrax augment DATASET", arguments):
        return 0
    words, options = _positional(arguments)
    if len(words) != 1:
        raise UserError("augment: expected one DATASET, then --out FILE --generator MODEL")
    config = build(AugmentConfig, {**parse_overrides(options), "dataset": words[0]}, "command line")
    use_compilation_cache()
    from electrax.report.common import console

    counts = augment(config)
    console.print(", ".join(f"{count:,} {name}" for name, count in counts.items()) + f": wrote {config.out}")
    return 0


def convert_command(arguments: Sequence[str]) -> int:
    from electrax.experiment.foreign import ConvertConfig

    more = "a model, a new directory"
    config = _two_words(ConvertConfig, "convert FROM TO", ("source", "out"), more, arguments)
    if config is not None:
        from electrax.report.convert import convert_and_report

        convert_and_report(config)
    return 0


def export_command(arguments: Sequence[str]) -> int:
    from electrax.convert.export import ExportConfig

    more = "a trained model, a new directory"
    config = _two_words(ExportConfig, "export MODEL OUT", ("model", "out"), more, arguments)
    if config is not None:
        from electrax.report.export import export_and_report

        export_and_report(config)
    return 0
