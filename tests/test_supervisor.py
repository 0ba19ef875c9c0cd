"""The supervisor's own part: which tenants there are, and that the fault or the end of one is nobody else's."""

from __future__ import annotations

import contextlib

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor.client import ConnectionClosed, ConnectionRejected
from supervisor.errors import Draining, StoreError, Unavailable, UnknownTenant
from supervisor.settings import Settings, TenantSettings
from supervisor.tenant.lifecycle import State
from supervisor.testing import faults
from supervisor.testing.agents import echo_agent
from supervisor.testing.world import open_world


@pytest.fixture
def inline_threads(monkeypatch):
    """A thread takes real time, through which the mock clock would jump."""

    async def run_sync(function, *args, **_options):
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


@pytest.fixture
def open_it(tmp_path, inline_threads):
    return lambda program=echo_agent, **settings: open_world(
        Settings(state_dir=tmp_path / "state", **settings), program
    )


class Held:
    """A store one of whose answers waits on its way back until `go`."""

    def __init__(self, store, method):
        self._store, self._method = store, method
        self.answered, self.go = trio.Event(), trio.Event()

    def __getattr__(self, name):
        found = getattr(self._store, name)
        if name != self._method or self.answered.is_set():
            return found

        async def held(*args, **kwargs):
            self.answered.set()
            value = await found(*args, **kwargs)
            await self.go.wait()
            return value

        return held


async def test_a_tenant_is_made_by_its_first_connect_where_that_is_allowed(open_it, autojump_clock):
    """Decision 12."""
    async with open_it(tenants=TenantSettings(auto_create=False)) as world:
        with pytest.raises(ConnectionRejected) as rejected:
            async with world.connect("alice"):
                pass
        assert rejected.value.status == 404
        assert not world.launcher.starts
        await world.supervisor.put_tenant("alice", None)
        async with world.connect("alice"):
            pass


async def test_a_tenant_is_deleted_with_its_files_and_its_clients_are_told_1001(open_it, autojump_clock):
    async with open_it() as world:
        supervisor = world.supervisor
        async with world.connect("alice") as websocket:
            home = supervisor._home("alice")
            home.mkdir(parents=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.delete_tenant, "alice")
                with pytest.raises(ConnectionClosed) as closed:
                    await websocket.receive()
        assert closed.value.code == 1001
        assert not home.exists()
        assert not world.launcher.alive
        with pytest.raises(UnknownTenant):
            await supervisor.describe("alice")


async def test_two_deletes_at_once_are_one_and_a_connect_beside_them_starts_nothing(open_it, autojump_clock):
    """The second may not take away the files of whoever comes after the first."""
    async with open_it() as world:
        supervisor = world.supervisor
        await supervisor.put_tenant("alice", None)
        supervisor.store = store = Held(supervisor.store, "get_tenant")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.delete_tenant, "alice")
            await store.answered.wait()
            with pytest.raises(Unavailable, match="being deleted"):
                await supervisor.delete_tenant("alice")
            with pytest.raises(Unavailable, match="being deleted"):
                await supervisor.tenant("alice", create=True)
            store.go.set()
        assert not world.launcher.starts


async def test_a_tenant_is_not_made_from_a_record_that_was_deleted_meanwhile(open_it, autojump_clock):
    async with open_it() as world:
        supervisor = world.supervisor
        await supervisor.put_tenant("alice", {"note": "old"})
        supervisor.store = store = Held(supervisor.store, "get_tenant")
        async with trio.open_nursery() as nursery:

            async def wake():
                await supervisor.wake("alice", create=True)

            nursery.start_soon(wake)
            await store.answered.wait()
            await supervisor.delete_tenant("alice")
            store.go.set()
        assert (await supervisor.describe("alice"))["settings"] == {}
        assert not [line for line in world.log if line["event"] == "tenant_crashed"]


async def test_a_tenant_is_not_made_from_a_record_that_was_read_before_a_revocation(open_it, autojump_clock):
    """Decision 11: the tenant that is in memory knows of it, and so do all later connects."""
    async with open_it() as world:
        supervisor = world.supervisor
        await supervisor.put_tenant("alice", None)
        before = supervisor.wall_clock()
        supervisor.store = store = Held(supervisor.store, "get_tenant")
        async with trio.open_nursery() as nursery:

            async def get():
                await supervisor.tenant("alice", create=False)

            nursery.start_soon(get)
            await store.answered.wait()
            await supervisor.revoke("alice", before)
            store.go.set()
        assert await supervisor.tokens_valid_after("alice") == before


async def test_a_token_revoked_during_the_connect_ends_the_connection_with_1008(open_it, autojump_clock):
    async with open_it(faults.slow_start(5)) as world, trio.open_nursery() as nursery:

        async def revoke():
            await trio.sleep(2)
            await world.supervisor.revoke("alice", world.supervisor.wall_clock())

        nursery.start_soon(revoke)
        async with world.connect("alice") as websocket:
            with pytest.raises(ConnectionClosed) as closed, trio.fail_after(5):
                await websocket.receive()
        assert closed.value.code == 1008


async def test_a_revocation_does_not_shut_out_an_admin_of_all_tenants(open_it, autojump_clock):
    async with open_it() as world:
        token = world.token(None, "admin")
        async with world.connect("alice", token=token) as websocket:
            await world.supervisor.revoke("alice", world.supervisor.wall_clock() + 1)
            await websocket.send("still here")
            assert await websocket.receive() == "still here"


async def test_a_tenant_that_crashes_takes_nobody_with_it_and_is_asleep_in_the_books(open_it, autojump_clock):
    """Decision 1: one tenant's fault stops at its nursery."""
    async with open_it() as world:
        supervisor = world.supervisor
        async with world.connect("bob") as bob, world.connect("alice"):
            tenant = supervisor._tenants["alice"]

            async def fault():
                raise RuntimeError("a bug")

            tenant.start_client(fault)
            with trio.fail_after(5):
                await tenant.ended.wait()
            await trio.sleep(1)
            assert (await supervisor.describe("alice"))["state"] == "asleep"
            assert (await supervisor.store.read_events("alice"))[-1].type == "tenant.recovered"
            assert list(world.launcher.alive) == ["bob"]
            await bob.send("hello")
            assert await bob.receive() == "hello"
            async with world.connect("alice") as again:
                await again.send("hello")
                assert await again.receive() == "hello"
        assert [line["tenant"] for line in world.log if line["event"] == "tenant_crashed"] == ["alice"]


async def test_a_drain_refuses_newcomers_and_is_over_in_time_whatever_agents_do(open_it, autojump_clock):
    async with open_it(faults.ignores_sigterm()) as world:
        supervisor = world.supervisor
        async with trio.open_nursery() as nursery:
            codes = []

            async def client(name):
                async with world.connect(name) as websocket:
                    with pytest.raises(ConnectionClosed) as closed:
                        await websocket.receive()
                    codes.append(closed.value.code)

            for name in ("alice", "bob", "carol"):
                nursery.start_soon(client, name)
            await trio.sleep(1)
            began = trio.current_time()
            supervisor.request_drain()
            with pytest.raises(Draining):
                await supervisor.wake("dave", create=True)
            assert await supervisor.drain()
            assert trio.current_time() - began < 7
        assert codes == [1012] * 3
        assert not world.launcher.alive


async def test_a_second_request_hurries_a_drain(open_it, autojump_clock):
    """S3-24."""
    async with open_it(faults.ignores_sigterm()) as world:
        await world.supervisor.wake("alice", create=True)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.supervisor.drain)
            await trio.sleep(1)
            world.supervisor.request_drain()
        assert trio.current_time() - began < 1.5


async def test_a_tenant_that_was_forgotten_is_there_again_at_once(open_it, autojump_clock):
    async with open_it(sleep_after_s=10.0) as world:
        await world.supervisor.wake("alice", create=True)
        await trio.sleep(100)
        assert not world.supervisor._tenants
        assert (await world.supervisor.describe("alice"))["state"] == State.ASLEEP.value
        assert (await world.supervisor.wake("alice"))["generation"] == 2


async def test_two_supervisors_in_one_process_do_not_meet(tmp_path, autojump_clock):
    async with contextlib.AsyncExitStack() as stack:
        worlds = [
            await stack.enter_async_context(open_world(Settings(state_dir=tmp_path / name), echo_agent))
            for name in ("one", "two")
        ]
        for world in worlds:
            async with world.connect("alice") as websocket:
                await websocket.send("hello")
                assert await websocket.receive() == "hello"
        assert await worlds[1].supervisor.drain()
        assert (await worlds[0].supervisor.wake("alice"))["state"] == "running"


async def test_the_cap_of_a_tenant_holds_for_all_who_come_in_one_moment(open_it, autojump_clock):
    from supervisor.settings import LimitSettings

    async with open_it(faults.slow_start(5), limits=LimitSettings(connections_per_tenant=3)) as world:
        statuses = []

        async def client():
            try:
                async with world.connect("alice"):
                    statuses.append(101)
                    await trio.sleep(1)
            except ConnectionRejected as rejected:
                statuses.append(rejected.status)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client)
        assert sorted(statuses) == [101] * 3 + [503] * 7


async def test_a_client_that_leaves_inside_an_agents_refusal_leaves_nothing_behind(open_it, autojump_clock):
    async def converse(connection):
        await connection.send_bytes(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 1000\r\n\r\nhalf")
        await trio.sleep_forever()

    from supervisor.testing.agents import serving

    async with open_it(serving(converse)) as world:
        with trio.move_on_after(2):
            async with world.connect("alice"):
                pass
        await trio.sleep(70)
        await wait_all_tasks_blocked()
        import gc

        gc.collect()
        tenant = world.supervisor._tenants["alice"]
        assert tenant.connections == 0


async def test_a_store_that_fails_is_told_and_recovered_from(open_it, autojump_clock):
    async with open_it() as world:
        store = world.supervisor.store

        class Broken:
            def __getattr__(self, name):
                async def fail(*_args, **_kwargs):
                    await trio.lowlevel.checkpoint()
                    raise StoreError("the disk is full")

                return fail

        world.supervisor.store = Broken()
        with pytest.raises(StoreError):
            await world.supervisor.wake("alice", create=True)
        world.supervisor.store = store
        assert (await world.supervisor.wake("alice", create=True))["state"] == "running"
