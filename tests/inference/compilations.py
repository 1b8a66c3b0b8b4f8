import contextlib
from collections.abc import Iterator

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Grows by the seconds of what JAX compiles, or takes from its cache, in any thread."""
    found: list[float] = []
    listen = lambda event, seconds, **_: found.append(seconds) if event == EVENT else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
