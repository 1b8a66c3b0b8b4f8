import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from electrax.tasks import vocabulary
from electrax.tasks.vocabulary import cross_entropy, rows_at_once
from electrax.training.sharding import BATCH_AXES, MeshConfig, make_mesh

LOWEST = float(jnp.finfo(jnp.float32).min)
LOGITS = jnp.array([[[0.0, np.log(3.0), LOWEST], [1e4, 0.0, LOWEST]]])


def test_cross_entropy_is_minus_the_log_of_the_tokens_share_also_of_large_logits():
    np.testing.assert_allclose(cross_entropy(LOGITS, jnp.array([[0, 0]])), [[np.log(4.0), 0.0]], rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(LOGITS, jnp.array([[1, 1]])), [[np.log(4 / 3), 1e4]], rtol=1e-6)


def test_its_gradient_is_the_shares_less_one_at_the_token():
    weights = jnp.array([[2.0, 5.0]])
    found = jax.grad(lambda logits: jnp.sum(weights * cross_entropy(logits, jnp.array([[0, 1]]))))(LOGITS)
    np.testing.assert_allclose(found, [[[-1.5, 1.5, 0.0], [5.0, -5.0, 0.0]]], atol=1e-6)


def test_it_is_optaxs_with_its_gradient():
    logits, token = 4 * jax.random.normal(jax.random.key(0), (2, 3, 50)), jnp.array([[0, 49, 7], [3, 3, 3]])
    own, other = (
        jax.value_and_grad(lambda x, f=f: jnp.sum(jnp.square(f(x, token))))(logits)
        for f in (cross_entropy, optax.softmax_cross_entropy_with_integer_labels)
    )
    np.testing.assert_allclose(own[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(own[1], other[1], rtol=1e-4, atol=1e-5)


SMOOTHING, TOKENS = 0.2, 2  # the third entry fills the table up


def test_smoothed_cross_entropy_is_that_with_a_target_of_which_a_share_lies_evenly_on_the_tokens():
    # -0.9 log(1/4) - 0.1 log(3/4), and 0.1 * 1e4 for the token that is not the largest of its place
    found = cross_entropy(LOGITS, jnp.array([[0, 0]]), SMOOTHING, TOKENS)
    np.testing.assert_allclose(found, [[0.9 * np.log(4) + 0.1 * np.log(4 / 3), 1e3]], rtol=1e-6)


def test_its_gradient_is_the_shares_less_that_target():
    weights = jnp.array([[2.0, 5.0]])
    token = jnp.array([[0, 1]])
    found = jax.grad(lambda logits: jnp.sum(weights * cross_entropy(logits, token, SMOOTHING, TOKENS)))(LOGITS)
    np.testing.assert_allclose(found, [[[2 * (0.25 - 0.9), 2 * (0.75 - 0.1), 0.0], [4.5, -4.5, 0.0]]], atol=1e-6)


def test_smoothed_cross_entropy_is_optaxs_with_its_gradient():
    logits, token = 4 * jax.random.normal(jax.random.key(0), (2, 3, 50)), jnp.array([[0, 39, 7], [3, 3, 3]])
    target = 0.9 * jax.nn.one_hot(token, 50) + 0.1 / 40 * (jnp.arange(50) < 40)[None, None]
    own, other = (
        jax.value_and_grad(lambda x, f=f: jnp.sum(jnp.square(f(x))))(logits)
        for f in (lambda x: cross_entropy(x, token, 0.1, 40), lambda x: optax.softmax_cross_entropy(x, target))
    )
    np.testing.assert_allclose(own[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(own[1], other[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("most", "at_once"),
    [(10**6, 12), (12 * 5 * 7, 12), (12 * 5 * 7 - 1, 6), (5 * 5 * 7, 4), (5 * 7, 1), (1, 1)],
)
def test_as_many_rows_are_taken_at_once_as_divide_all_and_hold_no_more_logits_than_wanted(monkeypatch, most, at_once):
    monkeypatch.setattr(vocabulary, "MOST_LOGITS", most)
    monkeypatch.setattr(vocabulary, "devices_of_tensors", lambda: 1)
    assert rows_at_once(12, 5, 7) == at_once
    assert rows_at_once(12, 5, 7, 5) == 4


def test_a_gib_of_logits_is_held_on_each_device():
    # 128 x 20 x 1,000,064 logits are 9.5 GiB: of the divisors of 128, one device takes 8
    wanted = {1: 8, 2: 16, 4: 32, 8: 64}[jax.device_count()]
    assert rows_at_once(128, 20, 1_000_064) == wanted


def test_a_device_that_takes_its_own_rows_holds_a_gib_of_their_logits_whatever_the_number_of_devices():
    found = []

    def take(rows):
        found.append(rows_at_once(128, 20, 1_000_064))
        return rows

    mesh, rows = make_mesh(MeshConfig()), PartitionSpec(BATCH_AXES)
    take_own = jax.shard_map(take, mesh=mesh, in_specs=rows, out_specs=rows, axis_names=set(BATCH_AXES))
    jax.eval_shape(take_own, jax.ShapeDtypeStruct((jax.device_count(),), jnp.float32))
    assert found == [8]
