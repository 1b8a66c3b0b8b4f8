"""GLUE as a whole: every task, one table, the files that the leaderboard takes."""

import dataclasses
import json
import re

import pytest

from electrax.config import UserError, build, find_config, load
from electrax.data.glue import GLUE
from electrax.experiment import glue
from electrax.experiment.config import FinetuneConfig
from electrax.experiment.glue import GlueConfig
from tests.fixtures.finetuning import GLUE_FILES, call, make_pretrained, results_of, write, write_glue

SPLITS = {
    "mnli": ("train", "dev_matched", "test_matched", "test_mismatched", "diagnostic"),
    "rte": ("train", "dev", "test"),
}
NAMES = ["rte", "mnli", "rte after mnli"]


def run(folder, *words):
    return call("finetune", "glue", "--path", folder / "data", "--workdir", folder / "run", *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, what was printed) of two tasks with two seeds each."""
    folder = tmp_path_factory.mktemp("glue")
    for task, files in SPLITS.items():
        write_glue(folder / "data", task, files)
    words = ["--init_from", make_pretrained(folder / "pretrained"), "--tasks", '["rte", "mnli"]']
    words += ["--mnli_first", "--seeds", "2", "--epochs", "1", "--batch_size", "8"]
    status, output = run(folder, *words)
    assert status == 0
    return folder, output, words


def test_every_task_is_trained_in_order_and_after_mnli_once_more(trained):
    folder, output, _ = trained
    rules = [name for line in output.splitlines() if (name := line.strip("─ ")) in NAMES]
    assert rules == NAMES
    assert {path.name for path in (folder / "run").iterdir()} == {
        "mnli", "rte", "rte-after-mnli", "leaderboard", "results.json",
    }  # fmt: skip
    for name in ("mnli", "rte", "rte-after-mnli"):
        assert len(results_of(folder / "run" / name)["scores"]) == 2


def test_a_task_after_mnli_starts_from_the_best_seed_of_mnli_and_the_others_do_not(trained):
    folder, _, _ = trained
    starts = {name: load(FinetuneConfig, folder / "run" / name / "config.toml").init_from
              for name in ("mnli", "rte", "rte-after-mnli")}  # fmt: skip
    pretrained = str(folder / "pretrained")
    assert starts == {"mnli": pretrained, "rte": pretrained, "rte-after-mnli": str(folder / "run" / "mnli")}


def test_the_results_hold_every_task_and_the_average_without_those_after_mnli(trained):
    folder, output, _ = trained
    results = results_of(folder / "run")
    assert (results["task"], list(results["tasks"]), results["averaged"]) == ("glue", NAMES, ["rte", "mnli"])
    for name, found in results["tasks"].items():
        kept = results_of(folder / "run" / name.replace(" ", "-"))
        assert found == {key: kept[key] for key in ("metric", "score", "scores", "std", "failed")}
    mean = (results["tasks"]["mnli"]["score"] + results["tasks"]["rte"]["score"]) / 2
    assert results["average"] == pytest.approx(mean)
    assert f"average of RTE, MNLI: {100 * mean:.2f}" in output
    rows = re.findall(r"│ (MNLI|RTE|RTE after mnli) +│ +accuracy │ +([\d.]+) │ +([\d.]+) │", output)
    assert [name for name, _, _ in rows] == ["RTE", "MNLI", "RTE after mnli"]
    assert [float(score) for _, score, _ in rows] == pytest.approx([100 * results["tasks"][n]["score"] for n in NAMES])


def test_the_leaderboards_files_have_a_prediction_for_every_row(trained):
    folder, output, _ = trained
    files = {path.name: path.read_text().splitlines() for path in (folder / "run" / "leaderboard").iterdir()}
    assert files.keys() == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv", "RTE.tsv"}
    for name, lines in files.items():
        rows = [line.split("\t") for line in lines]
        assert rows[0] == ["index", "prediction"]
        assert [index for index, _ in rows[1:]] == [str(i) for i in range(8)]
        assert {label for _, label in rows[1:]} <= set(GLUE["rte" if name == "RTE.tsv" else "mnli"].classes)
        assert f"wrote {folder / 'run' / 'leaderboard' / name}" in output


def test_what_is_finished_is_not_trained_again(trained):
    folder, output, words = trained
    before = (folder / "run" / "results.json").read_text()
    (folder / "run" / "results.json").unlink()
    status, again = run(folder, *words)
    assert (status, "step 1/" in output, "step 1/" in again) == (0, True, False)
    assert (folder / "run" / "results.json").read_text() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size", "16"], "rte/config.toml holds a run with batch_size = 8, now 16; take another workdir"),
        (["--seeds", "1"], "rte holds runs of several seeds; take another workdir for one"),
    ],
)
def test_a_finished_task_with_other_settings_is_refused(trained, more, message):
    folder, _, words = trained
    with pytest.raises(UserError, match=message):
        run(folder, *words, *more)


def test_a_finished_task_on_other_rows_is_refused_before_any_other_is_trained(trained):
    folder, _, words = trained
    rows = (folder / "data" / "RTE" / "train.tsv").read_text()
    write_glue(folder / "data", "wnli", ("train", "dev"))
    try:
        (folder / "data" / "RTE" / "train.tsv").write_text(rows.replace("good", "poor"))
        with pytest.raises(UserError, match="rte/seed-0/head.json holds a run on other rows than those of"):
            run(folder, *words, "--tasks", '["wnli", "mnli", "rte"]')
    finally:
        (folder / "data" / "RTE" / "train.tsv").write_text(rows)
    assert not (folder / "run" / "wnli").exists()


# -- without training --------------------------------------------------------------------------------------------------


def settings(path, **values):
    return build(GlueConfig, {"path": str(path), **values}, "the test")


def test_files_that_are_missing_are_named_before_anything_is_trained(tmp_path):
    for task in GLUE_FILES:
        write_glue(tmp_path / "data", task, ("train", "dev_matched" if task == "mnli" else "dev"))
    (tmp_path / "data" / "MNLI" / "dev_matched.tsv").unlink()
    (tmp_path / "data" / "CoLA" / "train.tsv").unlink()
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    left = '["sst2", "mrpc", "stsb", "qqp", "qnli", "rte", "wnli"]'
    assert str(caught.value).endswith(f"no training or dev file of CoLA, MNLI; for the others: --tasks '{left}'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "old", "new", "message"),
    [
        ("stsb", "4.750", "none", "STS-B/train.tsv, line 3: expected a number as label, found 'none'"),
        ("rte", "not_entailment", "none", "RTE/train.tsv, line 3: expected one of the labels .* found 'none'"),
    ],
)
def test_a_bad_label_is_named_before_anything_is_trained(tmp_path, task, old, new, message):
    for name in ("cola", task):
        write_glue(tmp_path / "data", name)
    path = tmp_path / "data" / GLUE[task].title / "train.tsv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        run(tmp_path, "--tasks", f'["cola", "{task}"]')
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", '["cola", "rt"]'], "tasks: expected some of cola, .*, not rt"),
        (["--tasks", "[]"], "tasks: expected some of cola, .*, not none"),
        (["--tasks", '["rte"]', "--mnli_first"], "mnli_first needs mnli among the tasks"),
        (["--path", ""], "path is empty"),
        (["--head.kind", "labels"], "unknown key head.kind; known here: style"),
        (["--path", "gone"], "gone: no training or dev file of CoLA, SST-2, .*, WNLI"),
    ],
)
def test_wrong_settings_are_named(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, *words)


def test_every_task_has_its_shipped_config_and_the_settings_of_the_whole(tmp_path):
    for task in GLUE_FILES:
        write_glue(tmp_path, task, ("train", "dev_matched" if task == "mnli" else "dev"))
    made = settings(tmp_path, workdir="w", init_from="p", seed=4, batch_size=16, faithful=True)
    configs = dict(glue.task_configs(made))
    assert list(configs) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    for name, config in configs.items():
        shipped = load(FinetuneConfig, find_config(name, "finetune"))
        assert (config.workdir, config.init_from, config.data.path) == (f"w/{name}", "p", str(tmp_path))
        assert (config.seed, config.seeds, config.batch_size, config.faithful) == (4, 5, 16, True)
        assert (config.epochs, config.head) == (shipped.epochs, shipped.head)
        assert config.data.both_orders == (name in ("mrpc", "stsb"))
    assert {config.epochs for _, config in glue.task_configs(settings(tmp_path, epochs=0.5))} == {0.5}


def test_sections_of_the_whole_are_those_of_every_task(tmp_path):
    for task in ("cola", "stsb"):
        write_glue(tmp_path, task)
    sections = {
        "optimizer": {"learning_rate": 2e-5},
        "eval": {"patience": 2},
        "mesh": {"fsdp": 2},
        "model": {"compute_dtype": "bfloat16"},
        "head": {"style": "dense"},
    }
    for name, config in glue.task_configs(settings(tmp_path, tasks=["cola", "stsb"], **sections)):
        shipped = load(FinetuneConfig, find_config(name, "finetune"))
        assert config.head == dataclasses.replace(shipped.head, style="dense")
        for section in ("optimizer", "eval", "mesh", "model"):  # the shipped configs set none of their keys
            default = getattr(FinetuneConfig, section)
            assert getattr(shipped, section) == default
            assert getattr(config, section) == dataclasses.replace(default, **sections[section])


def test_three_small_tasks_come_after_mnli(tmp_path):
    for task in GLUE_FILES:
        write_glue(tmp_path, task, ("train", "dev_matched" if task == "mnli" else "dev"))
    configs = list(glue.task_configs(settings(tmp_path, workdir="w", init_from="p", mnli_first=True)))
    assert [name for name, _ in configs[9:]] == ["mrpc after mnli", "stsb after mnli", "rte after mnli"]
    assert {config.init_from for _, config in configs[9:]} == {"w/mnli"}
    assert [config.workdir for _, config in configs[9:]] == [f"w/{name}-after-mnli" for name in ("mrpc", "stsb", "rte")]


SCORES = {"cola": 0.6, "sst2": 0.9, "mrpc": 0.8, "stsb": 0.85, "qqp": 0.88, "mnli": 0.82, "qnli": 0.86, "rte": 0.7,
          "wnli": 0.1}  # fmt: skip


@pytest.fixture
def finished_runs(tmp_path, monkeypatch):
    """(scores) Makes files of every task, and results in the place of its training."""

    def make(scores):
        for task in scores:
            write_glue(tmp_path / "data", task, ("train", "dev_matched" if task == "mnli" else "dev"))

        def trained(config, command):
            task = config.data.glue
            found = {"metric": GLUE[task].metrics[0], "score": scores[task], "scores": [scores[task]], "std": 0.015}
            found["failed"] = {"seed-1": ["it is stuck"]} if scores[task] is None else {}
            write(tmp_path / "run" / task / "results.json", json.dumps(found))
            return 0

        monkeypatch.setattr("electrax.report.glue.finetune_and_report", trained)

    return make


def test_the_average_is_that_of_eight_tasks_without_wnli(tmp_path, finished_runs):
    finished_runs(SCORES)
    status, output = run(tmp_path)
    assert status == 0
    # (60 + 90 + 80 + 85 + 88 + 82 + 86 + 70) / 8
    assert "average of CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE: 80.12" in output
    assert results_of(tmp_path / "run")["average"] == pytest.approx(0.80125)
    rows = re.findall(r"│ ([\w-]+) +│ +(\w+) │ +([\d.]+) │ +([\d.]+) │", output)
    assert rows == [(GLUE[task].title, GLUE[task].metrics[0], f"{100 * score:.4f}", "1.5000")
                    for task, score in SCORES.items()]  # fmt: skip


def test_a_score_that_is_not_a_number_is_shown_and_leaves_no_average(tmp_path, finished_runs):
    """As of STS-B where every prediction is the same."""
    finished_runs({"stsb": None, "rte": 0.5})
    status, output = run(tmp_path, "--tasks", '["stsb", "rte"]')
    assert status == 0
    assert re.search(r"STS-B +│ +spearman │ +nan", output)
    assert "STS-B did not train: seed-1: it is stuck" in output and "RTE did not train" not in output
    results = results_of(tmp_path / "run")
    assert [results["tasks"][task]["failed"] for task in ("stsb", "rte")] == [{"seed-1": ["it is stuck"]}, {}]
    assert (results["average"], results["tasks"]["stsb"]["score"]) == (None, None)


def test_predicted_likeness_is_kept_between_0_and_5(tmp_path, monkeypatch):
    write_glue(tmp_path, "stsb", ("test",), rows=3)

    class Model:
        def predict(self, rows):
            assert rows[0] == ("the film was good", "the house was poor")
            return [{"value": value} for value in (-0.25, 2.5, 7.0)]

    monkeypatch.setattr(glue.finetuned, "load", lambda workdir: Model())
    [path] = glue.predict_tests(settings(tmp_path, workdir=str(tmp_path / "run")), "stsb", "any")
    assert path == tmp_path / "run" / "leaderboard" / "STS-B.tsv"
    assert path.read_text() == "index\tprediction\n0\t0.000\n1\t2.500\n2\t5.000\n"
