"""One agent process of a tenant, from its start until its tree is empty, and what is known of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import trio

from supervisor.tenant.traffic import Traffic

if TYPE_CHECKING:
    from supervisor.sandbox.launcher import AgentProcess


@attrs.define(eq=False)
class Generation:
    """Instants are the Trio clock's, in seconds."""

    number: int
    process: AgentProcess
    started_at: float
    traffic: Traffic = attrs.field(factory=Traffic)
    # The first answered handshake: ready is that, and nothing else (S3-04).
    ready_at: float | None = None
    # Handshakes answered, whatever the answer.
    answers: int = 0
    # It was ready for `stable_after`: the ladder has gone back to its first rung for it, once.
    stable: bool = False
    # A failed attempt wants this generation ended, and no other.
    reset_wanted: bool = False
    # It is being ended, whatever for: whoever comes now waits for the next one.
    ending: bool = False
    exited: trio.Event = attrs.field(factory=trio.Event)
    # Exchanges that wait for an answer: the exit ends them at once.
    exchanges: set[trio.CancelScope] = attrs.field(factory=set)

    async def watch_exit(self) -> None:
        """Returns once the main process has ended and everybody who waited for its answer was told."""
        await self.process.wait_exited()
        self.exited.set()
        self.break_off("the agent's process ended")

    def break_off(self, reason: str) -> None:
        """Nobody waits for its answer any more, nor begins to."""
        self.ending = True
        for scope in self.exchanges:
            scope.cancel(reason=reason)

    def heard(self) -> tuple[int, int]:
        """Changes with everything that the agent says to anybody: that of a hung one does not."""
        return self.answers, self.traffic.down_bytes
