"""A tenant in memory: real store (in memory), agents as tasks, everything on the mock clock."""

from __future__ import annotations

import contextlib
from pathlib import Path

import attrs
import trio

from supervisor.settings import Settings
from supervisor.store import open_memory_store
from supervisor.telemetry import captured_telemetry
from supervisor.tenant.handshake import probe_head
from supervisor.tenant.tenant import Ending, Tenant
from supervisor.testing.launcher import MemoryLauncher

HEAD = probe_head("acme")


@attrs.define(eq=False)
class House:
    tenant: Tenant
    launcher: MemoryLauncher
    store: object
    events: list
    began: float = attrs.field(factory=trio.current_time)
    start_times: list = attrs.field(factory=list)

    @property
    def now(self) -> float:
        return round(trio.current_time() - self.began, 3)

    async def connect(self):
        """Connects and leaves the stream open; the caller closes it."""
        return await self.tenant.connect(HEAD)

    async def use(self) -> int:
        connected = await self.connect()
        await trio.aclose_forcefully(connected.stream)
        return connected.generation.number

    def logged(self, event: str) -> list[dict]:
        return [line for line in self.events if line["event"] == event]

    async def journal(self) -> list[str]:
        return [event.type for event in await self.store.read_events("acme")]


@attrs.frozen
class TimedLauncher:
    """Notes when each start was asked for."""

    launcher: MemoryLauncher
    house: House

    async def run(self, spec, *, task_status=trio.TASK_STATUS_IGNORED):
        self.house.start_times.append(self.house.now)
        await self.launcher.run(spec, task_status=task_status)


@contextlib.asynccontextmanager
async def open_house(program, *, store=None, **settings):
    """Ends with a drain, and checks that the agents have nothing to complain of and nothing is left of them."""
    telemetry, events = captured_telemetry()
    launcher = MemoryLauncher(program)
    async with contextlib.AsyncExitStack() as stack:
        if store is None:
            store = await stack.enter_async_context(open_memory_store())
        record, _ = await store.put_tenant("acme")
        tenant = Tenant(record, Path("/nowhere"), Settings(**settings), launcher, store, telemetry)
        house = House(tenant, launcher, store, events)
        tenant.launcher = TimedLauncher(launcher, house)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tenant.run)
            await tenant.opened.wait()
            yield house
            tenant.end(Ending.DRAIN, kill_at=trio.current_time() + 5)
            with trio.fail_after(20):
                await tenant.ended.wait()
        launcher.check()
        assert not launcher.alive
