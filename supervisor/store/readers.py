"""Readers beside the writer: connections that cannot write, short transactions, threads of their own limit.

SQLite's write-ahead log lets them see the last commit without waiting for the next, and the writer never waits for
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from ..errors import StoreError
from .database import transaction

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

_T = TypeVar("_T")

READERS = 4
_CLOSE_S = 5.0


class Readers(Protocol):
    """What the store reads through."""

    async def read(self, fn: Callable[[sa.Connection], _T]) -> _T: ...

    async def aclose(self) -> None: ...


class ThreadReaders:
    """Reads of a file. A cancelled read is left to its thread, which keeps its connection until it is done."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        # Not Trio's default: its threads are for spawning and for names, and slow disks are not to hold those up.
        self._limiter = trio.CapacityLimiter(READERS)
        self._closing = False

    async def read(self, fn: Callable[[sa.Connection], _T]) -> _T:
        if self._closing:
            raise StoreError("the store is closed: nothing was read")

        def run() -> _T:
            with transaction(self._engine) as connection:
                return fn(connection)

        return await trio.to_thread.run_sync(run, limiter=self._limiter, abandon_on_cancel=True)

    async def aclose(self) -> None:
        self._closing = True
        with trio.move_on_after(_CLOSE_S, shield=True):
            for _ in range(READERS):
                await self._limiter.acquire_on_behalf_of(object())
        self._engine.dispose()


class InlineReaders:
    """Reads of the database in memory, in the Trio thread, as unable to write as the others."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine: sa.Engine | None = engine

    async def read(self, fn: Callable[[sa.Connection], _T]) -> _T:
        await trio.lowlevel.checkpoint()
        if self._engine is None:
            raise StoreError("the store is closed: nothing was read")
        with transaction(self._engine) as connection:
            connection.exec_driver_sql("PRAGMA query_only = ON")
            try:
                return fn(connection)
            finally:
                connection.exec_driver_sql("PRAGMA query_only = OFF")

    async def aclose(self) -> None:
        self._engine = None
