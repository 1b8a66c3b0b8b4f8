import jax
import jax.numpy as jnp
import numpy as np

from electrax.models.linear import Linear

X = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))


def test_linear_is_a_product_over_the_last_axis_plus_bias():
    kernel, bias = jax.random.normal(jax.random.key(1), (4, 6)), jnp.arange(6.0)
    found = Linear(6).apply({"params": {"kernel": kernel, "bias": bias}}, X)
    np.testing.assert_allclose(found, np.einsum("abcd,de->abce", X, kernel) + np.arange(6.0), rtol=1e-5, atol=1e-5)


def test_linear_takes_and_gives_several_axes():
    kernel = jax.random.normal(jax.random.key(1), (3, 4, 2, 5))
    found = Linear((2, 5), inputs=2, use_bias=False).apply({"params": {"kernel": kernel}}, X)
    np.testing.assert_allclose(found, np.einsum("abcd,cdef->abef", X, kernel), rtol=1e-5, atol=1e-5)


def test_fans_of_the_initialiser_are_those_of_the_flat_product():
    def fans(key, shape, dtype):
        return jnp.full(shape, 1000.0 * shape[0] + shape[1], dtype)

    params = Linear((2, 5), inputs=2, kernel_init=fans).init(jax.random.key(0), X)["params"]
    assert params["kernel"].shape == (3, 4, 2, 5) and (params["kernel"] == 12_010).all()
    assert params["bias"].shape == (2, 5) and not params["bias"].any()


def test_bfloat16_rounds_both_sides_of_the_product_of_float32_parameters():
    linear = Linear(6, dtype=jnp.bfloat16)
    variables = linear.init(jax.random.key(0), X)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    x, kernel = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (X, variables["params"]["kernel"]))
    np.testing.assert_allclose(linear.apply(variables, X), np.einsum("abcd,de->abce", x, kernel), rtol=1e-5, atol=1e-6)
