"""The one writer: units of work in, durable results out, by group commit in a thread of its own.

Whoever waits at the same moment shares one transaction and one fsync, and is told after it. A unit is a callable
that takes the connection and returns a value; it may run twice (its batch was rolled back), so it does nothing but
read and write through the connection, and neither commits nor rolls back. All bookkeeping is done in the Trio
thread, so there is no lock.

Why a thread and no task: a task would live in a nursery around its user's block, would wrap the user's errors in
groups, and would have to be shielded from the user's cancellation, since the last states are written while the
supervisor is being cancelled. The thread owns the connection and the directory's lock to its end: if a disk hangs
and the thread has to be left behind, the lock stays taken for as long as that thread could still write.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import attrs
import trio

from ..errors import StoreError
from .database import transaction

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

_T = TypeVar("_T")

# Bounds what one failing unit makes run again, and how long a reader waits for a checkpoint.
_MAX_BATCH = 500
# How long a cancelled caller is kept for the answer to a unit that is being committed.
SHIELD_S = 5.0


class OutcomeUnknown(StoreError):
    """The caller was cancelled and the disk did not answer in time: the unit was committed, or it was not."""

    code = "store_outcome_unknown"
    retryable = False
    retry_after_s = None


class Writer(Protocol):
    """What the store writes through."""

    units: int
    transactions: int

    @property
    def waiting(self) -> int: ...

    async def write(self, unit: Callable[[sa.Connection], _T]) -> _T: ...

    async def aclose(self) -> None: ...


@attrs.define(eq=False)
class _Waiter:
    unit: Callable[[sa.Connection], Any]
    done: trio.Event = attrs.field(factory=trio.Event)
    taken: bool = False
    value: Any = None
    error: BaseException | None = None


class GroupCommit:
    """The writer of a file. Made in the Trio thread; `release` is called in the writer's thread as its last act."""

    def __init__(self, engine: sa.Engine, release: Callable[[], None]) -> None:
        self.units = 0
        self.transactions = 0
        self._engine = engine
        self._release = release
        self._token = trio.lowlevel.current_trio_token()
        self._waiting: dict[_Waiter, None] = {}
        self._batch: list[_Waiter] = []
        self._inbox: queue.SimpleQueue[list[_Waiter] | None] = queue.SimpleQueue()
        self._closing = False
        self._ended = trio.Event()
        self._thread = threading.Thread(target=self._run, name="tenantry-store-writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._batch)

    async def write(self, unit: Callable[[sa.Connection], _T]) -> _T:
        """Runs the unit in a transaction and returns its value once that is durable; raises what it raised.

        Raises StoreError for faults of the disk; the unit then left nothing behind. Cancellation withdraws a unit
        that the writer has not taken yet. One that it has taken is waited for, 5 s at most: its value is returned,
        and the caller's next checkpoint is cancelled; or OutcomeUnknown is raised.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closing:
            raise StoreError("the store is closed: nothing was written")
        waiter = _Waiter(unit)
        self._waiting[waiter] = None
        # At the end of this turn of the scheduler, so that all who write in one turn are one batch.
        self._token.run_sync_soon(self._dispatch, idempotent=True)
        try:
            await waiter.done.wait()
        except trio.Cancelled:
            if not waiter.taken:
                del self._waiting[waiter]
                raise
            with trio.move_on_after(SHIELD_S, shield=True):
                await waiter.done.wait()
            if not waiter.done.is_set():
                raise OutcomeUnknown(
                    f"the disk did not answer for {SHIELD_S:g} s: whether this was written is unknown; read it back"
                ) from None
        if waiter.error is not None:
            raise waiter.error
        return cast(_T, waiter.value)

    async def aclose(self) -> None:
        """Writes what still waits, and ends the thread. Raises StoreError if the disk does not let it end in time."""
        self._closing = True
        with trio.move_on_after(SHIELD_S, shield=True):
            self._dispatch()
            await self._ended.wait()
            self._thread.join()
            return
        raise StoreError(
            f"the disk did not answer for {SHIELD_S:g} s: the store's writer is left behind, and the state "
            "directory stays locked until it or this process ends"
        )

    # In the Trio thread, by run_sync_soon.

    def _dispatch(self) -> None:
        if self._batch:
            return
        if self._waiting:
            self._batch = list(islice(self._waiting, _MAX_BATCH))
            for waiter in self._batch:
                del self._waiting[waiter]
                waiter.taken = True
            self._inbox.put(self._batch)
        elif self._closing:
            self._inbox.put(None)

    def _finished(self) -> None:
        for waiter in self._batch:
            waiter.done.set()
        self._batch = []
        self._dispatch()

    # In the writer's thread.

    def _run(self) -> None:
        try:
            while (batch := self._inbox.get()) is not None:
                self._commit(batch)
                self._soon(self._finished)
        finally:
            self._release()
            self._soon(self._ended.set)

    def _soon(self, function: Callable[[], object]) -> None:
        # After Trio's end the thread was left behind, and nobody waits any more.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function)

    def _commit(self, batch: list[_Waiter]) -> bool:
        """Gives every waiter its value or its error. False if not even a transaction could be begun."""
        begun = False
        try:
            with transaction(self._engine) as connection:
                begun = True
                values = [waiter.unit(connection) for waiter in batch]
        except BaseException as error:  # goes to those who wait, and is raised there
            if begun and len(batch) == 1:
                batch[0].error = error
            elif begun:
                self._commit_each(batch)
            else:
                for waiter in batch:  # No unit is at fault; each gets an error of its own to raise.
                    waiter.error = StoreError(str(error))
                    waiter.error.__cause__ = error
        else:
            self.transactions += 1
            self.units += len(batch)
            for waiter, value in zip(batch, values, strict=True):
                waiter.value = value
        return begun

    def _commit_each(self, batch: list[_Waiter]) -> None:
        for done, waiter in enumerate(batch, start=1):
            if not self._commit([waiter]):
                # A lock is waited for once, not once for each of them.
                for other in batch[done:]:
                    other.error = StoreError(str(waiter.error))
                    other.error.__cause__ = waiter.error
                return


class Inline:
    """The writer of a database in memory: each unit at once, in the Trio thread, in a transaction of its own.

    For tests under a mock clock, which threads would make lie. Nothing waits, so nothing is withdrawn.
    """

    waiting = 0

    def __init__(self, engine: sa.Engine) -> None:
        self.units = 0
        self.transactions = 0
        self._engine: sa.Engine | None = engine

    async def write(self, unit: Callable[[sa.Connection], _T]) -> _T:
        await trio.lowlevel.checkpoint()
        if self._engine is None:
            raise StoreError("the store is closed: nothing was written")
        with transaction(self._engine) as connection:
            value = unit(connection)
        self.transactions += 1
        self.units += 1
        return value

    async def aclose(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
