"""LineLimiter: the same lines however the bytes are cut, bounded in memory and number, nothing dropped untold."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from supervisor.sandbox.output import Dropped, Dropping, Line, LineLimiter


def feed(limiter, *parts, now=0.0):
    return [event for part in parts for event in limiter.feed(part, now)]


@given(st.binary(max_size=60).map(lambda data: data.replace(b"0", b"\n")), st.lists(st.integers(0, 60), max_size=8))
def test_the_cuts_between_reads_change_nothing(data, cuts):
    whole, split = LineLimiter(7, 4), LineLimiter(7, 4)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert [*feed(whole, data), *whole.finish()] == [*feed(split, *parts), *split.finish()]


@given(st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"0", b"\n")), max_size=20))
def test_every_line_is_told_or_counted(parts):
    limiter = LineLimiter(10, 5)
    events = [event for turn, part in enumerate(parts) for event in limiter.feed(part, turn / 4)]
    events += limiter.finish()
    data = b"".join(parts)
    lines = data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
    assert sum(isinstance(event, Line) for event in events) + sum(
        event.lines for event in events if isinstance(event, Dropped)
    ) in (lines, lines - 1)


def test_a_line_that_is_too_long_is_cut_and_its_rest_counted():
    limiter = LineLimiter(4, 100)
    assert feed(limiter, b"abcdefgh", b"ij\nkl\n") == [Line("abcd", cut=True), Line("kl")]
    assert [*limiter.finish()] == [Dropped(0, 6)]


def test_a_line_without_an_end_costs_no_memory():
    limiter = LineLimiter(4, 100)
    for _ in range(1000):
        feed(limiter, b"x" * 1000)
    assert len(limiter._line) <= 4
    assert limiter.flooded


def test_lines_above_the_limit_are_told_first_and_counted_when_the_second_is_over():
    limiter = LineLimiter(100, 2)
    assert feed(limiter, b"1\n2\n3\n4\n") == [Line("1"), Line("2"), Dropping()]
    assert limiter.due_at == 1.0
    assert feed(limiter, b"5\n", now=0.9) == []
    assert [*limiter.tick(0.99)] == []
    assert feed(limiter, b"6\n", now=1.0) == [Dropped(3, 0), Line("6")]
    assert limiter.due_at == math.inf


def test_a_quiet_end_of_the_second_is_told_by_tick():
    limiter = LineLimiter(100, 1)
    feed(limiter, b"1\n2\n")
    assert [*limiter.tick(1.5)] == [Dropped(1, 0)]
    assert not limiter.flooded


def test_carriage_returns_and_bytes_that_are_no_utf8_do_no_harm():
    assert feed(LineLimiter(100, 9), b"a\r\n\xc3\x28\n\n") == [Line("a"), Line("\ufffd("), Line("")]
