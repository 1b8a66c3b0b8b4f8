"""Several runs of the loop side by side: their steps are gathered and taken together, in one program."""

from collections.abc import Callable, Generator, Iterator, Mapping

import jax
import jax.numpy as jnp

from electrax.training.state import Request, Step, StepResult
from electrax.training.tracking import Record


class JointStep:
    """The steps of runs that differ in their seed alone, compiled once for each number of runs and shape of batch.

    The runs' batches must be of one shape. States go in and come out apart, so that nothing outside knows of the
    others; those given are donated. A step of one run alone is that run's own.
    """

    def __init__(self, steps: Mapping[str, Step]):
        self._steps = dict(steps)
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def compiled(self, requests: Mapping[str, Request]) -> jax.stages.Compiled:
        if len(requests) == 1:
            [(name, request)] = requests.items()
            return self._steps[name].compiled(request.state, request.batch)
        arguments = self._arguments(requests)
        key = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[1]))
        if key not in self._compiled:
            step = self._steps[next(iter(requests))]
            shardings = ((step.shardings, None, None),) * len(requests)
            jitted = jax.jit(_side_by_side(step.function), donate_argnums=0, out_shardings=shardings)
            self._compiled[key] = jitted.lower(*arguments).compile()
        return self._compiled[key]

    def __call__(self, requests: Mapping[str, Request]) -> dict[str, StepResult]:
        if len(requests) == 1:
            [(name, request)] = requests.items()
            return {name: self._steps[name](request.state, request.batch)}
        results = self.compiled(requests)(*self._arguments(requests))
        return dict(zip(requests, results, strict=True))

    def _arguments(self, requests: Mapping[str, Request]) -> tuple[tuple, tuple, tuple]:
        """States, batches and seeds."""
        states, batches = zip(*((request.state, request.batch) for request in requests.values()), strict=True)
        return states, batches, tuple(self._steps[name].seed for name in requests)


def _side_by_side(function: Callable) -> Callable:
    """(states, batches, seeds) -> what `function` gives for each of them."""

    def together(states: tuple, batches: tuple, seeds: tuple) -> tuple[StepResult, ...]:
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (states, batches, seeds)]
        results = jax.vmap(function)(*stacked)
        return tuple(jax.tree.map(lambda leaf, place=place: leaf[place], results) for place in range(len(states)))

    return together


def lockstep(
    runs: Mapping[str, Generator],
    take: Callable[[Mapping[str, Request]], Mapping[str, StepResult]],
    endings: tuple[type[Exception], ...] = (),
) -> Iterator[tuple[str, Record | Exception]]:
    """Drives runs of the loop until each has ended; yields their records, and what of `endings` one ended with.

    Of the runs that wait, those at the earliest step go on, so that runs that were resumed at different steps meet.
    A run that has ended leaves the others as they are.
    """
    waiting: dict[str, Request] = {}
    ready: Mapping[str, StepResult | None] = dict.fromkeys(runs)
    while ready:
        for name, results in ready.items():
            try:
                event = runs[name].send(results)
                while isinstance(event, Record):
                    yield name, event
                    event = next(runs[name])
                waiting[name] = event
            except StopIteration:
                continue  # it is done
            except endings as ending:
                yield name, ending
        earliest = min((request.step for request in waiting.values()), default=0)
        # in the order of `runs`, so that a program finds its runs in the same places
        due = {name: waiting.pop(name) for name in runs if name in waiting and waiting[name].step == earliest}
        ready = take(due) if due else {}
