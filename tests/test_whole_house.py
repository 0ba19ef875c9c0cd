"""The whole stack in memory, on the mock clock: what would take hours outside."""

from __future__ import annotations

from typing import ClassVar

import pytest
import trio

from supervisor.client import ConnectionClosed, ConnectionRejected
from supervisor.settings import Settings
from supervisor.testing import faults
from supervisor.testing.agents import echo_agent, in_turn, serving


async def test_a_connection_idle_for_5_minutes_still_answers(supervisor, tenant_client, autojump_clock):
    """S3-18, S3-20: the plan's first manual check."""
    async with tenant_client("acme", "/echo") as websocket:
        await websocket.send("before")
        assert await websocket.receive() == "before"
        await trio.sleep(300)
        await websocket.send("after")
        assert await websocket.receive() == "after"
        assert trio.current_time() >= 300


async def test_a_connection_idle_for_a_day_still_answers(supervisor, tenant_client, autojump_clock):
    async with tenant_client("acme") as websocket:
        await trio.sleep(86_400)
        await websocket.send("after")
        assert await websocket.receive() == "after"
    assert [start.generation for start in supervisor.launcher.starts] == [1]


class TestAKilledAgent:
    @pytest.fixture
    def agent_app(self):
        exits = faults.exits_at_start(3)
        return in_turn(faults.ready_then_dies(60), exits, exits, exits, echo_agent)

    async def test_is_back_within_12_seconds_on_the_last_rung(self, tenant_client, supervisor, autojump_clock):
        """S3-05, S3-06: the plan's second manual check, in the worst case that still succeeds."""
        async with tenant_client("acme") as websocket:
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.receive()
            assert closed.value.code == 1012
        began = trio.current_time()
        async with tenant_client("acme") as websocket:
            await websocket.send("back")
            assert await websocket.receive() == "back"
        assert trio.current_time() - began == 12


class TestAnAgentThatDiesOfAMessage:
    received: ClassVar[list[str]] = []

    @pytest.fixture
    def agent_app(self):
        async def converse(connection):
            await connection.accept()
            async for message in connection.messages():
                self.received.append(message)
                connection.context.exit(-9)

        return serving(converse)

    async def test_does_not_get_it_a_second_time(self, supervisor, tenant_client, autojump_clock):
        """S3-19: a connection is retried, a message never."""
        self.received.clear()
        async with tenant_client("acme") as websocket:
            await websocket.send("once")
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.receive()
            assert closed.value.code == 1012
        async with tenant_client("acme"):
            await trio.sleep(30)
        assert self.received == ["once"]
        assert len(supervisor.launcher.starts) == 2


class TestADrain:
    @pytest.fixture
    def agent_app(self):
        return faults.ignores_sigterm()

    @pytest.fixture
    def supervisor_settings(self, tmp_path):
        return Settings(state_dir=tmp_path, drain_grace_s=9.0)

    async def test_closes_with_1012_within_its_grace_and_refuses_newcomers(
        self, supervisor, tenant_client, autojump_clock
    ):
        """S3-14, S3-24: the plan's third manual check; one timeline, every instant computed at the signal."""
        async with tenant_client("acme") as websocket:
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.drain)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(ConnectionRejected) as refused:
                    async with tenant_client("acme"):
                        pass
                assert refused.value.status == 503
                with pytest.raises(ConnectionClosed) as closed:
                    await websocket.receive()
            assert closed.value.code == 1012
            assert 5 <= trio.current_time() - began <= 7
