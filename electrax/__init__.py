"""electrax: pretrain and fine-tune ELECTRA text encoders in JAX."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from electrax.config import UserError as UserError
    from electrax.experiment.saved import load as load
    from electrax.models.decoding import Sampling as Sampling

__all__ = ["Sampling", "UserError", "load"]
_PLACES = {
    "Sampling": "electrax.models.decoding",
    "UserError": "electrax.config",
    "load": "electrax.experiment.saved",
}


def __getattr__(name: str):
    # imported on first use: the workers of `prepare` and `--help` need no JAX
    if name == "__version__":
        from importlib.metadata import version

        return version("electrax")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'electrax' has no attribute {name!r}")
