"""What the fast carrier promises beyond the suite that it shares with the pumps: a fault stays in its pair, nobody
starves, nothing spins, and numbers of closed sockets mean nothing.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import weakref

import pytest
import trio
import trio.testing

from supervisor.gateway.frames import close_frame
from supervisor.gateway.relay import Relay
from supervisor.gateway.splice import Outcome, Side, Splice
from supervisor.tenant.traffic import Traffic
from tests.gateway.splice_kit import (
    DIED,
    DIED_FRAME,
    Joined,
    died,
    flood,
    frame,
    joined,
    read_to_end,
    receive_exactly,
    reset,
    settle,
    tcp_pair,
    unix_pair,
)

pytestmark = [pytest.mark.timeout(60)]


# Every test takes it: pytest-trio hands to the loop only a clock that is an argument.
@pytest.fixture
def clock(mock_clock):
    return mock_clock


@contextlib.asynccontextmanager
async def relaying():
    """A relay, and a function that joins one more pair by it."""
    relay = Relay()
    pairs = []

    async def join(traffic=None) -> Joined:
        client, client_inner = await tcp_pair()
        agent, agent_inner = unix_pair()
        splice = Splice(client_inner, agent_inner, relay=relay, traffic=traffic or Traffic(), when_agent_ends=died)
        pair = Joined(splice, client, agent, (client_inner, agent_inner), relay, Traffic())
        pairs.append(pair)
        nursery.start_soon(pair.run)
        return pair

    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        yield relay, join
        for pair in pairs:
            pair.scope.cancel()
        for pair in pairs:
            await pair.done.wait()
            await trio.aclose_forcefully(pair.client)
            await trio.aclose_forcefully(pair.agent)
        assert relay.sockets == 0
        nursery.cancel_scope.cancel()


async def echo(pair: Joined, message: bytes = frame(b"hello")) -> None:
    """There and back through `pair`."""
    await pair.agent.send_all(message)
    assert await receive_exactly(pair.client, len(message)) == message


class _Broken(Traffic):
    """A bug in the middle of the hot path."""

    @property
    def down_bytes(self):
        raise ZeroDivisionError("a bug")

    @down_bytes.setter
    def down_bytes(self, value):
        pass


async def test_a_fault_in_one_pair_ends_that_pair_alone(clock):
    async with relaying() as (_, join):
        bad, good = await join(_Broken()), await join()
        await settle()
        await bad.agent.send_all(frame(b"hello"))
        await bad.done.wait()
        assert isinstance(bad.result, ZeroDivisionError)
        await bad.assert_nothing_left(2)
        await echo(good)


async def test_an_old_event_does_nothing_to_the_socket_that_has_its_number_now(clock):
    """Events of a batch outlive the sockets that they were about: then they are hints, and no more."""
    async with relaying() as (relay, join):
        pair = await join()
        await settle()
        every = 0x1 | 0x4 | 0x8 | 0x10 | 0x2000
        for fd in list(relay._ends):
            relay._serve(fd, every & ~0x8)
        relay._serve(10**6, every)
        await settle()
        assert pair.result is None
        await echo(pair)


async def test_numbers_are_used_again_at_once(clock):
    async with relaying() as (relay, join):
        seen = set()
        for _ in range(30):
            pair = await join()
            await echo(pair)
            fds = set(relay._ends)
            pair.scope.cancel()
            await pair.done.wait()
            assert relay.sockets == 0
            await trio.aclose_forcefully(pair.client)
            await trio.aclose_forcefully(pair.agent)
            seen |= fds
        assert len(seen) < 30 * 2


async def _half_closed(pair, nursery):
    await pair.client.send_eof()


async def _agent_half_open(pair, nursery):
    # The agent has ended both ways, and its client does not read the tail.
    async def die():
        await flood(pair.agent, frame(bytes(9_000_000)))

    nursery.start_soon(die)
    await settle()
    await pair.agent.aclose()


async def _client_reset_while_blocked(pair, nursery):
    nursery.start_soon(flood, pair.client, frame(bytes(9_000_000), masked=True))
    await settle()
    reset(pair.client)


async def _both_blocked(pair, nursery):
    nursery.start_soon(flood, pair.client, frame(bytes(9_000_000), masked=True))
    nursery.start_soon(flood, pair.agent, frame(bytes(9_000_000)))


async def _lingering(pair, nursery):
    pair.splice.close(1012, "restart", within_s=5)


@pytest.mark.parametrize(
    "state", [_half_closed, _agent_half_open, _client_reset_while_blocked, _both_blocked, _lingering]
)
async def test_a_socket_that_is_shut_broken_or_blocked_does_not_spin(state, clock):
    """Epoll tells of errors and hang-ups, wanted or not, for ever: 10 turns are more than any state needs."""
    async with relaying() as (relay, join), trio.open_nursery() as nursery:
        pair = await join()
        await state(pair, nursery)
        await settle()
        before = relay.turns
        for _ in range(5):
            # Each ends only after 10 ms of real time in which no task ran; one that spins would never let it.
            await settle()
        assert relay.turns - before <= 10
        nursery.cancel_scope.cancel()


def fill(pair: Joined, data: bytes) -> None:
    """Put into the agent's socket all that the kernel takes, without a turn for anybody."""
    with contextlib.suppress(BlockingIOError), socket.socket(fileno=os.dup(pair.agent.socket.fileno())) as sock:
        sock.setblocking(False)
        while True:
            data = data[sock.send(data) :]
            if not data:
                return


async def test_a_turn_carries_256_kib_at_most_and_then_others_run(clock):
    """Between two turns of this task the relay has two at most (Trio shuffles), of 256 KiB and one read."""
    async with relaying() as (_, join):
        traffic = Traffic()
        for _ in range(10):
            pair = await join(traffic)
            await settle()
            fill(pair, frame(bytes(1_000_000)))
        passed, most, turns = traffic.down_bytes, 0, 0
        while turns < 100:
            await trio.lowlevel.checkpoint()
            most = max(most, traffic.down_bytes - passed)
            passed = traffic.down_bytes
            turns += 1
        assert passed > 1_000_000
        assert 65_536 < most <= 2 * (256 + 64) * 1024


async def test_a_turn_has_64_operations_at_most(clock):
    async with relaying() as (_, join):
        traffic = Traffic()
        pairs = [await join(traffic) for _ in range(250)]
        await settle()
        for pair in pairs:
            fill(pair, frame(b"hello"))
        passed, most = 0, 0
        while passed < 250:
            await trio.lowlevel.checkpoint()
            most = max(most, traffic.data_frames - passed)
            passed = traffic.data_frames
        assert 1 < most <= 2 * 64


async def test_a_flood_delays_others_by_one_read_for_each_of_its_pairs(clock):
    """The sockets take turns: an echo is passed on after at most one read of each flooding pair, and one more."""
    async with relaying() as (_, join):
        traffic = Traffic()
        floods, quiet = [await join(traffic) for _ in range(5)], await join()
        await settle()
        for pair in floods:
            fill(pair, frame(bytes(1_000_000)))
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        fill(quiet, frame(b"hello"))
        before = traffic.down_bytes
        await receive_exactly(quiet.client, 7)
        assert traffic.down_bytes - before <= 2 * 5 * 64 * 1024


async def test_a_pair_that_is_blocked_holds_one_buffer_at_most(clock):
    async with relaying() as (relay, join), trio.open_nursery() as nursery:
        pair = await join()
        nursery.start_soon(flood, pair.agent, frame(bytes(9_000_000)))
        await settle()
        held = [len(end.rest) for end in relay._ends.values()]
        assert 0 < max(held) <= len(relay._buffer)
        nursery.cancel_scope.cancel()


async def test_blocked_pairs_do_not_slow_the_others(clock):
    async with relaying() as (_, join), trio.open_nursery() as nursery:
        for _ in range(10):
            pair = await join()
            nursery.start_soon(flood, pair.agent, frame(bytes(5_000_000)))
        await settle()
        other = await join()
        for _ in range(100):
            await echo(other)
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_500_pairs_side_by_side_each_get_their_own_bytes_and_close(clock):
    async with relaying() as (relay, join), trio.open_nursery() as nursery:
        pairs = [await join() for _ in range(500)]

        async def use(number, pair):
            mine = frame(str(number).encode() * 100)
            for _ in range(5):
                await echo(pair, mine)
            pair.splice.close(1012, "restart", within_s=5)
            assert await read_to_end(pair.client) == (close_frame(1012, "restart"), "eof")
            await pair.client.aclose()
            assert await pair.outcome() == Outcome(1012, Side.SUPERVISOR)

        await settle()
        assert relay.sockets == 1000
        for number, pair in enumerate(pairs):
            nursery.start_soon(use, number, pair)


async def test_pairs_fail_when_their_relay_ends(clock):
    client, client_inner = await tcp_pair()
    agent, agent_inner = unix_pair()
    relay = Relay()
    splice = Splice(client_inner, agent_inner, relay=relay, traffic=Traffic(), when_agent_ends=died)
    pair = Joined(splice, client, agent, (client_inner, agent_inner), relay, Traffic())
    async with trio.open_nursery() as nursery:
        running = trio.CancelScope()

        async def run():
            with running:
                await relay.run()

        nursery.start_soon(run)
        nursery.start_soon(pair.run)
        await settle()
        running.cancel()
        await pair.done.wait()
    assert isinstance(pair.result, trio.ClosedResourceError)
    await pair.assert_nothing_left()
    await client.aclose()
    await agent.aclose()


async def test_a_stream_that_was_closed_before_is_refused_and_the_other_is_closed_once(clock):
    client, client_inner = await tcp_pair()
    agent, agent_inner = unix_pair()
    await agent_inner.aclose()
    splice = Splice(client_inner, agent_inner, relay=Relay(), traffic=Traffic(), when_agent_ends=died)
    with pytest.raises(trio.ClosedResourceError, match="before it was spliced"):
        await splice.run()
    assert await read_to_end(client) == (b"", "eof")
    await client.aclose()
    await agent.aclose()


async def test_a_stream_closed_by_somebody_else_does_not_take_another_pair_with_it(clock):
    async with relaying() as (_, join):
        pair = await join()
        await settle()
        await pair.inner[0].aclose()
        other = await join()
        await echo(other)
        pair.scope.cancel()
        await pair.assert_nothing_left(2)
        await echo(other)


async def test_no_cycle_keeps_a_finished_pair_in_memory(clock):
    """A relay of many short connections must not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        async with joined("relay") as it:
            await settle()
            ends = [weakref.ref(end) for end in it.relay._ends.values()]
            await it.agent.send_all(close_frame(1000))
            await it.agent.aclose()
            await read_to_end(it.client)
            await it.client.aclose()
            await it.outcome()
            gone = [weakref.ref(it.splice), *ends]
            it.splice = None
            await settle()
            assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


_DYING_AGENT = """
import socket, sys, time
sock = socket.socket(fileno=int(sys.argv[1]))
sock.sendall(bytes.fromhex(sys.argv[2]) + bytes(int(sys.argv[3])))
print("sent", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("carrier", ["relay", "sockets"])
async def test_the_tail_of_a_killed_agent_arrives_whole(carrier, clock):
    """kill -9 of a real process, with its client's bytes unread in its socket: 81,920 of 81,920 bytes."""
    near, far = socket.socketpair()
    near.setblocking(False)
    tail = frame(bytes(81_910))
    process = subprocess.Popen(
        [sys.executable, "-c", _DYING_AGENT, str(far.fileno()), tail[:10].hex(), "81910"],
        pass_fds=[far.fileno()],
        stdout=subprocess.PIPE,
    )
    far.close()
    client, client_inner = await tcp_pair()
    agent_inner = trio.SocketStream(trio.socket.from_stdlib_socket(near))
    relay = Relay()
    splice = Splice(
        client_inner,
        agent_inner,
        relay=relay if carrier == "relay" else None,
        traffic=Traffic(),
        when_agent_ends=died,
    )
    try:
        assert process.stdout.readline() == b"sent\n"
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.run)
            for _ in range(100):
                await client.send_all(frame(b"x" * 100, masked=True))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            for _ in range(100):
                await client.send_all(frame(b"x" * 100, masked=True))
            outcomes = []

            async def run():
                outcomes.append(await splice.run())

            nursery.start_soon(run)
            assert await read_to_end(client) == (tail + DIED_FRAME, "eof")
            await client.aclose()
            await settle()
            assert outcomes == [Outcome(DIED[0], Side.SUPERVISOR)]
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
