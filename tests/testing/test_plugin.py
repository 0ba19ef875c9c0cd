"""The plugin as its users meet it: in a pytest run of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from supervisor.client import ConnectionClosed, ConnectionRejected
from supervisor.errors import AgentStartFailed
from supervisor.settings import Settings
from supervisor.testing import faults
from supervisor.testing.agents import echo, echo_agent, in_turn, serving
from supervisor.testing.leftovers import LeftOver
from supervisor.testing.world import open_world

DOCS = Path(__file__).parents[2] / "docs" / "testing.md"


@pytest.fixture
def users_tests(pytester):
    """Runs source as somebody's tests."""

    def run(source, *options):
        pytester.makeini("[pytest]\ntrio_mode = true\nfilterwarnings = error")
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)

    return run


@pytest.mark.slow
def test_the_example_of_the_documentation_passes(users_tests):
    example = re.search(r"```python\n(import .*?)```", DOCS.read_text(), re.DOTALL)
    assert example is not None
    users_tests(example[1]).assert_outcomes(passed=2)


def test_every_fault_stands_in_the_documentation():
    text = DOCS.read_text()
    names = [n for n, f in vars(faults).items() if getattr(f, "__module__", "") == faults.__name__ and n[0] != "_"]
    assert len(names) > 20
    assert [name for name in names if f"`{name}(" not in text] == []


@pytest.mark.slow
def test_the_plugin_imports_nothing_until_it_is_asked():
    code = (
        "import sys, pytest; before = set(sys.modules); import supervisor.testing.plugin; "
        "print(*(name.partition('.')[0] for name in set(sys.modules) - before))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert set(told.stdout.split()) == {"supervisor"}


def test_an_agent_that_raises_fails_the_test_with_its_error(users_tests):
    result = users_tests(
        """
        import pytest
        from supervisor.testing.agents import serving

        @pytest.fixture
        def agent_app():
            async def converse(connection):
                await connection.accept()
                raise LookupError("a bug of the agent's")
            return serving(converse)

        async def test_it(tenant_client, autojump_clock):
            async with tenant_client("alice"):
                pass

        async def test_that_means_it(supervisor, tenant_client, autojump_clock):
            async with tenant_client("alice"):
                pass
            await supervisor.drain()
            supervisor.launcher.errors.clear()
        """
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*a bug of the agent's*", "*agent_started*"])


def test_a_test_that_fails_is_told_with_its_own_error(users_tests):
    result = users_tests(
        """
        async def test_it(tenant_client, autojump_clock):
            async with tenant_client("alice") as websocket:
                await websocket.send("hello")
                assert await websocket.receive() == "something else"
        """
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 'hello' == 'something else'*", "*connection_opened*"])


@pytest.mark.slow
def test_what_is_left_over_fails_the_test(users_tests):
    result = users_tests(
        """
        import os

        def test_a_descriptor(nothing_left_over):
            os.open("/dev/null", os.O_RDONLY)

        def test_nothing(nothing_left_over):
            os.close(os.open("/dev/null", os.O_RDONLY))
        """
    )
    left = re.search(r"LeftOver: left over:.*\n.*descriptor ([0-9]+) -> /dev/null", result.stdout.str())
    assert left is not None
    os.close(int(left[1]))
    result.assert_outcomes(passed=2, errors=1)


# ---- the fixtures themselves -------------------------------------------------------------------------------


async def test_a_client_goes_through_the_whole_gateway(supervisor, tenant_client, supervisor_log, autojump_clock):
    async with (
        tenant_client("alice", "/a/b?c=1", subprotocols=["chat"]) as one,
        tenant_client("bob", headers=[("X-Mine", "yes")]) as two,
    ):
        assert one.subprotocol == "chat"
        for websocket in (one, two):
            await websocket.send(b"\x00" * 300_000)
            assert await websocket.receive() == b"\x00" * 300_000
        assert (await supervisor.describe("alice"))["connections"] == 1
        assert sorted(supervisor.launcher.alive) == ["alice", "bob"]
    assert [line["event"] for line in supervisor_log].count("connection_opened") == 2


async def test_what_the_agent_sees_is_clean(tmp_path, autojump_clock):
    seen = []

    async def converse(connection):
        seen.append((connection.target, dict(connection.headers)))
        await echo(connection)

    async with (
        open_world(Settings(state_dir=tmp_path), serving(converse)) as world,
        world.connect("alice", "/a?b=1"),
    ):
        pass
    (target, headers) = seen[0]
    assert target == "/a?b=1"
    assert headers["tenantry-tenant"] == "alice"
    assert "authorization" not in headers


async def test_a_foreign_token_starts_nothing(supervisor, tenant_client, tenantry_world, autojump_clock):
    with pytest.raises(ConnectionRejected) as rejected:
        async with tenant_client("alice", token=tenantry_world.token("bob")):
            raise AssertionError("was served")
    assert rejected.value.status == 403
    assert supervisor.launcher.starts == []


class TestOverrides:
    @pytest.fixture
    def supervisor_settings(self, tmp_path):
        return Settings(state_dir=tmp_path, sleep_after_s=5, connect_retry_s=(2.0,))

    @pytest.fixture
    def agent_app(self):
        return in_turn(faults.exits_at_start(7), echo_agent)

    async def test_settings_and_agents_can_be_overridden(self, supervisor, tenant_client, autojump_clock):
        async with tenant_client("alice") as websocket:
            assert trio.current_time() == 2
            await websocket.send("hello")
            assert await websocket.receive() == "hello"
        await trio.sleep(6)
        assert (await supervisor.describe("alice"))["state"] == "asleep"


async def test_starts_can_be_made_to_fail(supervisor, tenant_client, autojump_clock):
    supervisor.launcher.fail_next_starts(*[AgentStartFailed("no such program")] * 4)
    with pytest.raises(ConnectionRejected) as rejected:
        async with tenant_client("alice"):
            raise AssertionError("was served")
    assert rejected.value.status == 503
    assert trio.current_time() == 12
    async with tenant_client("alice"):
        pass


async def test_a_token_expires_in_virtual_time(supervisor, tenant_client, autojump_clock):
    token = supervisor.authenticator.issue(tenant="alice", scopes=["connect"], ttl_s=3600, subject="test")
    async with tenant_client("alice", token=token) as websocket:
        began = trio.current_time()
        with pytest.raises(ConnectionClosed) as closed:
            await websocket.receive()
        assert closed.value.code == 1008
        assert trio.current_time() - began == pytest.approx(3600, abs=1)


async def test_a_drain_within_the_test_reaches_the_clients(supervisor, tenant_client, autojump_clock):
    async with tenant_client("alice") as websocket:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.drain)
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.receive()
        assert closed.value.code == 1012


async def test_two_worlds_do_not_meet(tmp_path, autojump_clock):
    async with (
        open_world(Settings(state_dir=tmp_path / "one"), echo_agent) as one,
        open_world(Settings(state_dir=tmp_path / "two"), faults.refuses(403)) as two,
    ):
        async with one.connect("alice"):
            with pytest.raises(ConnectionRejected) as rejected:
                async with two.connect("alice"):
                    raise AssertionError("was served")
            assert rejected.value.status == 403
        with pytest.raises(ConnectionRejected) as rejected:
            async with one.connect("alice", token=two.token("alice")):
                raise AssertionError("was served")
        assert rejected.value.status == 401


async def test_a_world_tells_of_a_task_that_it_left(tmp_path, autojump_clock):
    """A part of the supervisor that starts something outside of its nurseries is found."""
    async with trio.open_nursery() as outside:

        async def leaves_a_task(context):
            outside.start_soon(trio.sleep_forever, name="the forgotten one")
            return await echo_agent(context)

        with pytest.raises(LeftOver, match="the forgotten one"):
            async with open_world(Settings(state_dir=tmp_path), leaves_a_task) as world, world.connect("alice"):
                pass
        outside.cancel_scope.cancel()


async def test_cancelling_a_world_leaves_nothing(tmp_path, autojump_clock):
    with trio.CancelScope() as scope:
        async with open_world(Settings(state_dir=tmp_path), echo_agent) as world, world.connect("alice"):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not world.launcher.alive
