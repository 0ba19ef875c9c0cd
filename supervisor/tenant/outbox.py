"""What a tenant has to store, in order: a store that fails is asked again, and what is lost meanwhile is told.

State changes are made in memory at once, and are written here by one task, so that a full disk stops no drain.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import attrs
import trio

from supervisor.errors import StoreError, UnknownTenant

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

RETRY_S = 1.0
# A store that fails for so long that this many changes of one tenant wait costs the oldest of them.
MAX_WAITING = 1000


@attrs.define(eq=False)
class Outbox:
    """One a tenant."""

    log: FilteringBoundLogger
    _waiting: deque[Callable[[], Awaitable[object]]] = attrs.field(init=False, factory=deque)
    _changed: trio.Event = attrs.field(init=False, factory=trio.Event)
    # Set while the store refuses what waits longest.
    _failure: StoreError | None = attrs.field(init=False, default=None)
    _lost: int = attrs.field(init=False, default=0)

    def __len__(self) -> int:
        return len(self._waiting)

    def post(self, write: Callable[[], Awaitable[object]]) -> None:
        """Takes one write; it happens after all former ones."""
        if len(self._waiting) >= MAX_WAITING:
            del self._waiting[1]  # the first is being written
            if not self._lost:
                self.log.error("journal_loses", reason=str(self._failure), waiting=len(self._waiting))
            self._lost += 1
        self._waiting.append(write)
        self._signal()

    async def run(self) -> None:
        """Writes until cancelled. A cancelled write is either stored or not, by the store's own promise."""
        while True:
            while not self._waiting:
                await self._changed.wait()
            try:
                await self._waiting[0]()
            except StoreError as error:
                if self._failure is None:
                    self.log.error("journal_delayed", reason=str(error), waiting=len(self._waiting))
                self._failure = error
                self._signal()
                await trio.sleep(RETRY_S)
                continue
            except UnknownTenant:
                self.log.info("journal_dropped", reason="the tenant was deleted")
            if self._failure is not None:
                self.log.warning("journal_resumed", waiting=len(self._waiting) - 1, lost=self._lost)
            self._failure, self._lost = None, 0
            self._waiting.popleft()
            self._signal()

    async def flush(self) -> None:
        """Returns once nothing waits. Raises StoreError while the store fails. Has no deadline of its own."""
        while self._waiting:
            if self._failure is not None:
                raise StoreError(str(self._failure))
            await self._changed.wait()

    def _signal(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
