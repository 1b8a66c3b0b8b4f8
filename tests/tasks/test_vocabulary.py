import jax
import jax.numpy as jnp
import numpy as np
import optax

from electrax.tasks.vocabulary import cross_entropy

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
