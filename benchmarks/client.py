"""The measuring client, a process of its own: takes jobs as JSON lines on stdin, and answers each with one line.

It speaks WebSocket by picows, so that what is measured is the way to the agent and not the client. Its instants are
CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time

from picows import WSError, WSListener, WSMsgType, ws_connect

MAX_FRAME_BYTES = 64 << 20
# Upgrades under way at one moment while many connections are opened.
OPENING = 32
SMALL = b"x" * 64


class Socket(socket.socket):
    """picows sets TCP options on whatever it gets, and a unix socket has none."""

    def setsockopt(self, level, *args):
        if self.family != socket.AF_UNIX or level != socket.IPPROTO_TCP:
            super().setsockopt(level, *args)

    def getsockopt(self, level, *args):
        if self.family == socket.AF_UNIX and level == socket.IPPROTO_TCP:
            return 1
        return super().getsockopt(level, *args)


class Connection(WSListener):
    """Sends, and waits for one message at a time. Remembers the Close that it got, and when."""

    def __init__(self):
        self.waiting = None
        self.code = None
        self.closed_at = None
        self.gone = asyncio.get_running_loop().create_future()

    def on_ws_connected(self, transport):
        self.transport = transport

    def on_ws_frame(self, transport, frame):
        if frame.msg_type == WSMsgType.CLOSE:
            if self.closed_at is None:
                self.closed_at = time.monotonic()
                self.code = int(frame.get_close_code())
                if not transport.is_close_frame_sent:
                    # The server ends the TCP connection (RFC 6455, section 7.1.1).
                    transport.send_close(self.code)
        elif self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(frame.get_payload_as_bytes())

    def on_ws_disconnected(self, transport):
        error = ConnectionError(f"the connection ended (close code {self.code})")
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(error)
        if not self.gone.done():
            self.gone.set_result(time.monotonic())

    async def echo(self, payload=SMALL, timeout_s=60.0):
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.send(WSMsgType.BINARY, payload)
        async with asyncio.timeout(timeout_s):
            if await self.waiting != payload:
                raise ValueError("the echo is not what was sent")

    async def leave(self):
        """Closes in order, and waits for the other side to hang up."""
        self.transport.send_close(1000)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await asyncio.shield(self.gone)
        self.transport.disconnect()


class Echoing(Connection):
    """Has one message on its way at all times, and notes how long each took, from `begin` until `until`."""

    def __init__(self, payload, trips, begin, until):
        super().__init__()
        self.payload = payload
        self.trips = trips
        self.begin = begin
        self.until = until
        self.echoes = 0
        self.done = asyncio.get_running_loop().create_future()

    def send(self):
        self.at = time.perf_counter()
        self.transport.send(WSMsgType.BINARY, self.payload)

    def on_ws_frame(self, transport, frame):
        if frame.msg_type != WSMsgType.BINARY:
            return
        at = time.perf_counter()
        if frame.payload_size != len(self.payload):
            self.done.set_exception(ValueError("the echo is not as long as what was sent"))
            return
        self.echoes += 1
        if at >= self.begin:
            self.trips.append(at - self.at)
        if at < self.until:
            self.send()
        elif not self.done.done():
            self.done.set_result(at)

    def on_ws_disconnected(self, transport):
        super().on_ws_disconnected(transport)
        if not self.done.done():
            self.done.set_exception(ConnectionError("the connection ended while it was measured"))


async def connect(target, make=Connection):
    """`target` is [address, path, headers]; an address is `unix:/path` or `tcp:port`."""
    address, path, headers = target
    kind, _, where = address.partition(":")

    def make_socket(_):
        if kind == "unix":
            sock = Socket(socket.AF_UNIX)
            sock.connect(where)
        else:
            sock = Socket(socket.AF_INET)
            sock.connect(("127.0.0.1", int(where)))
        sock.setblocking(False)
        return sock

    _, connection = await ws_connect(
        make,
        f"ws://localhost{path}",
        socket_factory=make_socket,
        extra_headers=headers,
        max_frame_size=MAX_FRAME_BYTES,
        read_buffer_init_size=64 * 1024,
        websocket_handshake_timeout=60.0,
    )
    return connection


async def ready(target, timeout_s):
    """Waits until an echo comes back; for programs that have just been started."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = await connect(target)
            await connection.echo()
            await connection.leave()
            return {}
        except (OSError, WSError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)


async def echo(target, size, connections, seconds):
    """Echoes a second over all connections, and the round trips' percentiles in microseconds."""
    payload = os.urandom(size)
    trips = []
    opened = [await connect(target, lambda: Echoing(payload, trips, math.inf, math.inf)) for _ in range(connections)]
    begin = time.perf_counter() + min(0.1, seconds / 4)
    for connection in opened:
        connection.begin, connection.until = begin, begin + seconds
        connection.send()
    last = max(await asyncio.gather(*(connection.done for connection in opened)))
    for connection in opened:
        await connection.leave()
    trips.sort()
    return {
        "rate": len(trips) / (last - begin),
        "p50_us": trips[len(trips) // 2] * 1e6,
        "p99_us": trips[len(trips) * 99 // 100] * 1e6,
        "all_echoes": sum(connection.echoes for connection in opened),
    }


async def connects(target, count):
    """How long until the handshake was answered, and until the first echo, of `count` connects one by one."""
    handshakes, echoes = [], []
    for _ in range(count):
        began = time.perf_counter()
        connection = await connect(target)
        handshakes.append(time.perf_counter() - began)
        await connection.echo()
        echoes.append(time.perf_counter() - began)
        await connection.leave()
    return {"handshake_s": handshakes, "echo_s": echoes}


async def cold_direct(command, path, env):
    """Starts an agent as the contract says, on a socket that listens already, and connects: nobody is between."""
    with tempfile.TemporaryDirectory() as directory:
        where = f"{directory}/agent"
        began = time.perf_counter()
        process = start_agent(command, env, directory, where)
        try:
            connection = await connect([f"unix:{where}", path, {}])
            handshake_s = time.perf_counter() - began
            await connection.echo()
            echo_s = time.perf_counter() - began
            await connection.leave()
        finally:
            process.kill()
            process.wait()
    return {"handshake_s": handshake_s, "echo_s": echo_s}


def start_agent(command, env, directory, where):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(where)
        listener.listen(128)
        # Only a process itself can tell its LISTEN_PID before it becomes the agent.
        shell = f'LISTEN_PID=$$ exec "$@" 3<&{listener.fileno()}'
        return subprocess.Popen(
            ["/bin/sh", "-c", shell, "sh", *command],
            env={**env, "LISTEN_FDS": "1", "TENANTRY_WORKSPACE": directory},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )


async def recover(target, pid):
    """SIGKILL to the agent of an open connection; reconnects as soon as that is closed. Times are since the kill."""
    connection = await connect(target)
    await connection.echo()
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30.0):
        gone_at = await connection.gone
    refused = 0
    while True:
        try:
            again = await connect(target)
            break
        except (OSError, WSError):
            refused += 1
            if time.monotonic() > killed_at + 60.0:
                raise
            await asyncio.sleep(0.01)
    await again.echo()
    result = {
        "echo_s": time.monotonic() - killed_at,
        "close_s": (connection.closed_at or gone_at) - killed_at,
        "code": connection.code,
        "refused": refused,
    }
    await again.leave()
    return result


held = []


async def hold(targets):
    """Opens a connection to each target, echoes once over it, and keeps it."""
    slots = asyncio.Semaphore(OPENING)

    async def open_one(target):
        async with slots:
            connection = await connect(target)
            await connection.echo()
            return connection

    held.extend(await asyncio.gather(*(open_one(target) for target in targets)))
    return {"connections": len(held)}


async def release():
    """Closes all that are held."""
    await asyncio.gather(*(connection.leave() for connection in held))
    held.clear()
    return {}


async def closings(timeout_s):
    """Waits until all that are held have ended; for each its close code and the instants of Close and of the end."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(asyncio.shield(connection.gone) for connection in held))
    ends = [
        [connection.code, connection.closed_at, connection.gone.result() if connection.gone.done() else None]
        for connection in held
    ]
    for connection in held:
        connection.transport.disconnect()
    held.clear()
    return {"ends": ends}


JOBS = {job.__name__: job for job in (ready, echo, connects, cold_direct, recover, hold, release, closings)}


async def main():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    while line := await asyncio.to_thread(sys.stdin.readline):
        job = json.loads(line)
        gc.collect()
        gc.disable()
        try:
            result = await JOBS[job.pop("do")](**job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        finally:
            gc.enable()
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
