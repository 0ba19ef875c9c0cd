"""The life of a tenant as data: every state, every event, and what follows.

All that this module knows is the table. An event that a state has no answer to is a bug, and raises an
IllegalTransition that names both. Nothing here waits, reads a clock, or knows what a process is.
"""

from __future__ import annotations

import enum

from supervisor.errors import IllegalTransition


class State(enum.Enum):
    """What `GET /v1/tenants/{tenant}` shows."""

    ASLEEP = "asleep"  # no agent, and nobody waits for one
    STARTING = "starting"  # somebody waits: an agent is being started, or the ladder's next rung is awaited
    RUNNING = "running"  # the agent has answered a handshake and its process lives
    DRAINING = "draining"  # the agent is being ended: put to sleep, deleted, or the supervisor drains
    FAILED = "failed"  # every rung of the ladder failed; the next request begins a new one


class Happening(enum.Enum):
    """What can happen to a tenant. The value is the past participle that the journal's readers see."""

    WANTED = "wanted"  # a caller came while there was no agent
    READY = "ready"  # the first answered handshake of a generation
    EXITED = "exited"  # the agent's process ended, and we had not asked
    RESET = "reset"  # the ladder ended a hung or never ready agent
    GAVE_UP = "gave_up"  # the last rung failed
    ABANDONED = "abandoned"  # the last caller left before the agent was ready
    STOPPING = "stopping"  # we asked the agent to end
    STOPPED = "stopped"  # and its tree is empty


TABLE: dict[tuple[State, Happening], State] = {
    (State.ASLEEP, Happening.WANTED): State.STARTING,
    (State.FAILED, Happening.WANTED): State.STARTING,
    (State.STARTING, Happening.READY): State.RUNNING,
    (State.STARTING, Happening.EXITED): State.STARTING,
    (State.STARTING, Happening.RESET): State.STARTING,
    (State.STARTING, Happening.GAVE_UP): State.FAILED,
    (State.ASLEEP, Happening.GAVE_UP): State.FAILED,  # ready each time, and never for long
    (State.STARTING, Happening.ABANDONED): State.ASLEEP,
    (State.STARTING, Happening.STOPPING): State.DRAINING,
    (State.RUNNING, Happening.EXITED): State.ASLEEP,
    (State.RUNNING, Happening.RESET): State.STARTING,
    (State.RUNNING, Happening.STOPPING): State.DRAINING,
    (State.DRAINING, Happening.STOPPED): State.ASLEEP,
}


def advance(state: State, happening: Happening) -> State:
    """The state that follows. Raises IllegalTransition where the table has no line."""
    try:
        return TABLE[state, happening]
    except KeyError:
        raise IllegalTransition(
            f"a tenant that is {state.value!r} has no answer to {happening.value!r}: this is a bug of the supervisor"
        ) from None
