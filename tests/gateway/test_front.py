"""The accept loop over real sockets: whatever one client does, the others are served and nothing is left."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
import subprocess
import sys

import pytest
import trio
import trio.testing

from supervisor.gateway.front import Lease
from tests.gateway.front_kit import (
    KEY,
    PLAIN,
    UPGRADE,
    UPGRADE_HEADERS,
    Kit,
    Upgrades,
    make_kit,
    read_all,
    read_until,
    request,
    serving,
    until,
)

UP = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.asynccontextmanager
async def quiet_front(kit: Kit | None = None, **options):
    """A served front that must stay whole: alive at the end, no crash, no task, no fd, no place taken."""
    kit = kit or make_kit()
    fds_before = fds()
    with trio.fail_after(60):
        async with serving(kit, **options):
            tasks = trio.lowlevel.current_statistics().tasks_living
            yield kit
            await kit.assert_alive()
            await until(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks)
            assert kit.front._places._taken == 0
            assert not kit.front._places._by_peer
    assert fds() == fds_before
    assert not kit.events_named("connection_crashed"), kit.events


def reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# ---- bad input -------------------------------------------------------------------------------------------


def frame(opcode, payload=b"", *, fin=1, rsv=0, length=None, masked=True):
    size = len(payload) if length is None else length
    mask_bit = 0x80 if masked else 0
    head = bytes([fin << 7 | rsv << 4 | opcode])
    if size < 126:
        head += bytes([mask_bit | size])
    elif size < 65536:
        head += bytes([mask_bit | 126]) + struct.pack("!H", size)
    else:
        head += bytes([mask_bit | 127]) + struct.pack("!Q", size)
    return head + (b"\0\0\0\0" if masked else b"") + payload


# Each input, and the status that its first answer has; None where it depends on chance.
HTTP_INPUTS = {
    "no upgrade header": (b"GET /ok HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n" + KEY + b"\r\n", 200),
    "no key": (b"GET /ws HTTP/1.1\r\nHost: x\r\n" + UP + b"Sec-WebSocket-Version: 13\r\n\r\n", 400),
    "upgrade on 1.0": (b"GET /ws HTTP/1.0\r\nHost: x\r\n" + UPGRADE_HEADERS + b"\r\n", 400),
    "version 99": (UPGRADE.replace(b"13", b"99"), 426),
    "post upgrade": (request(b"POST /ws", b"Content-Length: 5", UPGRADE_HEADERS.strip(), body=b"hello"), 405),
    "upgrade with a body": (request(b"GET /ws", b"Content-Length: 5", UPGRADE_HEADERS.strip(), body=b"hello"), 400),
    "upgrade with chunks": (
        request(b"GET /ws", b"Transfer-Encoding: chunked", UPGRADE_HEADERS.strip(), body=b"5\r\nhello\r\n0\r\n\r\n"),
        400,
    ),
    "bytes above ascii in the path": (request(b"GET /w\xc3\xa9"), 400),
    "percent-encoded nonsense": (request(b"GET /%ff%fe"), 404),
    "absolute form": (request(b"GET http://a:b:c/ws"), 400),
    "asterisk form": (request(b"OPTIONS *"), 400),
    "authority form": (request(b"CONNECT x:80"), 400),
    "a path without a slash": (request(b"GET foo", UPGRADE_HEADERS.strip()), 400),
    "no host": (b"GET /ok HTTP/1.1\r\n\r\n", 400),
    "a weird host": (b"GET /ok HTTP/1.1\r\nHost: \xff\xfe[[:\r\n\r\n", 400),
    "garbage": (bytes(range(256)) + b"\r\n", 400),
    "random": (os.urandom(300), None),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
    "a long header": (request(b"GET /ok", b"X: " + b"a" * 40_000), 200),
    "a huge header": (request(b"GET /ok", b"X: " + b"a" * 400_000), 431),
    "a thousand headers": (request(b"GET /ok", *[b"X: y"] * 1000), 431),
    "h2c": (
        request(b"GET /ok", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
        200,
    ),
    "h2c with bad settings": (
        request(b"GET /ok", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: !!"),
        200,
    ),
    "h2c without settings": (request(b"GET /ok", b"Connection: Upgrade", b"Upgrade: h2c"), 200),
    "http/2 and garbage": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(200), 505),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\n", 505),
    "http/2 and a bad frame": (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n\0\0\0\4\0\0\0\0\0", 505),
    "expect": (request(b"POST /body", b"Expect: 100-continue", b"Content-Length: 3", body=b"abc"), None),
    "pipelined": (PLAIN * 20, 200),
    "a bad chunk": (request(b"POST /body", b"Transfer-Encoding: chunked", body=b"zz\r\n"), 400),
    "a bad chunk's end": (request(b"POST /body", b"Transfer-Encoding: chunked", body=b"1\r\nabc\r\n"), 400),
    "a negative chunk": (request(b"POST /body", b"Transfer-Encoding: chunked", body=b"-1\r\n\r\n"), 400),
    "a bare CR in a chunk's extension": (
        request(b"POST /body", b"Transfer-Encoding: chunked", body=b"1;a\rb\r\nx\r\n0\r\n\r\n"),
        400,
    ),
    "a folded trailer": (
        request(b"POST /body", b"Transfer-Encoding: chunked", body=b"0\r\nA: b\r\n c\r\n\r\n"),
        400,
    ),
    "half a body": (request(b"POST /body", b"Content-Length: 50", body=b"half"), 400),
    "a body above the limit": (request(b"POST /body", b"Content-Length: 5000000", body=b"x" * 300_000), 413),
    "an empty line first": (b"\r\n" + PLAIN, 400),
    "nothing": (b"", None),
}
FRAMES = {
    "nothing": b"",
    "a message": frame(1, b"hi"),
    "unmasked": frame(1, b"hi", masked=False),
    "reserved bits": frame(1, b"hi", rsv=7),
    "a reserved opcode": frame(11, b"hi"),
    "a fragmented ping": frame(9, b"x", fin=0),
    "a long ping": frame(9, b"x" * 200),
    "a continuation first": frame(0, b"hi"),
    "bad utf-8": frame(1, b"\xff\xfe"),
    "a close of one byte": frame(8, b"\x03"),
    "a close with 1005": frame(8, struct.pack("!H", 1005)),
    "a close with 5000": frame(8, struct.pack("!H", 5000)),
    "a close in bad utf-8": frame(8, struct.pack("!H", 1000) + b"\xff"),
    "data after the close": frame(8, struct.pack("!H", 1000)) + frame(1, b"hi") * 5,
    "two closes": frame(8) + frame(8),
    "a length of 2**63-1": frame(2, b"x", length=2**63 - 1),
    "a length of 2**64-1": frame(2, b"x", length=2**64 - 1),
    "50 pings and a close": frame(9, b"p") * 50 + frame(8),
    "60 messages around a close": frame(1, b"a") * 30 + frame(8) + frame(1, b"a") * 30,
}


async def put(kit: Kit, pieces: list[bytes], *, then: str) -> bytes:
    """Sends the pieces as segments of their own, ends the connection in one of three ways, and reads."""
    stream = await kit.connect()
    async with stream:
        with contextlib.suppress(trio.BrokenResourceError):
            for piece in pieces:
                await stream.send_all(piece)
                await trio.sleep(0.003 if piece is not pieces[-1] else 0)
            if then == "reset":
                await trio.sleep(0.003)
                reset(stream)
                return b""
            if then == "leave":
                return b""
            await stream.send_eof()
        with trio.fail_after(5):
            return await read_all(stream)


async def test_no_malformed_request_reaches_another_connection():
    """The inputs that ended Hypercorn's own server, and more; each answered with a clear 4xx."""
    async with quiet_front() as kit:
        other = await kit.connect()
        for name, (data, status) in HTTP_INPUTS.items():
            answer = await put(kit, [data], then="end")
            assert status is None or answer[9:12] == str(status).encode(), (name, answer)
            half = len(data) // 2
            again = await put(kit, [data[:half], data[half:]], then="end")
            assert status is None or again[9:12] == str(status).encode(), (name, again)
            await put(kit, [data], then="leave")
            await put(kit, [data], then="reset")
            await put(kit, [data[:half]], then="reset")
            # A connection from before sees nothing of it.
            await other.send_all(PLAIN)
            assert (await read_until(other, b"ok")).startswith(b"HTTP/1.1 200 "), name
        await other.aclose()


async def test_no_eager_frame_and_no_reset_disturbs_an_upgrade():
    """Frames in the same segment as the request, behind it, and cut off by a reset."""
    async with quiet_front() as kit:
        for name, data in FRAMES.items():
            answer = await put(kit, [UPGRADE + data], then="end")
            assert answer == b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + data, name
            half = len(data) // 2
            answer = await put(kit, [UPGRADE, data[:half], data[half:]], then="end")
            assert answer == b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + data, name
            for then in ("leave", "reset"):
                await put(kit, [UPGRADE + data], then=then)
                await put(kit, [UPGRADE, data], then=then)
            answer = await put(kit, [PLAIN, PLAIN + UPGRADE + data], then="end")
            assert answer.endswith(b" 101 Switching Protocols\r\n\r\n" + data), name
        # A reset may come before the head was read; every client that waited was served.
        assert len(kit.upgrades.seen) >= 3 * len(FRAMES)


SMUGGLING = {
    "length and coding": (b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", 400),
    "coding and length": (b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nG", 400),
    "two lengths": (b"Content-Length: 6\r\nContent-Length: 5\r\n\r\n12345G", 400),
    "two equal lengths": (b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n12345", 400),
    "a list of lengths": (b"Content-Length: 5, 5\r\n\r\n12345", 400),
    "a signed length": (b"Content-Length: +5\r\n\r\n12345", 400),
    "a length in hex": (b"Content-Length: 0x5\r\n\r\n12345", 400),
    "an empty length": (b"Content-Length: \r\n\r\n", 400),
    "an unknown coding": (b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "two codings": (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", 501),
    "a list of codings": (b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", 501),
    "a tab before the coding": (b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
    "a space before the colon": (b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    "a folded coding": (b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    "a bare line feed": (b"X: a\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "a bare carriage return": (b"X: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "a null": (b"X: a\0b\r\n\r\n", 400),
    "a name with a space": (b"X Y: a\r\n\r\n", 400),
    "no colon": (b"X\r\n\r\n", 400),
    "no name": (b": x\r\n\r\n", 400),
    "two hosts": (b"Host: y\r\n\r\n", 400),
}


async def test_what_a_proxy_could_frame_differently_is_refused():
    """And nothing behind the first request is taken for a second one."""
    async with quiet_front() as kit:
        for name, (rest, status) in SMUGGLING.items():
            before = len(kit.app.scopes)
            answer = await put(kit, [b"POST /body HTTP/1.1\r\nHost: x\r\n" + rest + b"ET /ok"], then="end")
            assert answer[9:12] == str(status).encode(), (name, answer)
            assert answer.count(b"HTTP/1.1 ") == 1, name
            assert b"\r\nConnection: close\r\n" in answer
            assert len(kit.app.scopes) == before, name
        answer = await put(
            kit, [b"POST /body HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"], then="end"
        )
        assert answer[9:12] == b"400"


async def test_half_an_answer_looks_like_half_an_answer():
    """Where the end of the stream is the end of the body, a reset says that it is not whole."""
    async with quiet_front() as kit:
        for version, whole_end in ((b"1.0", False), (b"1.1", True)):
            stream = await kit.connect()
            async with stream:
                await stream.send_all(b"GET /crash-late HTTP/" + version + b"\r\nHost: x\r\n\r\n")
                await read_until(stream, b"half")
                if whole_end:
                    assert await stream.receive_some() in (b"\r\n", b"")  # and no last chunk
                else:
                    with pytest.raises(trio.BrokenResourceError):
                        await stream.receive_some()


# ---- upgrades --------------------------------------------------------------------------------------------


async def test_a_crash_in_one_upgrade_ends_that_connection_and_is_told_once():
    class Broken(Upgrades):
        async def __call__(self, upgrade):
            if b"crash" in upgrade.request.target:
                raise RuntimeError("on purpose")
            await super().__call__(upgrade)

    kit = make_kit(on_upgrade=Broken())
    async with serving(kit):
        with trio.fail_after(5):
            good = await kit.connect()
            await good.send_all(UPGRADE)
            await read_until(good, b"101")
            assert await kit.ask(UPGRADE.replace(b"/ws", b"/crash")) == b""
            await good.send_all(b"still")
            await read_until(good, b"still")
            await good.aclose()
    (event,) = kit.events_named("connection_crashed")
    assert event["level"] == "error"
    assert event["exc_info"].exceptions
    assert kit.refused("connection_crashed") == 1


async def test_who_takes_an_upgrade_owns_its_stream_and_its_place():
    taken = []

    async def take(upgrade):
        upgrade.taken = True
        taken.append(upgrade)

    kit = make_kit(on_upgrade=take, limits={"connections": 1})
    async with serving(kit):
        with trio.fail_after(5):
            client = await kit.connect()
            await client.send_all(UPGRADE)
            await until(lambda: taken)
            await trio.testing.wait_all_tasks_blocked()
            (upgrade,) = taken
            await upgrade.stream.send_all(b"alive")
            await read_until(client, b"alive")
            assert (await kit.ask(PLAIN)).startswith(b"HTTP/1.1 503 ")
            upgrade.lease.release()
            upgrade.lease.release()
            await kit.assert_alive()
            await upgrade.stream.aclose()
            await client.aclose()


def test_a_lease_is_given_back_once():
    given_back = []
    lease = Lease(lambda: given_back.append(1))
    lease.release()
    lease.release()
    assert given_back == [1]


# ---- caps ------------------------------------------------------------------------------------------------


async def test_a_client_over_the_cap_is_told_so_and_served_when_there_is_room():
    kit = make_kit(limits={"connections": 3})
    async with quiet_front(kit):
        held = [await kit.connect() for _ in range(3)]
        for stream in held:
            await stream.send_all(PLAIN)
            await read_until(stream, b"ok")
        for sent in (PLAIN, b"", request(b"POST /body", b"Content-Length: 300000", body=b"x" * 300_000)):
            stream = await kit.connect()
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(sent)
                    await stream.send_eof()
                answer = await read_all(stream)
            assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"\r\nRetry-After: 1\r\n" in answer
            assert b'"code": "over_capacity"' in answer
            assert b'"retryable": true' in answer
        assert kit.refused("over_capacity") == 3
        for stream in held:
            await stream.aclose()
        await until(lambda: not kit.front._places._taken)


async def test_a_cap_counts_for_each_peer_alone():
    kit = make_kit(limits={"connections_per_peer": 2}, trusted_proxies=["127.0.0.9"])
    async with quiet_front(kit):

        async def connect(source):
            sock = trio.socket.socket()
            await sock.bind((source, 0))
            await sock.connect(("127.0.0.1", kit.port))
            stream = trio.SocketStream(sock)
            await stream.send_all(PLAIN)
            return stream, (await stream.receive_some(65536))[9:12]

        answers = {}
        opened = []
        for source in ["127.0.0.2"] * 3 + ["127.0.0.3"] * 3 + ["127.0.0.9"] * 4:
            stream, status = await connect(source)
            opened.append(stream)
            answers.setdefault(source, []).append(status)
        for stream in opened:
            await stream.aclose()
        assert answers == {
            "127.0.0.2": [b"200", b"200", b"503"],
            "127.0.0.3": [b"200", b"200", b"503"],
            "127.0.0.9": [b"200"] * 4,  # a proxy stands for many
        }
        await until(lambda: not kit.front._places._taken)


async def test_a_flood_over_the_cap_piles_nothing_up():
    kit = make_kit(limits={"connections": 1})
    async with serving(kit):
        with trio.fail_after(20):
            held = await kit.connect()
            await held.send_all(PLAIN)
            await read_until(held, b"ok")
            tasks = trio.lowlevel.current_statistics().tasks_living
            flood = [await kit.connect() for _ in range(200)]
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert trio.lowlevel.current_statistics().tasks_living - tasks <= 64
            await until(lambda: kit.refused("over_capacity") == 200)
            for stream in [*flood, held]:
                await stream.aclose()
            await until(lambda: not kit.front._places._taken and not kit.front._told)
            await kit.assert_alive()


async def test_caps_hold_for_streams_too(autojump_clock):
    kit = make_kit(limits={"connections": 1})
    held, held_server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kit.front.serve_stream, held_server)
        await trio.testing.wait_all_tasks_blocked()
        client, server = trio.testing.memory_stream_pair()
        began = trio.current_time()
        nursery.start_soon(kit.front.serve_stream, server)
        # One that neither reads nor leaves is let go.
        assert (await read_all(client)).startswith(b"HTTP/1.1 503 ")
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() - began <= 2
        await held.aclose()


# ---- the end ---------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def served_until_done(kit: Kit):
    """Like `serving`, but `serve` has to return by itself."""
    from supervisor.gateway.listeners import open_listeners

    listeners, addresses = await open_listeners(["127.0.0.1:0"])
    kit.address = addresses[0]
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(kit.front.serve, listeners)
            yield kit


@pytest.mark.slow
async def test_the_end_closes_idle_connections_and_gives_answers_their_time():
    """New requests still get an answer while draining; then all HTTP ends, in bounded time."""
    kit = make_kit()
    async with served_until_done(kit):
        idle, streaming, upgraded = [await kit.connect() for _ in range(3)]
        await idle.send_all(PLAIN)
        await read_until(idle, b"ok")
        await streaming.send_all(request(b"GET /stream"))
        await read_until(streaming, b"tick")
        await upgraded.send_all(UPGRADE)
        await read_until(upgraded, b"101")

        kit.front.refuse_new()
        with trio.fail_after(1):
            assert await read_all(idle) == b""
        answer = await kit.ask(PLAIN * 2)
        assert b"\r\nconnection: close\r\n" in answer.lower()
        assert answer.count(b"HTTP/1.1 ") == 1

        began = trio.current_time()
        kit.front.terminate(0.3)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OSError, match="failed"):
            await kit.connect()
        assert not (await read_all(streaming)).endswith(b"0\r\n\r\n")
        assert 0.25 < trio.current_time() - began < 5
        # An upgraded connection is not the front's to end.
        await upgraded.send_all(b"still")
        await read_until(upgraded, b"still")
        for stream in (idle, streaming, upgraded):
            await stream.aclose()


@pytest.mark.slow
@pytest.mark.parametrize("path", [b"/big", b"/stream", b"/forever", b"/impatient"])
async def test_a_client_that_does_not_read_holds_up_no_end(path):
    """Hypercorn's own shutdown hangs until such a client leaves."""
    kit = make_kit(limits={"answer_stall_s": 3600})
    fds_before = fds()
    stuck = []
    with trio.fail_after(5):
        async with serving(kit):
            for _ in range(3):
                sock = trio.socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                await sock.connect(("127.0.0.1", kit.port))
                await sock.send(request(b"GET " + path))
                stuck.append(sock)
            await trio.sleep(0.1)
        # Cancelled by the end of the block: it was over at once.
    for sock in stuck:
        sock.close()
    assert fds() == fds_before


async def test_a_cancelled_front_leaves_nothing():
    fds_before = fds()
    kit = make_kit()
    clients = []
    with trio.fail_after(5):
        async with serving(kit):
            for sent in (b"", b"GET", PLAIN, request(b"GET /stream"), request(b"POST /body", b"Content-Length: 9")):
                client = await kit.connect()
                await client.send_all(sent)
                clients.append(client)
            client = await kit.connect()
            await client.send_all(UPGRADE)
            await read_until(client, b"101")
            clients.append(client)
        for client in clients:
            await read_all(client)
            await client.aclose()
    assert fds() == fds_before
    assert kit.front._places._taken == 0


# ---- the machine's limits --------------------------------------------------------------------------------

STARVED = """
import os, resource, socket, sys, trio
from supervisor.gateway.listeners import Listener
from tests.gateway.front_kit import PLAIN, make_kit, serving, read_until

tries = 0

async def main():
    kit = make_kit()
    accept_some = Listener.accept_some

    async def counted(self):
        global tries
        tries += 1
        return await accept_some(self)

    Listener.accept_some = counted
    async with serving(kit):
        clients = [socket.create_connection(("127.0.0.1", kit.port)) for _ in range(4)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, 4096))
        while not kit.events_named("accept_failed"):
            await trio.sleep(0.01)
        await trio.sleep(0.35)
        assert len(kit.events_named("accept_failed")) == 1, kit.events
        assert not kit.events_named("accept_recovered")
        assert tries < 20, tries
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        for client in clients:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            await stream.send_all(PLAIN)
            await read_until(stream, b"ok")
        assert len(kit.events_named("accept_recovered")) == 1
        print("recovered")

trio.run(main)
"""


@pytest.mark.slow
def test_a_process_without_fds_says_so_once_and_recovers():
    """EMFILE neither ends the loop nor spins it nor fills the log."""
    done = subprocess.run(
        [sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=30, cwd=os.getcwd(), check=False
    )
    assert done.stdout == "recovered\n", done.stderr
    assert done.returncode == 0
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64


async def test_an_accept_that_fails_for_another_reason_is_told():
    """A broken listener is a bug: the server ends with it rather than serve on half its addresses."""
    kit = make_kit()

    class Broken:
        address = "broken"
        tls = None

        async def accept_some(self):
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EBADF, "bad")

        def close(self):
            pass

    with pytest.RaisesGroup(pytest.RaisesExc(OSError), flatten_subgroups=True):
        await kit.front.serve([Broken()])
