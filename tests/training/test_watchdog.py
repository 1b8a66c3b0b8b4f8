import threading
import time

from electrax.training.watchdog import Watchdog


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def watched(seconds=60.0):
    """(watchdog, its clock, what it showed), after ten steps of 2 s."""
    clock, shown = Clock(), []
    dog = Watchdog(seconds, shown.append, clock)
    for _ in range(11):
        dog.beat()
        clock.now += 2.0
    return dog, clock, shown


def test_a_stall_is_shown_once_with_its_place_and_when_it_is_over():
    dog, clock, shown = watched()
    clock.now += 57.0  # 59 s since the last beat
    dog.check()
    assert shown == []
    clock.now += 2.0
    dog.check()
    dog.check()
    [message] = shown
    assert message.startswith("no step for 61 s, where 2 s is the median; it is here:\n")
    assert "test_a_stall_is_shown_once_with_its_place" in message
    dog.beat()
    assert shown[1:] == ["it went on after 61 s"]


def test_a_step_that_is_often_as_long_is_no_stall():
    dog, clock, shown = watched()
    for _ in range(3):
        clock.now += 98.0
        dog.beat()
    clock.now += 250.0  # three times 100 s is not over
    dog.check()
    assert shown == []
    clock.now += 60.0
    dog.check()
    assert len(shown) == 1


def test_no_beat_is_awaited_before_the_second_one_and_during_other_work():
    clock, shown = Clock(), []
    dog = Watchdog(60.0, shown.append, clock)
    dog.beat()
    clock.now += 1000.0
    dog.check()
    assert shown == []
    dog, clock, shown = watched()

    def work(seconds):
        clock.now += seconds
        dog.check()
        return "done"

    assert dog.unwatched(work)(1000.0) == "done"
    dog.check()
    assert shown == []


def test_a_beat_comes_before_each_question():
    dog, clock, shown = watched()
    clock.now += 100.0
    dog.check()
    assert dog.before(lambda: "asked")() == "asked"
    assert shown[1:] == ["it went on after 102 s"]


def test_the_thread_finds_a_stall_by_itself_and_ends():
    shown = []
    with Watchdog(0.05, shown.append) as dog:
        dog.beat(), dog.beat()
        until = time.monotonic() + 20
        while not shown and time.monotonic() < until:
            time.sleep(0.01)
    assert shown
    assert "electrax-watchdog" not in [thread.name for thread in threading.enumerate()]


def test_zero_seconds_watch_nothing():
    with Watchdog(0.0, print):
        assert "electrax-watchdog" not in [thread.name for thread in threading.enumerate()]
