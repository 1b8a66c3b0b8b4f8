"""AdamW, clipping and learning-rate schedules, the reference's and the standard ones (reference: optimization.py)."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from electrax.config import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Defaults are the reference's: Adam without bias correction, ε outside the root, decoupled decay, clipping."""

    learning_rate: float = 5e-4
    warmup_steps: float = 10_000.0
    warmup_share: float = 0.0  # of all steps, where warmup_steps is 0
    # multiplied: lr · (1 - t/T)^p · min(1, t/W) (the reference's); joined: up to W, then down over the T - W left
    schedule: Literal["multiplied", "joined"] = "multiplied"
    power: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    bias_correction: bool = False
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0: no clipping
    layer_decay: float = 1.0  # each layer's rate as a share of that of the layer above it
    microbatch: int = 0  # rows of a device in one forward-backward pass; 0: chosen for the device
    max_skipped: int = 10  # updates in a row that may be skipped because loss or gradient is not finite

    def __post_init__(self):
        if self.epsilon <= 0:
            raise UserError(f"optimizer.epsilon must be above 0, not {self.epsilon}")
        for name in (
            "learning_rate",
            "warmup_steps",
            "warmup_share",
            "weight_decay",
            "clip_norm",
            "layer_decay",
            "microbatch",
            "max_skipped",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name} must not be negative, but is {getattr(self, name)}")


def learning_rate(config: OptimizerConfig, steps: int, t: Int[Array, ""] | int) -> Float[Array, ""] | np.float32:
    """Of update t = 0, 1, …; the first update of a warm-up has rate 0. Of an int it is a number of the host, which does
    not wait for what the devices have to do."""
    xp = np if isinstance(t, int) else jnp
    t = xp.asarray(t, xp.float32)
    warmup = config.warmup_steps or config.warmup_share * steps
    rise = xp.minimum(1.0, t / warmup) if warmup else 1.0
    if config.schedule == "multiplied":
        done = xp.minimum(t, steps) / steps
    else:
        done = xp.clip((t - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    return config.learning_rate * (1.0 - done) ** config.power * rise


class AdamState(NamedTuple):
    count: Int[Array, ""]
    mean: Any
    square: Any


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """m / (√v + ε). Without bias correction (BERT's and the reference's Adam) early updates are larger: 3.16 times at
    the first step, 6.57 times at the twelfth, 1.26 times at the thousandth."""

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)  # noqa: E731
        return AdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        b1, b2 = config.beta1, config.beta2
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.square, grads)
        count = state.count + 1
        c1, c2 = (1 - b1**count, 1 - b2**count) if config.bias_correction else (1.0, 1.0)
        scaled = jax.tree.map(lambda m, v: (m / c1) / (jnp.sqrt(v / c2) + config.epsilon), mean, square)
        return scaled, AdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm of all numbers of a tree of parameters. Vectors that are in every layer are put together first: on
    a GPU each of the hundreds would be a kernel of its own."""
    alike, squares = defaultdict(list), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.ndim > 1:
            squares.append(jnp.sum(jnp.square(leaf)))
        else:
            name = tuple("" if name.startswith("layer_") else name for name in names_of(path))
            alike[name, leaf.shape].append(leaf)
    return jnp.sqrt(sum([*squares, *(jnp.sum(jnp.square(jnp.stack(leaves))) for leaves in alike.values())]))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Shrinks what is longer than the limit to it, as optax's does."""

    def update(updates, state, params=None):
        norm = global_norm(updates)
        return jax.tree.map(lambda g: jnp.where(norm < limit, g, g / norm.astype(g.dtype) * limit), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def names_of(path: tuple) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]


def is_decayed(path: tuple, leaf: Any) -> bool:
    """Everything but biases and norms; embedding and position tables are decayed, the output bias is not."""
    names = names_of(path)
    return not any("norm" in name or "bias" in name for name in names)


def layer_multiplier(path: tuple, layers: int, decay: float, faithful: bool = False) -> float:
    """decay^(top - depth): depth 0 for embeddings and their projection, i + 1 for layer i, `top` for the head.

    `top` is layers + 1. The reference's is layers + 2, since it counts a pooler that it does not have, so that its top
    layer gets decay² of the head's rate (google-research/electra#51).
    """
    names = names_of(path)
    top = layers + 2 if faithful else layers + 1
    layer = next((int(name.removeprefix("layer_")) for name in names if name.startswith("layer_")), None)
    if layer is not None:
        depth = layer + 1
    else:
        depth = 0 if any("embeddings" in name for name in names) else top
    return decay ** (top - depth)


def scale_by_layer(config: OptimizerConfig, faithful: bool) -> optax.GradientTransformation:
    """Updates times `layer_multiplier`; each tower counts its own layers, shared embeddings the deepest tower's."""

    def update(updates, state, params=None):
        towers = {name: _layers(tree) for name, tree in updates.items()}

        def multiply(path, value):
            layers = towers[path[0].key] or max(towers.values())
            return value * layer_multiplier(path, layers, config.layer_decay, faithful)

        return jax.tree_util.tree_map_with_path(multiply, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _layers(tower: dict) -> int:
    return sum(name.startswith("layer_") for name in tower.get("encoder", tower))


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    faithful: bool = False,
    is_frozen: Callable[[tuple[str, ...]], bool] = lambda path: False,
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, then the learning rate, lower for deeper layers if asked.
    Parameters whose path `is_frozen` stay as they are."""

    def frozen(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: is_frozen(tuple(names_of(path))), params)

    return optax.chain(
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scale_by_adam(config),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: jax.tree_util.tree_map_with_path(is_decayed, params)
        ),
        scale_by_layer(config, faithful) if config.layer_decay != 1.0 else optax.identity(),
        optax.scale_by_learning_rate(lambda count: learning_rate(config, steps, count)),
        optax.masked(optax.set_to_zero(), frozen),
    )
