"""electrax in someone else's JAX program: plain Flax modules over plain dictionaries."""

import functools
import importlib.resources
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings, EncoderConfig
from electrax.models.masks import padding_mask

CONFIG = EncoderConfig(
    vocab_size=40, layers=2, width=32, heads=2, feed_forward=64, embedding_width=16, max_length=8, dropout=0.0
)
IDS = jnp.array([[2, 17, 11, 30, 3, 0, 0, 0], [2, 21, 12, 3, 0, 0, 0, 0], [2, 5, 6, 7, 8, 9, 10, 3]])
REPLACED = jnp.zeros((3, 8)).at[0, 1].set(1).at[1, 2].set(1).at[2, 4].set(1)


def logits_of(params, ids):
    embedded = Embeddings(CONFIG).apply({"params": params["embeddings"]}, ids)
    return Discriminator(CONFIG).apply({"params": params["discriminator"]}, embedded, padding_mask(ids != 0))


def loss_of(params, ids, replaced, logits_of=logits_of):
    losses = optax.sigmoid_binary_cross_entropy(logits_of(params, ids), replaced)
    return jnp.sum(losses * (ids != 0)) / jnp.sum(ids != 0)


@pytest.fixture(scope="module")
def params():
    @jax.jit
    def init(key):
        first, second = jax.random.split(key)
        embedded, variables = Embeddings(CONFIG).init_with_output(first, IDS)
        discriminator = Discriminator(CONFIG).init(second, embedded, padding_mask(IDS != 0))
        return {"embeddings": variables["params"], "discriminator": discriminator["params"]}

    return init(jax.random.key(0))


@pytest.fixture(scope="module")
def logits(params):
    return jax.jit(logits_of)(params, IDS)


def test_parameters_are_plain_dictionaries_of_arrays(params):
    def check(tree):
        assert type(tree) is dict or isinstance(tree, jax.Array)
        for value in tree.values() if type(tree) is dict else ():
            check(value)

    check(params)


def test_under_jit_it_computes_what_it_computes_without(params, logits):
    assert logits.shape == (3, 8) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, logits_of(params, IDS), atol=1e-6)


def test_under_vmap_each_row_is_as_in_the_batch(params, logits):
    by_row = jax.jit(jax.vmap(lambda row: logits_of(params, row[None])[0]))(IDS)
    np.testing.assert_allclose(by_row, logits, atol=1e-6)


def test_under_vmap_over_parameters_it_is_an_ensemble(params, logits):
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    first, second = jax.jit(jax.vmap(logits_of, in_axes=(0, None)))(both, IDS)
    np.testing.assert_allclose(first, logits, atol=1e-6)
    assert np.abs(second - logits).max() > 1e-3


@functools.partial(jax.jit, static_argnames="wrapped")
def gradient_of(params, wrapped=None):
    return jax.grad(loss_of)(params, IDS, REPLACED, wrapped or logits_of)


def test_the_gradient_is_the_slope_of_the_loss(params):
    gradient = gradient_of(params)
    length = optax.tree.norm(gradient)
    moved = lambda step: jax.tree.map(lambda p, g: p + step * g / length, params, gradient)  # noqa: E731
    loss = jax.jit(loss_of)
    slope = (loss(moved(1e-2), IDS, REPLACED) - loss(moved(-1e-2), IDS, REPLACED)) / 2e-2
    assert float(slope) == pytest.approx(float(length), rel=0.02)


def test_under_checkpoint_the_gradient_is_the_same(params):
    for leaf, expected in zip(
        jax.tree.leaves(gradient_of(params, jax.checkpoint(logits_of))),
        jax.tree.leaves(gradient_of(params)),
        strict=True,
    ):
        np.testing.assert_allclose(leaf, expected, atol=1e-6)


def test_a_hand_written_optax_loop_trains_it(params):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(loss_of)(params, IDS, REPLACED)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses, state = [], optimizer.init(params)
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


# -- the package ------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_but_the_standard_library():
    code = "import sys; before = set(sys.modules); import electrax; print(*set(sys.modules) - before)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[0] for name in found} - sys.stdlib_module_names == {"electrax"}


def test_the_package_says_that_it_is_typed():
    assert importlib.resources.files("electrax").joinpath("py.typed").is_file()
