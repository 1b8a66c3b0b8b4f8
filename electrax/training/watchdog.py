"""Says when a run hangs, and where."""

import collections
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P, Result = ParamSpec("P"), TypeVar("Result")
USUAL, LONGEST = 10, 3  # a stall is so many times the median interval between beats, and the longest of the last ones


class Watchdog:
    """Calls `show` with the stack of the thread that made it when that thread does not `beat` for far longer than the
    median of its last 200 intervals, and for `seconds` at least; once for each stall. 0 seconds: never."""

    def __init__(self, seconds: float, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._seconds, self._show, self._clock = seconds, show, clock
        self._watched = threading.get_ident()
        self._last: float | None = None  # no beat is awaited before the first and while something else goes on
        self._intervals: collections.deque[float] = collections.deque(maxlen=200)
        self._shown = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="electrax-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        if self._seconds:
            self._thread.join()

    def beat(self) -> None:
        """All is well."""
        now = self._clock()
        if self._last is not None:
            self._intervals.append(now - self._last)
            if self._shown:
                self._show(f"it went on after {now - self._last:,.0f} s")
        self._last, self._shown = now, False

    def before(self, ask: Callable[[], Result]) -> Callable[[], Result]:
        """`ask`, which the watched thread calls once a step."""

        def asked() -> Result:
            self.beat()
            return ask()

        return asked

    def unwatched(self, work: Callable[P, Result]) -> Callable[P, Result]:
        """`work`, during which no beat is awaited."""

        def wrapped(*arguments: P.args, **options: P.kwargs) -> Result:
            self._last = None
            try:
                return work(*arguments, **options)
            finally:
                self._last = self._clock()

        return wrapped

    def check(self) -> None:
        """Shows a stall that has not been shown yet."""
        last = self._last
        if last is None or self._shown or not self._intervals:
            return
        passed, intervals = self._clock() - last, list(self._intervals)
        median = statistics.median(intervals)
        if passed > max(self._seconds, USUAL * median, LONGEST * max(intervals)):
            self._shown = True
            frame = sys._current_frames().get(self._watched)
            stack = "".join(traceback.format_stack(frame)) if frame else ""
            self._show(f"no step for {passed:,.0f} s, where {median:.3g} s is the median; it is here:\n{stack}")

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self._seconds / 4)):
            self.check()
