"""The ladder's arithmetic."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from supervisor.settings import Settings
from supervisor.tenant.ladder import Ladder


def test_the_default_delays_are_1_3_and_8_seconds_and_all_three_are_slept():
    """S3-05, S3-06: four attempts, twelve seconds of waiting."""
    ladder = Ladder(Settings().connect_retry_s)
    now, instants = 100.0, []
    while not ladder.exhausted:
        now = max(now, ladder.not_before)
        instants.append(now)
        ladder.fail("refused", now)
    assert instants == [100.0, 101.0, 104.0, 112.0]


def test_the_story_tells_which_attempt_failed_how():
    ladder = Ladder((1.0, 3.0))
    for words in ("exit status 3", "no answer within 10 s", "refused"):
        ladder.fail(words, 0.0)
    assert ladder.story() == (
        "attempt 1: exit status 3; attempt 2, after 1 s: no answer within 10 s; attempt 3, after 3 s: refused"
    )


@given(st.lists(st.floats(0, 100), max_size=8).map(tuple), st.lists(st.floats(0, 10), max_size=12), st.floats(0, 1e6))
def test_there_is_one_attempt_more_than_delays_and_none_comes_early(delays, pauses, now):
    ladder = Ladder(delays)
    attempts = 0
    for pause in [*pauses, *[0.0] * 20]:
        if ladder.exhausted:
            break
        now = max(now + pause, ladder.not_before)
        ladder.fail("x", now)
        attempts += 1
        if not ladder.exhausted:
            assert ladder.not_before == now + delays[attempts - 1]
    assert attempts == len(delays) + 1
    ladder.reset()
    assert (ladder.rung, ladder.not_before, ladder.exhausted) == (0, -math.inf, False)
