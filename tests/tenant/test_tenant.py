"""The tenant's task, on the mock clock: what it owns, and how it ends."""

from __future__ import annotations

import time

import attrs
import pytest
import trio

from supervisor.errors import StoreError, Unavailable
from supervisor.tenant.lifecycle import State
from supervisor.tenant.tenant import Ending
from supervisor.testing import faults
from supervisor.testing.agents import echo_agent

from .kit import HEAD, open_house


@attrs.define(eq=False)
class FakeClient:
    """A client as its tenant sees it: leaves `leaves_s` after its Close."""

    issued_at: float = 100.0
    expires_at: float | None = None
    closed: list = attrs.field(factory=list)
    told: trio.Event = attrs.field(factory=trio.Event)

    def close(self, code, reason, *, within_s):
        self.closed.append(code)
        self.told.set()

    async def stay(self, tenant, *, task_status=trio.TASK_STATUS_IGNORED):
        with tenant.attached(self):
            task_status.started()
            await self.told.wait()


async def test_every_change_of_state_is_a_numbered_event_of_the_journal(autojump_clock):
    async with open_house(echo_agent) as house:
        await house.use()
        await house.tenant.sleep()
        await trio.sleep(1)
        events = await house.store.read_events("acme")
    assert [event.type for event in events] == [
        "tenant.created",
        "tenant.starting",
        "tenant.running",
        "tenant.draining",
        "tenant.asleep",
    ]
    assert [event.seq for event in events] == [1, 2, 3, 4, 5]
    assert events[-1].data["last_exit"]["reason"] == "sleep"


async def test_the_description_tells_what_is_true_now(autojump_clock):
    async with open_house(echo_agent) as house:
        assert house.tenant.describe()["state"] == "asleep"
        await house.use()
        description = house.tenant.describe()
        assert (description["state"], description["generation"], description["why_awake"]) == ("running", 1, [])
        assert description["sleeps_at"] is not None
        async with trio.open_nursery() as nursery:
            client = FakeClient()
            await nursery.start(client.stay, house.tenant)
            description = house.tenant.describe()
            assert (description["connections"], description["sleeps_at"]) == (1, None)
            assert description["why_awake"] == ["1 open connection"]
            client.told.set()


async def test_an_idle_tenant_sleeps_after_sleep_after(autojump_clock):
    """S3-16, S3-20: the agent ends, the state follows from it, and the next connect starts a new one."""
    async with open_house(echo_agent, sleep_after_s=600.0) as house:
        await house.use()
        await trio.sleep(599)
        assert house.tenant.state is State.RUNNING
        await trio.sleep(2)
        assert house.tenant.state is State.ASLEEP
        assert not house.launcher.alive
        assert await house.use() == 2


async def test_the_first_window_is_the_one_that_is_set(autojump_clock):
    """S3-23: not a default that was in force before the setting was read."""
    async with open_house(echo_agent, sleep_after_s=7200.0) as house:
        await house.use()
        await trio.sleep(7199)
        assert house.tenant.state is State.RUNNING
        await trio.sleep(2)
        assert house.tenant.state is State.ASLEEP


async def test_only_a_connect_or_a_wake_wakes(autojump_clock):
    """S3-33: not a disconnect, a look or a touch, else nobody would ever sleep."""
    async with open_house(echo_agent, sleep_after_s=600.0) as house, trio.open_nursery() as nursery:
        await house.use()
        client = FakeClient()
        await nursery.start(client.stay, house.tenant)
        await house.tenant.sleep()
        assert client.closed == [1001]
        house.tenant.describe()
        house.tenant.touch()
        await trio.sleep(50)
        assert house.tenant.state is State.ASLEEP
        await house.tenant.wake()
        assert house.tenant.state is State.RUNNING
        assert house.tenant.record.generation == 2


async def test_a_connection_idle_for_an_hour_keeps_its_agent(autojump_clock):
    """S3-18, S3-20: an open connection is work."""
    async with open_house(echo_agent) as house, trio.open_nursery() as nursery:
        await house.use()
        client = FakeClient()
        await nursery.start(client.stay, house.tenant)
        await trio.sleep(3600)
        assert house.tenant.state is State.RUNNING
        assert not client.closed
        client.told.set()


async def test_with_sleep_with_connections_a_silent_client_is_told_1001_and_data_keeps_it_awake(autojump_clock):
    """S3-18: data renews, pings do not."""
    async with open_house(echo_agent, sleep_with_connections=True, sleep_after_s=600.0) as house:
        connected = await house.connect()
        await connected.stream.aclose()
        async with trio.open_nursery() as nursery:
            client = FakeClient()
            await nursery.start(client.stay, house.tenant)
            for _ in range(20):
                await trio.sleep(100)
                connected.generation.traffic.data_frames += 1
            assert house.tenant.state is State.RUNNING
            await trio.sleep(700)
        assert client.closed == [1001]
        assert house.tenant.state is State.ASLEEP


async def test_a_busy_processor_defers_sleep(autojump_clock):
    async with open_house(echo_agent, sleep_after_s=600.0) as house:
        connected = await house.connect()
        await connected.stream.aclose()
        process = connected.generation.process
        for _ in range(1000):
            await trio.sleep(1)
            process.cpu_s += 0.05
        assert house.tenant.state is State.RUNNING
        assert "processor use" in house.tenant.describe()["why_awake"][0]
        await trio.sleep(130)
        assert house.tenant.state is State.ASLEEP


async def test_a_touch_begins_the_window_anew_and_wakes_nobody(autojump_clock):
    """S3-21."""
    async with open_house(echo_agent, sleep_after_s=600.0) as house:
        house.tenant.touch()
        assert house.tenant.state is State.ASLEEP
        await house.tenant.wake()
        await trio.sleep(500)
        house.tenant.touch()
        await trio.sleep(500)
        assert house.tenant.state is State.RUNNING
        await trio.sleep(101)
        assert house.tenant.state is State.ASLEEP


async def test_sleep_tells_the_clients_first_and_then_the_agent(autojump_clock):
    """S3-24: SIGTERM is followed by SIGKILL of the tree, after the grace."""
    async with open_house(faults.ignores_sigterm()) as house, trio.open_nursery() as nursery:
        await house.use()
        client = FakeClient()
        await nursery.start(client.stay, house.tenant)
        await house.tenant.sleep()
        assert client.closed == [1001]
        assert house.now == 5
        assert house.tenant.describe()["last_exit"]["signal"] == 9
        assert await house.use() == 2


async def test_a_drain_kills_what_ignores_sigterm_at_kill_at_and_tells_its_clients_1012(autojump_clock):
    """S3-14, S3-24."""
    async with open_house(faults.ignores_sigterm()) as house, trio.open_nursery() as nursery:
        await house.use()
        client = FakeClient()
        await nursery.start(client.stay, house.tenant)
        house.tenant.end(Ending.DRAIN, kill_at=trio.current_time() + 3)
        await house.tenant.ended.wait()
        assert house.now == 3
        assert client.closed == [1012]


async def test_a_second_signal_shortens_the_grace(autojump_clock):
    async with open_house(faults.ignores_sigterm()) as house:
        await house.use()
        house.tenant.end(Ending.DRAIN, kill_at=trio.current_time() + 5)
        await trio.sleep(1)
        house.tenant.end(Ending.DRAIN, kill_at=trio.current_time())
        await house.tenant.ended.wait()
        assert house.now == 1


async def test_the_grace_ends_as_soon_as_the_agent_does(autojump_clock):
    async with open_house(echo_agent) as house:
        await house.use()
        house.tenant.end(Ending.DRAIN, kill_at=trio.current_time() + 5)
        await house.tenant.ended.wait()
        assert house.now < 1


async def test_an_ended_tenant_takes_no_client(autojump_clock):
    async with open_house(echo_agent) as house:
        house.tenant.end(Ending.DELETE)
        await house.tenant.ended.wait()

        async def serve():
            raise AssertionError

        with pytest.raises(Unavailable, match="being deleted"):
            house.tenant.start_client(serve)
        with pytest.raises(Unavailable, match="being deleted"):
            await house.connect()


async def test_a_tenant_with_nothing_to_do_is_forgotten(autojump_clock):
    """S3-17: no deadline is armed again and again for something that is gone."""
    async with open_house(echo_agent, sleep_after_s=10.0) as house:
        await house.use()
        await trio.sleep(60)
        assert not house.tenant.ended.is_set()
        await trio.sleep(60)
        assert house.tenant.ended.is_set()


async def test_the_agent_that_ends_by_itself_is_reported_and_counted(autojump_clock):
    """S3-30: the exit is told as it was."""
    async with open_house(faults.ready_then_dies(5)) as house:
        await house.use()
        await trio.sleep(6)
        description = house.tenant.describe()
        assert description["state"] == "asleep"
        assert description["restarts"] == 1
        assert description["last_exit"]["reason"] == "exited"
        assert description["pid"] is None


async def test_the_close_code_tells_a_dead_agent_from_one_that_hung_up(autojump_clock):
    """S3-32: a closed transport is no ended process."""
    async with open_house(faults.ready_then_dies(5)) as house:
        connected = await house.connect()
        assert (await house.tenant.close_code(connected.generation))[0] == 1011
        await trio.sleep(6)
        assert (await house.tenant.close_code(connected.generation))[0] == 1012
        await connected.stream.aclose()


async def test_an_expired_token_closes_its_connection_with_1008(autojump_clock):
    async with open_house(echo_agent) as house, trio.open_nursery() as nursery:
        await house.use()
        wall = time.time()
        soon, later = FakeClient(expires_at=wall + 30), FakeClient(expires_at=wall + 3600)
        house.tenant.clients.wall_clock = lambda: wall + house.now
        await nursery.start(soon.stay, house.tenant)
        await nursery.start(later.stay, house.tenant)
        await trio.sleep(31)
        assert soon.closed == [1008]
        assert not later.closed
        later.told.set()


async def test_a_revocation_closes_older_connections_with_1008(autojump_clock):
    async with open_house(echo_agent) as house, trio.open_nursery() as nursery:
        await house.use()
        old, new = FakeClient(issued_at=100.0), FakeClient(issued_at=200.0)
        await nursery.start(old.stay, house.tenant)
        await nursery.start(new.stay, house.tenant)
        house.tenant.revoke(150.0)
        assert (old.closed, new.closed) == ([1008], [])
        new.told.set()


class FullDisk:
    """A store whose disk is full until `room` is set."""

    def __init__(self, store):
        self._store = store
        self.room = False

    def __getattr__(self, name):
        return getattr(self._store, name)

    async def begin_generation(self, name, *, data):
        await trio.lowlevel.checkpoint()
        if not self.room:
            raise StoreError("the disk is full")
        return await self._store.begin_generation(name, data=data)

    async def record_state(self, name, **change):
        await trio.lowlevel.checkpoint()
        if not self.room:
            raise StoreError("the disk is full")
        return await self._store.record_state(name, **change)


async def test_a_full_disk_starts_nothing_says_so_and_is_recovered_from(autojump_clock):
    async with open_house(echo_agent) as house:
        full = FullDisk(house.store)
        house.tenant.store = full
        with pytest.raises(Exception, match="the disk is full"):
            await house.connect()
        assert not house.start_times
        full.room = True
        await trio.sleep(2)
        assert await house.use() == 1


async def test_a_disk_that_fills_up_stops_no_sleep_and_its_events_are_stored_later(autojump_clock):
    async with open_house(echo_agent) as house:
        full = FullDisk(house.store)
        house.tenant.store = full
        full.room = True
        await house.use()
        await trio.sleep(1)
        full.room = False
        await house.tenant.sleep()
        assert house.tenant.state is State.ASLEEP
        full.room = True
        await trio.sleep(2)
        assert (await house.journal())[-2:] == ["tenant.draining", "tenant.asleep"]
        assert house.logged("journal_delayed")


async def test_cancelling_the_tenant_ends_its_agent_and_everybody_who_waits(autojump_clock):
    """Cancelling a tenant's nursery ends all of it."""
    from pathlib import Path

    from supervisor.settings import Settings
    from supervisor.store import open_memory_store
    from supervisor.telemetry import captured_telemetry
    from supervisor.tenant.tenant import Tenant
    from supervisor.testing.launcher import MemoryLauncher

    telemetry, _ = captured_telemetry()
    launcher = MemoryLauncher(faults.never_accepts())
    async with open_memory_store() as store:
        record, _ = await store.put_tenant("acme")
        tenant = Tenant(record, Path("/nowhere"), Settings(), launcher, store, telemetry)
        refused = []
        async with trio.open_nursery() as callers:

            async def call():
                try:
                    await tenant.connect(HEAD)
                except Unavailable as error:
                    refused.append(error)

            callers.start_soon(call)
            with trio.move_on_after(3):
                await tenant.run()
        assert not launcher.alive
        assert tenant.ended.is_set()
        assert len(refused) == 1
