import logging
import re
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.config import UserError
from electrax.tasks.base import Mean
from electrax.tasks.pretrain import PretrainTask
from electrax.training.checkpoint import Checkpoints
from electrax.training.feed import host_feed
from electrax.training.sharding import put_batch
from electrax.training.state import (
    abstract_state,
    choose_microbatch,
    choose_together,
    fresh_state,
    make_step,
    return_memory,
)
from tests.fixtures.compilations import compilations


@pytest.fixture(scope="module")
def one_device(tiny, numpy_leaves):
    """Three steps on one device, all rows in one pass."""
    losses, metrics, state = tiny.run(tiny.task(), tiny.mesh())
    return losses, metrics, numpy_leaves(state)


def assert_close(leaves, expected, tolerance):
    assert leaves.keys() == expected.keys()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=tolerance, err_msg=name)


def test_three_steps_change_the_loss_every_time(one_device):
    losses, _, _ = one_device
    # ln(padded vocabulary of 128 at most) + 50 ln 2 = 39.5 at first
    assert losses[0] == pytest.approx(39, abs=2)
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 2)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_every_mesh_gives_the_losses_of_one_device(tiny, one_device, numpy_leaves, shape):
    losses, metrics, state = tiny.run(tiny.task(), tiny.mesh(*shape))
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert metrics == pytest.approx(one_device[1], rel=1e-4, abs=1e-6)
    # Adam divides by √v: where the gradient is next to nothing, rounding moves a parameter by a share of the rate 1e-3
    assert_close(numpy_leaves(state.params), {k.removeprefix("params/"): v for k, v in one_device[2].items()
                                              if k.startswith("params/")}, 1e-4)  # fmt: skip
    assert len(state.params["embeddings"]["word"].sharding.device_set) == np.prod(shape)


def test_several_layers_divide_over_a_mesh_as_one_does(tiny):
    task = tiny.task(model={"layers": 2})
    alone, together = (tiny.run(task, tiny.mesh(*shape), steps=2)[0] for shape in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=lambda s: "x".join(map(str, s)))
def test_what_eight_devices_saved_goes_on_on_other_meshes(tiny, one_device, tmp_path, shape):
    task = tiny.task()
    state, step, _ = tiny.start(task, tiny.mesh(8))
    state, loss, _ = step(state, put_batch(tiny.batch(task, 0), tiny.mesh(8)))
    losses = [float(loss)]
    saved = Checkpoints(tmp_path, 1)
    saved.save(1, state)
    mesh = tiny.mesh(*shape)
    _, step, abstract = tiny.start(task, mesh)
    saved.wait()
    reached, state = saved.restore(abstract)
    saved.close()
    for number in range(reached, 3):
        state, loss, _ = step(state, put_batch(tiny.batch(task, number), mesh))
        losses.append(float(loss))
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)


def test_dropout_is_on_in_these_tests(tiny, one_device):
    without = tiny.task(model={"dropout": 0.0, "attention_dropout": 0.0})
    losses, _, _ = tiny.run(without, tiny.mesh(), steps=1)
    assert abs(losses[0] - one_device[0][0]) > 1e-3


def test_a_fresh_state_is_the_same_on_every_mesh(tiny, numpy_leaves):
    task = tiny.task()
    one, _, _ = tiny.start(task, tiny.mesh())
    many, _, abstract = tiny.start(task, tiny.mesh(2, 2, 2))
    for name, leaf in numpy_leaves(one).items():
        np.testing.assert_array_equal(leaf, numpy_leaves(many)[name], err_msg=name)
    for leaf, wanted in zip(jax.tree.leaves(many), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_change_the_step_by_rounding_only(tiny, one_device, numpy_leaves, rows):
    losses, metrics, state = tiny.run(tiny.task(), tiny.mesh(), microbatch=rows)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert metrics == pytest.approx(one_device[1], rel=1e-4, abs=1e-6)
    assert_close(numpy_leaves(state), one_device[2], 1e-4)


def test_steps_in_one_call_are_those_of_single_calls(tiny, one_device, numpy_leaves):
    task, mesh = tiny.task(), tiny.mesh()
    state, step, _ = tiny.start(task, mesh)
    state, losses, metrics = step.several(state, host_feed(task.train_batch, task.batch_size, mesh)(0, 3))
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-6)
    rtd_loss = float(metrics["rtd_loss"].total[2] / metrics["rtd_loss"].weight[2])
    assert rtd_loss == pytest.approx(one_device[1]["rtd_loss"], rel=1e-5)
    assert_close(numpy_leaves(state), one_device[2], 1e-5)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_step_whose_loss_is_not_finite_counts_and_changes_nothing(tiny, numpy_leaves, value):
    task, mesh = tiny.task(), tiny.mesh()
    state, step, _ = tiny.start(task, mesh)
    state, _, _ = step(state, put_batch(tiny.batch(task, 0), mesh))  # moments that are not 0
    bias = state.params["discriminator"]["head"]["output"]["bias"]
    state.params["discriminator"]["head"]["output"]["bias"] = jnp.full_like(bias, value)
    before = numpy_leaves(state)
    state, loss, metrics = step(state, put_batch(tiny.batch(task, 1), mesh))
    assert not np.isfinite(loss + metrics["gradient_norm"].total)
    after = numpy_leaves(state)
    assert (before.pop("step"), after.pop("step")) == (1, 2)
    assert any("mean" in name and leaf.any() for name, leaf in before.items())
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf, err_msg=name)


def test_each_step_of_each_seed_is_drawn_anew(tiny):
    """Equal rows at two steps are masked differently, and so are they under another seed."""
    task, mesh = tiny.task(optimizer={"learning_rate": 1e-9}), tiny.mesh()
    same = put_batch(tiny.batch(task, 0), mesh)
    state, step, _ = tiny.start(task, mesh)
    losses = []
    for _ in range(2):
        state, loss, _ = step(state, same)
        losses.append(float(loss))
    again, step_again, _ = tiny.start(task, mesh)
    other, step_other, _ = tiny.start(task, mesh, seed=1)
    assert losses[0] != losses[1]
    assert float(step_again(again, same)[1]) == losses[0]
    assert float(step_other(other, same)[1]) != losses[0]


def test_what_the_compiler_freed_goes_back_to_the_system_once_for_each_program(tiny, monkeypatch):
    returned = []
    monkeypatch.setattr("electrax.training.state.return_memory", lambda: returned.append(1))
    state, step, _ = tiny.start(tiny.task(), tiny.mesh())
    for number in range(2):
        state, _, _ = step(state, put_batch(tiny.batch(tiny.task(), number), tiny.mesh()))
    assert returned == [1]


def test_memory_is_returned_where_the_c_library_can_and_otherwise_kept(monkeypatch):
    trimmed = []
    glibc = types.SimpleNamespace(malloc_trim=trimmed.append)
    for library in (glibc, types.SimpleNamespace(), OSError("no such library")):
        monkeypatch.setattr("ctypes.CDLL", unittest.mock.Mock(side_effect=[library]))
        return_memory()
    assert trimmed == [0]


def test_the_second_step_compiles_and_traces_nothing(tiny, caplog):
    traces = []

    class Counted(PretrainTask):
        def loss(self, params, prepared):
            traces.append(1)
            return super().loss(params, prepared)

    plain, mesh = tiny.task(), tiny.mesh(2)
    task = Counted(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
    state, step, _ = tiny.start(task, mesh)

    def compiled(number):
        nonlocal state
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            state, _, _ = step(state, put_batch(tiny.batch(task, number), mesh))
        return [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()]

    assert any("step" in message for message in compiled(0))
    first = len(traces)
    assert first > 0
    assert compiled(1) == []
    assert compiled(2) == []
    assert len(traces) == first


class Noisy:
    """The loss of a row is the sum of its ids and a number drawn for it; batches may have any length."""

    batch_size = 8

    def __init__(self):
        self.traced = 0

    def init(self, key, batch):
        return {"head": {"bias": jnp.zeros(1)}}

    def prepare(self, batch, keys):
        return batch | {"noise": jax.vmap(jax.random.uniform)(keys)}

    def loss(self, params, prepared):
        self.traced += 1
        values = prepared["ids"].sum(tuple(range(1, prepared["ids"].ndim))) + prepared["noise"]
        return jnp.sum(values) * (1 + params["head"]["bias"][0]), {"mean": Mean.of(values, jnp.ones(len(values)))}

    def evaluate(self, params, prepared): ...
    def summarize(self, means, arrays): ...
    def score(self, figures): ...
    def train_batch(self, step, rows): ...
    def eval_batches(self, rows): ...


def start_noisy(mesh, seed=0, microbatch=8):
    task, optimizer = Noisy(), optax.sgd(0.0)
    example = {"ids": np.zeros((8, 4), np.int32)}
    abstract = abstract_state(task, optimizer, example, mesh)
    state = fresh_state(task, optimizer, example, abstract, seed)
    return task, state, make_step(task, optimizer, abstract, mesh, microbatch, seed)


def test_a_step_is_compiled_once_for_each_shape_of_batch(tiny):
    mesh = tiny.mesh()
    task, state, step = start_noisy(mesh)
    shapes = [(8, 4), (8, 6), (8, 4), (8, 3, 4), (8, 6)]
    for number, shape in enumerate(shapes):
        batch = put_batch({"ids": np.full(shape, number + 1, np.int32)}, mesh)
        state, loss, _ = step(state, batch)
        total = (number + 1) * np.prod(shape)
        assert total < float(loss) < total + 8
    assert task.traced == 3 and int(state.step) == 5


def test_a_compiled_step_is_the_one_that_runs(tiny):
    mesh = tiny.mesh()
    task, state, step = start_noisy(mesh)
    batch = put_batch({"ids": np.ones((8, 4), np.int32)}, mesh)
    assert step.compiled(state, batch) is step.compiled(state, batch)
    step(state, batch)
    assert task.traced == 1


def test_a_step_that_was_begun_is_waited_for_and_not_compiled_again(tiny):
    mesh = tiny.mesh()
    task, state, step = start_noisy(mesh)
    batch = put_batch({"ids": np.ones((8, 4), np.int32)}, mesh)
    with compilations() as seconds:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        step.begin(shapes, batch)
        _, loss, _ = step(state, batch)
    assert (task.traced, len(seconds)) == (1, 1)
    assert 8 * 4 < float(loss) < 8 * 4 + 8


def test_what_keeps_a_step_that_was_begun_from_compiling_is_raised_where_it_is_wanted(tiny, monkeypatch):
    mesh = tiny.mesh()
    _, state, step = start_noisy(mesh)
    batch = put_batch({"ids": np.ones((8, 4), np.int32)}, mesh)

    def fail(lowered):
        raise MemoryError("too little")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    step.begin(state, batch)
    with pytest.raises(MemoryError, match="too little"):
        step.compiled(state, batch)


def operations(program):
    """Without where each was traced, which is another place where a part of it had been traced before."""
    return [re.sub(r", metadata=\{[^}]*\}", "", line) for line in program.splitlines() if " = " in line]


def test_runs_that_differ_in_their_seed_alone_share_one_compiled_program(tiny):
    mesh = tiny.mesh()
    batch = put_batch({"ids": np.ones((8, 4), np.int32)}, mesh)
    programs, losses = [], []
    for seed in (0, 123_456):
        _, state, step = start_noisy(mesh, seed)
        programs.append(operations(step.compiled(state, batch).as_text()))
        losses.append(float(step(state, batch)[1]))
    assert len(programs[0]) > 10
    assert programs[0] == programs[1] and losses[0] != losses[1]


@pytest.mark.parametrize(("devices", "microbatch"), [(1, 8), (2, 2), (1, 0)])
def test_the_key_of_a_row_comes_from_seed_step_and_row(tiny, devices, microbatch):
    mesh = tiny.mesh(devices)
    _, state, step = start_noisy(mesh, 7, microbatch)
    for number in range(2):
        state, loss, _ = step(state, put_batch({"ids": np.zeros((8, 4), np.int32)}, mesh))
        key = jax.random.fold_in(jax.random.key(7), number)
        noise = [float(jax.random.uniform(jax.random.fold_in(key, row))) for row in range(8)]
        assert float(loss) == pytest.approx(sum(noise), rel=1e-6)


def test_the_state_given_is_donated(tiny):
    task, mesh = tiny.task(), tiny.mesh()
    before, step, _ = tiny.start(task, mesh)
    after, _, _ = step(before, put_batch(tiny.batch(task, 0), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert int(after.step) == 1


def test_no_random_key_is_used_twice(tiny):
    task, mesh = tiny.task(objective={"random_prob": 0.1}), tiny.mesh()
    with jax.debug_key_reuse(True):
        # in one pass: the checker takes the transposition that cuts micro-batches for a use
        state, step, _ = tiny.start(task, mesh, microbatch=8)
        _, loss, _ = step(state, put_batch(tiny.batch(task, 0), mesh))
    assert np.isfinite(float(loss))


def test_key_reuse_would_be_noticed():
    def twice(key):
        return jax.random.uniform(key) + jax.random.normal(key)

    with jax.debug_key_reuse(True), pytest.raises(Exception, match="[Rr]eus"):
        jax.jit(twice)(jax.random.key(0))


def test_a_cpu_takes_about_512_tokens_at_a_time_and_other_devices_all():
    assert choose_microbatch(0, rows=64, length=128, platform="cpu") == 4
    assert choose_microbatch(0, rows=6, length=128, platform="cpu") == 3  # the largest divisor up to 4
    assert choose_microbatch(0, rows=8, length=1024, platform="cpu") == 1
    assert choose_microbatch(0, rows=64, length=128, platform="gpu") == 64
    assert choose_microbatch(16, rows=64, length=128, platform="cpu") == 16


def test_a_micro_batch_that_does_not_divide_the_rows_is_an_error_with_one_that_does():
    with pytest.raises(UserError, match="optimizer.microbatch 5 does not divide the 8 rows of a device; 4 does"):
        choose_microbatch(5, rows=8, length=128, platform="cpu")


def test_an_accelerator_takes_as_many_steps_a_call_as_divide_the_intervals():
    gpu = unittest.mock.Mock(spec=jax.Device, platform="gpu", device_kind="NVIDIA H200")  # 989 TFLOP/s
    assert choose_together(0, (100, 10_000, 1_000), gpu, 1e12) == 25
    assert choose_together(0, (96, 192, 960), gpu, 1e12) == 32
    assert choose_together(0, (7, 1_000, 1_000), gpu, 1e12) == 1
    assert choose_together(0, (100, 1_000, 1_000), gpu, 2e13) == 10  # 14 are over in 2 s at 15 % of the peak
    assert choose_together(0, (100, 1_000, 1_000), gpu, 1e16) == 1
    assert choose_together(4, (100, 1_000, 1_000), gpu, 1e16) == 4


def test_a_cpu_takes_a_step_a_call_unless_told_otherwise():
    cpu = jax.devices("cpu")[0]
    assert choose_together(0, (100, 1_000, 1_000), cpu, 1e12) == 1
    assert choose_together(4, (100, 1_000, 1_000), cpu, 1e12) == 4
