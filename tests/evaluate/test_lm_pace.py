"""The expected time is told after the first requests of a long run, and nothing of a short one."""

import pytest

from dllm_train.evaluate import pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def run(clock, seconds_of_one: float, count: int = 10, **options) -> list[list[int]]:
    found = []
    for wave in pace.waves("answers", range(count), [1.0] * count, first=2, least=3, **options):
        found.append(wave)
        clock[0] += seconds_of_one * len(wave)
    return found


def test_items_come_in_order_a_few_first_then_a_minute_of_them(clock):
    assert run(clock, 100.0) == [[0, 1], [2, 3, 4], [5, 6, 7], [8, 9]]
    assert run(clock, 10.0) == [[0, 1], [2, 3, 4, 5, 6, 7], [8, 9]]
    assert run(clock, 0.0) == [[0, 1], [2, 3, 4, 5, 6, 7, 8, 9]]
    assert run(clock, 0.0, count=4, most=1) == [[0], [1], [2], [3]]


def test_a_long_run_is_told_and_counted_down(clock, caplog):
    with caplog.at_level("INFO", logger="lm_eval.dllm"):
        run(clock, 30.0)
    assert [record.getMessage() for record in caplog.records] == [
        "answers: 10 requests, about 5 min 00 s expected",
        "answers: 5 of 10 requests, 2 min 30 s left",
        "answers: 8 of 10 requests, 1 min 00 s left",
    ]


@pytest.mark.parametrize(("seconds", "options"), [(0.5, {}), (30.0, dict(quiet=True))])
def test_a_short_run_and_other_processes_say_nothing(clock, caplog, seconds, options):
    with caplog.at_level("INFO", logger="lm_eval.dllm"):
        run(clock, seconds, **options)
    assert not caplog.records


def test_durations():
    assert [pace.duration(seconds) for seconds in (9.4, 61, 3725)] == ["9 s", "1 min 01 s", "1 h 02 min"]
