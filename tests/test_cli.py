"""The command line from its words to its exit status, in this process."""

import contextlib
import errno
import io
import json
import os
import pathlib
import random
import re
import runpy
import shutil
import sys

import jax
import numpy as np
import pytest

import electrax
from electrax import cli
from electrax.config import UserError, find_config
from electrax.report.common import alone

TOML = """# a run of four steps
steps = 4
batch_size = 8
[model]
size = "tiny"
layers = 2
width = 32
heads = 2
embedding_width = 16
max_length = 32
[generator]
layers = 1
[data]
max_length = 32
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
[checkpoint]
every = 2
[log]
every = 2
[eval]
rows = 12
"""


def call(*words):
    """(exit status, standard output) of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = cli.run([str(word) for word in words])
    return status, output.getvalue()


def main(monkeypatch, capsys, *words):
    """(exit status, standard output, standard error) of the program itself."""
    monkeypatch.setattr(sys, "argv", ["electrax", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text of made-up sentences and a config."""
    folder = tmp_path_factory.mktemp("cli")
    chance = random.Random(1)
    words = [chance.choice("bdfgklmnprst") + vowel + chance.choice("klmnrst") for vowel in "aeiou" for _ in range(12)]
    documents = (" ".join(chance.choices(words, k=40)) + "." for _ in range(100))
    (folder / "text.txt").write_text("\n\n".join(documents))
    (folder / "run.toml").write_text(TOML)
    return folder


@pytest.fixture(scope="module")
def prepared(folder):
    """(the directory that `prepare` made, what it printed)"""
    words = ["--vocab_size", "100", "--max-length=32", "--holdout", "0.2", "--workers", "1"]
    status, output = call("prepare", folder / "text.txt", "--out", folder / "rows", *words)
    assert status == 0
    return folder / "rows", output


@pytest.fixture(scope="module")
def trained(folder, prepared):
    """(work directory, what `pretrain` printed)"""
    words = ["--data.path", prepared[0], "--workdir", folder / "work"]
    status, output = call("pretrain", folder / "run.toml", *words)
    assert status == 0
    return folder / "work", output


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "pretrian: no such command; expected one of prepare, pretrain, finetune, evaluate"),
        (["pretrain"], "pretrain: expected one CONFIG"),
        (["pretrain", "a", "b"], "pretrain: expected one CONFIG"),
        (["pretrain", "nothing.toml"], "nothing.toml: no such file, and no shipped config of that name; shipped: "),
        (["pretrain", "RUN", "--modle.size", "tiny"], "command line: unknown key modle; did you mean model?"),
        (
            ["pretrain", "RUN", "--model.sizes", "tiny"],
            "command line: unknown key model.sizes; did you mean model.size?",
        ),
        (["pretrain", "RUN", "--steps", "many"], 'command line: steps is "many", but must be a whole number'),
        (["pretrain", "RUN", "-x"], "pretrain: expected one CONFIG"),
        (["pretrain", "RUN"], "workdir is empty"),
        (["pretrain", "RUN", "--workdir", "w", "--steps", "0"], "exactly one of steps and epochs must be above 0"),
        (["pretrain", "RUN", "--workdir", "w", "--epochs", "2"], "exactly one of steps and epochs must be above 0"),
        (["pretrain", "RUN", "--workdir", "w"], "data.path is empty"),
        (["pretrain", "RUN", "--workdir", "w", "--batch_size", "9"], "batch_size 9 does not divide over 8 devices"),
        (["pretrain", "RUN", "--workdir", "w", "--mesh.fsdp", "3"], "mesh.fsdp 3 x mesh.model 1 does not divide 8"),
        (["pretrain", "RUN", "--workdir", "w", "--data.path", "gone.txt"], "gone.txt"),
        (["pretrain", "RUN", "--workdir", "w", "--log.every", "0"], "log.every must be at least 1, not 0"),
        (
            ["pretrain", "tiny", "--workdir", "w", "--log.every", "5", "--steps_per_dispatch", "8"],
            "steps_per_dispatch must lie between 0 and the 5 steps",
        ),
        (
            ["pretrain", "RUN", "--workdir", "w", "--model.attention", "cudnn"],
            "model.attention cudnn needs an NVIDIA GPU, not a cpu; expected plain or xla",
        ),
        (
            ["pretrain", "RUN", "--workdir", "w", "--model.residual", "fused"],
            "model.residual fused needs an NVIDIA GPU, not a cpu; expected plain",
        ),
        (["pretrain", "RUN", "--workdir", "w", "--seed", "4294967296"], "seed must lie between 0 and 4294967295"),
        (["pretrain", "RUN", "--workdir", "w", "--eval.rows", "-1"], "eval.rows must be at least 1, or 0 for all rows"),
        (["prepare", "a.txt"], "prepare: expected TEXT… --out DIR"),
        (["prepare", "gone.txt", "--out", "w"], "gone.txt"),
        (["evaluate", "gone"], "gone/config.toml: no such file; expected the work directory of an electrax run"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    words = [str(folder / "run.toml") if word == "RUN" else word for word in words]
    status, output, error = main(monkeypatch, capsys, *words)
    assert status == 2
    assert error.startswith("electrax: ")
    assert message in error
    assert error.count("\n") == 1
    assert output == ""


def test_debug_anywhere_shows_where_an_error_arose(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["electrax", "pretrain", "--debug", "nothing.toml"])
    with pytest.raises(UserError, match="nothing.toml: no such file"):
        cli.main()


def test_ctrl_c_ends_with_status_130_and_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    status, _, error = main(monkeypatch, capsys, "pretrain", "tiny")
    assert (status, error) == (130, "electrax: stopped\n")


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
)
def test_storage_that_takes_no_more_is_one_line(monkeypatch, capsys, number, told):
    def full(arguments):
        raise OSError(number, os.strerror(number), "runs/a/metrics.jsonl")

    monkeypatch.setattr(cli, "run", full)
    status, _, error = main(monkeypatch, capsys, "pretrain", "tiny")
    assert (status, error) == (2, f"electrax: runs/a/metrics.jsonl: {told}; what was saved is whole\n")


def test_a_device_without_memory_is_one_line(monkeypatch, capsys):
    def full(arguments):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."
        )

    monkeypatch.setattr(cli, "run", full)
    status, _, error = main(monkeypatch, capsys, "pretrain", "tiny")
    assert (status, error.count("\n")) == (2, 1)
    assert "expected a smaller optimizer.microbatch" in error and "Out of memory while trying to allocate" in error
    assert "optimizer" not in main(monkeypatch, capsys, "predict", "run", "in.txt")[2]


def test_another_fault_of_the_system_is_shown_as_it_is(monkeypatch):
    def broken(arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cli, "run", broken)
    monkeypatch.setattr(sys, "argv", ["electrax", "pretrain", "tiny"])
    with pytest.raises(OSError, match="Input/output error"):
        cli.main()


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_program_names_its_commands(monkeypatch, capsys, words):
    status, output, error = main(monkeypatch, capsys, *words)
    assert (status, error) == (0, "")
    assert {"prepare", "pretrain", "evaluate"} <= set(output.split())


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("prepare", ["--out", "--vocab_size", "--layout", "--holdout", "--workers"]),
        ("pretrain", ["--workdir", "--model.size", "--data.path", "--optimizer.learning_rate", "--mesh.fsdp"]),
        ("evaluate", ["--eval.rows", "--mesh.data"]),
    ],
)
def test_help_of_a_command_names_its_keys(command, keys):
    status, output = call(command, "--help")
    assert status == 0
    assert f"electrax {command}" in output
    assert set(keys) <= set(re.findall(r"--[\w.]+", output))


def test_python_m_electrax_is_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["electrax"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("electrax", run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: electrax COMMAND")


# -- prepare, pretrain, evaluate --------------------------------------------------------------------------------------


def test_prepare_leaves_a_corpus_and_says_what_is_in_it(prepared):
    rows, output = prepared
    manifest = json.loads((rows / "manifest.json").read_text())
    train, valid = (manifest["splits"][name]["rows"] for name in ("train", "valid"))
    assert valid > 12
    assert re.search(rf"train\D+80\D+{train}\b", output)
    assert re.search(rf"valid\D+20\D+{valid}\b", output)


def test_pretrain_leaves_everything_that_belongs_to_a_run(trained):
    workdir, _ = trained
    names = {path.name for path in workdir.iterdir()}
    assert {"config.toml", "metrics.jsonl", "results.json", "tokenizer.json", "checkpoints"} <= names
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir()) == ["2", "4"]
    assert len([name for name in names if name.startswith("events.out.tfevents")]) == 1
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_preflight_shows_flops_by_both_counts(trained):
    step, run = map(float, re.search(r"FLOPs a step +(\S+) in matrix products \((\S+) the run\)", trained[1]).groups())
    assert run == pytest.approx(4 * step, rel=0.01)
    step, run = map(float, re.search(r"as the paper +counts FLOPs: (\S+) a step, (\S+) the run", trained[1]).groups())
    assert run == pytest.approx(4 * step, rel=0.01)


def test_the_results_have_the_promised_keys_and_possible_values(trained):
    results = json.loads((trained[0] / "results.json").read_text())
    rates = {
        "mlm_accuracy",
        "sampled_accuracy",
        "replaced_share",
        "rtd_accuracy",
        "rtd_precision",
        "rtd_recall",
        "rtd_auc",
    }
    assert {"step", "mlm_loss", "rtd_loss"} | rates <= results.keys()
    assert results["step"] == 4
    assert all(results[name] is None or 0 <= results[name] <= 1 for name in rates)
    # in four steps next to nothing is learned: ln V for V of at most 100, and ln 2
    assert results["mlm_loss"] == pytest.approx(np.log(100), abs=0.3)
    assert results["rtd_loss"] == pytest.approx(np.log(2), abs=0.2)
    assert results["loss"] == pytest.approx(results["mlm_loss"] + 50 * results["rtd_loss"], rel=1e-6)


def test_the_metrics_are_a_line_a_logged_step(trained):
    rows = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    logs = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logs] == [2, 4]
    keys = {"step", "seconds", "loss", "mlm_loss", "rtd_loss", "learning_rate", "tokens_per_second", "mfu"}
    assert all(keys <= row.keys() for row in logs)
    # the last update of each window, t = 1 and 3, of 1e-3 · (1 - t/4) · min(1, t/2)
    assert [row["learning_rate"] for row in logs] == pytest.approx([1e-3 * 0.75 * 0.5, 1e-3 * 0.25], rel=1e-5)
    results = json.loads((trained[0] / "results.json").read_text())
    evaluation = {name: value for row in rows if "eval_loss" in row for name, value in row.items()}
    assert evaluation == {"step": 4} | {f"eval_{name}": value for name, value in results.items() if name != "step"}


def test_the_saved_config_repeats_the_run(trained, folder, prepared):
    path = trained[0] / "config.toml"
    assert f'path = "{prepared[0]}"' in path.read_text()
    status, _ = call("pretrain", path, "--workdir", folder / "again")
    assert status == 0
    assert (folder / "again" / "results.json").read_text() == (trained[0] / "results.json").read_text()


def test_preflight_says_what_will_be_trained_before_it_is(trained):
    output = trained[1]
    for words in ("mesh data x fsdp x model 8x1x1", "0 to 4", "8 rows x 32 = 256", "together", "x ln 2"):
        assert words in output
        assert output.index(words) < output.index("step 2/4")


def test_evaluate_prints_the_figures_of_the_results(trained):
    workdir, _ = trained
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    status, output = call("evaluate", workdir)
    assert status == 0
    results = json.loads((workdir / "results.json").read_text())
    printed = dict(re.findall(r"\b(\w+) +│ +([\d.]+|nan) │", output))
    assert "held-out rows after step 4" in output
    assert {"mlm_loss", "rtd_loss", "rtd_auc"} <= printed.keys()
    for name, value in printed.items():
        assert value == ("nan" if results[name] is None else f"{results[name]:.4f}"), name
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_evaluate_takes_prepared_text_alone_and_refuses_what_it_cannot_change(trained, folder):
    files = sorted(trained[0].rglob("*"))
    with pytest.raises(UserError, match="text.txt: expected a directory that electrax prepare wrote"):
        call("evaluate", trained[0], "--data.path", folder / "text.txt")
    with pytest.raises(UserError, match="model.layers 1: the model was trained with 2, which evaluate cannot change"):
        call("evaluate", trained[0], "--model.layers=1")
    with pytest.raises(UserError, match="batch_size 9 does not divide over 8 devices"):
        call("evaluate", trained[0], "--batch_size=9")
    assert sorted(trained[0].rglob("*")) == files


def test_evaluate_without_a_checkpoint_is_an_error(trained, tmp_path):
    for name in ("config.toml", "tokenizer.json"):
        shutil.copy(trained[0] / name, tmp_path / name)
    with pytest.raises(UserError, match="no checkpoint yet"):
        call("evaluate", tmp_path)


def test_a_work_directory_loads_as_a_model(trained):
    model = electrax.load(trained[0])
    text = (trained[0].parent / "text.txt").read_text()[:20]
    assert model.encode([text]).shape[2] == 32
    assert all(0 <= token.probability <= 1 for token in model.detect(text))
    half = electrax.load(trained[0], compute_dtype="bfloat16")
    assert half.params["discriminator"]["encoder"]["layer_0"]["up"]["kernel"].dtype == "bfloat16"
    difference = np.abs(half.encode([text]) - model.encode([text])).max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.width", "64"], r"holds a run with model.width = 32, now 64; take another workdir"),
        (["--seed", "1"], "holds a run with seed = 0, now 1"),
        (["--objective.mask_prob", "0.2"], "holds a run with objective.mask_prob = 0.15, now 0.2"),
        (["--batch_size", "16"], "holds a run with batch_size = 8, now 16"),
    ],
)
def test_a_key_that_would_change_a_run_is_an_error_that_names_it(trained, folder, words, message):
    before = (trained[0] / "config.toml").read_text()
    with pytest.raises(UserError, match=message):
        call("pretrain", trained[0] / "config.toml", *words)
    assert (trained[0] / "config.toml").read_text() == before


def test_a_second_run_in_one_work_directory_is_refused(trained):
    with alone(trained[0]), pytest.raises(UserError, match="another run is at work in it"):
        call("pretrain", trained[0] / "config.toml")


def test_a_text_is_prepared_into_the_work_directory_and_its_settings_cannot_change_then(folder, tmp_path):
    words = ["--data.path", folder / "text.txt", "--workdir", tmp_path, "--data.vocab_size", "100"]
    words += ["--data.holdout", "0.2"]
    with pytest.raises(UserError, match="model.max_length is 16, but the rows have 32 tokens"):
        call("pretrain", folder / "run.toml", *words, "--model.max_length", "16")
    assert (tmp_path / "data" / "manifest.json").is_file()
    with pytest.raises(UserError, match=r"data was prepared with data.holdout = 0.2, now 0.1; take another workdir"):
        call("pretrain", folder / "run.toml", *words, "--data.holdout", "0.1")
    # nothing was trained yet, so that a model that does not fit may still be changed
    with pytest.raises(UserError, match="model.max_length is 8, but the rows have 32 tokens"):
        call("pretrain", folder / "run.toml", *words, "--model.max_length", "8")


def test_a_run_may_start_from_the_weights_of_another_of_the_same_shape(trained, folder, prepared, tmp_path):
    words = ["--data.path", prepared[0], "--workdir", tmp_path, "--init_from", trained[0]]
    with pytest.raises(UserError, match=f"init_from {trained[0]}: its model.width is 32, this run's 48"):
        call("pretrain", folder / "run.toml", *words, "--model.width", "48")
    assert not (pathlib.Path(tmp_path) / "results.json").exists()
    # weights of its own would be others under this seed, and no update changes anything at this rate
    words += ["--seed", "5", "--steps", "1", "--optimizer.learning_rate", "1e-30"]
    status, _ = call("pretrain", folder / "run.toml", *words)
    assert status == 0
    start, end = (json.loads((path / "results.json").read_text()) for path in (trained[0], tmp_path))
    assert end.keys() == start.keys()
    for name in start.keys() - {"step"}:
        assert (end[name] is None) == (start[name] is None)
        assert start[name] is None or end[name] == pytest.approx(start[name], rel=1e-6), name


def test_the_shipped_config_of_the_help_text_exists():
    assert find_config("tiny", "pretrain").is_file()


def test_programs_that_compile_in_a_moment_are_kept_too(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]
    try:
        for name, value in zip(names, (None, 1.0), strict=True):
            jax.config.update(name, value)
        cli.use_compilation_cache()
        assert jax.config.jax_persistent_cache_min_compile_time_secs <= 0.1
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


def test_compiled_programs_are_not_taken_from_a_cache_that_others_can_write_into(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        for mode, expected in {0o700: str(tmp_path / "electrax" / "jax"), 0o770: None}.items():
            jax.config.update("jax_compilation_cache_dir", None)
            (tmp_path / "electrax").mkdir(exist_ok=True)
            (tmp_path / "electrax").chmod(mode)
            cli.use_compilation_cache()
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "compiled programs are not kept" in caplog.text


def test_a_work_directory_that_a_command_makes_is_its_users_alone(tmp_path):
    with alone(tmp_path / "run"):
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
