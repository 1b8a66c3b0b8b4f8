import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.lookup import lookup

TABLE = jnp.arange(12.0).reshape(6, 2)
IDS = jnp.array([[3, 3, 0, 3], [5, 0, 5, 1]])
SLOPE = np.random.RandomState(0).randn(2, 4, 2).astype(np.float32)
GRADIENTS = pytest.mark.parametrize("gradient", ["auto", "scatter", "summed"])


def gradient_of_table(ids, slope, gradient, table=TABLE):
    return jax.grad(lambda table: jnp.sum(lookup(table, ids, gradient) * slope))(table)


@GRADIENTS
def test_rows_come_by_number(gradient):
    assert lookup(TABLE, IDS, gradient).tolist() == [
        [[6, 7], [6, 7], [0, 1], [6, 7]],
        [[10, 11], [0, 1], [10, 11], [2, 3]],
    ]


@GRADIENTS
def test_the_gradient_of_a_row_is_the_sum_of_the_slopes_at_its_number(gradient):
    expected = np.zeros((6, 2))
    for row in range(2):
        for place in range(4):
            expected[IDS[row, place]] += SLOPE[row, place]
    found = jax.jit(gradient_of_table, static_argnums=2)(IDS, SLOPE, gradient)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "gradient", "sorts"),
    [("cuda", "auto", True), ("cpu", "auto", False), ("cuda", "scatter", False), ("cpu", "summed", True)],
)
def test_only_cuda_sums_within_rows_by_itself(platform, gradient, sorts):
    traced = jax.jit(gradient_of_table, static_argnums=2).trace(IDS, SLOPE, gradient)
    assert ("stablehlo.sort" in traced.lower(lowering_platforms=(platform,)).as_text()) is sorts


@GRADIENTS
def test_a_bfloat16_table_has_a_bfloat16_gradient(gradient):
    found = gradient_of_table(IDS, SLOPE, gradient, TABLE.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), gradient_of_table(IDS, SLOPE, "scatter"), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("ids", [[[2, 2, 2, 2]], [[0], [0]], [[5, 4, 3, 2]]], ids=["all equal", "one a row", "falling"])
def test_rows_of_every_kind_sum_alike(ids):
    ids = jnp.array(ids)
    slope = jnp.asarray(np.random.RandomState(1).randn(*ids.shape, 2), jnp.float32)
    scatter, summed = (gradient_of_table(ids, slope, way) for way in ("scatter", "summed"))
    np.testing.assert_allclose(summed, scatter, rtol=1e-6, atol=1e-6)
