"""A front for tests: an ASGI app with one path for each behaviour, upgrades that are kept, and raw clients."""

from __future__ import annotations

import contextlib

import attrs
import trio

from supervisor.gateway.front import Front, Upgrade
from supervisor.gateway.listeners import open_listeners
from supervisor.settings import LimitSettings, Settings
from supervisor.telemetry import captured_telemetry

KEY = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: bKdPyn3u98cTfZJSh4TNeQ==\r\n"
UPGRADE_HEADERS = b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + KEY
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: x\r\n" + UPGRADE_HEADERS + b"\r\n"
PLAIN = b"GET /ok HTTP/1.1\r\nHost: x\r\n\r\n"


@attrs.define(eq=False)
class App:
    """An ASGI app. `/ok` says ok; the other paths are what their names say."""

    cancelled: list[str] = attrs.field(factory=list)
    bodies: list[bytes] = attrs.field(factory=list)
    scopes: list[dict] = attrs.field(factory=list)

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        path = scope["path"].strip("/").replace("-", "_")
        handler = getattr(self, f"at_{path}", self.at_nowhere)
        try:
            await handler(receive, send)
        except trio.Cancelled:
            self.cancelled.append(path)
            raise

    async def answer(self, send, status=200, body=b"ok", headers=()):
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
        await send({"type": "http.response.body", "body": body})

    async def at_ok(self, receive, send):
        await self.answer(send)

    async def at_nowhere(self, receive, send):
        await self.answer(send, 404, b"no")

    async def at_body(self, receive, send):
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(body)
        await self.answer(send, body=str(len(body)).encode())

    async def at_deaf(self, receive, send):
        """Answers at once and never looks at the body."""
        await self.answer(send)

    async def at_slow(self, receive, send):
        await trio.sleep(30)
        await self.answer(send, body=b"slow")

    async def at_forever(self, receive, send):
        await trio.sleep_forever()

    async def at_stream(self, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"tick", "more_body": True})
            await trio.sleep(1)

    async def at_big(self, receive, send):
        await self.answer(send, body=b"x" * 2_000_000)

    async def at_crash(self, receive, send):
        raise RuntimeError("the app is broken")

    async def at_crash_late(self, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("the app is broken")

    async def at_silent(self, receive, send):
        return

    async def at_wrong(self, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": b"more than one"})

    async def at_impatient(self, receive, send):
        """Gives up a write, and goes on as if nothing were."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with trio.move_on_after(1):
            await send({"type": "http.response.body", "body": b"x" * 2_000_000, "more_body": True})
        await send({"type": "http.response.body", "body": b"rest"})


@attrs.define(eq=False)
class Upgrades:
    """`on_upgrade`: says 101, sends back what it gets, and remembers what it got."""

    seen: list[Upgrade] = attrs.field(factory=list)
    trailing: list[bytes] = attrs.field(factory=list)
    targets: list[bytes] = attrs.field(factory=list)

    async def __call__(self, upgrade: Upgrade) -> None:
        self.seen.append(upgrade)
        self.trailing.append(upgrade.trailing)
        self.targets.append(upgrade.request.target)
        with contextlib.suppress(trio.BrokenResourceError):
            await upgrade.stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + upgrade.trailing)
            while data := await upgrade.stream.receive_some(65536):
                await upgrade.stream.send_all(data)


@attrs.define(eq=False)
class Kit:
    """A front with what is around it."""

    front: Front
    app: App
    upgrades: object
    events: list[dict]
    metrics: object
    address: str = ""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def refused(self, reason: str) -> float:
        return self.metrics.refused.labels(reason)._value.get()

    def events_named(self, name: str) -> list[dict]:
        return [event for event in self.events if event["event"] == name]

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def ask(self, data: bytes) -> bytes:
        """One connection: everything that comes back until the other side closes."""
        stream = await self.connect()
        async with stream:
            await stream.send_all(data)
            return await read_all(stream)

    async def assert_alive(self) -> None:
        with trio.fail_after(5):
            answer = await self.ask(b"GET /ok HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), answer


def make_kit(*, app=None, on_upgrade=None, limits=None, **settings) -> Kit:
    telemetry, events = captured_telemetry()
    app = app if app is not None else App()
    upgrades = on_upgrade if on_upgrade is not None else Upgrades()
    whole = Settings(limits=LimitSettings(**(limits or {})), **settings)
    front = Front(app, on_upgrade=upgrades, settings=whole, telemetry=telemetry)
    return Kit(front, app, upgrades, events, telemetry.metrics)


@contextlib.asynccontextmanager
async def serving(kit: Kit, bind: str = "127.0.0.1:0", *, tls=None):
    """The kit's front on a real listener; cancelled at the end, and everything then has to be gone."""
    listeners, addresses = await open_listeners([bind], tls=tls)
    kit.address = addresses[0]
    async with trio.open_nursery() as nursery:
        await nursery.start(kit.front.serve, listeners)
        yield kit
        nursery.cancel_scope.cancel()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Until the end of the stream, which may be a reset."""
    data = b""
    with contextlib.suppress(trio.BrokenResourceError):
        while more := await stream.receive_some(65536):
            data += more
    return data


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    data = b""
    while end not in data:
        more = await stream.receive_some(65536)
        assert more, f"the stream ended after {data!r}"
        data += more
    return data


def request(head: bytes, *fields: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([head + b" HTTP/1.1", b"Host: x", *fields]) + b"\r\n\r\n" + body


async def until(condition, within_s: float = 5) -> None:
    """Waits for what has no event to wait for, such as that nothing is left."""
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.001)
