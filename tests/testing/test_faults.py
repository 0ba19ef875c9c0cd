"""Each fault in memory is what its name says, and what its twin in fixtures/ is; nothing else is wrong with it."""

from __future__ import annotations

import inspect
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from supervisor.client import ConnectionClosed, ConnectionRejected, HandshakeFailed, open_websocket
from supervisor.sandbox.launcher import AgentSpec, ExitStatus
from supervisor.testing import faults
from supervisor.testing.agents import AgentConnection, echo, echo_agent, serving
from supervisor.testing.launcher import MemoryLauncher, Program

REQUEST = (
    b"GET / HTTP/1.1\r\nHost: agent\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@asynccontextmanager
async def running(program, launcher=None, generation=1):
    launcher = launcher or MemoryLauncher(program)
    spec = AgentSpec(tenant="alice", generation=generation, command=("agent",), home=Path("/nonexistent"))
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(launcher.run, spec)
            yield process
            process.kill()
    launcher.check()


@asynccontextmanager
async def client(process, target="/", **options):
    stream = await process.connect()
    async with open_websocket(stream, host="agent", target=target, **options) as websocket:
        yield websocket


async def assert_echoes(websocket):
    for message in ("hello", b"\x00\xff", "x" * 300_000):
        await websocket.send(message)
        assert await websocket.receive() == message


async def assert_silent(stream, seconds=1000):
    with trio.move_on_after(seconds) as scope:
        await stream.receive_some()
    assert scope.cancelled_caught


async def closed_with(websocket):
    try:
        while True:
            await websocket.receive()
    except ConnectionClosed as closed:
        return closed.code


async def upgrade(process):
    stream = await process.connect()
    await stream.send_all(REQUEST)
    return stream


async def read_all(stream):
    received = b""
    while data := await stream.receive_some():
        received += data
    await stream.aclose()
    return received


def test_every_fault_of_the_real_programs_is_here_unless_it_needs_a_process():
    fixtures = str(Path(__file__).parents[2] / "fixtures")
    sys.path.insert(0, fixtures)
    try:
        import misbehave
    finally:
        sys.path.remove(fixtures)
    here = {
        name.replace("_", "-")
        for name, value in vars(faults).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == faults.__name__
    }
    assert here - set(misbehave.FAULTS) == {"hangs-after"}
    assert set(misbehave.FAULTS) - here == {"hangs", "floods-its-output", "forks-grandchildren", "hogs-memory"}


# ---- what all of them are made of --------------------------------------------------------------------------


async def test_the_echo_agent_serves_side_by_side(autojump_clock):
    async with running(echo_agent) as process, client(process) as one, client(process, "/echo") as two:
        await assert_echoes(one)
        await assert_echoes(two)


async def test_a_connection_tells_what_was_asked(autojump_clock):
    asked = []

    async def converse(connection: AgentConnection):
        asked.append((connection.target, connection.header("tenantry-tenant"), connection.header("nothing")))
        await echo(connection)

    options = {"headers": [("Tenantry-Tenant", "alice")], "subprotocols": ["one", "two"]}
    async with running(serving(converse)) as process, client(process, "/a?b=1", **options) as websocket:
        assert websocket.subprotocol == "one"
    assert asked == [("/a?b=1", "alice", None)]


async def test_frames_behind_the_request_are_not_lost(autojump_clock):
    async with running(echo_agent) as process:
        stream = await process.connect()
        await stream.send_all(REQUEST + b"\x81\x85\x00\x00\x00\x00eager")
        received = b""
        while not received.endswith(b"\x81\x05eager"):
            received += await stream.receive_some()
        await stream.aclose()


async def test_every_cut_of_a_request_is_understood(autojump_clock):
    sent = REQUEST + b"\x81\x85\x00\x00\x00\x00eager"
    async with running(echo_agent) as process:
        for at in range(1, len(sent)):
            stream = await process.connect()
            await stream.send_all(sent[:at])
            await trio.testing.wait_all_tasks_blocked()
            await stream.send_all(sent[at:])
            received = b""
            while not received.endswith(b"\x81\x05eager"):
                received += await stream.receive_some()
            assert received.startswith(b"HTTP/1.1 101 ")
            await stream.aclose()


async def test_pings_are_answered(autojump_clock):
    async with running(echo_agent) as process:
        stream = await upgrade(process)
        await stream.receive_some()
        await stream.send_all(b"\x89\x82\x00\x00\x00\x00hi")
        assert await stream.receive_some() == b"\x8a\x02hi"
        await stream.aclose()


@pytest.mark.parametrize("head", [b"what?\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"x" * 70000])
async def test_what_is_no_request_gets_400(head, autojump_clock):
    async with running(echo_agent) as process:
        stream = await process.connect()
        await stream.send_all(head)
        assert (await read_all(stream)).startswith(b"HTTP/1.1 400 ")


async def test_sigterm_closes_everybody_with_1012_and_exits_with_0(autojump_clock):
    """S3-14: all connections side by side, and one that does not answer holds up nobody for more than 0.5 s."""
    async with running(echo_agent) as process, client(process) as one:
        deaf = await upgrade(process)
        await deaf.receive_some()
        began = trio.current_time()
        process.terminate()
        assert await closed_with(one) == 1012
        assert await process.wait_exited() == ExitStatus(0)
        assert trio.current_time() - began == 0.5
        assert (await read_all(deaf)).startswith(b"\x88\x13" + (1012).to_bytes(2, "big"))


async def test_the_drain_ends_with_the_last_connection(autojump_clock):
    async with running(echo_agent) as process, client(process) as one, client(process) as two:
        process.terminate()
        for websocket in (one, two):
            assert await closed_with(websocket) == 1012
        assert await process.wait_exited() == ExitStatus(0)
        assert trio.current_time() == 0


async def test_sigterm_without_a_connection_is_an_exit_at_once(autojump_clock):
    async with running(echo_agent) as process:
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        process.terminate()
        assert await process.wait_exited() == ExitStatus(0)
        assert trio.current_time() == began


async def test_new_upgrades_are_refused_during_the_drain(autojump_clock):
    """S3-14."""
    async with running(echo_agent) as process:
        deaf = await upgrade(process)
        await deaf.receive_some()
        process.terminate()
        with pytest.raises(ConnectionRejected) as rejected:
            async with client(process):
                raise AssertionError("was served")
        assert rejected.value.status == 503
        await deaf.aclose()
        assert await process.wait_exited() == ExitStatus(0)


async def test_a_bug_in_a_conversation_ends_the_agent(autojump_clock):
    async def converse(connection):
        await connection.accept()
        raise LookupError("a bug")

    launcher = MemoryLauncher(serving(converse))
    with pytest.RaisesGroup(pytest.RaisesGroup(LookupError, allow_unwrapped=True, flatten_subgroups=True)):
        async with running(None, launcher) as process, client(process) as websocket:
            assert await closed_with(websocket) == 1006
            assert await process.wait_exited() == ExitStatus(1)


# ---- the faults --------------------------------------------------------------------------------------------


async def test_slow_start(autojump_clock):
    async with running(faults.slow_start(29)) as process, client(process, handshake_timeout_s=30) as websocket:
        assert trio.current_time() >= 29
        await assert_echoes(websocket)


@pytest.mark.parametrize("fault", [faults.never_accepts, faults.never_answers])
async def test_never_ready(fault, autojump_clock):
    async with running(fault()) as process:
        stream = await upgrade(process)
        await assert_silent(stream)
        await stream.aclose()
        assert process.exit_status is None


@pytest.mark.parametrize("returncode", [3, 0, -signal.SIGSEGV])
async def test_exits_at_start(returncode, autojump_clock):
    async with running(faults.exits_at_start(returncode)) as process:
        assert await process.wait_exited() == ExitStatus(returncode)


@pytest.mark.parametrize("returncode", [-9, 5])
async def test_dies_at_the_upgrade(returncode, autojump_clock):
    async with running(faults.dies_at_the_upgrade(returncode)) as process:
        assert await read_all(await upgrade(process)) == b""
        assert await process.wait_exited() == ExitStatus(returncode)


@pytest.mark.parametrize("status", [503, 403])
async def test_refuses_and_lives(status, autojump_clock):
    async with running(faults.refuses(status)) as process:
        for _ in range(3):
            with pytest.raises(ConnectionRejected) as rejected:
                async with client(process):
                    raise AssertionError("was served")
            assert rejected.value.status == status
        assert process.exit_status is None


async def test_refuses_then_serves_counts_over_generations(autojump_clock):
    launcher = MemoryLauncher(faults.refuses_then_serves(2, 502))
    for generation in (1, 2):
        async with running(None, launcher, generation) as process:
            assert (await read_all(await upgrade(process))).startswith(b"HTTP/1.1 502 ")
    async with running(None, launcher, 3) as process, client(process) as websocket:
        await assert_echoes(websocket)


async def test_speaks_garbage(autojump_clock):
    async with running(faults.speaks_garbage()) as process:
        with pytest.raises(HandshakeFailed):
            async with client(process):
                raise AssertionError("was served")


async def test_huge_head(autojump_clock):
    async with running(faults.huge_head(70000)) as process:
        stream = await upgrade(process)
        received = b""
        while not received.endswith(b"\r\n\r\n"):
            received += await stream.receive_some()
        await stream.aclose()
        assert len(received) > 70000


async def test_endless_head(autojump_clock):
    async with running(faults.endless_head()) as process:
        stream = await upgrade(process)
        received = 0
        while received < 1_000_000:
            data = await stream.receive_some()
            assert b"\r\n\r\n" not in data
            received += len(data)
        await stream.aclose()


async def test_answers_byte_by_byte(autojump_clock):
    async with running(faults.answers_byte_by_byte(0.01)) as process, client(process) as websocket:
        assert trio.current_time() > 1
        await assert_echoes(websocket)


async def test_eager(autojump_clock):
    async with running(faults.eager()) as process, client(process) as websocket:
        assert await websocket.receive() == "first"
        await assert_echoes(websocket)


async def test_dies_when_connected(autojump_clock):
    async with running(faults.dies_when_connected()) as process:
        received = await read_all(await upgrade(process))
        assert received.startswith(b"HTTP/1.1 101 ")
        assert received.endswith(b"\r\n\r\n")
        assert await process.wait_exited() == ExitStatus(-9)


async def test_dies_inside_a_frame(autojump_clock):
    async with running(faults.dies_inside_a_frame()) as process:
        received = (await read_all(await upgrade(process))).partition(b"\r\n\r\n")[2]
        assert received[:4] == b"\x82\x7e\x03\xe8"
        assert len(received) == 500
        assert await process.wait_exited() == ExitStatus(-9)


async def test_sends_and_dies(autojump_clock):
    async with running(faults.sends_and_dies(81920)) as process, client(process) as websocket:
        await websocket.send("now")
        received = 0
        while received < 81920:
            received += len(await websocket.receive())
        assert await closed_with(websocket) == 1006
        assert received == 81920
        assert await process.wait_exited() == ExitStatus(-9)


async def test_ready_then_dies(autojump_clock):
    async with running(faults.ready_then_dies(2)) as process:
        await trio.sleep(10)
        assert process.exit_status is None
        async with client(process) as websocket:
            await assert_echoes(websocket)
            began = trio.current_time()
            assert await closed_with(websocket) == 1006
            assert trio.current_time() - began == pytest.approx(2, abs=0.1)
        assert await process.wait_exited() == ExitStatus(-9)


async def test_ready_then_dies_drains_before_that(autojump_clock):
    async with running(faults.ready_then_dies(2)) as process:
        await trio.testing.wait_all_tasks_blocked()
        process.terminate()
        assert await process.wait_exited() == ExitStatus(0)


async def test_hangs_after(autojump_clock):
    async with running(faults.hangs_after(2)) as process, client(process, close_timeout_s=1) as first:
        await assert_echoes(first)
        async with client(process, close_timeout_s=1) as second:
            for websocket in (first, second):
                await websocket.send("hello")
                with trio.move_on_after(1000) as scope:
                    await websocket.receive()
                assert scope.cancelled_caught
            stream = await upgrade(process)
            await assert_silent(stream)
            await stream.aclose()
            process.terminate()
            assert process.exit_status is None


async def test_half_closes(autojump_clock):
    async with running(faults.half_closes()) as process:
        stream = await upgrade(process)
        received = b""
        while data := await stream.receive_some():
            received += data
        assert received.endswith(b"\x81\x0alast words")
        await stream.send_all(bytes(1_000_000))
        await stream.aclose()
        assert process.exit_status is None


async def test_closes_without_close(autojump_clock):
    async with running(faults.closes_without_close()) as process, client(process) as websocket:
        assert await websocket.receive() == "last words"
        assert await closed_with(websocket) == 1006
        assert process.exit_status is None


async def test_closes_without_a_code(autojump_clock):
    async with running(faults.closes_without_a_code()) as process, client(process) as websocket:
        assert await closed_with(websocket) == 1005
        assert process.exit_status is None


async def test_closes_and_stays(autojump_clock):
    async with running(faults.closes_and_stays()) as process:
        stream = await upgrade(process)
        received = b""
        while not received.endswith(b"Server restarting"):
            received += await stream.receive_some()
        await stream.send_all(b"\x88\x80\x00\x00\x00\x00")
        await assert_silent(stream)
        await stream.aclose()


async def test_floods_under_back_pressure(autojump_clock):
    async with running(faults.floods(1000)) as process:
        stream = await upgrade(process)
        # It waits for its reader: nothing happens any more, so virtual time passes.
        await trio.sleep(3600 / 2)
        for _ in range(100):
            assert await stream.receive_some()
        await stream.aclose()


async def test_stops_reading(autojump_clock):
    async with running(faults.stops_reading()) as process:
        stream = await upgrade(process)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 101 ")
        with trio.move_on_after(1000) as scope:
            await stream.send_all(bytes(10_000_000))
        assert scope.cancelled_caught
        await stream.aclose()


async def test_ignores_sigterm(autojump_clock):
    async with running(faults.ignores_sigterm()) as process, client(process, close_timeout_s=1) as websocket:
        await assert_echoes(websocket)
        process.terminate()
        await trio.sleep(1000)
        await assert_echoes(websocket)
        assert process.exit_status is None


@pytest.mark.parametrize(
    "fault",
    [
        faults.refuses,
        faults.eager,
        faults.never_answers,
        faults.half_closes,
        faults.floods,
        faults.ready_then_dies,
        faults.stops_reading,
    ],
)
async def test_what_is_not_the_fault_keeps_the_contract(fault, autojump_clock):
    """S3-14: apart from its fault each agent drains on SIGTERM, and is gone after 0.5 s."""
    program: Program = fault()
    async with running(program) as process:
        stream = await upgrade(process)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        process.terminate()
        assert await process.wait_exited() == ExitStatus(0)
        assert trio.current_time() - began <= 0.5
        await stream.aclose()
