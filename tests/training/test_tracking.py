import io
import json

import numpy as np
from rich.console import Console

from electrax.training.tracking import Record, Tracker


def tracker(workdir, start=0):
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    rates = lambda step, seconds, steps: {"tokens_per_second": 100.0, "mfu": 0.5}  # noqa: E731
    return Tracker(workdir, start, 8, rates, console), shown


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def log(step, loss=1.0):
    return Record(step, "log", {"loss": loss, "steps": 2, "seconds": 0.5}, {})


def test_a_skipped_step_and_a_spike_are_told_and_kept(tmp_path):
    made, shown = tracker(tmp_path)
    made.write(Record(3, "alarm", {"loss": float("nan"), "gradient_norm": float("inf"), "skipped": 2}, {}))
    made.write(Record(4, "alarm", {"loss": 9.5, "gradient_norm": 3.0, "median": 2.25}, {}))
    made.close()
    assert lines(tmp_path) == [
        {"step": 3, "alarm_loss": None, "alarm_gradient_norm": None, "alarm_skipped": 2},
        {"step": 4, "alarm_loss": 9.5, "alarm_gradient_norm": 3.0, "alarm_median": 2.25},
    ]
    first, second = shown.getvalue().splitlines()
    assert first == "step 3/8  the loss is nan and the gradient's norm inf: update skipped, 2 in a row"
    assert second.startswith("step 4/8  the loss is 9.5 and the gradient's norm 3; the median loss of the steps before")


def test_a_run_that_goes_on_keeps_the_lines_up_to_its_step_and_drops_damaged_ones(tmp_path):
    made, _ = tracker(tmp_path)
    for step in (2, 4, 6):
        made.write(log(step))
    made.close()
    path = tmp_path / "metrics.jsonl"
    damaged = [b'{"step": 3, "loss": \xba}', b'{"stop": 3}', b'{"step": null}', b"[3]", b'{"step": 3, "lo']
    path.write_bytes(b"\n".join([*damaged[:4], *path.read_bytes().splitlines(), damaged[4]]))
    made, _ = tracker(tmp_path, start=4)
    made.write(log(6, 2.0))
    made.close()
    assert [(line["step"], line["loss"], line["seconds"]) for line in lines(tmp_path)] == [
        (2, 1.0, 0.5),
        (4, 1.0, 1.0),
        (6, 2.0, 1.5),
    ]


def test_an_evaluation_is_kept_with_its_prefix(tmp_path):
    made, shown = tracker(tmp_path)
    made.write(Record(2, "eval", {"loss": 0.25, "accuracy": float("nan")}, {"score": np.zeros(3)}))
    made.close()
    assert lines(tmp_path) == [{"step": 2, "eval_loss": 0.25, "eval_accuracy": None}]
    assert "held out: loss 0.250" in shown.getvalue()
