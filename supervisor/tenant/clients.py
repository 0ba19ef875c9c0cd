"""The connections of one tenant, as far as their tenant must know them: how many, until when, and how they are told.

What a code means is here and nowhere else: 1001 put away, 1008 the token, 1011 the agent hung up, 1012 come again.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from supervisor.drain import LINGER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from supervisor.telemetry import Metrics

SLEEP = (1001, "The tenant was put to sleep")
DELETED = (1001, "The tenant was deleted")
REVOKED = (1008, "The token was revoked")
EXPIRED = (1008, "The token has expired")
AGENT_CLOSED = (1011, "The agent closed the connection")
AGENT_ENDED = (1012, "The agent ended; connect again")
RESTARTING = (1012, "Server restarting")


class Client(Protocol):
    """One connection to the agent. Instants are the wall clock's, in seconds."""

    @property
    def issued_at(self) -> float: ...

    @property
    def expires_at(self) -> float | None: ...

    def close(self, code: int, reason: str, *, within_s: float) -> None:
        """Puts in a Close at the agent's next frame boundary. Idempotent: the first one counts."""


@attrs.define(eq=False)
class Clients:
    """`changed` is called when one comes or leaves."""

    metrics: Metrics
    changed: Callable[[], None]
    wall_clock: Callable[[], float]
    _connected: set[Client] = attrs.field(init=False, factory=set)
    # Of those who are connected; may be too early, since who leaves does not move it. Wall clock.
    _next_expiry: float = attrs.field(init=False, default=math.inf)

    def __len__(self) -> int:
        return len(self._connected)

    @contextlib.contextmanager
    def attached(self, client: Client) -> Iterator[None]:
        """While the block runs, the client counts as a connection, and is told when it must end."""
        self._connected.add(client)
        self.metrics.connections.inc()
        self.metrics.connections_total.inc()
        if client.expires_at is not None:
            self._next_expiry = min(self._next_expiry, client.expires_at)
        self.changed()
        try:
            yield
        finally:
            self._connected.discard(client)
            self.metrics.connections.dec()
            self.changed()

    def close_all(self, why: tuple[int, str]) -> None:
        """Tells everybody; each has the linger's time to read it and to answer."""
        for client in self._connected:
            client.close(*why, within_s=LINGER_S)

    def revoke(self, before: float) -> None:
        """Closes every connection whose token was issued until then."""
        for client in self._connected:
            if client.issued_at <= before:
                client.close(*REVOKED, within_s=LINGER_S)

    def close_expired(self) -> float:
        """Closes whoever's token has expired; returns when the next one does, by Trio's clock."""
        now = self.wall_clock()
        if now >= self._next_expiry:
            self._next_expiry = math.inf
            for client in self._connected:
                if client.expires_at is None:
                    continue
                if client.expires_at <= now:
                    client.close(*EXPIRED, within_s=LINGER_S)
                else:
                    self._next_expiry = min(self._next_expiry, client.expires_at)
        return trio.current_time() + self._next_expiry - now
