"""A splice with both of its outer ends in the test's hands, over each carrier."""

from __future__ import annotations

import contextlib
import socket
import struct

import attrs
import trio
import trio.testing

from supervisor.gateway.frames import close_frame
from supervisor.gateway.relay import Relay
from supervisor.gateway.splice import Splice
from supervisor.tenant.traffic import Traffic

# The fast path; two tasks over the same sockets; two tasks over memory.
CARRIERS = ("relay", "sockets", "memory")
SOCKETS = ("relay", "sockets")

DIED = (1011, "the agent died")
DIED_FRAME = close_frame(*DIED)


def frame(payload: bytes = b"", opcode: int = 2, *, masked: bool = False, fin: bool = True) -> bytes:
    head = bytes([(0x80 if fin else 0) | opcode])
    mask = 0x80 if masked else 0
    n = len(payload)
    if n < 126:
        head += bytes([mask | n])
    elif n < 65536:
        head += bytes([mask | 126]) + n.to_bytes(2, "big")
    else:
        head += bytes([mask | 127]) + n.to_bytes(8, "big")
    if not masked:
        return head + payload
    key = b"\x11\x22\x33\x44"
    stream = (key * (n // 4 + 1))[:n]
    return head + key + (int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")).to_bytes(n, "big")


def client_close(code: int | None) -> bytes:
    return frame(b"" if code is None else code.to_bytes(2, "big"), 8, masked=True)


async def settle() -> None:
    """Until nothing moves any more, in the kernel neither."""
    await trio.testing.wait_all_tasks_blocked(0.01)


async def receive_exactly(stream: trio.abc.Stream, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        piece = await stream.receive_some(n - len(data))
        assert piece, f"ended after {len(data)} of {n} bytes"
        data += piece
    return bytes(data)


async def read_to_end(stream: trio.abc.Stream) -> tuple[bytes, str]:
    """All that comes, and whether it ended with "eof" or "reset"."""
    data = bytearray()
    while True:
        try:
            piece = await stream.receive_some(65536)
        except (trio.BrokenResourceError, ConnectionResetError):
            return bytes(data), "reset"
        if not piece:
            return bytes(data), "eof"
        data += piece


async def flood(stream: trio.abc.Stream, data: bytes) -> None:
    """Send all that the other side will have of `data`."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(data)


def reset(stream: trio.SocketStream) -> None:
    """End a TCP connection as a dying peer does. The stream itself is still to be closed."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    trio.lowlevel.notify_closing(stream.socket)
    stream.socket.close()


async def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        near = trio.socket.socket()
        await near.connect(listener.getsockname())
        far, _ = await listener.accept()
    return trio.SocketStream(near), trio.SocketStream(far)


def unix_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    near, far = trio.socket.socketpair()
    return trio.SocketStream(near), trio.SocketStream(far)


@attrs.define
class Joined:
    """`client` and `agent` are the outer ends."""

    splice: Splice
    client: trio.abc.HalfCloseableStream
    agent: trio.abc.HalfCloseableStream
    inner: tuple[trio.abc.Stream, trio.abc.Stream]
    relay: Relay
    traffic: Traffic
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    # What came of it: an Outcome, an exception, or None while it runs or if it was cancelled.
    result: object = None
    done: trio.Event = attrs.field(factory=trio.Event)

    async def run(self) -> None:
        try:
            with self.scope:
                self.result = await self.splice.run()
        except Exception as error:
            self.result = error
        finally:
            self.done.set()

    async def outcome(self):
        await self.done.wait()
        return self.result

    async def assert_nothing_left(self, others: int = 0) -> None:
        """Both streams are closed, and the relay has only the `others`."""
        await self.done.wait()
        assert self.relay.sockets == others
        for stream in self.inner:
            try:
                await stream.receive_some(1)
            except trio.ClosedResourceError:
                continue
            raise AssertionError(f"{stream} is still open")


async def died() -> tuple[int, str]:
    return DIED


@contextlib.asynccontextmanager
async def joined(carrier: str, *, when_agent_ends=died, to_client: bytes = b"", to_agent: bytes = b""):
    if carrier == "memory":
        client, client_inner = trio.testing.memory_stream_pair()
        agent, agent_inner = trio.testing.memory_stream_pair()
    else:
        client, client_inner = await tcp_pair()
        agent, agent_inner = unix_pair()
    relay = Relay()
    traffic = Traffic()
    splice = Splice(
        client_inner,
        agent_inner,
        relay=relay if carrier == "relay" else None,
        traffic=traffic,
        when_agent_ends=when_agent_ends,
        to_client=to_client,
        to_agent=to_agent,
    )
    it = Joined(splice, client, agent, (client_inner, agent_inner), relay, traffic)
    del splice
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        nursery.start_soon(it.run)
        yield it
        it.scope.cancel()
        await it.assert_nothing_left()
        await trio.aclose_forcefully(client)
        await trio.aclose_forcefully(agent)
        nursery.cancel_scope.cancel()
