"""Matrix products in float32 or bfloat16, and the type of what is computed between them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def activation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The type of activations where products are in `dtype`: the same, but float32 on a CPU.

    A CPU that multiplies bfloat16 (AVX512-BF16) does so into float32, at twice the rate of float32; everything else in
    bfloat16 XLA computes there in float32, with a conversion before and after.
    """
    return jnp.dtype(jnp.float32 if _on_cpu() else dtype)


def product(
    spec: str, a: Float[Array, "..."], b: Float[Array, "..."], dtype: DTypeLike, out: DTypeLike | None = None
) -> Float[Array, "..."]:
    """einsum(spec, a, b) of operands rounded to `dtype`, summed in float32; the result is of type `out`, by default
    that of activations. Every index of an operand stands in the other or in the result.

    The gradients are such products too, of the type of their operand. Left to JAX, those of a bfloat16 product into
    float32 would be float32 products.
    """
    out = activation_dtype(dtype) if out is None else jnp.dtype(out)
    if jnp.dtype(dtype) == jnp.float32:
        return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=out)
    return _product(spec, jnp.dtype(dtype), out, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(spec, dtype, out, a, b):
    return _einsum(spec, a.astype(dtype), b.astype(dtype), out)


def _forward(spec, dtype, out, a, b):
    a_type, b_type = jnp.zeros((), a.dtype), jnp.zeros((), b.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    return _einsum(spec, a, b, out), (a, b, a_type, b_type)


def _backward(spec, dtype, out, kept, slope):
    a, b, a_type, b_type = kept
    operands, result = spec.split("->")
    first, second = operands.split(",")
    slope = slope.astype(dtype)
    return (
        _einsum(f"{result},{second}->{first}", slope, b, a_type.dtype),
        _einsum(f"{first},{result}->{second}", a, slope, b_type.dtype),
    )


_product.defvjp(_forward, _backward)


def _einsum(spec: str, a: jax.Array, b: jax.Array, out: jnp.dtype) -> jax.Array:
    """On a CPU with the first operand's summed index last, where its bfloat16 product (YNNPACK's) wants it. Of any
    other order XLA makes a float32 product, or one that it cannot run: hence the barrier, without which it takes the
    transposition into the product again."""
    if not _on_cpu():
        return jnp.einsum(spec, a, b, preferred_element_type=out)
    operands, result = spec.split("->")
    first, second = operands.split(",")
    batch = [i for i in first if i in second and i in result]
    summed = [i for i in first if i in second and i not in result]
    rows, columns = ([i for i in own if i not in batch + summed] for own in (first, second))
    ordered = batch + rows + summed
    a = jax.lax.optimization_barrier(a.transpose([first.index(i) for i in ordered]))
    contracting = [ordered.index(i) for i in summed], [second.index(i) for i in summed]
    batched = [ordered.index(i) for i in batch], [second.index(i) for i in batch]
    found = jax.lax.dot_general(a, b, (contracting, batched), preferred_element_type=out)
    return found.transpose([(batch + rows + columns).index(i) for i in result])


def rounded_layers(params: Any, dtype: DTypeLike) -> Any:
    """The parameters with the kernels of all layers in `dtype`, to which each product would round them anew."""

    def rounded(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        in_layer = any(name.startswith("layer_") for name in names)
        return leaf.astype(dtype) if in_layer and names[-1] == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(rounded, params)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
