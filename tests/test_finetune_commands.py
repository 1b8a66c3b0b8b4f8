"""The commands of fine-tuning from their words to what they print and leave."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

import electrax
from electrax import cli
from electrax.config import UserError
from tests.fixtures.finetuning import (
    REVIEWS,
    call,
    make_pretrained,
    metrics_of,
    params_of,
    results_of,
    same_bits,
    write,
    write_rows,
)

LABELS = dict(REVIEWS)


def main(monkeypatch, capsys, *words):
    """(exit status, standard output, standard error) of the program itself."""
    monkeypatch.setattr(sys, "argv", ["electrax", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table with two rows that cannot be used, one of dev rows, and a pretrained model."""
    folder = tmp_path_factory.mktemp("commands")
    rows = [*REVIEWS[:16], ("", "yes"), ("the cat", "")]
    write_rows(folder / "reviews.csv", rows)
    write_rows(folder / "dev.csv", REVIEWS[16:])
    write_rows(folder / "others.csv", [*REVIEWS[:4], ("good", "perhaps")])
    make_pretrained(folder / "pretrained")
    return folder


def words(folder, name, *more):
    """The words of a run in folder/name."""
    found = ["csv", "--data.path", folder / "reviews.csv", "--data.dev", "dev.csv", "--data.on_bad_row", "skip"]
    found += ["--init_from", folder / "pretrained", "--workdir", folder / name, "--batch_size=8", "--data.shapes=1"]
    return [*found, "--data.max_length=16", "--steps=4", "--eval.every=2", "--log.every=2", *more]


@pytest.fixture(scope="module")
def trained(folder):
    """(work directory, what was printed)"""
    status, output = call("finetune", *words(folder, "run"))
    assert status == 0
    return folder / "run", output


# -- errors and help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("finetune", "finetune: expected one CONFIG (a shipped name or a TOML file)"),
        ("finetune cvs", "cvs: no such file, and no shipped config of that name; shipped: chunk, cola, "),
        ("finetune csv", "data.path is empty"),
        ("finetune csv --data.path gone.csv", "gone.csv: no such file or folder (data.path)"),
        ("finetune csv --data.pth a", "command line: unknown key data.pth; did you mean data.path?"),
        ("finetune csv --head.kind several", 'head.kind is "several", but must be one of classes, labels, number'),
        ("finetune csv --data.path REVIEWS --data.dev gone.csv", "gone.csv: no such file"),
        ("finetune csv --data.path REVIEWS --data.label stars", "reviews.csv: no column 'stars'"),
        ("finetune csv --data.path REVIEWS", "reviews.csv: 2 bad rows (1 empty text, 1 label): "),
        ("finetune csv --data.path REVIEWS --init_from gone/for/good", "gone/for/good: no such file or directory"),
        ("finetune cola --data.path FOLDER", "expected the file CoLA/dev.tsv in it"),
        ("finetune squad1 --data.path FOLDER", "dev-v1.1.json: no such file"),
        (
            "finetune wnut17 --data.path REVIEWS --data.format squad",
            "squad: the task tag reads conll or conllu or table",
        ),
        (
            "finetune squad1 --data.path REVIEWS --data.format conll",
            "conll: the task answer reads squad or mrqa or table",
        ),
        ("finetune csv --data.path DEV --data.tokenizer gone.json", "data.tokenizer: expected one of wordpiece, bpe, "),
        (
            "finetune csv --data.path DEV --eval.patience 2 --checkpoint.every 5",
            "checkpoint.every: with eval.patience each evaluated model is saved",
        ),
        ("finetune csv --data.path DEV --seed -1", "seed must lie between 0 and 4294967295, not -1"),
        ("finetune csv --data.path DEV --model.dropout 1", "[model] dropout and attention_dropout must be at least 0 "),
        ("finetune csv --data.path DEV --model.heads -2", "[model] layers must not be negative, and widths, heads "),
        ("finetune csv --data.path REVIEWS --data.format conll", "conll: the task classify reads table or glue"),
        ("finetune csv --data.path REVIEWS --data.format parallel", "parallel: the task classify reads table or glue"),
        ("finetune glue --data.path FOLDER", "command line: unknown key data"),
        ("evaluate gone", "gone/config.toml: no such file"),
        ("predict gone", "predict: expected WORKDIR INPUT"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(folder, tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    places = {"REVIEWS": folder / "reviews.csv", "DEV": folder / "dev.csv", "FOLDER": folder}
    status, output, error = main(monkeypatch, capsys, *(places.get(word, word) for word in command.split()))
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert error.startswith("electrax: ") and message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("finetune --help", ["--workdir", "--init_from", "--seeds", "--data.path", "--head.kind", "--teacher.path"]),
        ("finetune csv --help", ["--data.on_bad_row", "--eval.patience", "--freeze_layers"]),
        ("finetune -h", ["--workdir"]),
        ("finetune glue -h", ["--mnli_first"]),
        ("evaluate RUN -h", ["--data.dev"]),
        ("finetune glue --help", ["--path", "--tasks", "--mnli_first", "--seeds"]),
        ("predict --help", ["--text"]),
        ("evaluate RUN --help", ["--data.dev", "--mesh.data"]),
    ],
)
def test_help_of_a_command_names_its_keys(trained, command, keys):
    status, output = call(*(trained[0] if word == "RUN" else word for word in command.split()))
    assert status == 0
    assert set(keys) <= set(re.findall(r"--[\w.]+", output))


# -- finetune ----------------------------------------------------------------------------------------------------------


def test_finetune_leaves_everything_that_belongs_to_a_run(trained):
    workdir, output = trained
    names = {path.name for path in workdir.iterdir()}
    assert {"config.toml", "head.json", "metrics.jsonl", "results.json", "tokenizer.json", "checkpoints"} <= names
    results = results_of(workdir)
    assert (results["task"], results["metric"], results["step"]) == ("classify", "accuracy", 4)
    assert results["scores"] == [results["score"]]
    assert {"loss", "accuracy", "macro_f1", "matthews", "f1"} == results["metrics"].keys()
    assert [row["class"] for row in results["by_class"]] == ["no", "yes"]
    assert sum(row["as no"] + row["as yes"] for row in results["confusion"]) == 8
    lines = metrics_of(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert {f"eval_{name}": value for name, value in results["metrics"].items()} | {"step": 4} == lines[-1]


def test_preflight_says_what_will_be_trained_before_it_is(trained, folder):
    output = trained[1]
    for part in (f"the weights of {folder / 'pretrained'}", "16 training and 8 dev rows, 2 classes: no, yes", "0 to 4",
                 "bad rows left out: 1 empty text, 1 label", "head 34, together 5,538"):  # fmt: skip
        assert part in output
        assert output.index(part) < output.index("step 2/4")


def test_the_saved_config_repeats_the_run(trained, folder):
    status, _ = call("finetune", trained[0] / "config.toml", "--workdir", folder / "again")
    assert status == 0
    assert results_of(folder / "again") == results_of(trained[0])
    assert same_bits(params_of(folder / "again"), params_of(trained[0]))


def test_a_finished_run_repeated_is_evaluated_again_and_stays_as_it_is(trained, folder):
    results, lines, params = results_of(trained[0]), metrics_of(trained[0]), params_of(trained[0])
    status, output = call("finetune", *words(folder, "run"))
    assert (status, "4 to 4 (continued)" in output) == (0, True)
    assert (results_of(trained[0]), metrics_of(trained[0])) == (results, lines)
    assert same_bits(params_of(trained[0]), params)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed=3"], "holds a run with seed = 0, now 3; take another workdir"),
        (["--optimizer.learning_rate=0.5"], "holds a run with optimizer.learning_rate = 0.0003, now 0.5"),
        (["--data.limit=4"], "holds a run with data.limit = 0, now 4"),
        (["--freeze_layers=1"], "holds a run with freeze_layers = 0, now 1"),
    ],
)
def test_a_key_that_would_change_a_run_is_an_error_that_names_it(trained, folder, more, message):
    before = {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        call("finetune", *words(folder, "run", *more))
    assert {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()} == before


# -- evaluate ----------------------------------------------------------------------------------------------------------


def figures(output):
    return dict(re.findall(r"│ (\w+) +│ +(-?[\d.]+|nan) │", output))


def test_evaluate_prints_the_figures_of_the_results_and_writes_nothing(trained):
    workdir, _ = trained
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    status, output = call("evaluate", workdir)
    results = results_of(workdir)
    assert status == 0
    assert f"dev rows after step 4: accuracy {results['score']:.4f}" in output
    printed = figures(output)
    assert {name: printed[name] for name in results["metrics"]} == {
        name: f"{value:.4f}" for name, value in results["metrics"].items()
    }
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_evaluate_on_other_rows_gives_their_figures(trained, folder):
    write_rows(folder / "other.csv", REVIEWS[:6])
    status, output = call("evaluate", trained[0], "--data.dev", "other.csv")
    predicted = electrax.load(trained[0]).predict([text for text, _ in REVIEWS[:6]])
    right = [row["label"] == label for row, (_, label) in zip(predicted, REVIEWS[:6], strict=True)]
    assert status == 0
    assert figures(output)["accuracy"] == f"{sum(right) / 6:.4f}"


def test_a_label_that_the_model_does_not_have_is_an_error_that_names_its_row(trained, folder, monkeypatch, capsys):
    command = ["evaluate", trained[0], "--data.dev", "others.csv", "--data.on_bad_row"]
    status, output, error = main(monkeypatch, capsys, *command, "error")
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert "others.csv, line 6: expected one of the labels 'no', 'yes', found 'perhaps'" in error
    status, output = call(*command, "skip")
    assert (status, "bad rows left out: 1 label" in output) == (0, True)


def test_evaluate_without_a_checkpoint_is_an_error(trained, tmp_path):
    for name in ("config.toml", "head.json", "tokenizer.json"):
        shutil.copy(trained[0] / name, tmp_path / name)
    with pytest.raises(UserError, match="no checkpoint yet"):
        call("evaluate", tmp_path)
    (tmp_path / "head.json").write_text("{")
    with pytest.raises(UserError, match="head.json: missing or damaged"):
        call("evaluate", tmp_path)


def test_predict_labels_new_rows(trained, tmp_path):
    status, output = call("predict", trained[0], write(tmp_path / "a.txt", "the film was good\nthe dog was bad\n"))
    assert status == 0
    assert [json.loads(line)["label"] in ("no", "yes") for line in output.splitlines()] == [True, True]


# -- a killed run ------------------------------------------------------------------------------------------------------

MANY = ["--steps=80", "--eval.every=40", "--checkpoint.every=10", "--log.every=5", "--optimizer.learning_rate=0.01"]


def start(words):
    """The program in a process of its own, which computes as this one does."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, "-m", "electrax", "finetune", *map(str, words)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_run_killed_at_any_moment_and_repeated_gives_the_same_bits(folder):
    workdir, moment = folder / "killed", random.uniform(0, 0.3)
    status, _ = call("finetune", *words(folder, "straight", *MANY))
    assert status == 0
    process, until = start(words(folder, "killed", *MANY)), time.monotonic() + 200
    while not list(workdir.glob("checkpoints/*/checksums.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.005)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it had ended {moment} s after the first checkpoint"
    reached = metrics_of(workdir)[-1]["step"]
    status, output = call("finetune", *words(folder, "killed", *MANY))
    assert (status, "(continued)" in output) == (0, True)
    assert same_bits(params_of(workdir), params_of(folder / "straight")), f"killed at about step {reached}"
    assert results_of(workdir) == results_of(folder / "straight")
    for figure in ("loss", "eval_loss"):
        found, expected = ([(line["step"], line[figure]) for line in metrics_of(run) if figure in line]
                           for run in (workdir, folder / "straight"))  # fmt: skip
        assert found == expected
    assert len(found) == 2
