"""Agents in memory that misbehave, one fault each: those of `fixtures/misbehave.py`, by the same names.

Every function gives a program for `MemoryLauncher`. Beside its fault each keeps an agent's contract; what the
supervisor must do with it stands in `fixtures/README.md`.
"""

from __future__ import annotations

import signal
from collections import Counter
from functools import wraps
from typing import TYPE_CHECKING

import trio

from supervisor.testing.agents import AgentConnection, echo, serving

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from supervisor.testing.launcher import AgentContext, Program

_HALF_A_FRAME = b"\x82\x7e\x03\xe8" + bytes(496)


def _fault_of_a_connection(converse: Callable[[AgentConnection], Awaitable[None]]) -> Callable[[], Program]:
    @wraps(converse)
    def make() -> Program:
        return serving(converse)

    return make


# ---- starting ----------------------------------------------------------------------------------------------


def slow_start(seconds: float) -> Program:
    """Takes its first connection only after so many seconds; until then they wait in the backlog."""

    async def program(context: AgentContext) -> int | None:
        await trio.sleep(seconds)
        return await serving(echo)(context)

    return program


def never_accepts() -> Program:
    """Its connections wait in the backlog for ever."""

    async def program(_context: AgentContext) -> int | None:
        await trio.sleep_forever()

    return program


@_fault_of_a_connection
async def never_answers(_connection: AgentConnection) -> None:
    """Accepts, reads, and says nothing."""
    await trio.sleep_forever()


def exits_at_start(returncode: int = 3) -> Program:
    """Ends before it has taken a connection. Negative is a death by that signal."""

    async def program(context: AgentContext) -> int | None:
        context.exit(returncode)
        await trio.lowlevel.checkpoint()
        return None

    return program


def dies_at_the_upgrade(returncode: int = -signal.SIGKILL) -> Program:
    """Reads the request and ends without an answer."""

    async def converse(connection: AgentConnection) -> None:
        connection.context.exit(returncode)

    return serving(converse)


# ---- answers that are no 101 -------------------------------------------------------------------------------


def refuses(status: int = 503) -> Program:
    """Answers every upgrade with this status, and lives."""

    async def converse(connection: AgentConnection) -> None:
        await connection.answer(status, f"refused with {status}\n".encode())

    return serving(converse)


def refuses_then_serves(times: int = 2, status: int = 503) -> Program:
    """Refuses each tenant so often, then serves. The count outlives the generation."""
    refused: Counter[str] = Counter()

    async def converse(connection: AgentConnection) -> None:
        tenant = connection.context.spec.tenant
        if refused[tenant] < times:
            refused[tenant] += 1
            await connection.answer(status, b"not yet\n")
        else:
            await echo(connection)

    return serving(converse)


@_fault_of_a_connection
async def speaks_garbage(connection: AgentConnection) -> None:
    """Answers what is no HTTP, and keeps the connection open."""
    await connection.send_bytes(b"SSH-2.0-OpenSSH_9.9\r\n\x00\xff\xfe\r\n\r\n")
    await _read_to_end(connection)


def huge_head(size: int = 70000) -> Program:
    """Answers 101 with a head of this many bytes and more."""

    async def converse(connection: AgentConnection) -> None:
        head = connection.accept_head()
        await connection.send_bytes(head[:-2] + b"X-Padding: " + b"x" * size + b"\r\n\r\n")
        await _read_to_end(connection)

    return serving(converse)


@_fault_of_a_connection
async def endless_head(connection: AgentConnection) -> None:
    """Starts a 101 and never ends its head."""
    await connection.send_bytes(connection.accept_head()[:-2])
    while True:
        await connection.send_bytes(b"X-More: and more\r\n" * 64)


# ---- slow or eager, and right ------------------------------------------------------------------------------


def answers_byte_by_byte(delay_s: float = 0.0) -> Program:
    """Sends the head of its 101 one byte a write, so many seconds apart; then echoes."""

    async def converse(connection: AgentConnection) -> None:
        for byte in connection.accept_head():
            await connection.send_bytes(bytes((byte,)))
            await trio.sleep(delay_s)
        async for message in connection.messages():
            await connection.send(message)

    return serving(converse)


@_fault_of_a_connection
async def eager(connection: AgentConnection) -> None:
    """Sends its first message in the same write as the 101; then echoes."""
    await connection.send_bytes(connection.accept_head() + b"\x81\x05first")
    async for message in connection.messages():
        await connection.send(message)


# ---- dying and hanging with clients connected --------------------------------------------------------------


@_fault_of_a_connection
async def dies_when_connected(connection: AgentConnection) -> None:
    """SIGKILLs itself as soon as it has answered 101."""
    await connection.accept()
    connection.context.exit(-signal.SIGKILL)


@_fault_of_a_connection
async def dies_inside_a_frame(connection: AgentConnection) -> None:
    """Sends half a frame, then SIGKILLs itself."""
    await connection.accept()
    await connection.send_bytes(_HALF_A_FRAME)
    connection.context.exit(-signal.SIGKILL)


def sends_and_dies(size: int = 81920) -> Program:
    """At the first message it sends this many bytes in frames of 4 KiB, then SIGKILLs itself."""

    async def converse(connection: AgentConnection) -> None:
        await connection.accept()
        async for _ in connection.messages():
            for start in range(0, size, 4096):
                await connection.send(bytes(min(4096, size - start)))
            connection.context.exit(-signal.SIGKILL)

    return serving(converse)


def ready_then_dies(seconds: float = 2.0) -> Program:
    """Echoes, and SIGKILLs itself this long after its first 101."""

    async def program(context: AgentContext) -> int | None:
        connected = trio.Event()

        async def converse(connection: AgentConnection) -> None:
            connected.set()
            await echo(connection)

        async def die() -> None:
            await connected.wait()
            await trio.sleep(seconds)
            context.exit(-signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(die)
            returncode = await serving(converse)(context)
            nursery.cancel_scope.cancel(reason="it was ended otherwise")
        return returncode

    return program


def hangs_after(connections: int = 1) -> Program:
    """SIGSTOPs itself as soon as it has answered so many upgrades: alive, and silent towards everybody."""

    async def program(context: AgentContext) -> int | None:
        answered = 0

        async def converse(connection: AgentConnection) -> None:
            nonlocal answered
            await connection.accept()
            answered += 1
            if answered == connections:
                context.stop()
            async for message in connection.messages():
                await connection.send(message)

        return await serving(converse)(context)

    return program


# ---- ending a connection -----------------------------------------------------------------------------------


@_fault_of_a_connection
async def half_closes(connection: AgentConnection) -> None:
    """Says one thing, then ends its writing without a Close and reads on."""
    await connection.accept()
    await connection.send("last words")
    await connection.stream.send_eof()
    await _read_to_end(connection)


@_fault_of_a_connection
async def closes_without_close(connection: AgentConnection) -> None:
    """Says one thing, then closes the stream without a Close frame."""
    await connection.accept()
    await connection.send("last words")


@_fault_of_a_connection
async def closes_without_a_code(connection: AgentConnection) -> None:
    """Sends a Close frame without a status code, which RFC 6455 allows."""
    await connection.accept()
    await connection.send_bytes(b"\x88\x00")
    await _read_to_end(connection)


@_fault_of_a_connection
async def closes_and_stays(connection: AgentConnection) -> None:
    """Sends Close 1012 to each connection and never closes the stream under it."""
    await connection.accept()
    await connection.close(1012, "Server restarting")
    await trio.sleep_forever()


# ---- flow --------------------------------------------------------------------------------------------------


def floods(size: int = 65536) -> Program:
    """Sends frames of this size without end, one a millisecond, and reads nothing."""

    async def converse(connection: AgentConnection) -> None:
        await connection.accept()
        while True:
            await connection.send(bytes(size))
            # Without it an autojump clock would stand still for as long as somebody reads.
            await trio.sleep(0.001)

    return serving(converse)


@_fault_of_a_connection
async def stops_reading(connection: AgentConnection) -> None:
    """Answers 101 and never reads again."""
    await connection.accept()
    await trio.sleep_forever()


# ---- ending the process ------------------------------------------------------------------------------------


def ignores_sigterm() -> Program:
    """Echoes on, whatever SIGTERM says."""
    return serving(echo, heeds_sigterm=False)


async def _read_to_end(connection: AgentConnection) -> None:
    while await connection.stream.receive_some(65536):
        pass
