"""Runs side by side: what each of them does is what it does alone."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.config import UserError
from electrax.experiment.run import side_by_side
from electrax.models.encoder import EncoderConfig
from electrax.report import finetune
from electrax.tasks.base import Mean
from electrax.tasks.classify import ClassifyTask
from electrax.training.lockstep import JointStep, lockstep
from electrax.training.optim import OptimizerConfig, make_optimizer
from electrax.training.sharding import MeshConfig, make_mesh, put_batch
from electrax.training.state import Request, TrainState, abstract_state, fresh_state, make_step
from electrax.training.tracking import Record, Tracker
from electrax.training.window import NonFiniteLoss
from tests.fixtures.finetuning import (
    REVIEWS,
    finetuning,
    make_pretrained,
    metrics_of,
    params_of,
    results_of,
    write_rows,
)

# -- who goes on, and when ---------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def run(start, end, error=None):
    """A loop from step `start` to `end` that logs what it was sent, and ends with an error if there is one."""
    for step in range(start, end):
        sent = yield Request(step, TrainState(step, {}, ()), {})
        yield Record(step + 1, "log", {"sent": sent}, {})
    if error:
        raise error


def drive(runs, endings=()):
    """(what each round of steps was taken for, the events)."""
    rounds = []

    def take(requests):
        rounds.append({name: request.step for name, request in requests.items()})
        return {name: f"{name} {request.step}" for name, request in requests.items()}

    return rounds, list(lockstep(runs, take, endings))


def test_every_run_is_sent_its_own_results_and_its_records_carry_its_name():
    rounds, events = drive({"a": run(0, 2), "b": run(0, 2)})
    assert rounds == [{"a": 0, "b": 0}, {"a": 1, "b": 1}]
    assert [(name, record.step, record.figures["sent"]) for name, record in events] == [
        ("a", 1, "a 0"),
        ("b", 1, "b 0"),
        ("a", 2, "a 1"),
        ("b", 2, "b 1"),
    ]


def test_a_run_that_ends_early_leaves_the_others_going():
    rounds, events = drive({"a": run(0, 1), "b": run(0, 3), "c": run(2, 2)})
    assert rounds == [{"a": 0, "b": 0}, {"b": 1}, {"b": 2}]
    assert [name for name, _ in events] == ["a", "b", "b", "b"]


def test_runs_at_different_steps_meet_and_go_on_together():
    rounds, _ = drive({"a": run(2, 4), "b": run(0, 4), "c": run(1, 4)})
    assert rounds == [{"b": 0}, {"b": 1, "c": 1}, {"a": 2, "b": 2, "c": 2}, {"a": 3, "b": 3, "c": 3}]


def test_what_a_run_may_end_with_is_told_and_ends_no_other():
    broken = Broken()
    rounds, events = drive({"a": run(0, 1, broken), "b": run(0, 2)}, (Broken,))
    assert rounds == [{"a": 0, "b": 0}, {"b": 1}]
    assert [event for name, event in events if name == "a"][1:] == [broken]
    assert [event.step for name, event in events if name == "b"] == [1, 2]


def test_any_other_error_ends_all():
    with pytest.raises(Broken):
        drive({"a": run(0, 1, Broken()), "b": run(0, 2)}, (UserError,))


def test_no_runs_have_no_records():
    assert drive({}) == ([], [])


# -- one program -------------------------------------------------------------------------------------------------------

FAST = {"learning_rate": 0.02}
NAMES = ("seed-0", "seed-1", "seed-2")
ENCODER = EncoderConfig(
    vocab_size=100, layers=1, width=16, heads=2, feed_forward=32, embedding_width=8, max_length=16, dropout=0.1
)
TASK = ClassifyTask(ENCODER, 0, 3, batch_size=8, kind="classes", classes=("a", "b", "c"), metric="accuracy")


def batch_of(seed, length=8):
    """8 rows of 4 tokens at least."""
    random = np.random.default_rng(seed)
    ids = random.integers(4, 100, (8, length))
    real = np.arange(length) < random.integers(4, length + 1, (8, 1))
    label = random.integers(0, 3, 8)
    return {
        "ids": np.where(real, ids, 0).astype(np.int32),
        "label": label.astype(np.int32),
        "weight": np.ones(8, np.float32),
    }


def start(mesh, microbatch=0, task=TASK, optimizer=None):
    """(states at step 0, step functions) of three seeds."""
    optimizer = optimizer or make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=2.0, layer_decay=0.8), 10)
    abstract = abstract_state(task, optimizer, batch_of(0), mesh)
    states = {name: fresh_state(task, optimizer, batch_of(0), abstract, seed) for seed, name in enumerate(NAMES)}
    steps = {name: make_step(task, optimizer, abstract, mesh, microbatch, seed) for seed, name in enumerate(NAMES)}
    return states, steps


def take_some(mesh, together, microbatch=0):
    """(losses by step, states) after some steps, the seeds' batches being different ones."""
    states, steps = start(mesh, microbatch)
    joint, losses = JointStep(steps), []
    for number in range(3):
        batches = {name: put_batch(batch_of([number, place]), mesh) for place, name in enumerate(NAMES)}
        if together:
            results = joint({name: Request(number, states[name], batches[name]) for name in NAMES})
        else:
            results = {name: steps[name](states[name], batches[name]) for name in NAMES}
        states = {name: results[name][0] for name in NAMES}
        losses.append([float(results[name][1]) for name in NAMES])
    return losses, states, results


@pytest.fixture(scope="module")
def apart():
    """Three steps of every seed by itself, on one device."""
    return take_some(make_mesh(MeshConfig(), jax.devices()[:1]), together=False)


def assert_close(states, expected):
    for name in NAMES:
        for path, leaf in jax.tree_util.tree_leaves_with_path(states[name]):
            wanted = np.asarray(dict(jax.tree_util.tree_leaves_with_path(expected[name]))[path])
            np.testing.assert_allclose(np.asarray(leaf), wanted, rtol=0, atol=1e-5, err_msg=f"{name} {path}")


@pytest.mark.parametrize(
    ("shape", "microbatch"),
    [((1, 1, 1), 0), ((2, 1, 1), 2), ((2, 2, 2), 0)],  # whole batches, and micro-batches of two rows
    ids=str,
)
def test_steps_taken_together_are_those_taken_apart(apart, shape, microbatch):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    losses, states, results = take_some(mesh, True, microbatch)
    np.testing.assert_allclose(losses, apart[0], rtol=1e-5)
    assert_close(states, apart[1])
    for name in NAMES:
        found, wanted = results[name][2], apart[2][name][2]
        assert {key: mean.value() for key, mean in found.items()} == pytest.approx(
            {key: mean.value() for key, mean in wanted.items()}, rel=1e-4
        )


def test_the_seeds_differ_and_drop_units_in_these_tests(apart):
    losses = np.asarray(apart[0])
    assert np.abs(np.diff(losses, axis=1)).min() > 1e-3
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    states, _ = start(mesh)
    encoder = dataclasses.replace(ENCODER, dropout=0.0, attention_dropout=0.0)
    without = dataclasses.replace(TASK, encoder=encoder)
    _, steps = start(mesh, task=without)
    loss = steps["seed-0"](states["seed-0"], put_batch(batch_of([0, 0]), mesh))[1]
    assert abs(float(loss) - losses[0, 0]) > 1e-3


def test_every_state_comes_out_placed_as_it_went_in_and_is_donated():
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices())
    states, steps = start(mesh)
    placed = {name: jax.tree.map(lambda leaf: leaf.sharding, state) for name, state in states.items()}
    results = JointStep(steps)({name: Request(0, states[name], put_batch(batch_of(0), mesh)) for name in NAMES})
    for name in NAMES:
        assert jax.tree.map(lambda leaf: leaf.sharding, results[name][0]) == placed[name]
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[name]))
        assert int(results[name][0].step) == 1


@dataclasses.dataclass(frozen=True)
class Counted(ClassifyTask):
    traced: list = dataclasses.field(default_factory=list, compare=False)

    def loss(self, params, prepared):
        self.traced.append(1)
        return jnp.sum(prepared["ids"]) * params["head"]["bias"][0], {"one": Mean(jnp.ones(()), jnp.ones(()))}

    def init(self, key, batch):
        return {"head": {"bias": jnp.ones(1)}}


def test_the_program_is_compiled_once_for_each_number_of_runs_and_shape_of_batch():
    mesh, task = make_mesh(MeshConfig(), jax.devices()[:1]), Counted(ENCODER, 0, 3)
    states, steps = start(mesh, 8, task, optax.sgd(0.0))
    joint, counts = JointStep(steps), []
    two, others = NAMES[:2], NAMES[1:]
    for number, (names, length) in enumerate([(NAMES, 8), (NAMES, 8), (NAMES, 12), (NAMES, 8), (two, 8), (others, 8)]):
        results = joint({name: Request(number, states[name], put_batch(batch_of(0, length), mesh)) for name in names})
        states |= {name: result[0] for name, result in results.items()}
        counts.append(len(task.traced))
    assert counts == [1, 1, 2, 2, 3, 3]
    assert [int(state.step) for state in states.values()] == [5, 6, 5]


def test_a_run_that_is_alone_takes_its_own_step():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    states, steps = start(mesh)
    request = Request(0, states["seed-1"], put_batch(batch_of(0), mesh))
    joint = JointStep(steps)
    assert joint.compiled({"seed-1": request}) is steps["seed-1"].compiled(request.state, request.batch)
    loss = float(joint({"seed-1": request})["seed-1"][1])
    again, same = start(mesh)
    assert loss == float(same["seed-1"](again["seed-1"], request.batch)[1])


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """(work directory, changed keys) -> config of a fine-tuning of three seeds: 3 batches an epoch, of two lengths."""
    folder = tmp_path_factory.mktemp("reviews")
    longer = [(f"{text} and {text}", label) for text, label in REVIEWS[:10]]
    write_rows(folder / "train.csv", [*longer, *REVIEWS[10:20]])
    write_rows(folder / "dev.csv", REVIEWS[20:])
    pretrained = make_pretrained(folder / "pretrained")

    def config(workdir, **changes):
        values = {"init_from": str(pretrained), "metric": "loss", "steps": 7, "eval": {"every": 3}, "seeds": 3}
        values |= {"optimizer": {"learning_rate": 0.01}, "data": {"path": str(folder), "shapes": 2}}
        return finetuning(workdir, **(values | changes))

    return config


def train(config, status=0):
    """What was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert finetune.finetune_and_report(config, "electrax finetune …") == status
    return output.getvalue()


@pytest.fixture(scope="module")
def one_by_one(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("apart") / "run"
    train(config(workdir))
    return workdir


@pytest.fixture(scope="module")
def together(config, tmp_path_factory):
    """(work directory, what was printed)"""
    workdir = tmp_path_factory.mktemp("together") / "run"
    return workdir, train(config(workdir, seeds_at_once=3))


def losses_of(workdir, name="loss"):
    return {line["step"]: line[name] for line in metrics_of(workdir) if name in line}


def assert_same_runs(workdir, other):
    found, wanted = results_of(workdir), results_of(other)
    assert found["scores"] == pytest.approx(wanted["scores"], abs=1e-5)
    assert (found["best"], found["median_run"]) == (wanted["best"], wanted["median_run"])
    for name in NAMES:
        for figure in ("loss", "eval_loss"):
            one, two = losses_of(workdir / name, figure), losses_of(other / name, figure)
            assert one.keys() == two.keys()
            assert list(one.values()) == pytest.approx(list(two.values()), abs=1e-5)
    for name in {found["best"], found["median_run"]}:
        params = params_of(other / name)
        for path, leaf in params_of(workdir / name).items():
            np.testing.assert_allclose(leaf, params[path], rtol=0, atol=1e-5, err_msg=path)


def test_seeds_trained_side_by_side_are_those_trained_one_by_one(together, one_by_one):
    assert_same_runs(together[0], one_by_one)
    assert len(set(results_of(together[0])["scores"])) == 3
    assert re.search(r"row lengths +\d+, \d+ tokens", together[1])  # batches of two shapes


def test_lines_of_runs_side_by_side_name_their_run(together):
    for name in NAMES:
        for step in (1, 7):
            assert f"\n{name} step {step}/7  loss " in together[1]
        assert f"\n{name} step 3/7  held out: " in together[1]
    assert "side by side   seed-0, seed-1, seed-2" in together[1]


def test_a_few_at_a_time_are_trained_where_more_are_not_allowed(config, tmp_path):
    output = train(config(tmp_path, steps=1, seeds_at_once=2))
    assert "side by side   seed-0, seed-1\n" in output
    assert [output.count(f"\n{name}step 1/1  held out") for name in ("seed-0 ", "seed-1 ", "seed-2 ", "")] == [
        1,
        1,
        0,
        1,
    ]
    assert len(set(results_of(tmp_path)["scores"])) == 3


def test_a_finished_set_of_seeds_is_not_trained_again_with_another_number_at_once(config, together):
    before = {path: path.read_bytes() for path in together[0].glob("seed-*/results.json")}
    assert len(before) == 3
    output = train(config(together[0], seeds_at_once=1))
    assert "step" not in output.split("loss of 3 seeds")[0]
    assert {path: path.read_bytes() for path in before} == before


def stop_at(step, name):
    """A Tracker.write that sends SIGTERM with a run's log line of a step."""
    write = Tracker.write

    def stopping(tracker, record):
        write(tracker, record)
        if (record.kind, record.step) == ("log", step) and pathlib.Path(tracker._file.name).parent.name == name:
            os.kill(os.getpid(), signal.SIGTERM)

    return stopping


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    """(work directory, what was printed) of runs that were stopped while seed-1 was at work on its log."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "write", stop_at(3, "seed-1"))
        return workdir, train(config(workdir, seeds_at_once=3), status=130)


def saved_steps(workdir):
    return sorted(int(path.parent.name) for path in workdir.glob("checkpoints/*/checksums.json"))


def test_a_stop_saves_every_run_at_one_step_and_says_once_how_to_go_on(stopped):
    workdir, output = stopped
    assert [saved_steps(workdir / name) for name in NAMES] == [[3, 4]] * 3
    assert [f"saved step 4 in {workdir / name}\n" in output for name in NAMES] == [True] * 3
    assert output.count("to continue: electrax finetune …") == 1
    assert list(workdir.rglob("results.json")) == []


def test_runs_go_on_together_from_wherever_each_was_saved(config, stopped, one_by_one, tmp_path):
    """As after a kill, when some of them had just saved and others had not."""
    shutil.copytree(stopped[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "seed-1" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "run" / "seed-2" / "checkpoints")
    assert "4 to 7 (continued)" in train(config(tmp_path / "run", seeds_at_once=3))
    assert_same_runs(tmp_path / "run", one_by_one)
    for name in NAMES:
        assert list(losses_of(tmp_path / "run" / name)) == [1, 2, 3, 4, 5, 6, 7]


def test_each_run_ends_when_its_own_score_gets_no_better(config, tmp_path):
    train(config(tmp_path, steps=30, eval={"every": 1, "patience": 1}, optimizer=FAST, seeds_at_once=3))
    lasts = []
    for name in NAMES:
        held_out = list(losses_of(tmp_path / name, "eval_loss").values())
        assert np.all(np.diff(held_out)[:-1] < 0) and held_out[-1] >= held_out[-2]
        assert results_of(tmp_path / name)["step"] == len(held_out) - 1
        lasts.append(len(held_out))
    assert len(set(lasts)) > 1 and max(lasts) < 30


def test_a_seed_whose_loss_is_not_finite_is_a_failed_one_among_the_others(config, one_by_one, tmp_path, monkeypatch):
    set_up = finetune.set_up

    def spoiled(config, early):
        run, rows = set_up(config)
        if config.seed == 1:
            params = jax.tree.map(lambda leaf: leaf * jnp.nan, run.state.params)
            run = dataclasses.replace(run, state=run.state.replace(params=params))
        return run, rows

    monkeypatch.setattr(finetune, "set_up", spoiled)
    steady = {"learning_rate": 0.01, "max_skipped": 0}
    output = train(config(tmp_path, seeds_at_once=3, optimizer=steady))
    results, wanted = results_of(tmp_path), results_of(one_by_one)
    assert results["scores"] == [pytest.approx(wanted["scores"][0], abs=1e-5), None,
                                 pytest.approx(wanted["scores"][2], abs=1e-5)]  # fmt: skip
    assert "the loss is nan" in results["failed"]["seed-1"][0]
    assert "seed-1 did not train" in output
    assert json.loads((tmp_path / "seed-1" / "results.json").read_text())["score"] is None


def test_a_lone_run_still_ends_with_the_error(config, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "train_and_track", lambda run, command: (_ for _ in ()).throw(NonFiniteLoss("nan")))
    with pytest.raises(NonFiniteLoss):
        train(config(tmp_path, seeds=1))


@dataclasses.dataclass(frozen=True)
class Accelerator:
    stats: dict | None
    platform: str = "gpu"

    def memory_stats(self):
        return self.stats


def test_so_many_models_are_trained_at_once_as_the_memory_of_an_accelerator_holds(config, tmp_path, monkeypatch):
    runs = {name: finetune.set_up(config(tmp_path / name, seeds=1, seed=seed))[0] for seed, name in enumerate(NAMES)}
    run, needed = runs["seed-0"], side_by_side(runs)[1]

    def at_once(device):
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return run.models_at_once()

    assert at_once(Accelerator({"bytes_limit": 100 * needed})) > 200
    limits = [share * needed for share in (0.1, 0.5, 1.0, 2.0, 5.0)]
    found = [at_once(Accelerator({"bytes_limit": limit})) for limit in limits]
    assert found[0] == 1 and found == sorted(found) and found[-1] > 8
    assert all(count == 1 or count * needed / 3 < limit for count, limit in zip(found, limits, strict=True))
    assert at_once(Accelerator(None)) == 1  # its memory is not known


def test_on_a_cpu_one_model_is_trained_at_a_time(config, tmp_path):
    assert finetune.set_up(config(tmp_path, seeds=1))[0].models_at_once() == 1


def test_a_negative_number_at_once_is_refused():
    with pytest.raises(UserError, match="seeds_at_once must not be negative, but is -1"):
        finetuning("any", seeds_at_once=-1)
