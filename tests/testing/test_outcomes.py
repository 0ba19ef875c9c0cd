"""What each fault leads to, by the table of fixtures/README.md, through a whole supervisor in virtual time.

The same faults as real processes are in tests/end_to_end.
"""

from __future__ import annotations

import pytest
import trio

from supervisor.client import ConnectionClosed, ConnectionRejected
from supervisor.settings import Settings
from supervisor.testing import faults
from supervisor.testing.agents import echo_agent, in_turn
from supervisor.testing.world import open_world

LADDER_S = 1 + 3 + 8


@pytest.fixture
def world(tmp_path):
    return lambda program: open_world(Settings(state_dir=tmp_path / "state"), program)


async def state_of(world):
    return (await world.supervisor.describe("alice"))["state"]


@pytest.mark.parametrize(
    ("fault", "arguments", "seconds", "starts"),
    [
        (faults.slow_start, (31,), 4 * 30 + LADDER_S, 4),
        (faults.never_accepts, (), 4 * 30 + LADDER_S, 4),
        (faults.never_answers, (), 4 * 30 + LADDER_S, 4),
        (faults.exits_at_start, (3,), LADDER_S, 4),
        (faults.dies_at_the_upgrade, (), LADDER_S, 4),
        (faults.refuses, (503,), LADDER_S, 1),
        (faults.refuses_then_serves, (4, 500), LADDER_S, 1),
        (faults.speaks_garbage, (), LADDER_S, 4),
        (faults.huge_head, (), LADDER_S, 4),
        (faults.endless_head, (), LADDER_S, 4),
    ],
)
async def test_it_is_refused_when_every_rung_has_failed(world, fault, arguments, seconds, starts, autojump_clock):
    """S3-05, S3-06, S3-07, S3-09: four attempts, 503 with Retry-After and the story, nothing left of the agent."""
    async with world(fault(*arguments)) as world:
        began = trio.current_time()
        with pytest.raises(ConnectionRejected) as rejected:
            async with world.connect("alice"):
                raise AssertionError("was served")
        assert rejected.value.status == 503
        assert "retry-after" in {name.lower() for name, _ in rejected.value.headers}
        assert b"attempt 4, after 8 s" in rejected.value.body
        assert trio.current_time() - began == pytest.approx(seconds, abs=0.01)
        await trio.sleep(1)
        assert await state_of(world) == "failed"
        assert len(world.launcher.starts) == starts
        assert not world.launcher.alive


@pytest.mark.parametrize(
    ("fault", "arguments", "seconds"),
    [
        (faults.slow_start, (29,), 29),
        (faults.refuses_then_serves, (1,), 1),
        (faults.refuses_then_serves, (2, 502), 4),
        (faults.refuses_then_serves, (3, 504), LADDER_S),
        (in_turn, (faults.exits_at_start(3), echo_agent), 1),
        (faults.ignores_sigterm, (), 0),
    ],
)
async def test_it_is_served_when_the_agent_can(world, fault, arguments, seconds, autojump_clock):
    """S3-05, S3-07: the attempt that succeeds is the last."""
    async with world(fault(*arguments)) as world, world.connect("alice") as websocket:
        assert trio.current_time() == pytest.approx(seconds, abs=0.01)
        await websocket.send("hello")
        assert await websocket.receive() == "hello"


@pytest.mark.parametrize("status", [400, 403, 404, 426])
async def test_an_answer_that_is_final_passes_at_once(world, status, autojump_clock):
    """S3-08: any other answer goes to the client as it is."""
    async with world(faults.refuses(status)) as world:
        with pytest.raises(ConnectionRejected) as rejected:
            async with world.connect("alice"):
                raise AssertionError("was served")
        assert rejected.value.status == status
        assert rejected.value.body == f"refused with {status}\n".encode()
        assert trio.current_time() == 0
        assert len(world.launcher.starts) == 1


@pytest.mark.parametrize(
    ("fault", "arguments", "received", "code", "within_s"),
    [
        (faults.dies_when_connected, (), 0, 1012, 0.01),
        (faults.dies_inside_a_frame, (), 0, 1006, 0.01),
        (faults.sends_and_dies, (81920,), 20, 1012, 0.01),
        (faults.ready_then_dies, (2,), 1, 1012, 2.01),
        (faults.half_closes, (), 1, 1011, 0.51),
        (faults.closes_without_close, (), 1, 1011, 0.51),
        (faults.closes_without_a_code, (), 0, 1005, 0.01),
        (faults.closes_and_stays, (), 0, 1012, 2.01),
    ],
)
async def test_the_client_gets_the_tail_and_the_right_close(
    world, fault, arguments, received, code, within_s, autojump_clock
):
    """Every message that the agent sent, then a Close that tells the truth."""
    async with world(fault(*arguments)) as world:
        async with world.connect("alice") as websocket:
            await websocket.send("now")
            messages = []
            with pytest.raises(ConnectionClosed) as closed, trio.fail_after(within_s):
                while True:
                    messages.append(await websocket.receive())
        assert closed.value.code == code
        assert len(messages) == received
        await trio.sleep(0.01)
        aborted = world.supervisor.telemetry.metrics.aborted_mid_frame.collect()[0].samples[0].value
        assert aborted == (code == 1006)


async def test_a_hung_agent_is_replaced_for_who_comes_next(world, autojump_clock):
    """S3-09: silent towards everybody for the whole of an attempt."""
    async with world(in_turn(faults.hangs_after(2), echo_agent)) as world:
        async with world.connect("alice") as first, world.connect("alice"):
            await first.send("hello")
            with trio.move_on_after(1000) as scope:
                await first.receive()
            assert scope.cancelled_caught
            began = trio.current_time()
            async with world.connect("alice") as third:
                assert trio.current_time() - began == pytest.approx(11, abs=0.01)
                await third.send("hello")
                assert await third.receive() == "hello"
            with pytest.raises(ConnectionClosed) as closed:
                await first.receive()
            assert closed.value.code == 1012
        assert [start.generation for start in world.launcher.starts] == [1, 2]


@pytest.mark.parametrize("seconds_alive", [0.5, 1.5])
async def test_one_that_lived_is_back_at_once_and_one_that_did_not_waits(world, seconds_alive, autojump_clock):
    """S3-10: the rung goes back to the first only after a second of readiness."""
    async with world(in_turn(faults.ready_then_dies(seconds_alive), echo_agent)) as world:
        async with world.connect("alice") as websocket:
            with pytest.raises(ConnectionClosed):
                await websocket.receive()
        died_at = trio.current_time()
        async with world.connect("alice"):
            waited = trio.current_time() - died_at
    assert waited == pytest.approx(0 if seconds_alive > 1 else 1, abs=0.01)


@pytest.mark.parametrize(
    ("fault", "within_s"),
    [(faults.floods, 0.6), (faults.stops_reading, 0.6), (faults.ignores_sigterm, 5.1)],
)
async def test_a_drain_ends_them_all_with_1012(world, fault, within_s, autojump_clock):
    """S3-14, S3-24: within the agent's own half second, or its grace and a SIGKILL."""
    codes = []
    async with world(fault()) as world, world.connect("alice") as websocket:

        async def read():
            try:
                while True:
                    await websocket.receive()
            except ConnectionClosed as closed:
                codes.append(closed.code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.sleep(0.1)
            began = trio.current_time()
            assert await world.supervisor.drain()
            assert trio.current_time() - began <= within_s
    assert codes == [1012]
