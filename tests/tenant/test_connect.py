"""The connect path, on the mock clock: the ladder as callers see it."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor.errors import AgentStartFailed, ConnectFailed, Draining, Unavailable
from supervisor.tenant.lifecycle import State
from supervisor.tenant.tenant import Ending
from supervisor.testing import faults
from supervisor.testing.agents import echo_agent, in_turn

from .kit import open_house


async def fails(house) -> ConnectFailed:
    with pytest.raises(ConnectFailed) as caught:
        await house.connect()
    return caught.value


async def test_a_sleeping_tenant_is_started_by_a_connect(autojump_clock):
    async with open_house(echo_agent) as house:
        assert await house.use() == 1
        assert house.tenant.state is State.RUNNING
        assert house.now == 0


async def test_an_agent_that_exits_at_start_is_tried_at_once_and_after_1_3_and_8_seconds(autojump_clock):
    """S3-05, S3-06, S3-09: four attempts, each with a process of its own; then 503 that tells how each failed."""
    async with open_house(faults.exits_at_start(3)) as house:
        error = await fails(house)
        assert house.start_times == [0, 1, 4, 12]
        assert [spec.generation for spec in house.launcher.starts] == [1, 2, 3, 4]
        assert str(error).count("exit status 3") == 4
        assert error.status == 503
        assert error.retryable
        assert error.retry_after_s == 8
        assert house.tenant.state is State.FAILED
        assert not house.launcher.alive


async def test_the_request_after_a_failed_ladder_begins_a_new_one_at_once(autojump_clock):
    """S3-05."""
    exits = faults.exits_at_start()
    async with open_house(in_turn(exits, exits, exits, exits, echo_agent)) as house:
        await fails(house)
        assert await house.use() == 5
        assert house.now == 12
        assert house.tenant.state is State.RUNNING


async def test_the_third_start_that_works_is_ready_after_4_seconds(autojump_clock):
    exits = faults.exits_at_start()
    async with open_house(in_turn(exits, exits, echo_agent)) as house:
        assert await house.use() == 3
        assert house.now == 4


async def test_500_connects_side_by_side_share_one_start(autojump_clock):
    """S3-10: one ladder a tenant, joined by all."""
    exits = faults.exits_at_start()
    async with open_house(in_turn(exits, echo_agent)) as house:
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(house.use)
        assert house.start_times == [0, 1]


async def test_500_connects_side_by_side_fail_together(autojump_clock):
    """S3-10: nobody's failure begins a ladder of its own."""
    async with open_house(faults.exits_at_start()) as house:
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(fails, house)
        assert house.start_times == [0, 1, 4, 12]
        assert house.now == 12


async def test_a_caller_that_comes_during_the_backoff_joins_it(autojump_clock):
    """S3-10."""
    exits = faults.exits_at_start()
    async with open_house(in_turn(exits, exits, echo_agent)) as house, trio.open_nursery() as nursery:
        nursery.start_soon(house.use)
        await trio.sleep(2)
        assert await house.use() == 3
        assert house.now == 4


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_an_agent_that_answers_5xx_is_asked_again_on_the_ladder_and_not_replaced(status, autojump_clock):
    """S3-07: an answered 5xx is a failed attempt of an agent that lives."""
    async with open_house(faults.refuses_then_serves(2, status)) as house:
        assert await house.use() == 1
        assert house.now == 4
        assert house.start_times == [0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 426])
async def test_any_other_answer_is_returned_at_once(status, autojump_clock):
    """S3-08."""
    async with open_house(faults.refuses(status)) as house:
        connected = await house.connect()
        assert connected.answer.status == status
        assert house.now == 0
        await connected.stream.aclose()


async def test_an_agent_that_always_answers_503_fails_after_the_last_rung_and_is_gone_then(autojump_clock):
    async with open_house(faults.refuses(503)) as house:
        error = await fails(house)
        assert str(error).count("answered 503") == 4
        assert house.now == 12
        assert house.start_times == [0]
        assert not house.launcher.alive
        assert house.tenant.state is State.FAILED


async def test_an_agent_that_never_answers_is_replaced_after_start_timeout(autojump_clock):
    """S3-04: started is not ready; the process that hung is ended before the next one starts."""
    async with open_house(in_turn(faults.never_accepts(), echo_agent), start_timeout_s=30.0) as house:
        assert await house.use() == 2
        assert house.start_times == [0, 31]


async def test_a_slow_start_within_its_time_is_waited_for(autojump_clock):
    """S3-26: 30 s for a first start."""
    async with open_house(faults.slow_start(25)) as house:
        assert await house.use() == 1
        assert house.now == 25


async def test_an_exit_ends_the_wait_at_once_and_begins_the_next_rung(autojump_clock):
    """Death is seen, not guessed; nothing polls."""
    async with open_house(in_turn(faults.dies_at_the_upgrade(), echo_agent)) as house:
        assert await house.use() == 2
        assert house.start_times == [0, 1]


async def test_an_agent_that_speaks_garbage_is_replaced_and_named(autojump_clock):
    async with open_house(faults.speaks_garbage()) as house:
        assert "attempt 4, after 8 s: the agent's answer is not HTTP/1.1" in str(await fails(house))
        assert len(house.start_times) == 4


async def test_a_start_that_cannot_be_made_climbs_the_ladder_and_tells_why(autojump_clock):
    async with open_house(echo_agent) as house:
        house.launcher.fail_next_starts(*[AgentStartFailed("no such file: /bin/agent", 2)] * 4)
        assert str(await fails(house)).count("no such file: /bin/agent") == 4
        assert house.start_times == [0, 1, 4, 12]
        assert house.tenant.state is State.FAILED
        assert await house.use() == 5


async def test_a_caller_that_leaves_takes_only_itself_away(autojump_clock):
    """S3-12."""
    exits = faults.exits_at_start()
    async with open_house(in_turn(exits, exits, echo_agent)) as house, trio.open_nursery() as nursery:
        nursery.start_soon(house.use)
        with trio.move_on_after(0.5):
            await house.use()
        await trio.sleep(5)
        assert house.start_times == [0, 1, 4]
        assert house.tenant.state is State.RUNNING


async def test_when_nobody_waits_any_more_the_ladder_stops(autojump_clock):
    """S3-12: a client gone during the backoff starts nothing."""
    async with open_house(faults.exits_at_start()) as house:
        with trio.move_on_after(2):
            await house.use()
        await trio.sleep(30)
        assert house.start_times == [0, 1]
        assert house.tenant.state is State.ASLEEP


async def test_a_start_that_was_left_may_be_used_by_the_next_caller(autojump_clock):
    async with open_house(faults.slow_start(20)) as house:
        with trio.move_on_after(5):
            await house.use()
        await trio.sleep(5)
        assert await house.use() == 1
        assert house.now == 20


async def test_a_start_that_was_left_for_good_ends_at_start_timeout(autojump_clock):
    async with open_house(faults.never_accepts()) as house:
        with trio.move_on_after(5):
            await house.use()
        await trio.sleep(24)
        assert house.launcher.alive
        await trio.sleep(10)
        assert not house.launcher.alive
        assert house.tenant.state is State.ASLEEP


async def test_an_agent_that_dies_at_once_each_time_is_not_started_in_a_loop(autojump_clock):
    """S3-05: the rung goes back only after `stable_after`; being ready for a moment is not enough."""
    async with open_house(faults.ready_then_dies(0.1)) as house:
        for _ in range(4):
            await house.use()
            await trio.sleep(0.2)
        assert house.start_times == pytest.approx([0, 1.1, 4.2, 12.3])


async def test_an_agent_that_lived_is_back_at_once(autojump_clock):
    """S3-05."""
    async with open_house(faults.ready_then_dies(2)) as house:
        for number in (1, 2, 3):
            assert await house.use() == number
            await trio.sleep(2.5)
        assert house.start_times == [0, 2.5, 5]


async def test_a_hung_agent_is_replaced_when_it_is_silent_towards_everybody(autojump_clock):
    """S3-09, S3-11: what reset means, and of whom."""
    async with open_house(in_turn(faults.hangs_after(1), echo_agent), connect_timeout_s=10.0) as house:
        first = await house.connect()
        await trio.sleep(5)
        assert await house.use() == 2
        assert house.now == 16
        await first.stream.aclose()


async def test_an_agent_that_still_speaks_to_others_is_not_replaced(autojump_clock):
    """S3-11: nobody else's connection is touched by a caller whose upgrade hangs."""
    async with open_house(faults.hangs_after(1), connect_timeout_s=10.0) as house:
        first = await house.connect()
        await trio.sleep(5)

        async def keep_talking():
            while True:
                await trio.sleep(1)
                first.generation.traffic.down_bytes += 10

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_talking)
            error = await fails(house)
            nursery.cancel_scope.cancel()
        assert str(error).count("though the agent speaks to others") == 4
        assert house.start_times == [0]
        assert house.tenant.state is State.RUNNING
        await first.stream.aclose()


async def test_newcomers_do_not_wait_for_somebody_elses_ladder_on_a_running_agent(autojump_clock):
    async with open_house(in_turn(echo_agent)) as house:
        await house.use()
        await trio.sleep(5)
        generation = house.tenant._generation
        connect, times = generation.process.connect, iter(range(100))

        async def flaky():
            from supervisor.errors import AgentUnreachable

            if next(times) < 1:
                raise AgentUnreachable("for once")
            return await connect()

        generation.process.connect = flaky
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.use)  # fails once: repeated after 1 s
            await wait_all_tasks_blocked()
            began = house.now
            await house.use()
            assert house.now == began
        assert house.now == pytest.approx(began + 1, abs=0.6)
        assert house.start_times == [0]


async def test_callers_are_told_when_the_tenant_drains(autojump_clock):
    async with open_house(faults.never_accepts()) as house:
        async with trio.open_nursery() as nursery:

            async def refused():
                with pytest.raises(Draining):
                    await house.connect()

            nursery.start_soon(refused)
            await trio.sleep(1)
            house.tenant.end(Ending.DRAIN, kill_at=trio.current_time())
            nursery.start_soon(refused)
        await house.tenant.ended.wait()
        assert not house.launcher.alive


async def test_callers_are_told_when_the_tenant_is_put_to_sleep_during_the_backoff(autojump_clock):
    async with open_house(faults.exits_at_start()) as house, trio.open_nursery() as nursery:

        async def refused():
            with pytest.raises(Unavailable, match="put to sleep"):
                await house.connect()

        nursery.start_soon(refused)
        await trio.sleep(0.5)
        await house.tenant.sleep()
        await trio.sleep(20)
        assert house.start_times == [0]
        assert house.tenant.state is State.ASLEEP


@pytest.mark.parametrize("instant", [0.0, 0.001, 0.5, 1.0, 1.5, 3.9, 4.0, 11.0, 12.0])
async def test_a_cancellation_at_any_instant_leaves_no_caller_and_no_agent(instant, autojump_clock):
    async with open_house(faults.exits_at_start()) as house:
        with trio.move_on_after(instant):
            await house.connect()
        await trio.sleep(0.001)
        assert house.tenant._path.callers == 0
        await trio.sleep(60)
        assert not house.launcher.alive
        assert house.tenant.state in (State.ASLEEP, State.FAILED)
