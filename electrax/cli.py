"""argv and environment end here: `electrax COMMAND …`."""

import contextlib
import logging
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

from electrax.config import UserError

USAGE = """usage: electrax COMMAND …

  prepare   TEXT… --out DIR [--tokenizer …]      text -> tokenizer + token shards
  pretrain  CONFIG [--section.key value …]       train generator and discriminator; run again to continue
  evaluate  WORKDIR [--section.key value …]      the figures of a trained model on held-out rows

electrax COMMAND --help shows every option. --debug (anywhere) shows the traceback of an error."""


def main() -> None:
    """Exit status 0; 2 for wrong input, in one line; 130 after a stop that saved; 1 for a fault of electrax."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
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
    except KeyboardInterrupt:
        print("electrax: stopped", file=sys.stderr)
        sys.exit(130)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line (without the program's name); returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "prepare": prepare_command,
        "pretrain": pretrain_command,
        "evaluate": evaluate_command,
    }
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        raise UserError(f"{name}: no such command; expected one of {', '.join(commands)}")
    return commands[name](rest)


def _positional(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first --option, and the rest."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    return list(arguments[:first]), list(arguments[first:])


def _help(cls: type, program: str, arguments: Sequence[str]) -> bool:
    """Prints every option of a config dataclass if help is asked for."""
    if not {"-h", "--help"} & set(arguments):
        return False
    import tyro

    with contextlib.suppress(SystemExit):  # tyro's way to end after help
        tyro.cli(tyro.conf.FlagConversionOff[cls], prog=program, args=["--help"], use_underscores=True)
    return True


def _start_jax() -> None:
    """Compiled programs are kept in the user's cache directory, so that the next start is quick."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "electrax" / "jax"
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        jax.config.update("jax_compilation_cache_dir", str(cache))


def prepare_command(arguments: Sequence[str]) -> int:
    from electrax.config import build, parse_overrides
    from electrax.data.prepare import PrepareConfig, prepare
    from electrax.report import PrepareProgress, show_prepared

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


def pretrain_command(arguments: Sequence[str]) -> int:
    from electrax.config import find_config, load
    from electrax.experiment import PretrainConfig

    if _help(PretrainConfig, "electrax pretrain CONFIG", arguments):
        return 0
    names, options = _positional(arguments)
    if len(names) != 1:
        raise UserError("pretrain: expected one CONFIG (a shipped name or a TOML file), then --section.key value …")
    config = load(PretrainConfig, find_config(names[0], "pretrain"), options)
    _start_jax()
    from electrax.report import pretrain_and_report

    command = shlex.join(["electrax", "pretrain", *arguments])
    return pretrain_and_report(config, command)


def evaluate_command(arguments: Sequence[str]) -> int:
    from electrax.config import load
    from electrax.experiment import CONFIG_FILE, PretrainConfig, read_config

    if _help(PretrainConfig, "electrax evaluate WORKDIR", arguments):
        return 0
    names, options = _positional(arguments)
    if len(names) != 1:
        raise UserError("evaluate: expected one WORKDIR, then --section.key value …")
    read_config(names[0])  # a clear error where it holds no run
    config = load(PretrainConfig, pathlib.Path(names[0]) / CONFIG_FILE, [*options, f"--workdir={names[0]}"])
    _start_jax()
    from electrax.report import evaluate_and_report

    return evaluate_and_report(config)
