"""One suite over all carriers. Time stands still and is moved on by hand, so that sockets and memory streams
see the same deadlines, and a wait that ought not to be there shows as a test that never ends.
"""

from __future__ import annotations

import contextlib
import random
from itertools import pairwise

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.gateway.frames import close_frame
from supervisor.gateway.splice import Outcome, Side
from tests.gateway.splice_kit import (
    CARRIERS,
    DIED,
    DIED_FRAME,
    SOCKETS,
    client_close,
    flood,
    frame,
    joined,
    read_to_end,
    receive_exactly,
    reset,
    settle,
)

pytestmark = [pytest.mark.timeout(30)]

FLOOD = frame(bytes(9990)) * 800
RESTART = close_frame(1012, "restart")
AGENT_LEAVES_S = 10.0
LINGER_S = 2.0


@pytest.fixture(params=CARRIERS)
def carrier(request):
    return request.param


# Every test takes it: pytest-trio hands to the loop only a clock that is an argument.
@pytest.fixture
def clock(mock_clock):
    return mock_clock


# What passes ---------------------------------------------------------------------------------------------------


async def test_bytes_pass_untouched_both_ways(carrier, clock):
    up = b"".join(frame(random.randbytes(n), masked=True) for n in (0, 1, 125, 126, 70_000))
    down = b"".join(frame(random.randbytes(n)) for n in (0, 1, 125, 126, 70_000))
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.client.send_all, up)
        nursery.start_soon(it.agent.send_all, down)
        assert await receive_exactly(it.agent, len(up)) == up
        assert await receive_exactly(it.client, len(down)) == down
        await settle()
        assert it.splice.at_rest
        assert (it.traffic.up_bytes, it.traffic.down_bytes) == (len(up), len(down))
        assert it.traffic.data_frames >= 10


async def test_what_came_with_the_heads_goes_first(carrier, clock):
    first, second = frame(b"early", masked=True), frame(b"late", masked=True)
    hello, again = frame(b"hello"), frame(b"again")
    async with joined(carrier, to_agent=first + second[:3], to_client=hello + again[:1]) as it:
        await it.client.send_all(second[3:])
        await it.agent.send_all(again[1:])
        assert await receive_exactly(it.agent, len(first + second)) == first + second
        assert await receive_exactly(it.client, len(hello + again)) == hello + again
        await settle()
        assert it.splice.at_rest
        assert it.traffic.data_frames >= 4


async def test_pings_pass_and_are_no_work(carrier, clock):
    """S3-18: pings keep the path alive and do not renew the tenant's time."""
    async with joined(carrier) as it:
        await it.client.send_all(frame(b"p", 9, masked=True))
        await it.agent.send_all(frame(b"p", 10))
        await receive_exactly(it.client, 3)
        await receive_exactly(it.agent, 7)
        await settle()
        assert it.traffic.data_frames == 0


async def test_it_is_not_at_rest_inside_a_frame(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.send_all(frame(b"hello")[:-1])
        await settle()
        assert not it.splice.at_rest
        await it.agent.send_all(b"o")
        await settle()
        assert it.splice.at_rest


async def test_both_directions_full_at_once_do_not_lock(carrier, clock):
    """Both sides write megabytes before they read a byte."""
    up, down = frame(bytes(4_000_000), masked=True), frame(bytes(5_000_000))
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.client.send_all, up)
        nursery.start_soon(it.agent.send_all, down)
        await settle()
        if carrier != "memory":
            assert it.traffic.up_bytes < len(up)
            assert it.traffic.down_bytes < len(down)
        assert await receive_exactly(it.client, len(down)) == down
        assert await receive_exactly(it.agent, len(up)) == up


@pytest.mark.parametrize("carrier", SOCKETS)
async def test_a_client_that_does_not_read_stops_its_agent_and_has_no_deadline(carrier, clock):
    """A suspended browser tab is no fault."""
    down = b"".join(frame(bytes([i % 256]) * 10_000) for i in range(1500))
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.agent.send_all, down)
        await settle()
        held = it.traffic.down_bytes
        assert held < len(down)
        clock.jump(3600)
        await settle()
        assert it.traffic.down_bytes == held
        assert it.result is None
        assert not it.splice.at_rest
        # The other direction goes on.
        await it.client.send_all(frame(b"still here", masked=True))
        assert await receive_exactly(it.agent, 16) == frame(b"still here", masked=True)
        assert await receive_exactly(it.client, len(down)) == down


@pytest.mark.parametrize("carrier", SOCKETS)
async def test_a_slow_reader_gets_every_byte_in_order(carrier, clock):
    down = b"".join(frame(random.randbytes(random.randrange(3000))) for _ in range(2000))
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.agent.send_all, down)
        got = bytearray()
        while len(got) < len(down):
            got += await it.client.receive_some(random.choice([1, 100, 10_000, 200_000]))
            for _ in range(random.randrange(5)):
                await trio.lowlevel.checkpoint()
        assert got == down


# How the agent ends ----------------------------------------------------------------------------------------------


async def test_the_agents_own_close_passes_and_is_the_only_one(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.send_all(frame(b"bye") + close_frame(1012, "Server restarting"))
        await it.agent.aclose()
        assert await read_to_end(it.client) == (frame(b"bye") + close_frame(1012, "Server restarting"), "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(1012, Side.AGENT)


async def test_a_close_without_a_code_is_told_as_1005(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.send_all(frame(b"", 8))
        await it.agent.aclose()
        assert await read_to_end(it.client) == (frame(b"", 8), "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(1005, Side.AGENT)


async def test_an_agent_that_ends_without_a_close_gets_its_client_closed(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.send_all(frame(b"last words"))
        await it.agent.aclose()
        assert await read_to_end(it.client) == (frame(b"last words") + DIED_FRAME, "eof")
        await it.client.send_all(client_close(1011))
        await it.client.aclose()
        assert await it.outcome() == Outcome(1011, Side.SUPERVISOR)


async def test_the_reason_of_the_agents_end_is_waited_for(carrier, clock):
    async def slow():
        await trio.sleep(0.5)
        return 1012, "restart"

    async with joined(carrier, when_agent_ends=slow) as it:
        await it.agent.aclose()
        await settle()
        assert it.result is None
        clock.jump(0.5)
        assert await read_to_end(it.client) == (RESTART, "eof")


async def test_a_fault_in_telling_the_reason_ends_this_connection_and_closes_both(carrier, clock):
    async def broken():
        raise LookupError("no such generation")

    async with joined(carrier, when_agent_ends=broken) as it:
        await it.agent.aclose()
        error = await it.outcome()
        if isinstance(error, ExceptionGroup):
            (error,) = error.exceptions
        assert isinstance(error, LookupError)


@pytest.mark.parametrize("at", [1, 3, 10])
async def test_an_agent_that_ends_inside_a_frame_has_no_close_invented_for_it(carrier, at, clock):
    """The client sees 1006: a Close inside a frame would be read as its payload."""
    data = frame(b"whole") + frame(b"torn in two")[:at]
    async with joined(carrier) as it:
        await it.agent.send_all(data)
        await it.agent.aclose()
        assert await read_to_end(it.client) == (data, "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(None, Side.AGENT, aborted_mid_frame=True)


async def test_an_agent_that_ends_inside_its_own_close_is_torn_too(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.send_all(RESTART[:-1])
        await it.agent.aclose()
        assert await read_to_end(it.client) == (RESTART[:-1], "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(None, Side.AGENT, aborted_mid_frame=True)


async def test_the_tail_arrives_though_writing_to_the_dead_agent_fails(carrier, clock):
    """An error in writing ends that direction alone; else 8,192 of these 81,920 bytes arrive."""
    tail = frame(bytes(81_920 - 10))
    assert len(tail) == 81_920
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        # The agent dies with bytes of its client unread, so that its end is a reset.
        nursery.start_soon(it.agent.send_all, tail)
        await settle()
        for _ in range(20):
            await it.client.send_all(frame(b"x" * 100, masked=True))
        await settle()
        await it.agent.aclose()
        for _ in range(20):
            await it.client.send_all(frame(b"x" * 100, masked=True))
        assert await read_to_end(it.client) == (tail + DIED_FRAME, "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(1011, Side.SUPERVISOR)


@pytest.mark.parametrize("carrier", SOCKETS)
async def test_the_tail_of_a_dead_agent_waits_for_a_slow_client(carrier, clock):
    tail = b"".join(frame(bytes(20_000)) for _ in range(250))
    async with joined(carrier) as it, trio.open_nursery() as nursery:

        async def die():
            await it.agent.send_all(tail)
            await it.agent.aclose()

        nursery.start_soon(die)
        await settle()
        clock.jump(3600)
        await settle()
        assert it.result is None
        assert await read_to_end(it.client) == (tail + DIED_FRAME, "eof")


async def test_a_client_that_stays_after_the_end_is_left_after_two_seconds(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.aclose()
        assert await receive_exactly(it.client, len(DIED_FRAME)) == DIED_FRAME
        await it.client.send_all(frame(b"I do not listen", masked=True))
        await settle()
        clock.jump(LINGER_S - 0.1)
        await settle()
        assert it.result is None
        await it.client.send_all(frame(b"nor now", masked=True))
        clock.jump(0.2)
        assert await it.outcome() == Outcome(1011, Side.SUPERVISOR)


async def test_a_client_that_answers_the_close_is_not_waited_for_any_longer(carrier, clock):
    """A TLS client sees no end of writing, and waits for ours: its Close must be enough."""
    async with joined(carrier) as it:
        await it.agent.aclose()
        assert await receive_exactly(it.client, len(DIED_FRAME)) == DIED_FRAME
        await it.client.send_all(client_close(1011))
        assert await it.outcome() == Outcome(1011, Side.SUPERVISOR)


async def test_an_agent_that_stays_after_both_closes_is_left_after_ten_seconds(carrier, clock):
    async with joined(carrier) as it:
        await it.client.send_all(client_close(1000))
        await settle()
        await it.agent.send_all(close_frame(1000))
        await settle()
        clock.jump(AGENT_LEAVES_S - 0.1)
        await settle()
        assert it.result is None
        clock.jump(0.2)
        assert await it.outcome() == Outcome(1000, Side.CLIENT)


# How the client ends ---------------------------------------------------------------------------------------------


async def test_a_clients_close_is_answered_by_its_agent(carrier, clock):
    async with joined(carrier) as it:
        await it.client.send_all(client_close(1001))
        assert await receive_exactly(it.agent, 8) == client_close(1001)
        await it.agent.send_all(close_frame(1001))
        await it.agent.aclose()
        assert await read_to_end(it.client) == (close_frame(1001), "eof")
        assert await it.outcome() == Outcome(1001, Side.CLIENT)


async def test_a_clients_close_that_its_agent_does_not_answer_is_answered_with_its_own_code(carrier, clock):
    async def never():
        raise AssertionError("the agent's end is the answer, not a failure")

    async with joined(carrier, when_agent_ends=never) as it:
        await it.client.send_all(client_close(1001))
        await settle()
        await it.agent.aclose()
        assert await read_to_end(it.client) == (close_frame(1001), "eof")
        assert await it.outcome() == Outcome(1001, Side.CLIENT)


async def test_a_client_that_has_ended_still_gets_what_its_agent_says(carrier, clock):
    async with joined(carrier) as it:
        await it.client.send_all(frame(b"question", masked=True))
        await it.client.send_eof()
        assert (await read_to_end(it.agent))[0] == frame(b"question", masked=True)
        await it.agent.send_all(frame(b"answer"))
        await settle()
        assert it.result is None
        await it.agent.send_all(close_frame(1000))
        await it.agent.aclose()
        assert await read_to_end(it.client) == (frame(b"answer") + close_frame(1000), "eof")
        assert await it.outcome() == Outcome(1000, Side.AGENT)


async def test_a_client_that_leaves_without_a_close_is_no_failure_of_its_agent(carrier, clock):
    async def never():
        raise AssertionError("the client left first")

    async with joined(carrier, when_agent_ends=never) as it:
        await it.client.aclose()
        assert await read_to_end(it.agent) == (b"", "eof")
        await it.agent.aclose()
        assert await it.outcome() == Outcome(None, Side.CLIENT)


async def test_a_client_that_left_and_takes_no_more_ends_it_at_once(carrier, clock):
    """Its end alone may be half a close; that it refuses what its agent says is the other half."""
    async with joined(carrier) as it:
        await it.client.aclose()
        await settle()
        assert it.result is None
        for _ in range(3):
            with contextlib.suppress(trio.BrokenResourceError):
                await it.agent.send_all(frame(b"are you there?"))
            await settle()
        assert await it.outcome() == Outcome(None, Side.CLIENT)


async def test_all_that_a_client_sent_before_it_left_reaches_its_agent(carrier, clock):
    up = frame(bytes(3_000_000), masked=True)
    async with joined(carrier) as it, trio.open_nursery() as nursery:

        async def send_and_leave():
            await it.client.send_all(up)
            await it.client.send_eof()

        nursery.start_soon(send_and_leave)
        await settle()
        assert await read_to_end(it.agent) == (up, "eof")


async def test_an_agent_that_does_not_end_after_its_client_is_left_after_ten_seconds(carrier, clock):
    async with joined(carrier) as it:
        await it.client.send_eof()
        await settle()
        clock.jump(AGENT_LEAVES_S - 0.1)
        await settle()
        assert it.result is None
        clock.jump(0.2)
        assert await it.outcome() == Outcome(None, Side.CLIENT)


@pytest.mark.parametrize("carrier", SOCKETS)
@pytest.mark.parametrize("when", ["idle", "inside a frame", "while it does not read", "while its agent does not read"])
async def test_a_reset_of_the_client_ends_everything(carrier, when, clock):
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        if when == "inside a frame":
            await it.client.send_all(frame(b"hello", masked=True)[:4])
        elif when == "while it does not read":
            nursery.start_soon(flood, it.agent, frame(bytes(9_000_000)))
        elif when == "while its agent does not read" and carrier == "relay":
            nursery.start_soon(flood, it.client, frame(bytes(9_000_000), masked=True))
        await settle()
        reset(it.client)
        assert await it.outcome() == Outcome(None, Side.CLIENT)
        await it.agent.aclose()


# Our own Close ---------------------------------------------------------------------------------------------------


async def test_close_at_rest_is_sent_at_once(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.send_all(frame(b"before"))
        await receive_exactly(it.client, 8)
        it.splice.close(1012, "restart", within_s=1)
        await it.agent.send_all(frame(b"after"))
        assert await read_to_end(it.client) == (RESTART, "eof")
        await it.client.send_all(client_close(1012))
        assert await it.outcome() == Outcome(1012, Side.SUPERVISOR)


async def test_close_before_anything_ran(carrier, clock):
    async with joined(carrier) as it:
        it.splice.close(1012, "restart", within_s=1)
        assert await read_to_end(it.client) == (RESTART, "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(1012, Side.SUPERVISOR)


async def test_close_waits_for_the_end_of_the_frame_and_drops_what_follows(carrier, clock):
    one, two = frame(b"x" * 5000), frame(b"never seen")
    async with joined(carrier) as it:
        await it.agent.send_all(one[:2000])
        await settle()
        it.splice.close(1012, "restart", within_s=5)
        await settle()
        await it.agent.send_all(one[2000:] + two)
        assert await read_to_end(it.client) == (one + RESTART, "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(1012, Side.SUPERVISOR)


async def test_close_inside_a_frame_that_never_ends_cuts_the_client_off_in_time(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.send_all(frame(b"x" * 5000)[:2000])
        await settle()
        it.splice.close(1012, "restart", within_s=5)
        await settle()
        clock.jump(4.9)
        await settle()
        assert it.result is None
        clock.jump(0.2)
        assert await it.outcome() == Outcome(None, Side.SUPERVISOR, aborted_mid_frame=True)
        assert (await read_to_end(it.client))[1] == ("eof" if carrier == "memory" else "reset")


@pytest.mark.parametrize("carrier", SOCKETS)
async def test_a_client_that_does_not_read_its_close_is_cut_off_in_time(carrier, clock):
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        nursery.start_soon(flood, it.agent, FLOOD)
        await settle()
        it.splice.close(1012, "restart", within_s=5)
        await settle()
        clock.jump(4.9)
        await settle()
        assert it.result is None
        clock.jump(0.2)
        outcome = await it.outcome()
        assert (outcome.code, outcome.side) == (None, Side.SUPERVISOR)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("carrier", SOCKETS)
async def test_a_close_reaches_a_slow_client_after_all_that_passed(carrier, clock):
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        nursery.start_soon(flood, it.agent, FLOOD)
        await settle()
        it.splice.close(1012, "restart", within_s=5)
        data, end = await read_to_end(it.client)
        assert end == "eof"
        assert data.endswith(RESTART)
        assert (len(data) - len(RESTART)) % len(frame(bytes(9990))) == 0
        await it.client.aclose()
        assert await it.outcome() == Outcome(1012, Side.SUPERVISOR)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("carrier", SOCKETS)
@pytest.mark.parametrize("reads", [True, False])
async def test_a_close_at_a_boundary_waits_for_what_the_client_has_not_taken(carrier, reads, clock):
    whole = frame(bytes(9_000_000))
    async with joined(carrier, to_client=whole) as it:
        await settle()
        assert not it.splice.at_rest
        it.splice.close(1012, "restart", within_s=5)
        await settle()
        if reads:
            assert await read_to_end(it.client) == (whole + RESTART, "eof")
            await it.client.aclose()
            assert await it.outcome() == Outcome(1012, Side.SUPERVISOR)
        else:
            reset(it.client)
            assert await it.outcome() == Outcome(None, Side.CLIENT)


async def test_an_agent_that_does_not_read_keeps_no_end_of_its_client_unseen(carrier, clock):
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        nursery.start_soon(flood, it.client, frame(bytes(3_000_000), masked=True))
        await settle()
        it.splice.close(1012, "restart", within_s=5)
        assert await read_to_end(it.client) == (RESTART, "eof")
        await settle()
        await it.client.send_all(client_close(1012))
        assert await it.outcome() == Outcome(1012, Side.SUPERVISOR)


async def test_the_client_has_its_two_seconds_after_a_close_with_a_short_limit(carrier, clock):
    async with joined(carrier) as it:
        it.splice.close(1012, "restart", within_s=0.1)
        await settle()
        clock.jump(1.9)
        await settle()
        assert it.result is None
        clock.jump(0.2)
        assert await it.outcome() == Outcome(1012, Side.SUPERVISOR)


async def test_close_after_the_agents_own_close_adds_nothing(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.send_all(close_frame(1000, "done"))
        await settle()
        it.splice.close(1012, "restart", within_s=1)
        assert await read_to_end(it.client) == (close_frame(1000, "done"), "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(1000, Side.AGENT)


async def test_close_while_the_agents_own_close_is_half_passed_adds_nothing(carrier, clock):
    own = close_frame(1000, "done")
    async with joined(carrier) as it:
        await it.agent.send_all(own[:3])
        await settle()
        it.splice.close(1012, "restart", within_s=1)
        await it.agent.send_all(own[3:])
        assert await read_to_end(it.client) == (own, "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(1000, Side.AGENT)


async def test_close_while_the_reason_is_asked_for_answers_it(carrier, clock):
    """A drain must not wait for an answer that a stuck tenant may never give."""
    async with joined(carrier, when_agent_ends=trio.sleep_forever) as it:
        await it.agent.aclose()
        await settle()
        it.splice.close(1012, "restart", within_s=1)
        assert await read_to_end(it.client) == (RESTART, "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(1012, Side.SUPERVISOR)


async def test_the_first_close_counts(carrier, clock):
    async with joined(carrier) as it:
        it.splice.close(1012, "restart", within_s=1)
        it.splice.close(1001, "asleep", within_s=1)
        await settle()
        it.splice.close(1001, "asleep", within_s=0)
        assert await read_to_end(it.client) == (RESTART, "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(1012, Side.SUPERVISOR)
        it.splice.close(1001, "asleep", within_s=1)


async def test_a_code_that_may_not_be_sent_is_refused_and_changes_nothing(carrier, clock):
    async with joined(carrier) as it:
        for code in (1005, 1006, 1015):
            with pytest.raises(ValueError, match="may not be sent"):
                it.splice.close(code, "", within_s=1)
        await it.agent.send_all(frame(b"on"))
        assert await receive_exactly(it.client, 4) == frame(b"on")


async def test_an_agent_that_ends_inside_a_frame_while_a_close_waits_is_torn(carrier, clock):
    async with joined(carrier) as it:
        await it.agent.send_all(frame(b"hello")[:4])
        await settle()
        it.splice.close(1012, "restart", within_s=5)
        await it.agent.aclose()
        assert await read_to_end(it.client) == (frame(b"hello")[:4], "eof")
        await it.client.aclose()
        assert await it.outcome() == Outcome(None, Side.AGENT, aborted_mid_frame=True)


@pytest.mark.parametrize("carrier", SOCKETS)
async def test_a_client_gone_before_its_close_did_not_see_one(carrier, clock):
    async with joined(carrier) as it, trio.open_nursery() as nursery:
        nursery.start_soon(flood, it.agent, FLOOD)
        await settle()
        it.splice.close(1012, "restart", within_s=5)
        await settle()
        reset(it.client)
        assert await it.outcome() == Outcome(None, Side.CLIENT)
        nursery.cancel_scope.cancel()


# Cancellation ----------------------------------------------------------------------------------------------------


async def _idle(it):
    pass


async def _client_left(it):
    await it.client.send_eof()


async def _asking(it):
    await it.agent.aclose()


async def _lingering(it):
    it.splice.close(1012, "restart", within_s=5)


async def _waiting_for_a_boundary(it):
    await it.agent.send_all(frame(b"hello")[:3])
    await settle()
    it.splice.close(1012, "restart", within_s=5)


async def _blocked(it):
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.agent.send_all, frame(bytes(9_000_000)))
            nursery.start_soon(it.client.send_all, frame(bytes(9_000_000), masked=True))
            await settle()
            scope.cancel()


async def _delivering(it):
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, it.agent, FLOOD)
            await settle()
            it.splice.close(1012, "restart", within_s=5)
            await settle()
            scope.cancel()


@pytest.mark.parametrize(
    "phase", [_idle, _client_left, _asking, _lingering, _waiting_for_a_boundary, _blocked, _delivering]
)
async def test_cancelled_in_any_wait_both_streams_are_closed_and_nothing_is_left(carrier, phase, clock):
    async with joined(carrier, when_agent_ends=trio.sleep_forever) as it:
        await phase(it)
        await settle()
        assert not it.done.is_set()
        it.scope.cancel()
        await it.assert_nothing_left()


async def test_cancelled_before_it_began(carrier, clock):
    async with joined(carrier) as it:
        it.scope.cancel()
        await it.assert_nothing_left()


# Any moment, any cut ---------------------------------------------------------------------------------------------


server_frames = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 9, 10]), st.sampled_from([0, 1, 60, 125, 126, 400])).map(
        lambda it: frame(bytes(min(it[1], 125) if it[0] > 8 else it[1]), it[0])
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("carrier", CARRIERS)
@settings(max_examples=60, deadline=None)
@given(
    frames=server_frames,
    cuts=st.lists(st.integers(0, 3000), max_size=5),
    close_at=st.none() | st.integers(0, 6),
    own_close=st.booleans(),
    settled=st.booleans(),
)
def test_a_client_gets_whole_frames_and_one_close_whatever_the_moment(
    carrier, frames, cuts, close_at, own_close, settled
):
    """`close` at any moment of a stream cut anywhere: a prefix of the agent's frames, and one Close after it."""
    if own_close:
        frames = [*frames, close_frame(1000, "done")]
    stream = b"".join(frames)
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in cuts)})
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    got = None

    async def main():
        nonlocal got
        async with joined(carrier) as it:
            for number, piece in enumerate(pieces):
                if number == close_at:
                    it.splice.close(1012, "restart", within_s=5)
                if settled:
                    await settle_fast()
                try:
                    await it.agent.send_all(piece)
                except trio.BrokenResourceError:
                    break
            await it.agent.aclose()
            got = await read_to_end(it.client)
            await it.client.aclose()
            await it.outcome()

    trio.run(main, clock=trio.testing.MockClock())
    data, end = got
    assert end == "eof"
    whole, at = {0}, 0
    for one in frames:
        at += len(one)
        whole.add(at)
    if data == stream:
        # Unbroken, with the agent's own Close.
        assert own_close
        return
    ours = next((close for close in (RESTART, close_frame(*DIED)) if data.endswith(close)), None)
    assert ours is not None
    passed = data[: -len(ours)]
    assert stream.startswith(passed)
    assert len(passed) in whole
    if own_close:
        assert passed != stream
    if ours == close_frame(*DIED):
        assert passed == stream


async def settle_fast():
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_stream_cut_at_every_byte_passes_whole_up_to_the_cut(carrier):
    """The agent dies after every number of bytes: whole frames get a Close, torn ones none."""
    frames = [frame(b"a"), frame(b"", 9), frame(b"b" * 130)]
    stream = b"".join(frames)
    whole = {0, len(frames[0]), len(frames[0] + frames[1]), len(stream)}

    async def main():
        for cut in range(len(stream) + 1):
            async with joined(carrier) as it:
                if cut:
                    await it.agent.send_all(stream[:cut])
                await it.agent.aclose()
                data, _ = await read_to_end(it.client)
                assert data == stream[:cut] + (DIED_FRAME if cut in whole else b"")
                await it.client.aclose()
                assert (await it.outcome()).aborted_mid_frame == (cut not in whole)

    trio.run(main, clock=trio.testing.MockClock())
