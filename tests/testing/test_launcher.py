"""The launcher in memory keeps what `Launcher` and `AgentProcess` promise."""

from __future__ import annotations

import signal
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from supervisor.errors import AgentStartFailed, AgentUnreachable
from supervisor.sandbox.launcher import AgentSpec, ExitStatus
from supervisor.testing.agents import echo_agent, in_turn
from supervisor.testing.launcher import MemoryLauncher


def spec(generation=1, tenant="alice"):
    return AgentSpec(tenant=tenant, generation=generation, command=("agent",), home=Path("/nonexistent"))


@asynccontextmanager
async def running(program, *, check=True):
    """An agent of `program`; its run must have returned by itself or after a kill when the block is left."""
    launcher = MemoryLauncher(program)
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(launcher.run, spec())
            yield launcher, process
            process.kill()
    assert not launcher.alive
    assert process.exit_status is not None
    if check:
        launcher.check()


async def pass_on(context):
    """Echoes one connection, byte by byte as they come."""
    stream = await context.accept()
    while data := await stream.receive_some():
        await stream.send_all(data)


async def never_ends(_context):
    await trio.sleep_forever()


def ends_with(returncode):
    async def program(_context):
        await trio.lowlevel.checkpoint()
        return returncode

    return program


async def test_a_connection_reaches_the_program(autojump_clock):
    async with running(pass_on) as (launcher, process):
        stream = await process.connect()
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        assert process.connections == 1
        assert process.exit_status is None
        assert process.pid is None
        assert launcher.alive == {"alice": process}
        await stream.aclose()
        assert await process.wait_exited() == ExitStatus(0)


@pytest.mark.parametrize("returncode", [None, 0, 7])
async def test_what_the_program_returns_is_the_status(returncode, autojump_clock):
    async def program(context):
        await trio.sleep(1)
        return returncode

    async with running(program) as (_, process):
        assert (await process.wait_exited()).returncode == (returncode or 0)
    # A kill of what has ended changes nothing.
    assert process.exit_status == ExitStatus(returncode or 0)


async def test_sigterm_ends_a_program_that_does_not_catch_it(autojump_clock):
    async with running(never_ends) as (_, process):
        process.terminate()
        assert (await process.wait_exited()).signal == signal.SIGTERM
        process.terminate()


async def test_sigterm_is_an_event_for_one_that_does(autojump_clock):
    async def program(context):
        await context.catch_sigterm().wait()
        await trio.sleep(3)
        return 4

    async with running(program) as (_, process):
        await trio.testing.wait_all_tasks_blocked()
        process.terminate()
        process.terminate()
        began = trio.current_time()
        assert await process.wait_exited() == ExitStatus(4)
        assert trio.current_time() - began == 3


@pytest.mark.parametrize("waiters", [1, 3])
async def test_kill_ends_what_ignores_sigterm_and_tells_everybody(waiters, autojump_clock):
    async def program(context):
        context.catch_sigterm()
        await trio.sleep_forever()

    told = []
    async with running(program) as (_, process), trio.open_nursery() as nursery:

        async def wait():
            told.append(await process.wait_exited())

        for _ in range(waiters):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        process.terminate()
        await trio.testing.wait_all_tasks_blocked()
        assert told == []
        process.kill()
    assert told == [ExitStatus(-9)] * waiters


async def test_a_dying_agents_streams_are_closed_before_its_exit_is_told(autojump_clock):
    async def program(context):
        stream = await context.accept()
        await stream.send_all(b"last words")
        try:
            await trio.sleep_forever()
        finally:
            # SIGKILL lets nobody say anything more.
            with trio.CancelScope(shield=True), pytest.raises(trio.ClosedResourceError):
                await stream.send_all(b" and more")

    async with running(program) as (_, process):
        stream, waiting = await process.connect(), await process.connect()
        await trio.testing.wait_all_tasks_blocked()
        process.kill()
        await process.wait_exited()
        assert await stream.receive_some() == b"last words"
        assert await stream.receive_some() == b""
        # Never accepted.
        assert await waiting.receive_some() == b""
        assert process.connections == 0
        with pytest.raises(AgentUnreachable):
            await process.connect()


async def test_an_agent_may_stop_listening_and_live(autojump_clock):
    async def program(context):
        stream = await context.accept()
        await trio.testing.wait_all_tasks_blocked()
        context.stop_listening()
        with pytest.raises(trio.EndOfChannel):
            await context.accept()
        await stream.send_all(b"still here")
        await trio.sleep_forever()

    async with running(program) as (_, process):
        stream, waiting = await process.connect(), await process.connect()
        assert await stream.receive_some() == b"still here"
        assert await waiting.receive_some() == b""
        with pytest.raises(AgentUnreachable):
            await process.connect()
        assert process.exit_status is None


async def test_exit_ends_the_process_at_once_from_any_task(autojump_clock):
    async def program(context):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def child():
                await trio.sleep(1)
                context.exit(-signal.SIGSEGV)
                await trio.sleep_forever()

            await trio.sleep_forever()

    async with running(program) as (_, process):
        assert (await process.wait_exited()).signal == signal.SIGSEGV


@pytest.mark.parametrize("catches", [True, False])
async def test_a_stopped_process_is_alive_and_silent_until_it_is_killed(catches, autojump_clock):
    async def program(context):
        if catches:
            context.catch_sigterm()
        stream = await context.accept()
        await stream.send_all(b"before")
        context.stop()
        await stream.send_all(b"after")

    async with running(program) as (_, process):
        stream = await process.connect()
        assert await stream.receive_some() == b"before"
        await trio.testing.wait_all_tasks_blocked()
        process.terminate()
        with trio.move_on_after(3000) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        assert process.exit_status is None
        process.kill()
        assert await process.wait_exited() == ExitStatus(-9)


async def test_run_returns_only_when_nothing_of_the_program_runs(autojump_clock):
    ended_at = []

    async def program(context):
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
            ended_at.append(trio.current_time())

    async with running(program) as (_, process):
        await trio.testing.wait_all_tasks_blocked()
        process.kill()
        assert process.exit_status is None
    assert ended_at == [trio.current_time()]


async def test_cancelling_run_kills_and_waits(autojump_clock):
    launcher = MemoryLauncher(pass_on)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            process = await nursery.start(launcher.run, spec())
            stream = await process.connect()
            scope.cancel()
    assert scope.cancelled_caught
    assert process.exit_status == ExitStatus(-9)
    assert not launcher.alive
    assert await stream.receive_some() == b""


async def test_a_cancelled_connect_leaves_no_connection(autojump_clock):
    async with running(pass_on) as (_, process):
        with trio.CancelScope() as scope:
            scope.cancel()
            await process.connect()
        assert scope.cancelled_caught
        assert process.connections == 0


async def test_starts_are_recorded_and_can_be_made_to_fail(autojump_clock):
    launcher = MemoryLauncher(pass_on)
    launcher.fail_next_starts(AgentStartFailed("no such program", errno=2))
    async with trio.open_nursery() as nursery:
        with pytest.raises(AgentStartFailed, match="no such program"):
            await nursery.start(launcher.run, spec(1))
        (await nursery.start(launcher.run, spec(2))).kill()
    assert [start.generation for start in launcher.starts] == [1, 2]
    launcher.check()


@pytest.mark.parametrize(("second", "words"), [(2, "still ran"), (1, "still ran")])
async def test_two_generations_of_a_tenant_never_overlap(second, words, autojump_clock):
    launcher = MemoryLauncher(pass_on)
    async with trio.open_nursery() as nursery:
        first = await nursery.start(launcher.run, spec(1))
        await nursery.start(launcher.run, spec(1, tenant="bob"))
        with pytest.raises(AssertionError, match=words):
            await nursery.start(launcher.run, spec(second))
        assert launcher.alive["alice"] is first
        nursery.cancel_scope.cancel()
    with pytest.RaisesGroup(AssertionError):
        launcher.check()


async def test_a_generation_is_newer_than_the_last(autojump_clock):
    launcher = MemoryLauncher(ends_with(0))
    await launcher.run(spec(2))
    with pytest.raises(AssertionError, match="after generation 2"):
        await launcher.run(spec(2))


async def test_an_exception_in_a_program_is_status_1_and_is_kept(autojump_clock):
    async def program(context):
        await trio.lowlevel.checkpoint()
        raise LookupError("a bug of the agent's")

    async with running(program, check=False) as (launcher, process):
        assert await process.wait_exited() == ExitStatus(1)
    with pytest.RaisesGroup(LookupError):
        launcher.check()


async def test_processor_time_is_what_the_test_says(autojump_clock):
    async with running(pass_on) as (_, process):
        assert await process.cpu_seconds() == 0
        process.cpu_s = 1.5
        assert await process.cpu_seconds() == 1.5


async def test_starts_of_a_tenant_can_run_different_programs(autojump_clock):
    launcher = MemoryLauncher(in_turn(ends_with(1), ends_with(2)))
    statuses = []
    for generation in (1, 2, 3):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(launcher.run, spec(generation))
            statuses.append((await process.wait_exited()).returncode)
    assert statuses == [1, 2, 2]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(launcher.run, spec(1, tenant="bob"))
        assert await process.wait_exited() == ExitStatus(1)


async def test_it_needs_no_thread(autojump_clock):
    before = trio.to_thread.current_default_thread_limiter().statistics().borrowed_tokens
    async with running(echo_agent) as (_, process):
        (await process.connect()).close()
    assert trio.to_thread.current_default_thread_limiter().statistics().borrowed_tokens == before
