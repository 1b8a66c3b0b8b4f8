"""What a fine-tuning starts from, resumes, keeps and leaves as it was."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

import electrax
from electrax.config import UserError, load
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import FinetuneConfig
from electrax.experiment.examples import read_examples
from electrax.experiment.finetune import evaluate_trained, resolve, set_up, with_multiple
from electrax.experiment.head import read_head
from electrax.experiment.initial import get_tokenizer, initial_params
from electrax.experiment.results import findings, summarize_seeds
from electrax.experiment.run import load_params, mesh_for
from electrax.experiment.saved import ConvertConfig, ExportConfig, convert, export
from electrax.experiment.start import start_of
from electrax.inference.classifier import Classifier
from electrax.models.sizes import ModelConfig, discriminator_shape
from electrax.report.finetune import show_seeds
from electrax.tasks.classify import ClassifyTask
from electrax.training.tracking import Record, Tracker
from tests.fixtures.finetuning import (
    REVIEWS,
    call,
    finetuning,
    flat,
    make_pretrained,
    metrics_of,
    params_of,
    results_of,
    same_bits,
    train,
    write,
    write_rows,
)

STEPS = 6
FAST = {"learning_rate": 0.01, "layer_decay": 1.0}


def started(config, head):
    """The parameters that a run starts with; a word stands for those that are drawn."""
    start = start_of(config.init_from)
    drawn = {"embeddings": load_params(start)[1]["embeddings"], "head": "drawn"}
    return initial_params(config, head, Tokenizer.load(start), drawn, mesh_for(config))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return make_pretrained(tmp_path_factory.mktemp("pretrained") / "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 training and 4 dev rows, and what those of dev would be with the opposite labels."""
    folder = tmp_path_factory.mktemp("reviews")
    write_rows(folder / "train.csv", REVIEWS[:20])
    write_rows(folder / "dev.csv", REVIEWS[20:])
    write_rows(folder / "opposite.csv", [(text, "no" if label == "yes" else "yes") for text, label in REVIEWS[:20]])
    return folder


@pytest.fixture(scope="module")
def config(pretrained, folder):
    """(work directory, changed keys) -> config of a short fine-tuning of the pretrained model."""

    def config(workdir, **changes):
        values = {"init_from": str(pretrained), "metric": "loss", "steps": STEPS, "eval": {"every": 3}}
        values |= {"optimizer": {"learning_rate": 0.01}}
        data = {"path": str(folder), **changes.pop("data", {})}
        return finetuning(workdir, **(values | changes), data=data)

    return config


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    """The work directory of one model, of seed 1."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train(config(workdir, seed=1))
    return workdir


def stop_after(step, name):
    """A Tracker.write that sends SIGTERM after a step of the run in that folder."""
    write = Tracker.write

    def stopping(tracker, record):
        write(tracker, record)
        if record.kind == "log" and record.step == step and pathlib.Path(tracker._file.name).parent.name == name:
            os.kill(os.getpid(), signal.SIGTERM)

    return stopping


@pytest.fixture(scope="module")
def seeds(config, tmp_path_factory):
    """(work directory of seeds 0, 1 and 2, copies of it from when seed 1 and seed 2 were stopped in the middle)"""
    workdir = tmp_path_factory.mktemp("seeds") / "run"
    copies = []
    for step, name in ((3, "seed-1"), (1, "seed-2")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tracker, "write", stop_after(step, name))
            train(config(workdir, seeds=3), status=130)
        copies.append(shutil.copytree(workdir, workdir.with_name(f"in-{name}")))
    train(config(workdir, seeds=3))
    return workdir, *copies


# -- what it starts from -----------------------------------------------------------------------------------------------


def test_it_starts_from_the_pretrained_embeddings_and_encoder_with_a_fresh_head(config, pretrained, tmp_path):
    run, rows = set_up(config(tmp_path, steps=0, epochs=2.5, eval={"every": 0}))
    start, kept = flat(run.state.params), params_of(pretrained)
    taken = {name: leaf for name, leaf in start.items() if not name.startswith("head/")}
    assert len(taken) > 15
    assert same_bits(taken, {name: kept[name] for name in taken})
    assert set(start) - set(taken) == {"head/output/kernel", "head/output/bias"}
    kernel = start["head/output/kernel"]
    assert kernel.shape == (16, 2)
    assert 0.1 < np.abs(kernel).max() <= math.sqrt(6 / 18)  # Glorot's bound
    # 20 rows are 3 batches of 8
    assert (run.steps, run.eval_every, run.save_every) == (7, 3, 3)
    assert rows.head["classes"] == ["no", "yes"]


def test_the_seed_draws_the_head(config, tmp_path):
    a, b = (set_up(config(tmp_path / str(seed), seed=seed))[0].state.params["head"] for seed in (0, 1))
    assert not same_bits(flat(a), flat(b))


def test_a_masked_lm_gives_its_encoder_too(config, tmp_path):
    workdir = make_pretrained(tmp_path / "mlm", objective={"kind": "mlm"})
    kept = load_params(workdir)[1]
    assert kept.keys() == {"embeddings", "generator"}
    changed = config(tmp_path / "run", init_from=str(workdir))
    found = started(changed, {})
    assert found["head"] == "drawn"
    assert same_bits(flat(found["embeddings"]), flat(kept["embeddings"]))
    assert same_bits(flat(found["discriminator"]["encoder"]), flat(kept["generator"]["encoder"]))
    assert found["discriminator"].keys() == {"encoder"}


def test_a_fine_tuning_of_the_same_classes_is_continued_with_its_head(config, straight, tmp_path):
    run, _ = set_up(config(tmp_path, init_from=str(straight)))
    assert same_bits(flat(run.state.params), params_of(straight))


@pytest.mark.parametrize("change", [{"classes": ["bad", "good"]}, {"kind": "labels"}, {"style": "dense"}])
def test_a_fine_tuning_of_other_outputs_gives_all_but_its_head(config, straight, change):
    changed = config("unused", init_from=str(straight))
    found = started(changed, read_head(straight) | change)
    assert found["head"] == "drawn"
    kept = params_of(straight)
    assert all(
        kept["embeddings/" + name].tobytes() == leaf.tobytes() for name, leaf in flat(found["embeddings"]).items()
    )


def test_of_several_seeds_it_starts_from_the_best(config, seeds, tmp_path):
    workdir, stopped, _ = seeds
    best = workdir / results_of(workdir)["best"]
    changed = resolve(config(tmp_path, init_from=str(workdir)))
    assert start_of(changed.init_from) == best
    assert get_tokenizer(changed, []).sha256 == Tokenizer.load(best).sha256
    found = started(changed, read_head(best))
    assert same_bits(flat(found), params_of(best))
    with pytest.raises(UserError, match="its seeds are not all trained yet"):
        resolve(config(tmp_path, init_from=str(stopped)))


PAPER = [("tiny", 3e-4, 0.8), ("small", 3e-4, 0.8), ("small++", 3e-4, 0.8), ("base", 1e-4, 0.8), ("large", 5e-5, 0.9)]


@pytest.mark.parametrize(("size", "rate", "decay"), PAPER)
def test_shape_comes_from_the_pretraining_and_rates_from_the_paper(tmp_path, size, rate, decay):
    model = f'size = "{size}"\nbody = "modern"\nwidth = 24\nmax_length = 64\ndropout = 0.3\nremat = true'
    write(tmp_path / "config.toml", f'task = "pretrain"\nworkdir = "any"\nsteps = 1\n[model]\n{model}\n')
    asked = {"size": "small", "width": 8, "dropout": 0.2, "compute_dtype": "bfloat16", "max_length": 512}
    found = resolve(finetuning("any", init_from=str(tmp_path), model=asked))
    assert (found.model.size, found.model.body, found.model.width, found.model.max_length) == (size, "modern", 24, 64)
    assert (found.model.dropout, found.model.compute_dtype, found.model.remat) == (0.2, "bfloat16", False)
    assert (found.optimizer.learning_rate, found.optimizer.layer_decay) == (rate, decay)
    assert resolve(found) == found
    set_by_hand = resolve(finetuning("any", init_from=str(tmp_path), optimizer={"learning_rate": 1e-5}))
    assert (set_by_hand.optimizer.learning_rate, set_by_hand.optimizer.layer_decay) == (1e-5, decay)
    longer = resolve(finetuning("any", init_from=str(tmp_path), data={"max_length": 65}))
    assert longer.model.max_length == 65  # later positions are drawn
    with pytest.raises(UserError, match="data.max_length 65 is more than the model's 64"):
        resolve(finetuning("any", model={"max_length": 64}, data={"max_length": 65}))


def test_what_was_resolved_is_kept_in_the_work_directory(straight, seeds):
    for workdir, rows in ((straight, 1), (seeds[0], 3), (seeds[0] / "seed-2", 1)):
        kept = load(FinetuneConfig, workdir / "config.toml")
        assert (kept.model.layers, kept.model.width, kept.model.max_length) == (1, 16, 128)
        assert (kept.optimizer.learning_rate, kept.optimizer.layer_decay) == (0.01, 0.8)
        assert kept.seeds == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0, "epochs": 0.0}, "steps or epochs must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"teacher": {"weight": 1.5}}, "teacher.weight must lie between 0 and 1"),
        ({"teacher": {"temperature": 0.0}}, "teacher.temperature above 0"),
        ({"teacher": {"weight": 0.3}}, "teacher.weight and teacher.temperature are those of a teacher.path, which is"),
        ({"freeze_layers": -3}, "freeze_layers must not be negative, but is -3"),
        ({"data": {"limit": -5}}, "data.limit must be at least 1, or 0 for all rows, not -5"),
        ({"eval": {"patience": -1}}, "eval.every and eval.patience must not be negative, not 0 and -1"),
        ({"head": {"n_best": 0}}, "head.max_answer and head.n_best must be at least 1, not 30 and 0"),
        ({"head": {"kind": "class"}}, "head.kind is .* but must be one of classes, labels, number, choice"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        finetuning("any", **changes)


def test_a_run_must_be_kept_somewhere():
    with pytest.raises(UserError, match="workdir is empty; say where the run shall be kept"):
        finetuning("")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "gone/for/good"}, "^gone/for/good: no such file or directory$"),
        ({"metric": "f2"}, "metric f2: expected one of accuracy"),
        ({"freeze_layers": 99}, "freeze_layers 99 is more than the model's 1"),
        ({"batch_size": 12}, "batch_size 12 does not divide over 8 devices; the next one that does is 16"),
        ({"data": {"text": ["txt"]}}, "dev.csv: no column 'txt'; did you mean 'text'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        set_up(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# -- tokenizers of random weights --------------------------------------------------------------------------------------


def test_random_weights_get_a_tokenizer_of_the_training_rows_as_configured_now(config, tmp_path):
    """One that was left by a run that never saved a checkpoint is not taken for the new settings'."""
    first = config(tmp_path, init_from="", data={"vocab_size": 60})
    examples = read_examples(first.data)[0]
    made = get_tokenizer(first, examples)
    made.save(tmp_path)
    write(tmp_path / "config.toml", 'workdir = "any"\n')
    assert made.vocab_size <= 60 < get_tokenizer(config(tmp_path, init_from=""), examples).vocab_size
    named = config(tmp_path, init_from="", data={"tokenizer": str(tmp_path / "tokenizer.json")})
    assert get_tokenizer(named, examples).sha256 == made.sha256


# -- resume and seeds --------------------------------------------------------------------------------------------------


def test_a_stop_in_the_middle_saves_and_leaves_no_results(seeds):
    stopped = seeds[1]
    assert (stopped / "seed-0" / "results.json").is_file()
    assert not (stopped / "seed-1" / "results.json").exists()
    assert not (stopped / "seed-2").exists() and not (stopped / "results.json").exists()
    assert {path.parent.name for path in stopped.glob("seed-1/checkpoints/*/checksums.json")} == {"3", "4"}
    with pytest.raises(UserError, match="its seeds are not all trained yet; run its command again"):
        electrax.load(stopped)


def test_a_run_that_was_stopped_and_one_alone_with_its_seed_have_the_same_bits(seeds, straight):
    continued = seeds[2] / "seed-1"
    assert results_of(continued) == results_of(straight)
    assert results_of(continued)["step"] == STEPS
    assert same_bits(params_of(continued), params_of(straight))
    losses = [{line["step"]: line["loss"] for line in metrics_of(run) if "loss" in line}
              for run in (continued, straight)]  # fmt: skip
    assert losses[0] == losses[1]
    assert list(losses[0]) == [1, 2, 3, 4, 5, 6]


def test_a_continued_set_of_seeds_trains_none_of_them_again(seeds):
    for name in ("results.json", "metrics.jsonl"):
        assert len({(run / "seed-0" / name).read_text() for run in seeds}) == 1
        assert len({(run / "seed-1" / name).read_text() for run in (seeds[0], seeds[2])}) == 1
    evaluated = [line["step"] for line in metrics_of(seeds[0] / "seed-1") if "eval_loss" in line]
    assert evaluated == [3, 6]


def test_the_results_of_seeds_are_their_scores_and_what_follows_from_them(seeds):
    workdir = seeds[0]
    results = results_of(workdir)
    scores = [results_of(workdir / f"seed-{seed}")["metrics"]["loss"] for seed in range(3)]
    assert len(set(scores)) == 3
    assert results["scores"] == scores
    assert results["score"] == statistics.median(scores)
    assert results["mean"] == pytest.approx(statistics.mean(scores), rel=1e-12)
    assert results["std"] == pytest.approx(statistics.stdev(scores), rel=1e-9)
    names = sorted((f"seed-{seed}" for seed in range(3)), key=lambda name: scores[int(name[-1])])
    assert (results["best"], results["median_run"]) == (names[0], names[1])  # the least loss is the best
    assert (results["task"], results["metric"]) == ("classify", "loss")
    assert results["failed"] == {name: failed for name in sorted(names)
                                 if (failed := results_of(workdir / name)["failed"])}  # fmt: skip
    assert results["metrics"] == results_of(workdir / names[0])["metrics"]
    assert [(workdir / name / "checkpoints").exists() for name in names] == [True, True, False]


def test_a_set_of_seeds_loads_and_evaluates_as_its_best(seeds):
    workdir = seeds[0]
    best = workdir / results_of(workdir)["best"]
    model = electrax.load(workdir)
    assert same_bits(flat(model.params), params_of(best))
    status, output = call("evaluate", workdir)
    assert status == 0
    assert f"dev rows after step {STEPS}: loss {min(results_of(workdir)['scores']):.4f}" in output


def test_a_set_of_seeds_cannot_go_on_with_other_settings(config, seeds):
    workdir = seeds[0]
    before = (workdir / "config.toml").read_text()
    with pytest.raises(UserError, match="holds a run with optimizer.learning_rate = 0.01, now 0.02; take another"):
        train(config(workdir, seeds=4, optimizer={"learning_rate": 0.02}))
    assert (workdir / "config.toml").read_text() == before


def test_fewer_steps_than_were_taken_are_refused(config, straight):
    with pytest.raises(UserError, match=f"trained for {STEPS} steps already; expected no fewer, not 3"):
        train(config(straight, seed=1, steps=3))


def test_what_training_refuses_now_does_not_keep_a_model_from_being_used(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "old")
    path = tmp_path / "old" / "config.toml"
    text = path.read_text().replace("patience = 0", "patience = 2").replace('attention = "plain"', 'attention = "xla"')
    path.write_text(re.sub(r"(\[checkpoint\]\n(?:.*\n)*?every = )0", r"\g<1>5", text))
    assert (
        "patience = 2" in path.read_text()
        and 'attention = "xla"' in path.read_text()
        and "every = 5" in path.read_text()
    )
    assert electrax.load(tmp_path / "old").predict(["the film was good"])[0]["label"] in ("no", "yes")
    assert call("evaluate", tmp_path / "old", "--head.no_answer=true")[0] == 0


def test_a_run_goes_on_where_the_file_of_its_tokenizer_is_gone(config, straight, tmp_path):
    shutil.copy(straight / "tokenizer.json", tmp_path / "own.json")
    changes = {"init_from": "", "data": {"tokenizer": str(tmp_path / "own.json")}}
    train(config(tmp_path / "run", **changes, steps=1))
    (tmp_path / "own.json").unlink()
    assert train(config(tmp_path / "run", **changes, steps=2))["step"] == 2
    with pytest.raises(UserError, match="data.tokenizer: expected one of .* or a path, not"):
        train(config(tmp_path / "other", **changes))


def test_evaluation_holds_the_rows_of_training_out_under_any_name_of_their_file(tmp_path, monkeypatch):
    write_rows(tmp_path / "reviews.csv", REVIEWS)
    monkeypatch.chdir(tmp_path)
    train(finetuning("run", data={"path": "reviews.csv", "holdout": 0.25}))
    for path, rows in (("reviews.csv", 6), (tmp_path / "reviews.csv", 6), ("./reviews.csv", 6)):
        assert f"data {rows} rows" in " ".join(call("evaluate", "run", "--data.path", path)[1].split())
    write_rows(tmp_path / "others.csv", REVIEWS[:20])
    assert "data 20 rows" in " ".join(call("evaluate", "run", "--data.path", "others.csv")[1].split())


@pytest.mark.parametrize(
    "words", [["--model.layers=2"], ["--task=tag"], ["--optimizer.learning_rate=0.5"], ["--seeds=2"], ["--steps=9"]]
)
def test_evaluation_refuses_what_it_cannot_change(straight, words):
    with pytest.raises(UserError, match="which evaluate cannot change"):
        call("evaluate", straight, *words)


def test_rows_are_multiples_of_16_for_kernels_of_a_gpu_and_the_longest_must_be_one(tmp_path):
    model = {"compute_dtype": "bfloat16", "attention": "fused", "width": 32, "heads": 2}
    for changes, message in (
        ({"data": {"max_length": 40}}, "data.max_length 40: expected a multiple of data.length_multiple, 16, as model"),
        (
            {"task": "rewrite", "decoder": {"max_length": 20}},
            "decoder.max_length 20: expected a multiple of .*, 16, as",
        ),
    ):
        with pytest.raises(UserError, match=message):
            with_multiple(finetuning(tmp_path, model=model, **changes))
    assert with_multiple(finetuning(tmp_path, model=model)).length_multiple == 16
    assert with_multiple(finetuning(tmp_path)).length_multiple == 1


def test_attention_without_dropout_of_its_weights_does_not_train_with_it(config, tmp_path):
    with pytest.raises(UserError, match="model.attention xla has no dropout .*; expected model.attention_dropout 0"):
        set_up(config(tmp_path, model={"attention": "xla"}))


def test_a_run_of_one_seed_is_not_continued_as_several(config, straight):
    with pytest.raises(UserError, match="holds a run of one seed; take another workdir for several"):
        train(config(straight, seed=1, seeds=2))


def summary(scores, metric="accuracy"):
    runs = {f"seed-{i}": {"task": "classify", "metric": metric, "score": score, "failed": [], "metrics": {"n": i}}
            for i, score in enumerate(scores)}  # fmt: skip
    return summarize_seeds(runs)


def test_of_an_even_number_of_seeds_the_lower_median_is_kept():
    found = summary([0.5, 0.9, 0.7, 0.6])
    assert (found["score"], found["mean"]) == (pytest.approx(0.65), pytest.approx(0.675))
    assert (found["best"], found["median_run"]) == ("seed-1", "seed-3")
    assert found["std"] == pytest.approx(math.sqrt((0.175**2 + 0.225**2 + 0.025**2 + 0.075**2) / 3))
    assert found["metrics"] == {"n": 1}
    assert summary([4.0, 1.0, 9.0], "mse")["best"] == "seed-1"


def test_a_score_that_is_not_a_number_is_told_as_a_failure():
    encoder = discriminator_shape(ModelConfig(size="tiny"), 8)
    task = ClassifyTask(encoder, 0, 3, kind="number", metric="spearman")
    arrays = {"logits": np.float32([[0.5]]), "label": np.float32([1])}
    assert findings(task, Record(1, "eval", {"spearman": math.nan}, arrays)) == ["its spearman is not a number"]
    assert findings(task, Record(1, "eval", {"spearman": 0.5}, arrays)) == []


def test_a_seed_without_a_score_is_never_the_best():
    found = summary([None, -0.2, 0.1])
    assert (found["best"], found["median_run"]) == ("seed-2", "seed-1")
    assert math.isnan(found["scores"][0])


def test_the_table_of_seeds_marks_what_is_kept_and_what_did_not_train(capsys):
    found = summary([0.5, 0.75, 0.25])
    runs = {name: {"failed": ["it is stuck"] if name == "seed-2" else []} for name in ("seed-0", "seed-1", "seed-2")}
    show_seeds(found, runs)
    output = capsys.readouterr().out
    for seed, score, note in ((0, "0.5000", "median, kept"), (1, "0.7500", "best, kept"),
                              (2, "0.2500", "did not train: it is stuck")):  # fmt: skip
        assert re.search(rf"seed-{seed} +│ +{score} │ +{note}", output)
    assert "median 0.5000  mean 0.5000  standard deviation 0.2500" in output


def test_a_run_on_other_rows_is_not_continued(config, straight, folder):
    rows = (folder / "train.csv").read_text()
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    try:
        (folder / "train.csv").write_text(rows.replace("poor,no", "poor,yes"))
        with pytest.raises(UserError, match="holds a run on other rows than those of .*; take another workdir"):
            set_up(config(straight, seed=1))
    finally:
        (folder / "train.csv").write_text(rows)
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


@pytest.fixture
def two_seeds(config, folder, tmp_path):
    """(work directory, seeds) -> config of one step on a copy of the rows, of which two seeds in `run` are trained."""
    for name in ("train.csv", "dev.csv"):
        shutil.copy(folder / name, tmp_path / name)

    def made(name="run", seeds=2, **changes):
        return config(tmp_path / name, seeds=seeds, data={"path": str(tmp_path)}, **({"steps": 1} | changes))

    train(made())
    return made


def test_finished_seeds_are_refused_on_other_rows_and_without_any(two_seeds, tmp_path):
    rows = (tmp_path / "train.csv").read_text()
    before = results_of(tmp_path / "run")
    assert train(two_seeds()) == before
    (tmp_path / "train.csv").write_text(rows.replace("poor,no", "poor,yes"))
    with pytest.raises(UserError, match="seed-0/head.json holds a run on other rows than those of"):
        train(two_seeds())
    (tmp_path / "train.csv").unlink()
    with pytest.raises(UserError, match="expected train.csv or the like in it"):
        train(two_seeds())
    assert results_of(tmp_path / "run") == before


def test_finished_seeds_are_measured_on_the_dev_rows_of_now(two_seeds, tmp_path):
    before = results_of(tmp_path / "run")
    shutil.copy(tmp_path / "train.csv", tmp_path / "dev.csv")
    after = train(two_seeds())
    assert all(a != b for a, b in zip(before["scores"], after["scores"], strict=True))
    straight = train(two_seeds("straight"))
    assert after["scores"] == straight["scores"]


def test_seeds_of_fewer_steps_than_were_taken_are_refused_before_anything_changes(two_seeds, tmp_path):
    train(two_seeds(steps=2))
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="trained for 2 steps already; expected no fewer, not 1"):
        train(two_seeds(steps=1))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == kept


def test_a_seed_that_did_not_train_is_tried_again_where_more_steps_may_be_skipped(two_seeds, tmp_path):
    path = tmp_path / "run" / "seed-1" / "results.json"
    path.write_text(json.dumps(results_of(path.parent) | {"score": None, "failed": ["the loss is NaN"]}))
    assert train(two_seeds())["scores"][1] is None
    assert train(two_seeds(optimizer={"learning_rate": 0.01, "max_skipped": 5}))["scores"][1] is not None


def test_finished_seeds_are_not_trained_again_where_they_moved_or_compute_in_other_batches(two_seeds, tmp_path):
    before = results_of(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("electrax.report.finetune.train_some", lambda *_: pytest.fail("trained again"))
        assert train(two_seeds("moved", optimizer={"learning_rate": 0.01, "microbatch": 1})) == before


def test_several_seeds_are_not_continued_as_one(two_seeds):
    with pytest.raises(UserError, match="holds runs of several seeds; take another workdir for one"):
        train(two_seeds(seeds=1))


# -- what stays as it was, and what ends early -------------------------------------------------------------------------


def test_what_is_frozen_stays_and_everything_else_moves(folder, tmp_path):
    model = {"layers": 2}
    frozen = {"freeze_embeddings": True, "freeze_layers": 1, "optimizer": FAST | {"weight_decay": 0.1}}
    run, _ = set_up(finetuning(tmp_path, model=model, data={"path": str(folder)}, **frozen))
    before = flat(run.state.params)
    list(run.train())
    run.checkpoints.close()
    after = params_of(tmp_path)
    still = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    expected = {name for name in before if name.startswith("embeddings/")}
    expected |= {name for name in before if "encoder/embeddings_project/" in name or "encoder/layer_0/" in name}
    assert len(expected) == 5 + 2 + 12
    assert still == expected


@pytest.fixture(scope="module")
def early(config, folder, tmp_path_factory):
    """(config, results) of a run that learns the opposite of what its dev rows say."""
    write_rows(folder / "contrary.csv", REVIEWS[20:])
    changed = config(
        tmp_path_factory.mktemp("early") / "run",
        steps=60,
        eval={"every": 2, "patience": 2},
        data={"train": "opposite.csv", "dev": "contrary.csv"},
    )
    return changed, train(changed)


def test_training_ends_after_evaluations_without_a_better_score_and_keeps_the_best(early):
    config, results = early
    losses = {line["step"]: line["eval_loss"] for line in metrics_of(config.workdir) if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert list(losses) == list(range(2, best + 5, 2))  # two evaluations beyond the best
    assert max(losses) < 60
    assert (results["step"], results["score"]) == (best, losses[best])
    kept = [path.parent.name for path in pathlib.Path(config.workdir).glob("checkpoints/*/checksums.json")]
    assert sorted(map(int, kept)) == [best, best + 2, best + 4]  # and the latest two


def test_the_best_step_is_what_is_evaluated_loaded_and_started_from(early, config):
    changed, results = early
    workdir = pathlib.Path(changed.workdir)
    task, _, final = evaluate_trained(load(FinetuneConfig, workdir / "config.toml"))
    assert (final.step, final.figures) == (results["step"], results["metrics"])
    best = params_of(workdir, latest=results["step"])
    assert not same_bits(best, params_of(workdir))
    assert same_bits(flat(electrax.load(workdir).params), best)
    next_one = config("unused", init_from=str(workdir))
    assert same_bits(flat(started(next_one, read_head(workdir))), best)


def test_a_run_that_ended_early_and_is_repeated_stays_as_it_is(early):
    config, results = early
    before = metrics_of(config.workdir)
    assert train(config) == results
    assert [line for line in metrics_of(config.workdir) if "loss" in line] == [
        line for line in before if "loss" in line
    ]


# -- a teacher ---------------------------------------------------------------------------------------------------------


def test_a_teacher_brings_the_probabilities_nearer_to_its_own(config, straight, tmp_path):
    """Even where the labels say the opposite, which with a weight of 1 do not count."""
    teacher = {"path": str(straight), "weight": 1.0}
    changed = config(tmp_path, seed=3, steps=20, teacher=teacher, data={"train": "opposite.csv"})
    run, rows = set_up(dataclasses.replace(changed, eval=dataclasses.replace(changed.eval, every=1000)))
    texts = [text for text, _ in REVIEWS[:20]]

    def probabilities(model):
        return np.array([list(row["probabilities"].values()) for row in model.predict(texts)])

    wanted = probabilities(electrax.load(straight))
    before = probabilities(Classifier(run.state.params, run.tokenizer, run.task, 16))
    losses = [record.figures["teacher_loss"] for record in run.train() if record.kind == "log"]
    run.checkpoints.close()
    after = probabilities(electrax.load(tmp_path))
    assert np.abs(after - wanted).mean() < 0.5 * np.abs(before - wanted).mean()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"kind": "labels"}}, "its head.kind is classes, not labels"),
        ({"data": {"train": "others.csv", "dev": "others.csv"}}, "its classes are not those of the rows"),
        ({"teacher": {"path": "PRETRAINED"}}, "expected the work directory of a classifier"),
        ({"teacher": {"path": "gone/for/good"}}, "^gone/for/good: no such file or directory$"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(config, straight, pretrained, folder, tmp_path, changes, message):
    write_rows(folder / "others.csv", [("good", "x"), ("bad", "y")])
    teacher = changes.pop("teacher", {"path": str(straight)})
    teacher = {"path": teacher["path"].replace("PRETRAINED", str(pretrained))}
    with pytest.raises(UserError, match=message):
        set_up(config(tmp_path, metric="", teacher=teacher, **changes))


# -- in other formats --------------------------------------------------------------------------------------------------


def there_and_back(workdir, folder):
    """A model after a way through a Hugging Face directory."""
    convert(ConvertConfig(source=str(workdir), out=str(folder / "theirs")))
    return electrax.load(folder / "theirs")


def test_a_model_of_numbers_gives_the_same_ones_in_another_format(config, folder, tmp_path):
    rows = write_rows(tmp_path / "stars" / "train.csv", [(text, 4 if label == "yes" else 1) for text, label in REVIEWS])
    write(rows.with_name("dev.csv"), rows.read_text())
    head = {"kind": "number", "style": "dense"}
    train(config(tmp_path / "run", data={"path": str(rows.parent)}, head=head, steps=1))
    model, back = electrax.load(tmp_path / "run"), there_and_back(tmp_path / "run", tmp_path)
    assert (model.task.scale, back.task.scale) == (4.0, 1.0)
    texts = [text for text, _ in REVIEWS[:3]]
    for one, other in zip(model.predict(texts), back.predict(texts), strict=True):
        assert abs(one["value"]) > 1e-3 and other["value"] == pytest.approx(one["value"], rel=1e-5)


@pytest.mark.parametrize("faithful", [True, False])
def test_a_tagger_gives_the_same_tags_in_another_format(config, tmp_path, faithful):
    for name in ("train", "dev"):
        write(tmp_path / "words" / f"{name}.txt", "the\tO\ncat\tB-X\n\na\tO\ndog\tB-X\nran\tO\n\n" * 8)
    files = {"format": "conll", "train": "train.txt", "dev": "dev.txt", "path": str(tmp_path / "words")}
    train(config(tmp_path / "run", data=files, task="tag", metric="f1", faithful=faithful, steps=1))
    model, back = electrax.load(tmp_path / "run"), there_and_back(tmp_path / "run", tmp_path)
    ids = jnp.asarray([[2, 9, 10, 3]])
    one, other = (m.task.logits(m.params, {"ids": ids}) for m in (model, back))
    np.testing.assert_allclose(one, other, atol=1e-5)
    types = model.params["embeddings"]["type"]
    assert np.abs(types[0] - types[1]).max() > 1e-3 and back.task.faithful is False


def test_a_tokenizer_that_took_the_place_of_another_is_refused(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    export(ExportConfig(model=str(straight), out=str(tmp_path / "small"), format="safetensors"))
    for workdir in (tmp_path / "run", tmp_path / "small"):
        electrax.load(workdir)
        file = workdir / "tokenizer.json"
        content = file.read_text()
        file.write_text(content.replace('"cat"', '"cet"', 1))
        assert file.read_text() != content
        with pytest.raises(UserError, match="its tokenizer is not the one that its weights were trained with"):
            electrax.load(workdir)
