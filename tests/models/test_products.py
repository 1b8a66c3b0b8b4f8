import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models import products
from electrax.models.encoder import Encoder, EncoderConfig
from electrax.models.products import activation_dtype, product, rounded_layers

# of the dense layers, of attention's scores and mixing, and of the vocabulary; sizes as in models, and very small
PRODUCTS = [
    ("nd,df->nf", (48, 16), (16, 24)),
    ("nd,df->nf", (1, 16), (16, 24)),
    ("nd,df->nf", (3, 5), (5, 1)),
    ("bhtk,bhkl->bhtl", (2, 2, 16, 8), (2, 2, 8, 16)),
    ("bhtk,bhkl->bhtl", (1, 2, 1, 8), (1, 2, 8, 5)),
    ("bhtl,bhlk->bhtk", (2, 2, 16, 16), (2, 2, 16, 8)),
    ("bhtl,bhlk->bhtk", (1, 2, 1, 5), (1, 2, 5, 8)),
    ("ne,ve->nv", (19, 16), (128, 16)),
    ("nd,df->nf", (512, 256), (256, 1024)),
    ("bhtk,bhkl->bhtl", (4, 4, 128, 64), (4, 4, 64, 128)),
    ("bhtl,bhlk->bhtk", (4, 4, 128, 128), (4, 4, 128, 64)),
    ("ne,ve->nv", (76, 128), (8192, 128)),
]
IDS = [f"{spec} {a} {b}" for spec, a, b in PRODUCTS]


@pytest.fixture(params=["cpu", "accelerator"])
def platform(request, monkeypatch):
    monkeypatch.setattr(products, "_on_cpu", lambda: request.param == "cpu")
    return request.param


def rounded(x):
    """To the eight bits of a bfloat16."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


def operands(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(("spec", "a", "b"), PRODUCTS, ids=IDS)
def test_a_bfloat16_product_is_that_of_rounded_operands_and_so_are_its_gradients(platform, spec, a, b):
    a, b = operands(a, b)
    (slope,) = operands(np.einsum(spec, a, b).shape)

    def both(a, b):
        found, pull = jax.vjp(lambda a, b: product(spec, a, b, jnp.bfloat16, jnp.float32), a, b)
        return found, *pull(slope)

    found = jax.jit(both)(a, b)
    sides, out = spec.split("->")
    first, second = sides.split(",")
    expected = (
        np.einsum(spec, rounded(a), rounded(b), optimize=True),
        np.einsum(f"{out},{second}->{first}", rounded(slope), rounded(b), optimize=True),
        np.einsum(f"{first},{out}->{second}", rounded(a), rounded(slope), optimize=True),
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("spec", "a", "b"), PRODUCTS, ids=IDS)
def test_a_float32_product_has_the_bits_of_an_einsum(spec, a, b):
    a, b = operands(a, b)
    assert (
        jax.jit(lambda a, b: product(spec, a, b, "float32"))(a, b) == jax.jit(lambda a, b: jnp.einsum(spec, a, b))(a, b)
    ).all()


def test_the_result_is_of_the_type_of_activations_where_none_is_named(platform):
    expected = jnp.float32 if platform == "cpu" else jnp.bfloat16
    a, b = operands((4, 8), (8, 2))
    assert product("nd,df->nf", a, b, jnp.bfloat16).dtype == activation_dtype(jnp.bfloat16) == expected
    assert product("nd,df->nf", a, b, jnp.float32).dtype == activation_dtype(jnp.float32) == jnp.float32


def test_gradients_are_of_their_operands_types(platform):
    a, b = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 2), jnp.float32)
    grads = jax.grad(lambda a, b: product("nd,df->nf", a, b, jnp.bfloat16).sum().astype(jnp.float32), (0, 1))(a, b)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_array_equal(grads[0], np.full((4, 8), 2.0))
    np.testing.assert_array_equal(grads[1], np.full((8, 2), 4.0))


def test_several_models_products_side_by_side_are_those_of_each(platform):
    a, b = operands((3, 48, 16), (3, 16, 24))

    def loss(a, b):
        return jnp.sum(product("nd,df->nf", a, b, jnp.bfloat16, jnp.float32) ** 2)

    together = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(a, b)
    for i in range(3):
        for found, one in zip(together, jax.jit(jax.grad(loss, (0, 1)))(a[i], b[i]), strict=True):
            np.testing.assert_allclose(found[i], one, rtol=1e-5, atol=1e-4)


def test_layers_rounded_beforehand_compute_the_same(platform):
    config = EncoderConfig(
        40, layers=2, width=16, heads=2, feed_forward=24, embedding_width=8, compute_dtype="bfloat16"
    )
    encoder, (embedded,) = Encoder(config), operands((2, 5, 8))
    mask = jnp.ones((2, 1, 1, 5), bool)
    params = encoder.init(jax.random.key(0), embedded, mask)["params"]
    kept = rounded_layers(params, "bfloat16")
    kernels = {
        jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(kept) if leaf.dtype == jnp.bfloat16
    }
    assert len(kernels) == 2 * 4 and all("layer_" in name and name.endswith("['kernel']") for name in kernels)
    apply = jax.jit(lambda params: encoder.apply({"params": params}, embedded, mask).astype(jnp.float32))
    np.testing.assert_allclose(apply(kept), apply(params), rtol=1e-6, atol=1e-6)
    same = rounded_layers(params, "float32")
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))
