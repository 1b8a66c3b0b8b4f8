import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models import fused_norm, products
from electrax.models.encoder import Block, Embeddings, Encoder, EncoderConfig, gelu, truncated_normal
from electrax.models.masks import document_index, document_mask, document_positions, padding_mask
from tests.fixtures.weights import random_params

TINY = EncoderConfig(
    vocab_size=50, layers=2, width=16, heads=2, feed_forward=32, embedding_width=8, max_length=16, dropout=0.2
)
MODERN = dataclasses.replace(TINY, body="modern", qk_norm=True)
BODIES = pytest.mark.parametrize("config", [TINY, MODERN], ids=["electra", "modern"])
PAD, CLS, SEP = 0, 1, 2
SEEDS = jnp.array([11, 12], jnp.uint32)


@functools.cache
def shapes_of(config):
    def init():
        ids = jnp.zeros((1, 4), jnp.int32)
        embedded, embeddings = Embeddings(config).init_with_output(jax.random.key(0), ids)
        encoder = Encoder(config).init(jax.random.key(0), embedded, padding_mask(ids == 0))
        return {"embeddings": embeddings["params"], "encoder": encoder["params"]}

    return jax.eval_shape(init)


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


def hidden(config, params, ids, mask, positions=None, seed=None):
    embedded = Embeddings(config).apply({"params": params["embeddings"]}, ids, None, positions)
    return Encoder(config).apply({"params": params["encoder"]}, embedded, mask, positions, seed)


# little is computed here and much compiled
FAST_COMPILE = {"xla_backend_optimization_level": 0}
run = jax.jit(hidden, static_argnums=0, compiler_options=FAST_COMPILE)


def run_packed(config, params, ids):
    ids = jnp.asarray(ids)
    return run(config, params, ids, document_mask(document_index(ids, CLS, PAD)), document_positions(ids, CLS))


def run_padded(config, params, ids):
    ids = jnp.asarray(ids)
    return run(config, params, ids, padding_mask(ids != PAD))


# -- GELU -------------------------------------------------------------------------------------------------------------

POINTS = np.array([-6.0, -2.5, -1.0, -0.3, 0.0, 0.3, 1.0, 2.5, 6.0], np.float32)


def exact_gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def test_gelu_is_the_one_of_the_error_function():
    np.testing.assert_allclose(gelu(jnp.asarray(POINTS)), [exact_gelu(float(x)) for x in POINTS], rtol=1e-5, atol=1e-7)
    # the tanh approximation is 2e-4 off at 2.5
    assert abs(float(gelu(jnp.float32(2.5))) - exact_gelu(2.5)) < 2e-6


def test_gelus_own_derivative_is_that_of_its_values():
    step = 1e-4
    slopes = [(exact_gelu(float(x) + step) - exact_gelu(float(x) - step)) / (2 * step) for x in POINTS]
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(jnp.asarray(POINTS)), slopes, rtol=1e-5, atol=1e-6)


def test_gelu_of_bfloat16_is_bfloat16_with_its_gradient():
    x = jnp.asarray(POINTS, jnp.bfloat16)
    value, slope = gelu(x), jax.vmap(jax.grad(gelu))(x)
    assert value.dtype == slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(value.astype(jnp.float32), [exact_gelu(float(v)) for v in x], rtol=0.02, atol=0.02)


# -- parts and their initial values -----------------------------------------------------------------------------------


def test_norms_add_the_references_epsilon():
    x = jnp.array([[1e-6, -1e-6]])  # of variance 1e-12, so that an epsilon of 1e-12 halves the square
    for config, expected in [(TINY, 1 / math.sqrt(2)), (MODERN, 1e-6 / math.sqrt(1e-6))]:
        found, _ = config.norm().init_with_output(jax.random.key(0), x)
        np.testing.assert_allclose(found[0], [expected, -expected], rtol=1e-3)


def test_embeddings_are_the_norm_of_word_position_and_type():
    params = random_params(shapes_of(TINY))["embeddings"]
    ids, types, positions = jnp.array([[3, 7, 3]]), jnp.array([[0, 1, 1]]), jnp.array([[0, 1, 0]])
    word, position, kind = (np.asarray(params[name], np.float64) for name in ("word", "position", "type"))
    x = word[[3, 7, 3]] + position[[0, 1, 0]] + kind[[0, 1, 1]]
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    expected = x * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    apply = functools.partial(Embeddings(TINY).apply, {"params": params})
    np.testing.assert_allclose(apply(ids, types, positions)[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(apply(ids), apply(ids, jnp.zeros_like(ids), jnp.array([[0, 1, 2]])))


def test_the_word_table_is_padded_to_a_multiple_of_128():
    assert shapes_of(TINY)["embeddings"]["word"].shape == (128, 8)
    assert [dataclasses.replace(TINY, vocab_size=v).padded_vocab_size for v in (128, 129, 30522)] == [128, 256, 30592]


def layer_paths(*names):
    return {f"encoder/layer_{i}/{name}" for i in range(2) for name in names}


def test_the_electra_body_has_these_parameters_and_no_pooler():
    linear = ["attention/qkv", "attention/output", "up", "down"]
    parts = [f"{name}/{part}" for name in linear for part in ("kernel", "bias")]
    norms = [f"{name}/{part}" for name in ("attention_norm", "output_norm") for part in ("scale", "bias")]
    embeddings = ["word", "position", "type", "norm/scale", "norm/bias"]
    assert paths(shapes_of(TINY)) == layer_paths(*parts, *norms) | {f"embeddings/{name}" for name in embeddings} | {
        "encoder/embeddings_project/kernel",
        "encoder/embeddings_project/bias",
    }


def test_the_modern_body_has_gates_and_no_positions_and_no_bias_but_the_projections():
    names = ["attention/qkv/kernel", "attention/output/kernel", "gate/kernel", "up/kernel", "down/kernel"]
    names += ["attention_norm/scale", "output_norm/scale"]
    names += ["attention/query_norm/scale", "attention/key_norm/scale"]
    assert paths(shapes_of(MODERN)) == layer_paths(*names) | {
        "embeddings/word",
        "embeddings/type",
        "embeddings/norm/scale",
        "encoder/embeddings_project/kernel",
        "encoder/embeddings_project/bias",
        "encoder/final_norm/scale",
    }


def test_qk_norm_is_an_option():
    without = paths(shapes_of(MODERN)) - paths(shapes_of(dataclasses.replace(MODERN, qk_norm=False)))
    assert without == layer_paths("attention/query_norm/scale", "attention/key_norm/scale")


def test_embeddings_are_projected_only_where_the_widths_differ():
    same = shapes_of(dataclasses.replace(TINY, embedding_width=16))["encoder"]
    assert set(same) == {"layer_0", "layer_1"}


@functools.cache
def fresh_layer(config):
    """Parameters of one fresh encoder, the embeddings beside it."""
    ids = jnp.zeros((1, 4), jnp.int32)

    @jax.jit
    def init(key):
        first, second = jax.random.split(key)
        embedded, embeddings = Embeddings(config).init_with_output(first, ids)
        return embeddings["params"] | Encoder(config).init(second, embedded, padding_mask(ids == 0))["params"]

    return init(jax.random.key(0))


WIDE = EncoderConfig(vocab_size=128, layers=2, width=32, heads=2, feed_forward=64, embedding_width=24, max_length=64)


def assert_std(values, expected):
    """The sample's standard deviation is within five of its own standard errors of the expected one."""
    values = np.asarray(values).ravel()
    assert abs(values.std() / expected - 1) < 5 / math.sqrt(2 * values.size)


def test_tables_and_kernels_start_normal_with_sigma_002_cut_at_two_sigma():
    params = fresh_layer(WIDE)
    layer = params["layer_1"]
    kernels = [layer["attention"]["qkv"], layer["attention"]["output"], layer["up"], layer["down"]]
    for values in [params["word"], params["position"], *[k["kernel"] for k in kernels]]:
        # a normal cut at two sigma has 0.8796 of its standard deviation
        assert_std(values, 0.0176)
        assert 0.039 < np.abs(values).max() <= 0.04
        assert abs(np.mean(values)) < 5 * 0.0176 / math.sqrt(values.size)
    assert 0 < np.abs(params["type"]).max() <= 0.04


def test_the_projection_starts_glorot_uniform():
    kernel = np.asarray(fresh_layer(WIDE)["embeddings_project"]["kernel"])
    bound = math.sqrt(6 / (24 + 32))
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    assert_std(kernel, bound / math.sqrt(3))


@pytest.mark.parametrize("body", ["electra", "modern"])
def test_biases_start_at_zero_and_scales_at_one(body):
    params = fresh_layer(dataclasses.replace(WIDE, body=body))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias":
            assert not leaf.any()
        if path[-1].key == "scale":
            assert (leaf == 1).all()


def test_layers_start_different():
    params = fresh_layer(WIDE)
    assert not np.allclose(params["layer_0"]["up"]["kernel"], params["layer_1"]["up"]["kernel"])


def test_the_modern_body_starts_with_variance_one_over_fan_in_less_towards_the_residual():
    params = fresh_layer(dataclasses.replace(WIDE, body="modern"))
    layer = params["layer_0"]
    for kernel in (layer["attention"]["qkv"], layer["gate"], layer["up"]):
        assert_std(kernel["kernel"], 32**-0.5)
    # two layers: 1 / √(2 · 2) of it
    assert_std(layer["attention"]["output"]["kernel"], 32**-0.5 / 2)
    assert_std(layer["down"]["kernel"], 64**-0.5 / 2)
    assert_std(params["word"], 24**-0.5)


def test_the_cut_of_the_normal_is_not_corrected_for():
    values = np.asarray(truncated_normal(jax.random.key(1), (200, 500)))
    assert values.std() == pytest.approx(0.017593, rel=0.01)
    assert np.abs(values).max() <= 0.04


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 3}, "16 .* 3 heads"),
        ({"heads": 16}, "even head width"),
        ({"residual": "fused"}, "residual fused .* the body modern has not"),
    ],
)
def test_what_does_not_fit_a_body_is_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODERN, **wrong)


# -- the layer against numpy ------------------------------------------------------------------------------------------


def numpy_layer(p, x, modern):
    """One layer on one row, all places visible; p holds numpy arrays."""

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + (1e-6 if modern else 1e-12)) * p["scale"] + p.get("bias", 0)

    def turn(x):
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)  # a rotation of the pairs
        return np.concatenate([turned.real, turned.imag], -1)

    def attention(x, p):
        out = 0
        for h in range(2):
            bias = p["qkv"]["bias"][h] if "bias" in p["qkv"] else np.zeros(3)
            q, k, v = (x @ p["qkv"]["kernel"][:, h, i] + bias[i] for i in range(3))
            if modern:
                q, k = (
                    turn(y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"])
                    for y, name in ((q, "query_norm"), (k, "key_norm"))
                )
            weights = np.exp(q @ k.T / np.sqrt(8))
            out = out + weights / weights.sum(-1, keepdims=True) @ v @ p["output"]["kernel"][h]
        return out + p["output"].get("bias", 0)

    def feed_forward(x, p):
        up = x @ p["up"]["kernel"] + p["up"].get("bias", 0)
        up = np.vectorize(exact_gelu)(x @ p["gate"]["kernel"]) * up if modern else np.vectorize(exact_gelu)(up)
        return up @ p["down"]["kernel"] + p["down"].get("bias", 0)

    if modern:
        x = x + attention(norm(x, p["attention_norm"]), p["attention"])
        return x + feed_forward(norm(x, p["output_norm"]), p)
    x = norm(x + attention(x, p["attention"]), p["attention_norm"])
    return norm(x + feed_forward(x, p), p["output_norm"])


@BODIES
def test_a_layer_is_post_norm_or_pre_norm_with_rotary_positions_and_gates(config):
    params = random_params(shapes_of(config))["encoder"]["layer_0"]
    x = np.random.RandomState(1).randn(5, 16).astype(np.float32)
    mask, positions = jnp.ones((1, 1, 1, 5), bool), jnp.arange(5)[None]
    found = jax.jit(Block(config).apply)({"params": params}, jnp.asarray(x)[None], mask, positions)[0][0]
    expected = numpy_layer(
        jax.tree.map(lambda p: np.asarray(p, np.float64), params), np.float64(x), config.body == "modern"
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# -- rows -------------------------------------------------------------------------------------------------------------


@BODIES
def test_documents_of_a_packed_row_do_not_see_each_other(config):
    params = random_params(shapes_of(config))
    first = run_packed(config, params, [[CLS, 7, SEP, CLS, 9, 10, SEP, CLS, SEP, PAD]])
    other = run_packed(config, params, [[CLS, 7, SEP, CLS, 20, 21, SEP, CLS, SEP, PAD]])
    changed = np.asarray(jnp.any(first != other, axis=-1))[0]
    assert changed.tolist() == [False] * 3 + [True] * 4 + [False] * 3


@BODIES
def test_a_document_looks_the_same_wherever_it_lies_in_a_row(config):
    params = random_params(shapes_of(config))
    early = run_packed(config, params, [[CLS, 9, 10, SEP, CLS, 12, SEP, PAD, PAD, PAD]])
    late = run_packed(config, params, [[CLS, 7, 8, 7, SEP, CLS, 9, 10, SEP, PAD]])
    np.testing.assert_allclose(early[0, :4], late[0, 5:9], rtol=1e-4, atol=1e-5)


@BODIES
def test_padding_changes_nothing(config):
    params = random_params(shapes_of(config))
    row = [CLS, 7, 8, 9, SEP]
    short, long = run_padded(config, params, [row]), run_padded(config, params, [row + [PAD] * 5])
    np.testing.assert_allclose(long[0, :5], short[0], rtol=1e-4, atol=1e-5)


@BODIES
def test_what_stands_in_masked_places_changes_nothing(config):
    params = random_params(shapes_of(config))
    mask = padding_mask(jnp.arange(10)[None] < 5)
    rows = jnp.array([[CLS, 7, 8, 9, SEP] + [PAD] * 5, [CLS, 7, 8, 9, SEP] + [33] * 5])
    first, other = (run(config, params, rows[i : i + 1], mask) for i in range(2))
    assert (first[:, :5] == other[:, :5]).all() and (first[:, 5:] != other[:, 5:]).any()


# -- ways of computing the same ---------------------------------------------------------------------------------------

IDS = jnp.array([[CLS, 7, 8, 9, SEP, CLS, 5, 6, SEP, PAD], [CLS, 9, 9, SEP, CLS, 3, 4, 5, 6, SEP]])


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def value_and_grads(config, params):
    mask, positions = document_mask(document_index(IDS, CLS, PAD)), document_positions(IDS, CLS)
    weights = jax.random.normal(jax.random.key(9), (*IDS.shape, config.width))

    def weighed(params):
        out = hidden(config, params, IDS, mask, positions, SEEDS)
        return jnp.sum(out * weights), out

    return jax.grad(weighed, has_aux=True)(params)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (TINY, {"scan_layers": True}),
        (TINY, {"remat": True}),
        (TINY, {"remat": True, "remat_keep": "products"}),
        (TINY, {"lookup_gradient": "summed"}),
        (MODERN, {"scan_layers": True, "remat": True}),
    ],
    ids=["electra-scan", "electra-remat", "electra-remat-products", "electra-summed", "modern-scan-remat"],
)
def test_every_way_to_compute_the_layers_gives_the_plain_ones_results_dropout_on(config, changes):
    params = random_params(shapes_of(config))
    plain = value_and_grads(config, params)
    other = value_and_grads(dataclasses.replace(config, **changes), params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@functools.partial(jax.jit, static_argnums=(0, 2), compiler_options=FAST_COMPILE)
def first_states(config, params, first):
    """Those of the first two tokens, and the gradient of a sum of them."""
    mask, positions = document_mask(document_index(IDS, CLS, PAD)), document_positions(IDS, CLS)
    weights = jax.random.normal(jax.random.key(9), (len(IDS), 2, config.width))

    def weighed(params):
        embedded = Embeddings(config).apply({"params": params["embeddings"]}, IDS, None, positions)
        encoder = {"params": params["encoder"]}
        out = Encoder(config).apply(encoder, embedded, mask, positions, SEEDS, first=first)[:, :2]
        return jnp.sum(out * weights), out

    return jax.grad(weighed, has_aux=True)(params)


@pytest.mark.parametrize(
    ("config", "changes"),
    [(TINY, {}), (MODERN, {"scan_layers": True, "remat": True}), (TINY, {"layers": 1, "scan_layers": True})],
    ids=["electra", "modern-scan-remat", "one layer"],
)
def test_the_first_tokens_states_are_the_same_where_the_last_layer_gives_no_others_dropout_on(config, changes):
    config = dataclasses.replace(config, **changes)
    params = random_params(shapes_of(config))
    whole, first = first_states(config, params, None), first_states(config, params, 2)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_last_layer_computes_the_first_tokens_states_alone():
    params = random_params(shapes_of(TINY))

    def rows_of_products(first):
        def states(params):
            embedded = Embeddings(TINY).apply({"params": params["embeddings"]}, IDS)
            return Encoder(TINY).apply({"params": params["encoder"]}, embedded, padding_mask(IDS != PAD), first=first)

        return collections.Counter(rows_of(jax.make_jaxpr(states)(params).jaxpr))

    whole, first = rows_of_products(None), rows_of_products(1)
    # three of the last layer's four products with kernels: of the output of attention, up and down
    assert whole - first == {IDS.size: 3} and (first - whole)[len(IDS)] == 3


def rows_of(jaxpr):
    """How many rows each product with a kernel has."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.ndim == 2:
            yield equation.invars[0].aval.shape[0]
        for value in equation.params.values():
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns"):
                yield from rows_of(body)


def test_the_fused_residual_gives_the_plain_ones_results_dropout_on(monkeypatch):
    """Rows of 16 tokens, which the kernels take, of two documents each."""
    rows = jnp.tile(jnp.array([[CLS, 7, 8, 9, SEP, CLS, 5, 6]]), (2, 2)).at[1, 3].set(4)
    monkeypatch.setattr("tests.models.test_encoder.IDS", rows)
    taken, kernel = [], fused_norm.norm_of_sum
    monkeypatch.setattr(fused_norm, "norm_of_sum", lambda *given: taken.append(given[0].shape) or kernel(*given))
    config = dataclasses.replace(TINY, width=32)
    params = random_params(shapes_of(config))
    plain = value_and_grads(config, params)
    assert not taken
    fused = value_and_grads(dataclasses.replace(config, residual="fused"), params)
    assert set(taken) == {(2, 16, 32)}
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fused), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def count_products(jaxpr):
    inner = [value for equation in jaxpr.eqns for value in equation.params.values()]
    bodies = [getattr(value, "jaxpr", value) for value in inner]
    return sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns) + sum(
        count_products(body) for body in bodies if hasattr(body, "eqns")
    )


def test_remat_computes_products_again_and_with_products_kept_only_those_of_attention():
    params = random_params(shapes_of(TINY))

    def products(**changes):
        config = dataclasses.replace(TINY, **changes)
        total = lambda params: jnp.sum(hidden(config, params, IDS, padding_mask(IDS != PAD)))  # noqa: E731
        return count_products(jax.make_jaxpr(jax.grad(total))(params).jaxpr)

    plain, kept, remat = products(), products(remat=True, remat_keep="products"), products(remat=True)
    # in each of two layers queries with keys and weights with values, and the products with four kernels
    assert kept - plain == 2 * 2 and remat - kept == 2 * 4


@pytest.mark.parametrize(("layers", "asked", "scanned"), [(12, None, False), (13, None, True), (13, False, False)])
def test_deep_towers_are_scanned_unless_told_otherwise(layers, asked, scanned):
    assert dataclasses.replace(TINY, layers=layers, scan_layers=asked).scanned is scanned


def test_the_encoder_passes_its_attention_implementation_on(monkeypatch):
    taken, attention = [], jax.nn.dot_product_attention

    def record(*args, implementation, **kwargs):
        taken.append(implementation)
        return attention(*args, implementation=implementation, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    params = random_params(shapes_of(MODERN))
    plain = run_packed(MODERN, params, IDS[:1])
    assert not taken
    other = run_packed(dataclasses.replace(MODERN, attention="xla"), params, IDS[:1])
    assert set(taken) == {"xla"}
    np.testing.assert_allclose(other, plain, rtol=1e-3, atol=1e-4)
    weights = jax.random.normal(jax.random.key(3), plain.shape)
    ids = jnp.asarray(IDS[:1])
    packed = ids, document_mask(document_index(ids, CLS, PAD)), document_positions(ids, CLS)
    gradients = [
        jax.jit(jax.grad(lambda params, config=config: (hidden(config, params, *packed) * weights).sum()))(params)
        for config in (MODERN, dataclasses.replace(MODERN, attention="xla"))
    ]
    for leaf, wanted in zip(jax.tree.leaves(gradients[1]), jax.tree.leaves(gradients[0]), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=1e-4 * max(1.0, float(jnp.abs(wanted).max())))


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "accelerator"])
@BODIES
def test_bfloat16_stays_close_to_float32_with_float32_gradients(monkeypatch, config, cpu):
    monkeypatch.setattr(products, "_on_cpu", lambda: cpu)
    params = random_params(shapes_of(config))
    half_config = dataclasses.replace(config, compute_dtype="bfloat16")
    mask = padding_mask(IDS[:1] != PAD)

    def weighed(params):  # traced anew for the one and the other
        out = hidden(half_config, params, IDS[:1], mask)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    grads, half = jax.jit(jax.grad(weighed, has_aux=True), compiler_options=FAST_COMPILE)(params)
    out = run(config, params, IDS[:1], mask)
    assert half.dtype == (jnp.float32 if cpu else jnp.bfloat16)
    assert 1e-6 < jnp.sqrt(jnp.mean((half - out) ** 2) / jnp.mean(out**2)) < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


# -- dropout in the layers --------------------------------------------------------------------------------------------


def test_dropout_is_on_only_with_a_seed_and_follows_it():
    params = random_params(shapes_of(TINY))
    mask = padding_mask(IDS[:1] != PAD)
    plain, first, again, other = (
        run(TINY, params, IDS[:1], mask, None, seed) for seed in (None, SEEDS[:1], SEEDS[:1], SEEDS[1:])
    )
    assert (first == again).all()
    assert not np.allclose(plain, first) and not np.allclose(first, other)


@BODIES
def test_a_row_drops_the_same_units_in_every_batch(config):
    params = random_params(shapes_of(config))
    mask = padding_mask(IDS != PAD)
    together = run(config, params, IDS, mask, None, SEEDS)
    alone = run(config, params, IDS[1:], mask[1:], None, SEEDS[1:])
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-4, atol=1e-5)


def test_every_layer_drops_attention_weights_and_both_outputs_and_the_embeddings_are_dropped_once(monkeypatch):
    rate, attention_rate, calls = 0.2, 0.3, 7  # 1 + 2 layers x 3
    sites = []

    def record(x, rate, seed, row=None):
        if rate and seed is not None:
            sites.append((x.ndim, rate, int(seed[0])))
        return x

    params = random_params(shapes_of(TINY))
    monkeypatch.setattr("electrax.models.encoder.dropout", record)
    monkeypatch.setattr("electrax.models.attention.dropout", record)
    config = dataclasses.replace(TINY, dropout=rate, attention_dropout=attention_rate)
    with jax.disable_jit():  # one layer's trace serves all otherwise
        hidden(config, params, IDS, padding_mask(IDS != PAD), None, SEEDS)
    assert len(sites) == calls and len({seed for _, _, seed in sites}) == calls
    assert all(found == (attention_rate if rank == 4 else rate) for rank, found, _ in sites)


def test_the_references_dropout_rates_are_the_default():
    config = EncoderConfig(vocab_size=50)
    assert (config.dropout, config.attention_dropout) == (0.1, 0.1)
