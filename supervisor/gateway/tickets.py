"""Things that can be taken once, within a time, by whoever has the ticket; in memory, and bounded in number."""

from __future__ import annotations

import secrets
from collections import Counter
from typing import Final, Generic, TypeVar

import attrs
import trio

from supervisor.errors import OverCapacity

_T = TypeVar("_T")

_MAX_TICKETS: Final = 16384
_MAX_TICKETS_PER_TENANT: Final = 1024


@attrs.frozen
class _Entry(Generic[_T]):
    tenant: str
    value: _T
    deadline: float


class Tickets(Generic[_T]):
    """Each ticket is worth its value once, until `ttl_s` after it was made, by Trio's clock."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        # In the order of their deadlines, since all live equally long.
        self._entries: dict[str, _Entry[_T]] = {}
        self._count: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, tenant: str, value: _T) -> str:
        """A new ticket. Raises OverCapacity if too many are unused: one tenant cannot use up all."""
        self._forget_expired()
        if len(self) >= _MAX_TICKETS or self._count[tenant] >= _MAX_TICKETS_PER_TENANT:
            raise OverCapacity(f"too many tickets are unused, for tenant {tenant!r} or in all; use one, or wait")
        ticket = secrets.token_urlsafe(24)
        self._entries[ticket] = _Entry(tenant, value, trio.current_time() + self.ttl_s)
        self._count[tenant] += 1
        return ticket

    def take(self, ticket: str) -> _T | None:
        """The value, once; None if the ticket is unknown, used or expired."""
        self._forget_expired()
        entry = self._remove(ticket)
        return None if entry is None else entry.value

    def _forget_expired(self) -> None:
        now = trio.current_time()
        while self._entries:
            oldest = next(iter(self._entries))
            if self._entries[oldest].deadline > now:
                return
            self._remove(oldest)

    def _remove(self, ticket: str) -> _Entry[_T] | None:
        entry = self._entries.pop(ticket, None)
        if entry is not None:
            self._count[entry.tenant] -= 1
            if not self._count[entry.tenant]:
                del self._count[entry.tenant]
        return entry
