"""Where the time of a step goes: what a trace says, and what it is called."""

import gzip
import json

import pytest

from electrax.training.profile import busy_time, operation_names, own_time, part_of, read_events
from tests.fixtures.finetuning import call

STEP = "jit(step)/while/body/closed_call"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (f"{STEP}/jvp(Discriminator)/encoder/Block_0/up/dot_general", "matrix products"),
        (f"{STEP}/transpose(jvp(Discriminator))/encoder/Block_0/attention/qkv/transpose", "matrix products"),
        (f"{STEP}/jvp(Discriminator)/encoder/Block_0/attention/blhk,bmhk->bhlm/dot_general", "attention"),
        (f"{STEP}/jvp(Discriminator)/encoder/Block_0/attention/reduce_max", "attention"),
        (f"{STEP}/transpose(jvp(Generator))/head/bne,ve->bnv/dot_general", "vocabulary"),
        (f"{STEP}/jvp(vocabulary)/exp", "vocabulary"),
        (f"{STEP}/jvp(sampling)/exp", "vocabulary"),
        (f"{STEP}/jvp(Embeddings)/norm/mul", "embeddings"),
        (f"{STEP}/jvp(Discriminator)/encoder/embeddings_project/dot_general", "embeddings"),
        ("jit(step)/optimizer/mul", "optimizer"),
        ("jit(step)/prepare/vmap()/PretrainTask._mask_row/add", "masking"),
        (f"{STEP}/jvp(Generator)/encoder/Block_0/output_norm/mul", "norms, activations, dropout"),
        ("jit(step)/while", "other"),
        ("", "other"),
    ],
)
def test_an_operation_belongs_to_the_part_that_its_path_names(path, part):
    assert part_of(path) == part


def event(name, thread, start, duration):
    return {"ph": "X", "pid": 1, "tid": thread, "ts": start, "dur": duration, "args": {"hlo_op": name}}


# a loop of 100 around two operations, one of which holds a third; and another thread at work at the same time
EVENTS = [
    event("loop", 1, 0.0, 100.0),
    event("dot", 1, 10.0, 30.0),
    event("inner", 1, 15.0, 5.0),
    event("dot", 1, 50.0, 20.0),
    event("add", 2, 90.0, 40.0),
    event("late", 2, 200.0, 10.0),
]


def test_what_runs_inside_an_operation_is_not_its_own_time():
    assert own_time(EVENTS) == {"loop": 50.0, "dot": 45.0, "inner": 5.0, "add": 40.0, "late": 10.0}


def test_the_devices_are_at_work_while_any_operation_runs():
    assert busy_time(EVENTS) == 130.0 + 10.0


def test_a_programs_operations_have_the_names_that_jax_gave_them():
    program = """
  %broadcast_add = u32[8,5]{1,0} fusion(%copy, %copy.2), calls=%fused, metadata={op_name="jit(step)/add" id=3}
  ROOT %dot.7 = (s32[], f32[8]{0}) dot(%a, %b), metadata={op_name="jit(step)/up/dot_general"}
  %plain = f32[] constant(1)
"""
    assert operation_names(program) == {"broadcast_add": "jit(step)/add", "dot.7": "jit(step)/up/dot_general"}


def test_only_operations_of_the_newest_trace_are_read(tmp_path):
    (tmp_path / "plugins").mkdir()
    with gzip.open(tmp_path / "plugins" / "vm.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [EVENTS[0], {"ph": "X", "ts": 1, "dur": 2, "name": "host"}, {"ph": "M"}]}, file)
    assert read_events(tmp_path) == EVENTS[:1]


def test_a_profiled_run_leaves_a_trace_and_shows_shares_that_add_up(tmp_path):
    small = ["--model.layers=1", "--model.width=16", "--model.heads=2", "--model.embedding_width=16"]
    words = ["--workdir", tmp_path / "run", "--steps=8", "--batch_size=8", "--eval.rows=8", "--generator.width=8"]
    status, output = call("pretrain", "tiny", *words, *small, "--profile")
    assert status == 0 and "5 steps traced" in output
    shares = [float(line.split("│")[2].strip(" %")) for line in output.splitlines() if line.endswith("% │")]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert {"matrix products", "attention", "optimizer"} <= {line.split("│")[1].strip() for line in output.splitlines()
                                                            if line.endswith("% │")}  # fmt: skip
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1


def test_too_few_steps_for_a_trace_are_said(tmp_path):
    small = ["--model.layers=1", "--model.width=16", "--model.heads=2", "--model.embedding_width=16"]
    words = ["--workdir", tmp_path / "run", "--steps=2", "--batch_size=8", "--eval.rows=8", "--generator.width=8"]
    status, output = call("pretrain", "tiny", *words, *small, "--profile")
    assert status == 0 and "profile: too few steps to trace any" in output
