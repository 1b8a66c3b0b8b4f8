"""electrax: pretrain and fine-tune ELECTRA text encoders in JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from electrax.experiment.saved import load as load

__all__ = ["load"]


def __getattr__(name: str):
    # loaded on first use: the workers of `prepare` and `--help` need no JAX
    if name == "load":
        from electrax.experiment.saved import load

        return load
    raise AttributeError(f"module 'electrax' has no attribute {name!r}")
