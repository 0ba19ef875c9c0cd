"""The store's door: what the supervisor asks of it, in its own words. Nothing is told before it is durable.

Every write raises StoreError if the disk would not take it (nothing is half-written, and the next write works once
the cause is gone), and is cancelled as `writer.GroupCommit.write` says. Every read may be cancelled at any time.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import attrs
import trio

from ..errors import ConfigError, Refused, UnknownTenant
from . import journal, tenants
from .database import open_database, open_engine
from .journal import Entry
from .lock import directory_lock, make_state_dir
from .readers import READERS, InlineReaders, Readers, ThreadReaders
from .records import Event, TenantRecord, plain
from .writer import GroupCommit, Inline, Writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    import sqlalchemy as sa

_T = TypeVar("_T")

FILE_NAME = "tenantry.db"
MAX_PAGE = 1000


@attrs.frozen(kw_only=True)
class StoreStatistics:
    """`units` were committed in `transactions`; `waiting` are not durable yet."""

    units: int
    transactions: int
    waiting: int


class Store:
    """Tenants and their journal. Made by `open_store` and `open_memory_store`; any number of tasks may use it."""

    def __init__(self, writer: Writer, readers: Readers, wall_clock: Callable[[], float]) -> None:
        self._writer = writer
        self._readers = readers
        # Read in the Trio thread, at the call: the order of calls is the order of the journal.
        self._now = wall_clock

    async def write(self, unit: Callable[[sa.Connection], _T]) -> _T:
        """Runs `unit` in a transaction shared with others and returns its value once it is durable.

        The unit runs in another thread, and again by itself if a neighbour failed: it only reads and writes
        through its connection, and neither commits nor rolls back. What it raises is raised here, and its
        changes are undone.
        """
        return await self._writer.write(unit)

    async def read(self, fn: Callable[[sa.Connection], _T]) -> _T:
        """Runs `fn` in a short transaction that cannot write, in another thread, beside the writer."""
        return await self._readers.read(fn)

    def statistics(self) -> StoreStatistics:
        writer = self._writer
        return StoreStatistics(units=writer.units, transactions=writer.transactions, waiting=writer.waiting)

    async def list_tenants(self, *, after: str = "", limit: int = 100) -> list[TenantRecord]:
        """Tenants whose names come after `after`, by name. Raises Refused if `limit` is not 1 to 1000."""
        return await self.read(partial(tenants.page, after=after, limit=_page(limit)))

    async def get_tenant(self, name: str) -> TenantRecord | None:
        return await self.read(partial(tenants.get, name=name))

    async def tokens_valid_after(self, name: str) -> float:
        """The instant until which tokens for that name are revoked, a delete since then or not; 0.0 for none."""
        return await self.read(partial(tenants.tokens_valid_after, name=name))

    async def put_tenant(self, name: str, settings: Mapping[str, object] | None = None) -> tuple[TenantRecord, bool]:
        """The tenant, and whether this created it. Settings of None keep what is there ({} for a new one).

        A creation is the event `tenant.created`, a change `tenant.updated {changed: [keys]}`; equal settings
        change nothing.
        """
        wanted = None if settings is None else plain(settings)
        return await self.write(partial(tenants.put, name=name, settings=wanted, now=self._now()))

    async def delete_tenant(self, name: str) -> bool:
        """Removes the tenant with its journal, in one transaction; False if there was none.

        Its generation, its last event's number and its tokens' revocation stay with the name: a tenant made
        anew under it goes on from there.
        """
        return await self.write(partial(tenants.delete, name=name))

    async def begin_generation(self, name: str, *, data: Mapping[str, object]) -> int:
        """The number of the tenant's next generation, stored, with the event `tenant.starting` and the state.

        Raises UnknownTenant.
        """
        unit = partial(tenants.begin_generation, name=name, data=plain(data), now=self._now())
        return _known(name, await self.write(unit))

    async def record_state(
        self,
        name: str,
        *,
        generation: int,
        state: str,
        event: str,
        data: Mapping[str, object],
        last_exit: Mapping[str, object] | None = None,
        restarted: bool = False,
    ) -> Event | None:
        """Stores the state and its event if `generation` is still the tenant's; else nothing, and returns None.

        `last_exit` of None keeps the former one; `restarted` adds one to the count. Raises UnknownTenant.
        """
        entry = Entry(event, self._now(), plain(data))
        exit_record = None if last_exit is None else plain(last_exit)

        def unit(connection: sa.Connection) -> tuple[Event | None, bool]:
            written = tenants.record_state(
                connection,
                name,
                generation=generation,
                state=state,
                entry=entry,
                last_exit=exit_record,
                restarted=restarted,
            )
            return written, written is not None or tenants.get(connection, name) is not None

        written, exists = await self.write(unit)
        return written if exists else _known(name, None)

    async def append_event(self, name: str, *, type: str, data: Mapping[str, object]) -> Event:  # noqa: A002
        """Writes one event with the tenant's next number. Raises UnknownTenant."""
        entry = Entry(type, self._now(), plain(data))
        events = await self.write(partial(journal.append, tenant=name, entries=[entry]))
        return _known(name, events)[0]

    async def read_events(self, name: str, *, after: int = 0, limit: int = MAX_PAGE) -> list[Event]:
        """The tenant's events numbered above `after`, in order. Raises Refused if `limit` is not 1 to 1000."""
        return await self.read(partial(journal.read, tenant=name, after=after, limit=_page(limit)))

    async def revoke_tokens(self, name: str, *, before: float) -> TenantRecord:
        """Tokens issued before that time are no longer good; it never goes back. Raises UnknownTenant."""
        return _known(name, await self.write(partial(tenants.revoke_tokens, name=name, before=before)))

    async def settle(self) -> list[str]:
        """To be called once, at the start: who was starting, running or draining when the last supervisor ended.

        Their state becomes `asleep`, with the event `tenant.recovered {reason, former_state, generation}`.
        """
        return await self.write(partial(tenants.settle, now=self._now()))


def _known(name: str, found: _T | None) -> _T:
    if found is None:
        raise UnknownTenant(f"there is no tenant {name}: create it first")
    return found


def _page(limit: int) -> int:
    if not 1 <= limit <= MAX_PAGE:
        raise Refused(f"limit is {limit}: ask for 1 to {MAX_PAGE} at a time")
    return limit


@asynccontextmanager
async def open_store(state_dir: Path, *, wall_clock: Callable[[], float] = time.time) -> AsyncIterator[Store]:
    """Opens the store of a directory, made if need be, and holds the directory for this process.

    Raises ConfigError if another supervisor holds it (with its pid), if the database is damaged or newer than
    this program, or if the directory cannot be used; StoreError if the disk is full or fails. To be entered when
    nothing of this process will fork without exec any more. Leaving it writes what still waits, within 5 s.
    """
    limiter = trio.CapacityLimiter(1)
    engine, reading, release = await trio.to_thread.run_sync(_open_files, state_dir, limiter=limiter)
    # No checkpoint until the thread owns them.
    try:
        writer = GroupCommit(engine, release)
    except BaseException:
        release()
        raise
    readers = ThreadReaders(reading)
    try:
        yield Store(writer, readers, wall_clock)
    finally:
        # Readers first: who closes last moves the log into the database, and readers cannot.
        await readers.aclose()
        await writer.aclose()


@asynccontextmanager
async def open_memory_store(*, wall_clock: Callable[[], float] = time.time) -> AsyncIterator[Store]:
    """The same store with nothing behind it: no file, no thread, all in the Trio thread. For tests."""
    engine = open_database(None)
    writer = Inline(engine)
    readers = InlineReaders(engine)
    try:
        yield Store(writer, readers, wall_clock)
    finally:
        await readers.aclose()
        await writer.aclose()


def _open_files(state_dir: Path) -> tuple[sa.Engine, sa.Engine, Callable[[], None]]:
    """The writer's engine, the readers', and what gives the writer's and then the lock back."""
    path = state_dir.absolute() / FILE_NAME
    with ExitStack() as stack:
        try:
            make_state_dir(path.parent)
            stack.enter_context(directory_lock(path.parent))
            engine = open_database(path)
        except OSError as error:
            raise ConfigError(
                f"state_dir {path.parent} cannot be used: {error.strerror or error}: "
                "set it to a directory that can be written"
            ) from error
        stack.callback(engine.dispose)
        return engine, open_engine(path, readers=READERS), stack.pop_all().close
