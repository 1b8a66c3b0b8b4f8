import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.tasks.base import Mean
from electrax.training.checkpoint import Checkpoints
from electrax.training.feed import host_feed
from electrax.training.loop import Interrupted, train
from electrax.training.sharding import MeshConfig, make_mesh
from electrax.training.state import TrainState
from electrax.training.window import NonFiniteLoss

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


class Recorded(Checkpoints):
    """Keeps states in a dict."""

    def __init__(self, directory, events, before=()):
        super().__init__(directory, 1)
        self.events, self.states, self.scores = events, dict.fromkeys(before), dict(before)

    def steps(self):
        return sorted(self.states)

    def score(self, step):
        return self.scores[step]

    def best(self):
        scores = {step: score for step, score in self.scores.items() if score is not None}
        return max(scores.items(), key=lambda scored: scored[1], default=None)

    def save(self, step, state, score=None):
        self.events.append(f"save {int(state.step)}")
        assert step == int(state.step)
        self.states[step], self.scores[step] = np.asarray(state.params["w"]).tolist(), score


class FakeTask:
    """Batch s holds the number s; the state counts what it has seen."""

    batch_size = 2

    def __init__(self, events):
        self.events = events

    def train_batch(self, step, rows):
        self.events.append(f"batch {step}")
        return {"ids": np.full((2, 1), step)}

    def score(self, figures):
        return -figures["loss"]

    def init(self, key, batch): ...
    def prepare(self, batch, keys): ...
    def loss(self, params, prepared): ...
    def evaluate(self, params, prepared): ...
    def summarize(self, means, arrays): ...
    def eval_batches(self, rows): ...


LOSSES = [8.0, 6.0, 1.0, 3.0, 5.0, 4.0, 2.0, 7.0]


class Fake:
    """A run of the loop with everything around it made up; `events` tells what happened, in order."""

    def __init__(self, tmp_path, start=0, saved=(), losses=LOSSES, norms=None, held_out=None, seconds=0.0):
        self.events: list[str] = []
        self.seconds = seconds  # of a step
        self.held_out = held_out or {}  # loss by step
        saved = saved if isinstance(saved, dict) else dict.fromkeys(saved)
        self.checkpoints = Recorded(tmp_path, self.events, saved)
        self.losses, self.norms = losses, norms or [1.0] * len(losses)
        self.start = start

    def several(self, state, batches):
        self.events.append(f"{len(batches['ids'])} steps:")
        results = []
        for ids in batches["ids"]:
            state, *result = self(state, {"ids": ids})
            results.append(result)
        return state, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    def __call__(self, state, batch):
        time.sleep(self.seconds)
        number = int(np.asarray(batch["ids"])[0, 0])
        self.events.append(f"step {number}")
        assert number == int(state.step)
        metrics = {
            "accuracy": Mean(jnp.float32(number), jnp.float32(2 * number)),  # always a half
            "recall": Mean(jnp.float32(1.0), jnp.float32(number)),
            "gradient_norm": Mean(jnp.float32(self.norms[number]), jnp.float32(1.0)),
        }
        return TrainState(state.step + 1, {"w": state.params["w"] + 1}, ()), jnp.float32(self.losses[number]), metrics

    def evaluate(self, params):
        self.events.append(f"evaluate {int(params['w'])}")
        return {"loss": self.held_out.get(int(params["w"]), float(params["w"]) + 0.5)}, {"score": np.zeros(3)}

    def records(
        self,
        steps,
        eval_every=100,
        save_every=100,
        log_every=100,
        patience=0,
        stop=lambda: False,
        dispatch=1,
        max_skipped=0,
    ):
        state = TrainState(jnp.int32(self.start), {"w": jnp.float32(self.start)}, ())
        every = {"eval_every": eval_every, "save_every": save_every, "log_every": log_every, "patience": patience}
        task = FakeTask(self.events)
        for record in train(
            task,
            state,
            self,
            self.evaluate,
            self.checkpoints,
            host_feed(task.train_batch, task.batch_size, MESH),
            steps=steps,
            stop=stop,
            steps_per_dispatch=dispatch,
            max_skipped=max_skipped,
            **every,
        ):
            self.events.append(f"{record.kind} record {record.step}")
            yield record


def test_the_order_is_evaluate_save_batch_step_and_the_log_of_the_steps_before(tmp_path):
    fake = Fake(tmp_path)
    list(fake.records(4, eval_every=2, save_every=2, log_every=1))
    assert fake.events == [
        "batch 0",
        "step 0",
        "batch 1",
        "step 1",  # runs while step 0 is logged
        "log record 1",
        "log record 2",
        "evaluate 2",
        "eval record 2",
        "save 2",
        "save record 2",
        "batch 2",
        "step 2",
        "batch 3",
        "step 3",
        "log record 3",
        "log record 4",
        "evaluate 4",
        "eval record 4",
        "save 4",
        "save record 4",
    ]


def test_the_last_step_is_evaluated_and_saved_whatever_the_intervals(tmp_path):
    fake = Fake(tmp_path)
    kinds = [(record.kind, record.step) for record in fake.records(3)]
    assert kinds == [("log", 3), ("eval", 3), ("save", 3)]
    assert fake.checkpoints.states == {3: 3.0}
    assert fake.checkpoints.scores == {3: -3.5}  # of the evaluation of the state that is saved


def test_a_state_that_was_not_evaluated_is_saved_without_a_score(tmp_path):
    fake = Fake(tmp_path)
    list(fake.records(4, eval_every=4, save_every=1))
    assert fake.checkpoints.scores == {1: None, 2: None, 3: None, 4: -4.5}


def test_a_log_record_has_the_means_over_its_window_weights_and_all(tmp_path):
    logs = [r for r in Fake(tmp_path).records(5, log_every=3) if r.kind == "log"]
    assert [(r.step, r.figures["steps"]) for r in logs] == [(3, 3), (5, 2)]
    # losses 8, 6, 1 and then 3, 5; recall is (1 + 1 + 1) / (0 + 1 + 2) and then (1 + 1) / (3 + 4)
    assert [r.figures["loss"] for r in logs] == [5.0, 4.0]
    assert [r.figures["recall"] for r in logs] == [1.0, pytest.approx(2 / 7, abs=1e-15)]
    assert [r.figures["accuracy"] for r in logs] == [0.5, 0.5]


def test_no_step_is_in_two_windows_or_in_none(tmp_path):
    records = list(Fake(tmp_path).records(8, eval_every=4, save_every=5, log_every=3))
    logs = [(r.step, r.figures["steps"]) for r in records if r.kind == "log"]
    assert logs == [(3, 3), (4, 1), (5, 1), (6, 1), (8, 2)]


def test_a_mean_over_nothing_is_nan(tmp_path):
    record = next(r for r in Fake(tmp_path).records(1) if r.kind == "log")
    assert np.isnan(record.figures["accuracy"])  # step 0 weighs 0


@pytest.mark.parametrize(
    ("losses", "norms"),
    [
        ([1.0, 1.0, 1.0, 1.0, float("nan"), float("nan"), 1.0, 1.0], None),
        ([1.0, 1.0, 1.0, 1.0, float("inf"), 1.0, 1.0, 1.0], None),
        ([1.0] * 8, [1.0, 1.0, 1.0, 1.0, float("inf"), 1.0, 1.0, 1.0]),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_nothing_after_it_is_saved(tmp_path, losses, norms):
    fake = Fake(tmp_path, losses=losses, norms=norms)
    with pytest.raises(NonFiniteLoss, match="at step 4, in the window of steps 3 to 5"):
        list(fake.records(8, save_every=3, log_every=6))
    assert list(fake.checkpoints.states) == [3]  # 6 would be the next
    assert "evaluate 8" not in fake.events


def test_a_loss_that_is_not_finite_is_found_before_the_last_state_is_saved(tmp_path):
    fake = Fake(tmp_path, losses=[1.0, 1.0, float("nan")])
    with pytest.raises(NonFiniteLoss, match="at step 2, in the window of steps 0 to 2"):
        list(fake.records(3))
    assert fake.checkpoints.states == {}


def test_steps_that_are_not_finite_are_told_and_left_out_of_the_means_until_too_many_come_in_a_row(tmp_path):
    nan, inf = float("nan"), float("inf")
    fake = Fake(tmp_path, losses=[1.0, nan, inf, 3.0, nan, nan, nan, 1.0])
    records = fake.records(8, log_every=4, max_skipped=2)
    seen = []
    with pytest.raises(NonFiniteLoss, match="at step 6, in the window of steps 4 to 7, the 3. in a row"):
        seen.extend(records)
    alarms = [(r.step, r.figures["skipped"]) for r in seen if r.kind == "alarm"]
    assert alarms == [(2, 1), (3, 2), (5, 1), (6, 2), (7, 3)]
    [log] = [r for r in seen if r.kind == "log"]
    assert log.figures["loss"] == 2.0  # of 1 and 3
    assert log.figures["steps"] == 4


def test_skipped_steps_are_counted_across_windows(tmp_path):
    fake = Fake(tmp_path, losses=[1.0, float("nan"), float("nan"), 1.0])
    with pytest.raises(NonFiniteLoss, match="the 2. in a row"):
        list(fake.records(4, log_every=2, max_skipped=1))


def test_a_window_without_an_update_has_no_means(tmp_path):
    fake = Fake(tmp_path, losses=[float("nan")] * 2)
    [log] = [r for r in fake.records(2, max_skipped=5) if r.kind == "log"]
    assert np.isnan(log.figures["loss"])


def test_a_loss_far_above_those_before_is_told(tmp_path):
    losses = [1.0 + 0.01 * (i % 3) for i in range(60)]
    losses[55] = 2.0
    alarms = [r for r in Fake(tmp_path, losses=losses).records(60, log_every=10) if r.kind == "alarm"]
    assert [(r.step, r.figures["loss"], r.figures["median"]) for r in alarms] == [(56, 2.0, pytest.approx(1.01))]


def test_a_stop_saves_the_state_and_raises_interrupted(tmp_path):
    fake = Fake(tmp_path)
    asked = iter([False, False, True])
    seen = []
    with pytest.raises(Interrupted) as caught:
        seen.extend(fake.records(8, stop=lambda: next(asked)))
    assert caught.value.step == 2
    assert fake.checkpoints.states == {2: 2.0}
    assert fake.events[-4:] == ["step 1", "log record 2", "save 2", "save record 2"]  # no evaluation, no batch


def test_a_stop_at_a_step_that_is_saved_already_does_not_save_it_again(tmp_path):
    fake = Fake(tmp_path, start=3, saved=[3])
    with pytest.raises(Interrupted):
        list(fake.records(8, stop=lambda: True))
    assert fake.events == []


def test_a_stop_at_the_last_step_still_leaves_the_run_to_be_finished(tmp_path):
    fake = Fake(tmp_path)
    with pytest.raises(Interrupted):
        list(fake.records(2, stop=lambda: fake.events[-1:] == ["step 1"]))
    assert fake.checkpoints.states == {2: 2.0}
    again = Fake(tmp_path, start=2, saved=[2])
    assert [r.kind for r in again.records(2)] == ["eval"]


def test_a_resumed_run_goes_on_with_the_next_batch_and_repeats_neither_evaluation_nor_save(tmp_path):
    fake = Fake(tmp_path, start=4, saved={2: -9.0, 4: -8.0})
    list(fake.records(6, eval_every=2, save_every=2, log_every=2))
    assert fake.events[:4] == ["batch 4", "step 4", "batch 5", "step 5"]
    assert [e for e in fake.events if e.startswith(("evaluate", "save "))] == ["evaluate 6", "save 6", "save record 6"]


def test_a_run_that_was_stopped_where_an_evaluation_was_due_makes_up_for_it(tmp_path):
    fake = Fake(tmp_path)
    with pytest.raises(Interrupted):
        list(fake.records(4, eval_every=2, stop=lambda: fake.events[-1:] == ["step 1"]))
    again = Fake(tmp_path, start=2, saved=fake.checkpoints.scores)
    list(again.records(4, eval_every=2))
    assert again.events[:4] == ["evaluate 2", "eval record 2", "batch 2", "step 2"]


def test_a_finished_run_is_evaluated_again_and_not_trained(tmp_path):
    fake = Fake(tmp_path, start=4, saved=[4])
    records = list(fake.records(4))
    assert fake.events == ["evaluate 4", "eval record 4"]
    assert records[0].figures == {"loss": 4.5}
    assert records[0].arrays["score"].shape == (3,)


def test_the_time_of_a_window_is_that_of_its_own_steps(tmp_path):
    logs = [r for r in Fake(tmp_path, seconds=0.05).records(5, log_every=4) if r.kind == "log"]
    assert [r.figures["steps"] for r in logs] == [4, 1]
    assert logs[0].figures["seconds"] >= 0.2 and logs[1].figures["seconds"] >= 0.05


def test_no_step_begins_before_all_but_the_last_are_over(tmp_path, monkeypatch):
    fake = Fake(tmp_path, losses=[0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(jax, "block_until_ready", lambda loss: fake.events.append(f"step {loss:.0f} is over"))
    list(fake.records(4))
    assert [event for event in fake.events if event.startswith("step")] == [
        *("step 0", "step 1", "step 0 is over", "step 2", "step 1 is over", "step 3"),
    ]


# -- several steps in one call ----------------------------------------------------------------------------------------


def test_steps_are_taken_together_where_nothing_is_due_between_them(tmp_path):
    fake = Fake(tmp_path)
    list(fake.records(8, eval_every=5, save_every=100, log_every=4, dispatch=2))
    together = [event for event in fake.events if not event.startswith("batch")]
    assert together == [
        *("2 steps:", "step 0", "step 1", "2 steps:", "step 2", "step 3"),
        *("step 4", "log record 4", "log record 5", "evaluate 5", "eval record 5"),  # step 5 is evaluated
        *("2 steps:", "step 5", "step 6", "step 7"),
        *("log record 8", "evaluate 8", "eval record 8", "save 8", "save record 8"),
    ]


def test_the_records_are_those_of_single_steps(tmp_path):
    single, several = (list(Fake(tmp_path).records(8, log_every=4, dispatch=n)) for n in (1, 3))
    assert [(r.kind, r.step) for r in several] == [(r.kind, r.step) for r in single]
    for a, b in zip(single, several, strict=True):
        a.figures.pop("seconds", None), b.figures.pop("seconds", None)
        assert a.figures == b.figures


def test_the_step_of_a_loss_that_is_not_finite_is_named_among_several(tmp_path):
    with pytest.raises(NonFiniteLoss, match="at step 4, in the window of steps 0 to 7"):
        list(Fake(tmp_path, losses=[1.0] * 4 + [float("nan")] * 4).records(8, dispatch=8))


def test_a_started_generator_trains_only_as_far_as_it_is_asked(tmp_path):
    fake = Fake(tmp_path)
    records = fake.records(8, log_every=1)
    assert fake.events == []
    assert next(records).step == 1
    assert fake.events == ["batch 0", "step 0", "batch 1", "step 1", "log record 1"]


# -- early stopping ---------------------------------------------------------------------------------------------------


def evaluated(tmp_path, held_out, patience, steps=20, **start):
    """(steps at which a run was evaluated, its checkpoints); every second step is, and is saved."""
    fake = Fake(tmp_path, losses=[1.0] * 20, held_out=held_out, **start)
    records = list(fake.records(steps, eval_every=2, save_every=2, patience=patience))
    assert [r.kind for r in records[-2:]] == ["eval", "save"]
    return [record.step for record in records if record.kind == "eval"], fake.checkpoints


FALLING = {2: 9.0, 4: 5.0, 6: 7.0, 8: 6.0, 10: 4.0, 12: 8.0, 14: 8.0, 16: 8.0, 18: 8.0, 20: 8.0}


@pytest.mark.parametrize(
    ("patience", "last"),
    [(1, 6), (2, 8), (3, 16), (4, 18), (5, 20), (0, 20)],  # the best is 4, and from 10 on 10
)
def test_training_ends_after_as_many_evaluations_without_a_better_score_as_there_is_patience(tmp_path, patience, last):
    steps, checkpoints = evaluated(tmp_path, FALLING, patience)
    assert steps == list(range(2, last + 1, 2))
    assert checkpoints.steps()[-1] == last and checkpoints.scores[last] == -FALLING[last]


def test_an_equal_score_is_not_a_better_one(tmp_path):
    assert evaluated(tmp_path, dict.fromkeys(range(21), 3.0), 2)[0] == [2, 4, 6]


def test_any_score_is_better_than_the_worst_there_is(tmp_path):
    held_out = {2: float("inf"), 4: float("inf"), 6: 9.0, 8: 9.0, 10: 9.0, 12: 9.0}
    assert evaluated(tmp_path, held_out, 3)[0] == [2, 4, 6, 8, 10, 12]


def test_a_better_score_at_the_last_step_does_not_prolong_a_run(tmp_path):
    assert evaluated(tmp_path, {2: 5.0, 4: 4.0, 6: 3.0}, 1, steps=6)[0] == [2, 4, 6]


def test_a_resumed_run_is_as_patient_as_one_that_was_not_stopped(tmp_path):
    saved = {2: -9.0, 4: -5.0, 6: -7.0}
    assert evaluated(tmp_path, FALLING, 2, start=6, saved=saved)[0] == [8]
    assert evaluated(tmp_path, FALLING, 3, start=6, saved=saved)[0] == [8, 10, 12, 14, 16]


def test_a_run_that_ended_early_is_evaluated_again_and_not_trained(tmp_path):
    saved = {2: -9.0, 4: -5.0, 6: -7.0, 8: -6.0}
    fake = Fake(tmp_path, start=8, saved=saved, held_out=FALLING)
    assert [(r.kind, r.step) for r in fake.records(20, eval_every=2, save_every=2, patience=2)] == [("eval", 8)]
    assert fake.events == ["evaluate 8", "eval record 8"]


def test_only_evaluations_use_up_the_patience(tmp_path):
    fake = Fake(tmp_path, losses=[1.0] * 20, held_out={3: 1.0, 6: 2.0, 9: 2.0})
    records = list(fake.records(20, eval_every=3, save_every=1, patience=2))
    assert [r.step for r in records if r.kind == "eval"] == [3, 6, 9] and fake.checkpoints.steps()[-1] == 9
