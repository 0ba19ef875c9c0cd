"""Two things at once: each of these had once the wrong outcome."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor.drain import Timeline
from supervisor.errors import ConnectFailed, Draining, Unavailable
from supervisor.settings import AgentSettings, Settings
from supervisor.tenant.lifecycle import State
from supervisor.tenant.tenant import Ending
from supervisor.testing import faults
from supervisor.testing.agents import echo_agent, in_turn, serving

from .kit import HEAD, open_house
from .test_tenant import FakeClient


async def refused(house, error, match=None):
    with pytest.raises(error, match=match):
        await house.connect()


class StuckLauncher:
    """Its starts never end."""

    async def run(self, spec, *, task_status=trio.TASK_STATUS_IGNORED):
        await trio.sleep_forever()


async def test_sleep_sends_away_who_waits_for_an_answer_and_starts_nothing_for_them(autojump_clock):
    """S3-12: put to sleep means asleep, though somebody had an upgrade under way."""
    async with open_house(faults.never_answers()) as house, trio.open_nursery() as nursery:
        nursery.start_soon(refused, house, Unavailable, "put to sleep")
        await trio.sleep(1)
        await house.tenant.sleep()
        await trio.sleep(20)
        assert house.start_times == [0]
        assert house.tenant.state is State.ASLEEP


@pytest.mark.parametrize("why", [Ending.SLEEP, Ending.DRAIN, Ending.DELETE])
async def test_a_start_that_does_not_end_holds_nobody_up(why, autojump_clock):
    """Decision 8: an agent that is not there yet has no grace to wait for."""
    async with open_house(echo_agent) as house, trio.open_nursery() as nursery:
        house.tenant.launcher = StuckLauncher()
        nursery.start_soon(refused, house, Unavailable)
        await trio.sleep(1)
        if why is Ending.SLEEP:
            await house.tenant.sleep()
        else:
            house.tenant.end(why)
            await house.tenant.ended.wait()
        assert house.now == 1
        assert house.tenant.state is State.ASLEEP


async def test_sleep_returns_when_the_tenant_is_cut_off_meanwhile(autojump_clock):
    async with open_house(faults.ignores_sigterm()) as house, trio.open_nursery() as nursery:
        await house.use()
        nursery.start_soon(house.tenant.sleep)
        await trio.sleep(1)
        house.tenant._nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await house.tenant.ended.wait()
            await house.tenant.sleep()


async def test_who_waits_for_an_answer_hears_of_the_drain_at_once(autojump_clock):
    """Decision 8: connects that wait are told at the signal, not when their agent has been killed."""
    async with open_house(faults.ignores_sigterm()) as house:
        await house.use()
        house.launcher.alive["acme"]._stop()  # SIGSTOP
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused, house, Draining)
            await trio.sleep(0.5)
            house.tenant.end(Ending.DRAIN, kill_at=trio.current_time() + 5)
        assert house.now == 0.5


async def test_who_comes_while_the_agent_is_put_to_sleep_gets_the_next_one(autojump_clock):
    """Rule 2: not the one that is on its way out, whose 1001 would be the first thing said."""
    async with open_house(faults.ignores_sigterm()) as house, trio.open_nursery() as nursery:
        await house.use()
        client = FakeClient()
        nursery.start_soon(client.stay, house.tenant)
        await wait_all_tasks_blocked()
        nursery.start_soon(house.tenant.sleep)
        await trio.sleep(1)
        assert house.tenant.state is State.DRAINING
        assert await house.use() == 2


async def test_an_upgrade_that_was_under_way_at_the_idle_deadline_keeps_the_agent(autojump_clock):
    """S3-20: a connect is work, from its answer on, though its client is not attached yet."""

    async def converse(connection):
        await trio.sleep(2 if connection.target == "/slow" else 0)
        await connection.accept()
        await trio.sleep_forever()

    async with open_house(serving(converse), sleep_after_s=100.0) as house:
        await house.use()
        await trio.sleep(99)
        connected = await house.tenant.connect(HEAD.replace(b"GET / ", b"GET /slow "))
        await trio.sleep(50)  # its 101 is on its way
        assert house.tenant.state is State.RUNNING
        assert house.now == 151
        await connected.stream.aclose()


async def test_who_comes_while_the_processor_time_is_read_is_not_put_to_sleep(autojump_clock):
    async with open_house(echo_agent, sleep_after_s=100.0) as house:
        await house.use()
        process = house.launcher.alive["acme"]

        async def slowly():
            await trio.sleep(1)
            return 0.0

        process.cpu_seconds = slowly
        connect = process.connect

        async def connect_slowly():
            await trio.sleep(2)
            return await connect()

        process.connect = connect_slowly
        await trio.sleep_until(house.began + 100.5)
        assert await house.use() == 1
        assert house.tenant.state is State.RUNNING


async def test_a_head_that_kills_an_agent_which_serves_others_is_given_up(autojump_clock):
    """S3-05: the ladder goes back for the others' sake; whoever kills the agent each time has no endless one."""

    async def converse(connection):
        if connection.target == "/poison":
            await trio.sleep(1.5)
            connection.context.exit(1)
        await connection.accept()

    async with open_house(serving(converse)) as house, trio.open_nursery() as nursery:

        async def others():
            while True:
                await house.use()
                await trio.sleep(0.1)

        nursery.start_soon(others)
        with pytest.raises(ConnectFailed, match="attempts failed"), trio.fail_after(60):
            await house.tenant.connect(HEAD.replace(b"GET / ", b"GET /poison "))
        nursery.cancel_scope.cancel()


async def test_a_token_that_is_revoked_while_its_client_waits_opens_nothing(autojump_clock):
    """Decision 11: a connection ends with 1008 when its token does."""
    async with open_house(echo_agent) as house, trio.open_nursery() as nursery:
        await house.use()
        house.tenant.revoke(150.0)
        old, same, new = FakeClient(issued_at=100.0), FakeClient(issued_at=150.0), FakeClient(issued_at=200.0)
        for client in (old, same, new):
            nursery.start_soon(client.stay, house.tenant)
        await wait_all_tasks_blocked()
        assert (old.closed, same.closed, new.closed) == ([1008], [1008], [])
        house.tenant.revoke(200.0)
        assert new.closed == [1008]


async def test_clients_that_have_left_are_not_remembered_until_their_tokens_expire(autojump_clock):
    import gc
    import weakref

    async with open_house(echo_agent) as house:
        await house.use()

        class Visitor(FakeClient):
            pass

        visitor = Visitor(expires_at=math.inf)
        visitor.told.set()
        await visitor.stay(house.tenant)
        seen = weakref.ref(visitor)
        del visitor
        gc.collect()
        assert seen() is None


async def test_who_does_not_leave_a_tenant_that_ends_is_cut_off(autojump_clock):
    """Delete and drain wait for the tenant's end: a client that stalls somewhere does not delay it for ever."""
    async with open_house(echo_agent) as house:
        house.tenant.start_client(trio.sleep_forever)
        assert house.tenant.connections == 1
        house.tenant.end(Ending.DELETE)
        with trio.fail_after(15):
            await house.tenant.ended.wait()


async def test_two_who_fail_together_on_old_and_new_attempts_count_once(autojump_clock):
    """S3-11: the first failure of an attempt counts, and all others are its echoes."""
    async with open_house(in_turn(faults.hangs_after(1), echo_agent)) as house:
        first = await house.connect()
        await trio.sleep(5)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(house.use)
        assert house.start_times == [0, 16]
        assert len(house.logged("connect_attempt_failed")) == 1
        await first.stream.aclose()


@pytest.mark.parametrize(("grace_s", "drain_s"), [(5.0, 9.0), (30.0, 9.0), (5.0, 2.0), (0.5, 9.0)])
def test_the_drain_leaves_time_for_the_last_close_and_for_our_own_end(grace_s, drain_s):
    """Decision 8: an agent that ignores SIGTERM for longer than the drain may last does not bring the watchdog."""
    timeline = Timeline.starting(100.0, Settings(drain_grace_s=drain_s, agent=AgentSettings(grace_s=grace_s)))
    assert 100 < timeline.kill_at < timeline.finish_at < timeline.hard_at == 100 + drain_s
    if drain_s == 9 and grace_s == 5:
        assert (timeline.kill_at, timeline.finish_at) == (105, 107)
