import hashlib
import json
import logging
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from electrax.config import UserError
from electrax.training.checkpoint import CheckpointConfig, Checkpoints, find_damage, restore_newest_params
from electrax.training.sharding import MeshConfig, make_mesh
from electrax.training.state import TrainState
from tests.fixtures.compilations import compilations


def state_at(step, rows=8):
    """A state whose every number depends on the step."""
    params = {"word": jnp.arange(4.0 * rows).reshape(rows, 4) + step, "head": {"bias": jnp.full(4, 0.1) * step}}
    optimizer = optax.adam(1e-3)
    _, moments = optimizer.update(jax.tree.map(lambda p: p / 3, params), optimizer.init(params), params)
    return TrainState(jnp.int32(step), params, moments)


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def assert_equal(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == wanted.dtype
        np.testing.assert_array_equal(leaf, wanted)


def write(folder, steps, keep=10, scores=()):
    """A run's checkpoints at some steps."""
    checkpoints = Checkpoints(folder, keep)
    for step, score in zip(steps, scores or [None] * len(steps), strict=True):
        checkpoints.save(step, state_at(step), score)
    checkpoints.close()
    return checkpoints


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    write(folder, [10, 20])
    return folder


@pytest.fixture
def folder(two_checkpoints, tmp_path):
    """Checkpoints of steps 10 and 20, to be spoilt."""
    return shutil.copytree(two_checkpoints, tmp_path / "checkpoints")


def restore(folder, like=None):
    checkpoints = Checkpoints(folder, 10)
    found = checkpoints.restore(like or abstract(state_at(0)))
    checkpoints.close()
    return found


def test_a_restored_state_is_the_saved_one_to_the_bit_with_moments_and_step(folder):
    step, state = restore(folder)
    assert step == 20
    assert_equal(state, state_at(20))
    assert float(state.opt_state[0].nu["word"][0, 0]) != 0


@pytest.mark.parametrize(("rows", "programs"), [(8, 0), (1 << 19, 8)], ids=["small", "8 MiB"])
def test_what_eight_devices_hold_is_cut_into_slices_only_where_it_is_large(tmp_path, rows, programs):
    everywhere = NamedSharding(make_mesh(MeshConfig(8), jax.devices()), P())
    state = jax.device_put(TrainState(jnp.int32(1), {"word": jnp.arange(4.0 * rows).reshape(rows, 4)}, ()), everywhere)
    checkpoints = Checkpoints(tmp_path, 1)
    with compilations() as compiled:
        checkpoints.save(1, state)
    checkpoints.close()
    assert len(compiled) == programs
    assert_equal(restore(tmp_path, abstract(state))[1], state)


def test_an_empty_directory_holds_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "none") is None
    assert Checkpoints(tmp_path / "none", 1).steps() == []


def test_the_state_may_change_as_soon_as_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    state = state_at(1)
    checkpoints.save(1, state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # as donation does
    checkpoints.close()
    assert_equal(restore(tmp_path)[1], state_at(1))


def test_a_state_is_restored_onto_another_mesh(folder):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    like = abstract(state_at(0), NamedSharding(mesh, P()))
    rows = NamedSharding(mesh, P("fsdp", None))
    like.params["word"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows)
    _, state = restore(folder, like)
    assert_equal(state, state_at(20))
    assert state.params["word"].sharding == rows
    assert state.params["word"].addressable_shards[0].data.shape == (4, 4)


@pytest.mark.parametrize(
    ("word", "bias", "message"),
    [
        ((16, 4), jnp.float32, "params/word is float32[8, 4] there, float32[16, 4] here"),
        ((8, 4), jnp.bfloat16, "params/head/bias is float32[4] there, bfloat16[4] here"),
        (None, jnp.float32, "params/word is float32[8, 4] there, missing here"),
    ],
)
def test_a_state_of_other_arrays_is_an_error_that_names_the_checkpoint_and_the_first(folder, word, bias, message):
    like = abstract(state_at(0))
    like.params["head"]["bias"] = jax.ShapeDtypeStruct((4,), bias, sharding=like.step.sharding)
    del like.params["word"]
    if word:
        like.params["word"] = jax.ShapeDtypeStruct(word, jnp.float32, sharding=like.step.sharding)
    with pytest.raises(UserError) as caught:
        restore(folder, like)
    assert str(caught.value) == f"{folder / '20'}: does not fit this run's model or optimizer: {message}"
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20"]  # nothing is wrong with the files


def test_a_state_with_more_arrays_or_another_optimizer_is_an_error(folder):
    more = abstract(state_at(0))
    more.params["extra"] = more.step
    with pytest.raises(UserError, match="params/extra is missing there, int32.* here"):
        restore(folder, more)
    plain = abstract(state_at(0)).replace(opt_state=())
    with pytest.raises(UserError, match="optimizer/opt_state/0/count is int32.* there, missing here"):
        restore(folder, plain)


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path):
    """One bit, in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_any_file_is_found(folder):
    checkpoint = folder / "20"
    assert find_damage(checkpoint) is None
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "checksums.json" and p.stat().st_size]
    assert len(files) >= 3
    for path in files:
        before = path.read_bytes()
        flip(path)
        assert find_damage(checkpoint) == f"damaged ({path.relative_to(checkpoint)} differs from its checksum)"
        path.write_bytes(before)
    assert find_damage(checkpoint) is None


def test_a_missing_or_shortened_file_is_found(folder):
    path = max((p for p in (folder / "20" / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    name, data = path.relative_to(folder / "20"), path.read_bytes()
    path.write_bytes(data[:-1])
    assert find_damage(folder / "20") == f"damaged ({name} differs from its checksum)"
    path.unlink()
    assert find_damage(folder / "20") == f"damaged ({name} is missing)"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"file": {}}', '{"files": {"x": 1}}'])
def test_a_manifest_that_cannot_be_read_is_damage(folder, text):
    (folder / "20" / "checksums.json").write_text(text)
    assert find_damage(folder / "20") == "damaged (checksums.json cannot be read)"


def test_a_manifest_that_names_no_file_is_damage(folder):
    (folder / "20" / "checksums.json").write_text(json.dumps({"files": {}}))
    assert find_damage(folder / "20") == "damaged (checksums.json names no file)"


def spoil_a_byte(checkpoint):
    flip(max((p for p in (checkpoint / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))


def leave_half_written(checkpoint):
    (checkpoint / "checksums.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"), [(spoil_a_byte, "differs from its checksum"), (leave_half_written, "half-written")]
)
def test_a_spoilt_checkpoint_is_renamed_with_a_warning_and_the_one_before_is_used(folder, caplog, spoil, words):
    spoil(folder / "20")
    with caplog.at_level(logging.WARNING, logger="electrax"):
        step, state = restore(folder)
    assert step == 10
    assert_equal(state, state_at(10))
    assert len(caplog.records) == 1
    assert words in caplog.text
    assert str(folder / "20") in caplog.text
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20.damaged"]


def test_where_every_checkpoint_is_spoilt_nothing_is_restored_and_nothing_is_lost(folder):
    spoil_a_byte(folder / "10")
    leave_half_written(folder / "20")
    assert restore(folder) is None
    assert sorted(p.name for p in folder.iterdir()) == ["10.damaged", "20.damaged"]


def test_a_half_written_checkpoint_does_not_count_as_a_step(folder):
    leave_half_written(folder / "20")
    assert Checkpoints(folder, 2).steps() == [10]


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again_and_spoilt_again(folder):
    spoil_a_byte(folder / "20")
    checkpoints = Checkpoints(folder, 1)
    checkpoints.restore(abstract(state_at(0)))
    for step in (20, 30, 40):
        checkpoints.save(step, state_at(step))
    checkpoints.close()
    # the damaged one stays through every clean-up, also one by another process
    assert sorted(p.name for p in folder.iterdir()) == ["20.damaged", "40"]
    write(folder, [50], keep=1)
    assert sorted(p.name for p in folder.iterdir()) == ["20.damaged", "50"]
    (folder / "50").rename(folder / "20")
    spoil_a_byte(folder / "20")
    restore(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["20.damaged", "20.damaged2"]


# -- parameters alone -------------------------------------------------------------------------------------------------

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


def head_at(step):
    """With names and shapes that the sharding table knows."""
    params = {"head": {"output": {"kernel": jnp.full((4, 2), float(step)), "bias": jnp.zeros(2)}}}
    return TrainState(jnp.int32(step), params, optax.adam(1e-3).init(params))


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    checkpoints = Checkpoints(folder, 10)
    for step in (10, 20, 30):
        checkpoints.save(step, head_at(step))
    checkpoints.close()
    return folder


@pytest.mark.parametrize(("latest", "step"), [(None, 30), (30, 30), (29, 20), (10, 10)])
def test_parameters_are_read_without_knowing_their_shapes_up_to_a_step(heads, latest, step):
    found, params = restore_newest_params(heads, ONE_DEVICE, latest)
    assert found == step
    assert_equal(params, head_at(step).params)


def test_reading_parameters_leaves_out_a_damaged_checkpoint_and_changes_nothing(heads, tmp_path, caplog):
    folder = shutil.copytree(heads, tmp_path / "checkpoints")
    leave_half_written(folder / "30")
    with caplog.at_level(logging.WARNING, logger="electrax"):
        assert restore_newest_params(folder, ONE_DEVICE)[0] == 20
    assert "half-written" in caplog.text and sorted(p.name for p in folder.iterdir()) == ["10", "20", "30"]
    assert restore_newest_params(folder, ONE_DEVICE, latest=9) is None
    assert restore_newest_params(tmp_path / "none", ONE_DEVICE) is None


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_the_latest_ones_are_kept(tmp_path):
    assert write(tmp_path, [1, 2, 3, 4], keep=2).steps() == [3, 4]


def test_a_clock_that_jumps_neither_takes_nor_hides_a_checkpoint(tmp_path, monkeypatch):
    clock, day, checkpoints = time.time, 86400.0, Checkpoints(tmp_path, 2)
    for step, ahead in enumerate((0.0, 300 * day, -300 * day, -day), start=1):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: clock() + ahead)
        checkpoints.save(step, state_at(step))
        checkpoints.wait()
    checkpoints.close()
    assert checkpoints.steps() == [3, 4]
    step, state = restore(tmp_path)
    assert step == 4
    assert_equal(state, state_at(4))


def test_the_best_one_is_kept_beside_the_latest(tmp_path):
    checkpoints = write(tmp_path, [1, 2, 3, 4, 5], keep=2, scores=[-9.0, -3.0, -5.0, -4.0, -6.0])
    assert checkpoints.steps() == [2, 4, 5]


def test_one_that_was_not_evaluated_is_never_the_best(tmp_path):
    assert write(tmp_path, [1, 2, 3, 4], keep=1, scores=[-9.0, None, None, None]).steps() == [1, 4]


def test_a_later_process_knows_the_best_one(tmp_path):
    write(tmp_path, [1, 2, 3], keep=1, scores=[-2.0, -1.0, -3.0])
    assert write(tmp_path, [4, 5], keep=1, scores=[-4.0, -5.0]).steps() == [2, 5]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([-2.0, -1.0, -3.0], (2, -1.0)),
        ([-2.0, None, None], (1, -2.0)),
        ([None, None, None], None),
        ([0.5, 0.25, 0.5], (1, 0.5)),  # of equal ones the first
        ([-np.inf, -np.inf, None], (1, -np.inf)),  # evaluated, though as badly as can be
        ([-np.inf, -9.0, -np.inf], (2, -9.0)),
    ],
)
def test_the_best_step_and_score_are_known_to_any_process(tmp_path, scores, best):
    written = write(tmp_path, [1, 2, 3], scores=scores)
    later = Checkpoints(tmp_path, 10)
    assert written.best() == later.best() == best
    written.close()
    later.close()


def test_the_worst_score_is_not_kept_for_its_sake(tmp_path):
    checkpoints = write(tmp_path, [1, 2, 3, 4], keep=1, scores=[-np.inf, -3.0, -np.inf, -4.0])
    assert checkpoints.steps() == [2, 4]


def test_where_nothing_is_saved_nothing_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.best() is None
    checkpoints.close()


def test_a_half_written_checkpoint_is_not_the_best(tmp_path):
    write(tmp_path, [1, 2], scores=[-2.0, -1.0])
    leave_half_written(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, 10)
    assert checkpoints.best() == (1, -2.0)
    checkpoints.close()


def test_a_newer_best_one_takes_the_place_of_the_old(tmp_path):
    assert write(tmp_path, [1, 2, 3, 4], keep=1, scores=[-2.0, -1.0, -3.0, -0.5]).steps() == [4]


def test_a_restored_run_goes_on_after_its_newest_checkpoint(folder):
    checkpoints = Checkpoints(folder, 2)
    checkpoints.restore(abstract(state_at(0)))
    checkpoints.save(30, state_at(30))
    checkpoints.close()
    assert checkpoints.steps() == [20, 30]
    assert_equal(restore(folder)[1], state_at(30))


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_names_the_directory(tmp_path, monkeypatch):
    def full(path, tokenizer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("electrax.training.checkpoint.write_manifest", full)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, state_at(1))
    with pytest.raises(UserError, match=f"{tmp_path}: the checkpoint could not be written: .*No space left"):
        checkpoints.wait()
    checkpoints.close()
    assert checkpoints.steps() == []


def test_keeping_no_checkpoint_is_an_error():
    with pytest.raises(UserError, match="checkpoint.keep must be at least 1, not 0"):
        CheckpointConfig(keep=0)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", ""])
def test_a_manifest_that_leads_out_of_its_checkpoint_is_damage(tmp_path, name):
    (tmp_path / "1").mkdir()
    (tmp_path / "secret").touch()
    entry = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    (tmp_path / "1" / "checksums.json").write_text(json.dumps({"files": {name: entry}}))
    assert find_damage(tmp_path / "1") == f"damaged (checksums.json names {name!r}, which is no file in it)"
