"""The table of a tenant's life."""

from __future__ import annotations

import pytest

from supervisor.errors import IllegalTransition
from supervisor.tenant.lifecycle import TABLE, Happening, State, advance


def test_an_illegal_transition_names_the_state_and_the_event():
    with pytest.raises(IllegalTransition, match="'asleep' has no answer to 'ready'"):
        advance(State.ASLEEP, Happening.READY)


def test_every_state_but_the_resting_ones_is_left_by_something():
    for state in State:
        assert any(former is state for former, _ in TABLE), state


def test_every_state_can_be_reached_and_returns_to_sleep():
    reached = {State.ASLEEP}
    while more := {TABLE[line] for line in TABLE if line[0] in reached} - reached:
        reached |= more
    assert reached == set(State)
    for start in State:
        seen = {start}
        while more := {TABLE[line] for line in TABLE if line[0] in seen} - seen:
            seen |= more
        assert State.ASLEEP in seen, start


def test_an_agent_that_was_not_started_here_is_never_ready():
    """S3-04: running follows from an answered handshake of a start that is under way, and from nothing else."""
    assert [former for (former, happening), state in TABLE.items() if state is State.RUNNING] == [State.STARTING]
    assert all(TABLE[line] is not State.RUNNING or line[1] is Happening.READY for line in TABLE)
