"""Where the time of a step goes: what a trace says, and what it is called."""

import gzip
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.encoder import EncoderConfig
from electrax.tasks.classify import ClassifyTask
from electrax.tasks.rewrite import RewriteTask
from electrax.training.optim import OptimizerConfig, make_optimizer
from electrax.training.profile import (
    HOST,
    ProfiledStep,
    Program,
    Run,
    busy_time,
    operation_names,
    own_time,
    part_of,
    read_events,
    read_program,
)
from electrax.training.sharding import put_batch
from electrax.training.state import Step, TrainState, abstract_state, fresh_state, make_step
from tests.fixtures.finetuning import call

ENCODER = EncoderConfig(20, 1, 16, 2, 24, embedding_width=8, max_length=16)
IDS = np.tile(np.array([2, 7, 8, 9, 10, 11, 12, 3], np.int32), (4, 1))
ROWS = {"ids": IDS, "weight": np.ones(4, np.float32)}


def start_of(task, batch, mesh):
    """(step function, state) of a fine-tuning."""
    optimizer = make_optimizer(OptimizerConfig(), 10)
    abstract = abstract_state(task, optimizer, batch, mesh)
    return make_step(task, optimizer, abstract, mesh, 0, 0), fresh_state(task, optimizer, batch, abstract, 0)


@pytest.fixture(scope="module")
def pretraining(tiny):
    task = tiny.task()
    state, step, _ = tiny.start(task, tiny.mesh())
    return step, state, tiny.batch(task, 0)


@pytest.fixture(scope="module")
def classifying(tiny):
    task = ClassifyTask(ENCODER, 0, 3, classes=("yes", "no"), style="dense", metric="loss")
    batch = ROWS | {"label": np.zeros(4, np.int32)}
    return *start_of(task, batch, tiny.mesh()), batch


@pytest.fixture(scope="module")
def rewriting(tiny):
    task = RewriteTask(ENCODER, 0, 3, decoder=ENCODER, cls_id=2, end_id=3, metric="loss")
    batch = ROWS | {"target": IDS}
    return *start_of(task, batch, tiny.mesh()), batch


NORMS = "norms, activations, dropout"
OF_EVERY_TASK = [
    (r"Block_0/up/[^/]*/dot_general$", "matrix products"),
    (r"Block_0/attention/(qkv|output)/[^/]*/(dot_general|transpose)$", "matrix products"),
    (r"Block_0/attention/[^/]*/dot_general$", "attention"),
    (r"Block_0/attention/(reduce_max|exp|div)$", "attention"),
    (r"Block_0/(attention|output)_norm/", NORMS),
    (r"Embeddings", "embeddings"),
    (r"encoder/embeddings_project/|Encoder\)*/embeddings_project/", "embeddings"),
    (r"step\)/optimizer/", "optimizer"),
    (r"step\)/prepare/", "masking"),
    (r"^jit\(step\)/while$|^$|^jit\(step\)/iota$", "other"),
]
OF_ONE_TASK = [
    ("pretraining", r"/(encoder|head)/(erf|mul|add|ge)$", NORMS),
    ("pretraining", r"head\.transform/dense/[^/]*/dot_general$", "matrix products"),
    ("pretraining", r"head\.transform/(erf|mul|norm/.*)$", NORMS),
    ("pretraining", r"^(?!.*Embeddings).*ve->nv/dot_general$", "vocabulary"),
    ("pretraining", r"MaskedLMHead\.logits|jvp\(vocabulary\)|jvp\(sampling\)", "vocabulary"),
    ("classifying", r"jvp\(Encoder\)+/(mul|ge|add)$", NORMS),
    ("classifying", r"jvp\(OutputHead\)+/(mul|erf|dense/add|dense/reduce_sum)$", NORMS),
    ("classifying", r"jvp\(OutputHead\)+/(dense|output)/[^/]*/dot_general$", "matrix products"),
    ("rewriting", r"Block_0/cross_attention/[^/]*/dot_general$", "attention"),
    ("rewriting", r"Block_0/cross_attention/(reduce_max|exp|div|transpose)$", "attention"),
    ("rewriting", r"Block_0/cross_attention/.*(query|key_value|output)/[^/]*/dot_general$", "matrix products"),
    ("rewriting", r"Block_0/cross_attention_norm/", NORMS),
    ("rewriting", r"MaskedLMHead\.transform\)+/(erf|norm/.*)$", NORMS),
    ("rewriting", r"ve->nv/dot_general$", "vocabulary"),
    ("rewriting", r"jvp\(vocabulary\)+/(exp|eq|reduce_max|log)$", "vocabulary"),
]


@pytest.mark.parametrize(
    ("task", "found", "part"),
    OF_ONE_TASK + [(task, *case) for task in ("pretraining", "classifying", "rewriting") for case in OF_EVERY_TASK],
)
def test_an_operation_of_a_compiled_step_belongs_to_the_part_that_its_path_names(task, found, part, request):
    step, state, batch = request.getfixturevalue(task)
    paths = {*read_program(step.compiled(state, batch).as_text()).operations.values()}
    fitting = {path for path in paths if path.startswith("jit(step)/") and re.search(found, path)}
    assert fitting
    assert {path: part_of(path) for path in fitting} == dict.fromkeys(fitting, part)


def test_an_operation_without_a_path_belongs_to_no_part():
    assert part_of("") == "other"


def event(name, thread, start, duration, **args):
    args = {"hlo_op": name, "hlo_module": "jit_step", **args}
    return {"ph": "X", "pid": 1, "tid": thread, "ts": start, "dur": duration, "args": args}


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
    found = {name: time for (_, name), time in own_time(EVENTS).items()}
    assert found == {"loop": 50.0, "dot": 45.0, "inner": 5.0, "add": 40.0, "late": 10.0}


def test_the_devices_are_at_work_while_any_operation_runs():
    assert busy_time(EVENTS) == 130.0 + 10.0


def test_a_programs_operations_have_the_names_that_jax_gave_them():
    text = """HloModule jit_step, is_scheduled=true

ENTRY %main.5 {
  %broadcast_add = u32[8,5]{1,0} fusion(%copy, %copy.2), calls=%fused, metadata={op_name="jit(step)/add" id=3}
  ROOT %dot.7 = (s32[], f32[8]{0}) dot(%a, %b), metadata={op_name="jit(step)/up/dot_general"}
  %plain = f32[] constant(1)
}
"""
    names = {"broadcast_add": "jit(step)/add", "dot.7": "jit(step)/up/dot_general"}
    assert read_program(text) == Program("jit_step", names)


A, B = Program("jit_step", {"fusion": "a"}), Program("jit_step", {"fusion": "b"})


def test_on_a_cpu_whose_events_name_the_call_each_call_has_the_names_of_its_own_program():
    # as threads write them: not in order; and what the feed ran in between
    runs = [("jit_step", "7", 50.0), ("jit_step", "9", 10.0), ("jit_gather", "3", 12.0), ("jit_step", "8", 30.0)]
    events = [event("fusion", 1, start, 5.0, hlo_module=module, run_id=run) for module, run, start in runs]
    found = operation_names(events, [A, B, A])
    assert found == {Run("jit_step", "9"): {"fusion": "a"}, Run("jit_step", "8"): {"fusion": "b"},
                     Run("jit_step", "7"): {"fusion": "a"}}  # fmt: skip


def test_on_a_gpu_whose_events_name_the_program_each_program_has_its_own_names():
    events = [event("fusion", 1, 10.0 * i, 5.0, program_id=program) for i, program in enumerate("4464")]
    found = operation_names(events, [B, B, A, B])
    assert found == {Run("jit_step", "4"): {"fusion": "b"}, Run("jit_step", "6"): {"fusion": "a"}}


def test_the_same_operation_counts_apart_in_each_run():
    events = [event("fusion", 1, 0.0, 5.0, run_id="1"), event("fusion", 1, 10.0, 7.0, run_id="2")]
    assert own_time(events) == {(Run("jit_step", "1"), "fusion"): 5.0, (Run("jit_step", "2"), "fusion"): 7.0}


def test_only_operations_of_the_newest_trace_are_read(tmp_path):
    (tmp_path / "plugins").mkdir()
    with gzip.open(tmp_path / "plugins" / "vm.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [EVENTS[0], {"ph": "X", "ts": 1, "dur": 2, "name": "host"}, {"ph": "M"}]}, file)
    assert read_events(tmp_path) == EVENTS[:1]


def profile_of(step, state, batches, directory):
    profiled = ProfiledStep(step, directory)
    for batch in batches:
        state, _, _ = profiled(state, batch)
    return profiled.finish()


def small_step(compiling=0.0):
    """(step, state) of a sum in a scope that the shape of the batch names; a program takes `compiling` s more."""

    def function(state, batch, seed):
        with jax.named_scope({4: "optimizer", 6: "prepare", 8: "sampling"}[len(batch["ids"])]):
            total = jnp.sum(jnp.sin(batch["ids"] + state.params["w"]))
        return TrainState(state.step + 1, {"w": state.params["w"] + total}, ()), total, {}

    class Slow(Step):
        def compiled(self, state, batch, several=False):
            known = len(self._compiled)
            program = super().compiled(state, batch, several)
            time.sleep(compiling * (len(self._compiled) > known))
            return program

    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(())}, ())
    return Slow(function, jax.tree.map(lambda leaf: leaf.sharding, state), 0), state


def rows_of(count):
    return {"ids": np.ones((count, 64), np.float32)}


def test_the_programs_of_two_shapes_whose_operations_have_the_same_names_are_told_apart(tmp_path):
    step, state = small_step()
    first, second = (read_program(step.compiled(state, rows_of(n)).as_text()) for n in (4, 6))
    assert first.module == second.module and first.operations.keys() & second.operations.keys()
    found = profile_of(step, state, [rows_of(n) for n in (4, 6, 4, 6, 4, 6, 4)], tmp_path)
    assert found.parts["optimizer"] > 0 and found.parts["masking"] > 0


@pytest.mark.parametrize("sizes", [(4, 4, 6, 6, 6, 6, 6), (4, 4, 4, 6, 6, 8, 8)])  # a new shape comes first, or later
def test_the_time_of_compiling_a_new_shape_is_none_of_the_steps(tmp_path, sizes):
    step, state = small_step(compiling=1.0)
    found = profile_of(step, state, [rows_of(n) for n in sizes], tmp_path)
    assert found.steps == 5 and 0 < found.seconds < 1.0


def test_the_time_in_which_devices_wait_is_the_hosts(tmp_path):
    step, state = small_step()
    profiled = ProfiledStep(step, tmp_path)
    for _ in range(7):
        state, _, _ = profiled(state, rows_of(4))
        time.sleep(0.1)
    found = profiled.finish()
    assert found.parts[HOST] > 0.8 and found.seconds > 0.4
    assert sum(found.parts.values()) == pytest.approx(1)


def test_a_classifiers_profile_has_each_part_of_the_encoder_and_no_vocabulary(classifying, tmp_path, tiny):
    step, state, batch = classifying
    longer = batch | {"ids": np.concatenate([IDS, IDS], axis=1)}
    batches = [put_batch(each, tiny.mesh()) for each in (batch, batch, batch, longer, batch, longer, batch)]
    found = profile_of(step, jax.tree.map(jnp.copy, state), batches, tmp_path)
    assert sum(found.parts.values()) == pytest.approx(1)
    assert {"attention", "matrix products", NORMS, "embeddings", "optimizer"} <= found.parts.keys()
    assert "vocabulary" not in found.parts and 0 <= found.parts[HOST] < 1


def test_a_profile_of_rewriting_has_the_vocabulary_and_both_attentions(rewriting, tmp_path, tiny):
    step, state, batch = rewriting
    batches = [put_batch(batch, tiny.mesh())] * 7
    found = profile_of(step, jax.tree.map(jnp.copy, state), batches, tmp_path)
    assert sum(found.parts.values()) == pytest.approx(1)
    assert {"vocabulary", "attention", "matrix products", NORMS, "embeddings", "optimizer"} <= found.parts.keys()
    names = read_program(step.compiled(state, batch).as_text()).operations
    ran = {names.get(event["args"]["hlo_op"], "") for event in read_events(tmp_path)}
    assert {part_of(path) for path in ran if "/cross_attention/bh" in path} == {"attention"}


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
