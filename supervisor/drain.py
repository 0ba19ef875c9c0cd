"""The drain as one timeline: every instant is computed at the signal, none later. Pure.

    t0            readiness and upgrades say 503; SIGTERM to every agent, side by side
    kill_at       an agent that is not gone: its clients get 1012, its tree SIGKILL
    finish_at     what still lingers is cut off
    hard_at       the watchdog ends the process with status 70

A second SIGTERM moves `kill_at` to now (`hurried`); a third forces the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from supervisor.settings import Settings

# A client has this long to answer our Close (RFC 6455 section 7.1.1: the server closes TCP first).
LINGER_S = 2.0


@attrs.frozen
class Timeline:
    """Instants of the Trio clock, in seconds."""

    began_at: float
    kill_at: float
    finish_at: float
    hard_at: float

    @classmethod
    def starting(cls, now: float, settings: Settings) -> Timeline:
        hard_at = now + settings.drain_grace_s
        # Once for the clients to read their Close, once for ourselves to end before the watchdog.
        linger_s = min(LINGER_S, settings.drain_grace_s / 4)
        kill_at = min(now + settings.agent.grace_s, hard_at - 2 * linger_s)
        return cls(now, kill_at, kill_at + linger_s, hard_at)

    def hurried(self, now: float) -> Timeline:
        """The grace is over now; nothing is ever later than it was."""
        kill_at = min(self.kill_at, now)
        return attrs.evolve(self, kill_at=kill_at, finish_at=min(self.finish_at, kill_at + LINGER_S))
