import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.config import UserError
from electrax.models.encoder import EncoderConfig
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from electrax.training.optim import (
    OptimizerConfig,
    global_norm,
    is_decayed,
    layer_multiplier,
    learning_rate,
    make_optimizer,
    scale_by_adam,
)

# -- learning rate ----------------------------------------------------------------------------------------------------


# 2e-3 · (1 - t/100) · min(1, t/10); the decay counts from 0, not from the end of the warm-up
@pytest.mark.parametrize(
    ("t", "rate"), [(0, 0.0), (1, 1.98e-4), (5, 9.5e-4), (10, 1.8e-3), (50, 1e-3), (99, 2e-5), (100, 0.0), (120, 0.0)]
)
def test_multiplied_schedule_is_decay_times_warmup(t, rate):
    config = OptimizerConfig(learning_rate=2e-3, warmup_steps=10.0)
    assert float(learning_rate(config, 100, t)) == pytest.approx(rate, rel=1e-5, abs=1e-12)


# up to 2e-3 at t = 10, then down over the 90 updates left
@pytest.mark.parametrize(
    ("t", "rate"), [(0, 0.0), (1, 2e-4), (5, 1e-3), (10, 2e-3), (55, 1e-3), (91, 2e-4), (100, 0.0), (120, 0.0)]
)
def test_joined_schedule_decays_from_the_end_of_the_warmup(t, rate):
    config = OptimizerConfig(learning_rate=2e-3, warmup_steps=10.0, schedule="joined")
    assert float(learning_rate(config, 100, t)) == pytest.approx(rate, rel=1e-5, abs=1e-12)


def test_power_bends_the_decay():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0.0, power=2.0)
    assert float(learning_rate(config, 100, 70)) == pytest.approx(0.09)


def test_warmup_may_be_a_fraction_of_the_steps():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0.1 * 25)  # 2.5 updates
    rates = [float(learning_rate(config, 25, t)) for t in range(4)]
    assert rates == pytest.approx([0.0, 0.4 * 24 / 25, 0.8 * 23 / 25, 22 / 25])


@pytest.mark.parametrize("schedule", ["multiplied", "joined"])
def test_a_share_of_the_steps_takes_the_place_of_the_warmup_steps(schedule):
    shared = OptimizerConfig(warmup_share=0.1, warmup_steps=0.0, schedule=schedule)
    counted = OptimizerConfig(warmup_steps=2.5, schedule=schedule)
    for t in range(26):
        assert float(learning_rate(shared, 25, t)) == pytest.approx(float(learning_rate(counted, 25, t)), rel=1e-6)
    assert OptimizerConfig().warmup_share == 0.0


@pytest.mark.parametrize("schedule", ["multiplied", "joined"])
def test_the_host_computes_the_rate_of_a_step_without_asking_a_device(schedule):
    config = OptimizerConfig(learning_rate=2e-3, warmup_steps=10.0, schedule=schedule, power=1.5)
    with jax.transfer_guard("disallow"):
        rates = [learning_rate(config, 100, t) for t in range(120)]
    assert not any(isinstance(rate, jax.Array) for rate in rates)
    in_a_step = jax.jit(jax.vmap(lambda t: learning_rate(config, 100, t)))(jnp.arange(120))
    np.testing.assert_allclose(rates, in_a_step, rtol=1e-5, atol=1e-12)


def test_without_warmup_the_first_update_has_the_full_rate():
    assert float(learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=0.0), 10, 0)) == 1.0


def test_defaults_are_the_references():
    c = OptimizerConfig()
    assert (c.learning_rate, c.warmup_steps, c.schedule, c.power) == (5e-4, 10_000, "multiplied", 1.0)
    assert (c.beta1, c.beta2, c.epsilon, c.bias_correction) == (0.9, 0.999, 1e-6, False)
    assert (c.weight_decay, c.clip_norm) == (0.01, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": -0.1},
        {"epsilon": 0.0},
        {"warmup_steps": -1.0},
        {"warmup_share": -0.1},
        {"weight_decay": -0.1},
        {"clip_norm": -1.0},
        {"layer_decay": -0.8},
        {"microbatch": -1},
    ],
)
def test_a_number_out_of_range_is_an_error_that_names_it(wrong):
    with pytest.raises(UserError, match=f"optimizer.{next(iter(wrong))}"):
        OptimizerConfig(**wrong)


# -- Adam -------------------------------------------------------------------------------------------------------------


def test_missing_bias_correction_inflates_early_updates_as_the_references():
    """A bias-corrected update of a constant gradient 1 is 1 / (1 + ε), so the update is itself the inflation."""
    adam = scale_by_adam(OptimizerConfig())

    def step(state, _):
        update, state = adam.update(jnp.ones(()), state)
        return state, update

    _, updates = jax.lax.scan(step, adam.init(jnp.zeros(())), length=1000)
    assert float(updates[0]) == pytest.approx(3.162, abs=1e-3)
    assert float(updates[11]) == pytest.approx(6.57, abs=5e-3) and int(jnp.argmax(updates)) == 11
    assert float(updates[999]) == pytest.approx(1.258, abs=1e-3)


@pytest.mark.parametrize("g", [1e-7, 1e-6, 1e-3])
def test_epsilon_is_outside_the_root(g):
    adam = scale_by_adam(OptimizerConfig())
    update, _ = adam.update(jnp.float32(g), adam.init(jnp.zeros(())))
    # at 1e-6: 0.1 / (0.0316 + 1) = 0.097, where inside the root it would be 1e-4
    assert float(update) == pytest.approx(0.1 * g / (0.001**0.5 * g + 1e-6), rel=1e-4)


def test_moments_are_float32_for_bfloat16_parameters():
    state = scale_by_adam(OptimizerConfig()).init({"w": jnp.zeros(3, jnp.bfloat16)})
    assert state.mean["w"].dtype == state.square["w"].dtype == jnp.float32


# -- the whole update -------------------------------------------------------------------------------------------------

PARAMS = {
    "kernel": np.array([[0.5, -1.0], [2.0, 0.25]], np.float32),
    "bias": np.array([0.3, -0.2], np.float32),
    "attention_norm": {"scale": np.array([1.0, 0.9], np.float32)},
}


def gradients(steps, scale):
    random = np.random.RandomState(0)
    return [jax.tree.map(lambda p: (scale * random.randn(*p.shape)).astype(np.float32), PARAMS) for _ in range(steps)]


def run(optimizer, grads):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    return params


def reference_adam(grads, lr0, steps, warmup):
    """optimization.py in numpy, float64: clip, Adam without correction, decay, rate."""
    params = [np.float64(p) for p in jax.tree.leaves(PARAMS)]  # attention_norm/scale, bias, kernel
    decay = [0.0, 0.0, 0.01]
    m, v = [0.0] * 3, [0.0] * 3
    for t, tree in enumerate(grads):
        g = [np.float64(x) for x in jax.tree.leaves(tree)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        lr = lr0 * (1 - t / steps) * min(1, t / warmup)
        for i in range(3):
            x = g[i] * min(1, 1 / norm)
            m[i], v[i] = 0.9 * m[i] + 0.1 * x, 0.999 * v[i] + 0.001 * x**2
            params[i] = params[i] - lr * (m[i] / (np.sqrt(v[i]) + 1e-6) + decay[i] * params[i])
    return params


@pytest.mark.parametrize("scale", [0.01, 10.0])  # below and far above the clipping norm
def test_several_updates_are_the_references(scale):
    grads = gradients(8, scale)
    found = run(make_optimizer(OptimizerConfig(learning_rate=0.02, warmup_steps=3.0), 10), grads)
    for got, want in zip(jax.tree.leaves(found), reference_adam(grads, 0.02, 10, 3), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_the_first_update_of_a_warmup_changes_nothing():
    found = run(make_optimizer(OptimizerConfig(warmup_steps=5.0), 10), gradients(1, 1.0))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(PARAMS), strict=True))


def test_decay_is_multiplied_by_the_rate_and_leaves_norms_and_biases_alone():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0.0, weight_decay=0.1)
    found = run(make_optimizer(config, 1000), [jax.tree.map(np.zeros_like, PARAMS)])
    np.testing.assert_allclose(found["kernel"], PARAMS["kernel"] * (1 - 0.5 * 0.1), rtol=1e-6)
    assert (found["bias"] == PARAMS["bias"]).all()
    assert (found["attention_norm"]["scale"] == PARAMS["attention_norm"]["scale"]).all()


def first_moment(config, grads):
    optimizer = make_optimizer(config, 10)
    params = jax.tree.map(jnp.zeros_like, grads)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    return next(s for s in state if hasattr(s, "mean")).mean


def test_gradients_are_clipped_by_their_global_norm_before_adam():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}  # norm 5
    mean = first_moment(OptimizerConfig(), grads)
    np.testing.assert_allclose(mean["a"], [0.06, 0.0], rtol=1e-6)
    np.testing.assert_allclose(mean["b"], 0.08, rtol=1e-6)
    small = first_moment(OptimizerConfig(), {"a": jnp.array([0.6])})
    np.testing.assert_allclose(small["a"], [0.06], rtol=1e-6)  # a norm below 1 stays
    unclipped = first_moment(OptimizerConfig(clip_norm=0.0), grads)
    np.testing.assert_allclose(unclipped["b"], 0.4, rtol=1e-6)


def test_the_global_norm_is_over_all_numbers_of_all_layers():
    layer = {"kernel": jnp.array([[2.0, 4.0]]), "bias": jnp.array([4.0, 2.0])}  # squares add up to 40
    tree = {
        "encoder": {"layer_0": layer, "layer_1": layer, "final_norm": {"scale": jnp.array([3.0, 0.0])}},
        "decoder": {"layer_0": {"bias": jnp.array([1.0])}},
        "temperature": jnp.array(-1.0),
    }
    np.testing.assert_allclose(global_norm(tree), np.sqrt(2 * 40 + 9 + 1 + 1), rtol=1e-6)


STANDARD = OptimizerConfig(
    learning_rate=0.02, warmup_steps=0.0, bias_correction=True, clip_norm=0.0, epsilon=1e-8, weight_decay=0.1, power=0.0
)


def test_with_bias_correction_it_is_optax_adamw():
    grads = gradients(10, 1.0)
    mask = {"kernel": True, "bias": False, "attention_norm": {"scale": False}}
    expected = run(optax.adamw(0.02, eps=1e-8, weight_decay=0.1, mask=mask), grads)
    for got, want in zip(
        jax.tree.leaves(run(make_optimizer(STANDARD, 10), grads)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_with_bias_correction_it_is_torch_adamw():
    torch = pytest.importorskip("torch")
    grads = gradients(10, 1.0)
    scale, bias, kernel = [torch.nn.Parameter(torch.tensor(p)) for p in jax.tree.leaves(PARAMS)]
    groups = [{"params": [kernel], "weight_decay": 0.1}, {"params": [scale, bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.999), eps=1e-8)
    for tree in grads:
        for parameter, g in zip((scale, bias, kernel), jax.tree.leaves(tree), strict=True):
            parameter.grad = torch.tensor(g)
        adamw.step()
    found = run(make_optimizer(STANDARD, 10), grads)
    for got, want in zip(jax.tree.leaves(found), (scale, bias, kernel), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-5)


# -- what is decayed --------------------------------------------------------------------------------------------------


def paths_of_a_model(body, qk_norm=False):
    tower = EncoderConfig(
        vocab_size=50,
        layers=1,
        width=16,
        heads=2,
        feed_forward=32,
        embedding_width=8,
        max_length=16,
        body=body,
        qk_norm=qk_norm,
    )
    task = PretrainTask(ObjectiveConfig(), tower, tower, SpecialIds(0, 1, 2, 3), "packed")
    params = jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": np.zeros((1, 16), np.int32)}))
    decayed, excluded = set(), set()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        (decayed if is_decayed(path, jnp.zeros(())) else excluded).add(
            jax.tree_util.keystr(path, simple=True, separator="/")
        )
    return decayed, excluded


LAYER_KERNELS = ["attention/qkv/kernel", "attention/output/kernel", "up/kernel", "down/kernel"]


def both_towers(*names):
    return {f"{tower}/{name}" for tower in ("generator", "discriminator") for name in names}


def test_every_table_and_kernel_is_decayed_and_every_norm_and_bias_is_not():
    decayed, excluded = paths_of_a_model("electra")
    assert decayed == {"embeddings/word", "embeddings/position", "embeddings/type"} | both_towers(
        "encoder/embeddings_project/kernel", "head/dense/kernel", *[f"encoder/layer_0/{k}" for k in LAYER_KERNELS]
    ) | {"discriminator/head/output/kernel"}
    biases = [f"encoder/layer_0/{k.replace('kernel', 'bias')}" for k in LAYER_KERNELS]
    norms = [
        f"encoder/layer_0/{norm}/{part}" for norm in ("attention_norm", "output_norm") for part in ("scale", "bias")
    ]
    assert excluded == both_towers("encoder/embeddings_project/bias", "head/dense/bias", *biases, *norms) | {
        "embeddings/norm/scale",
        "embeddings/norm/bias",
        "generator/head/norm/scale",
        "generator/head/norm/bias",
        "generator/head/output_bias",
        "discriminator/head/output/bias",
    }


def test_the_modern_body_decays_its_kernels_and_tables_only():
    decayed, excluded = paths_of_a_model("modern", qk_norm=True)
    assert {path.rsplit("/", 1)[1] for path in decayed} == {"kernel", "word", "type"}
    assert {path.rsplit("/", 1)[1] for path in excluded} == {"scale", "bias", "output_bias"}
    assert "generator/encoder/layer_0/attention/query_norm/scale" in excluded
    assert "generator/encoder/final_norm/scale" in excluded


# -- layer-wise rates -------------------------------------------------------------------------------------------------


def keys(path):
    return tuple(jax.tree_util.DictKey(name) for name in path.split("/"))


# by hand: 0.8² and 0.8^14, 0.9² and 0.9^26 with the reference's offset; 0.8 and 0.8^13 without
@pytest.mark.parametrize(
    ("layers", "decay", "faithful", "top", "embeddings"),
    [(12, 0.8, True, 0.64, 0.04398), (24, 0.9, True, 0.81, 0.06461), (12, 0.8, False, 0.8, 0.05498)],
)
def test_layer_decay_reaches_from_the_head_down_to_the_embeddings(layers, decay, faithful, top, embeddings):
    def multiplier(path):
        return layer_multiplier(keys(path), layers, decay, faithful)

    assert multiplier("discriminator/head/dense/kernel") == 1.0
    assert multiplier(f"discriminator/encoder/layer_{layers - 1}/up/kernel") == pytest.approx(top)
    assert multiplier("embeddings/word") == pytest.approx(embeddings, rel=1e-3)
    assert multiplier("discriminator/encoder/embeddings_project/kernel") == pytest.approx(embeddings, rel=1e-3)


def test_layer_decay_scales_each_parameters_update_by_its_depth():
    params = {
        "embeddings": {"word": jnp.ones(2)},
        "discriminator": {
            "encoder": {"layer_0": {"kernel": jnp.ones(2)}, "layer_1": {"kernel": jnp.ones(2)}},
            "head": {"kernel": jnp.ones(2)},
        },
    }
    plain = OptimizerConfig(learning_rate=1.0, warmup_steps=0.0, weight_decay=0.0)
    decayed = dataclasses.replace(plain, layer_decay=0.5)
    grads = jax.tree.map(lambda p: 0.3 * p, params)
    updates = []
    for config in (plain, decayed):
        optimizer = make_optimizer(config, 10)
        updates.append(optimizer.update(grads, optimizer.init(params), params)[0])
    ratio = jax.tree.map(lambda a, b: float((b / a)[0]), *updates)
    assert ratio["embeddings"]["word"] == pytest.approx(0.125)
    assert ratio["discriminator"]["encoder"]["layer_0"]["kernel"] == pytest.approx(0.25)
    assert ratio["discriminator"]["encoder"]["layer_1"]["kernel"] == pytest.approx(0.5)
    assert ratio["discriminator"]["head"]["kernel"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("faithful", "top", "first", "embeddings"),
    [(True, 0.64, 0.8**13, 0.8**14), (False, 0.8, 0.8**12, 0.8**13)],  # the embeddings' .8^14 is .044
    ids=["the reference's", "without its offset"],
)
def test_layer_decay_in_fine_tuning_leaves_the_new_head_its_whole_rate(faithful, top, first, embeddings):
    layers = {f"layer_{i}": {"up": {"kernel": jnp.ones(2)}} for i in range(12)}
    params = {
        "embeddings": {"word": jnp.ones(2), "norm": {"scale": jnp.ones(2)}},
        "discriminator": {"encoder": {"embeddings_project": {"kernel": jnp.ones(2)}, **layers}},
        "head": {"output": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}},
    }
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0.0, weight_decay=0.0, layer_decay=0.8)
    optimizer = make_optimizer(config, 10, faithful)
    updates = jax.jit(lambda p: optimizer.update(jax.tree.map(lambda x: 0.3 * x, p), optimizer.init(p), p)[0])(params)
    whole = float(updates["head"]["output"]["kernel"][0])
    assert float(updates["head"]["output"]["bias"][0]) == whole < -0.1
    ratio = jax.tree.map(lambda update: float(update[0]) / whole, updates)
    encoder = ratio["discriminator"]["encoder"]
    assert encoder["layer_11"]["up"]["kernel"] == pytest.approx(top)
    assert encoder["layer_0"]["up"]["kernel"] == pytest.approx(first)
    assert encoder["embeddings_project"]["kernel"] == pytest.approx(embeddings)
    assert jax.tree.leaves(ratio["embeddings"]) == pytest.approx([embeddings] * 2)


# -- frozen parameters ------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_to_the_bit_and_the_others_move_as_ever():
    grads = gradients(3, 0.01)  # below the clipping norm
    config = OptimizerConfig(learning_rate=0.02, warmup_steps=0.0)
    asked = set()

    def is_frozen(path):
        asked.add(path)
        return path[0] == "attention_norm" or path == ("kernel",)

    found = run(make_optimizer(config, 10, is_frozen=is_frozen), grads)
    free = run(make_optimizer(config, 10), grads)
    assert asked == {("kernel",), ("bias",), ("attention_norm", "scale")}
    np.testing.assert_array_equal(found["kernel"], PARAMS["kernel"])  # no weight decay either
    np.testing.assert_array_equal(found["attention_norm"]["scale"], PARAMS["attention_norm"]["scale"])
    np.testing.assert_array_equal(found["bias"], free["bias"])
    assert (np.asarray(free["kernel"]) != PARAMS["kernel"]).all()
