import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.dropout import dropout, fold

SEEDS = jax.random.bits(jax.random.key(0), (6,), jnp.uint32)


def kept(rate, seeds=SEEDS, shape=(50, 40)):
    return np.asarray(dropout(jnp.ones((len(seeds), *shape)), rate, seeds)) > 0


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_of_dropped_units_is_the_rate(rate):
    dropped = 1 - kept(rate, shape=(100, 100)).mean(axis=(1, 2))
    # per row 10,000 units: five standard deviations
    assert np.abs(dropped - rate).max() < 5 * np.sqrt(rate * (1 - rate) / 10_000)


def test_kept_units_are_scaled_by_one_over_the_keep_rate():
    x = jnp.arange(1.0, 13.0).reshape(6, 2)
    found = np.asarray(dropout(x, 0.2, SEEDS))
    keep = found != 0
    assert 0 < keep.sum() < 12
    np.testing.assert_allclose(found[keep], np.asarray(x)[keep] * 1.25, rtol=1e-6)


def test_no_seed_or_rate_zero_is_the_identity():
    x = jnp.arange(12.0).reshape(6, 2)
    assert (dropout(x, 0.5, None) == x).all() and (dropout(x, 0.0, SEEDS) == x).all()
    assert fold(None, 3) is None


def test_the_gradient_passes_where_the_value_does():
    x = jnp.ones((6, 30))
    slope = jax.grad(lambda x: dropout(x, 0.5, SEEDS).sum())(x)
    assert (slope == dropout(x, 0.5, SEEDS)).all()


def test_a_rows_mask_does_not_depend_on_the_other_rows():
    together = kept(0.3)
    assert (kept(0.3, SEEDS[2:3])[0] == together[2]).all()
    assert (kept(0.3, SEEDS[::-1])[::-1] == together).all()


def test_rows_and_sites_drop_independently():
    masks = [kept(0.5, fold(SEEDS, site), (10_000,)) for site in range(4)]
    flat = np.concatenate(masks) * 2.0 - 1.0  # 24 masks of ±1
    correlation = flat @ flat.T / 10_000
    assert np.abs(correlation - np.eye(24)).max() < 0.05  # five standard deviations


def test_neighbouring_units_drop_independently():
    signs = kept(0.5, SEEDS, (10_000,)) * 2.0 - 1.0
    for lag in (1, 2, 64):
        assert np.abs((signs[:, lag:] * signs[:, :-lag]).mean(1)).max() < 0.05


def test_all_sites_of_a_deep_model_have_different_seeds():
    layers = [fold(SEEDS, layer) for layer in range(25)]
    sites = np.concatenate([*layers, *[fold(seed, site) for seed in layers for site in range(3)]])
    assert len(np.unique(sites)) == len(sites) == 6 * 100


def test_bfloat16_stays_bfloat16():
    assert dropout(jnp.ones((6, 4), jnp.bfloat16), 0.1, SEEDS).dtype == jnp.bfloat16


def test_the_first_units_of_a_row_are_dropped_as_in_the_whole_row():
    x = jnp.ones((6, 3, 8, 5))
    found = dropout(x[:, :, :2, :4], 0.5, SEEDS, row=(3, 8, 5))
    assert (found == dropout(x, 0.5, SEEDS)[:, :, :2, :4]).all()
    assert (found != dropout(x[:, :, :2, :4], 0.5, SEEDS)).any()
