"""The whole of it, with real processes and real sockets: a server in this process, fixtures as its agents."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from pathlib import Path

import attrs
import pytest
import trio

from supervisor.client import open_websocket
from supervisor.server import serve
from supervisor.settings import AgentSettings, Settings
from supervisor.telemetry import captured_telemetry

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
ECHO = (sys.executable, "-I", "-S", str(FIXTURES / "echo.py"))
BUNDLED = (sys.executable, "-I", "-m", "agent")


def misbehave(*fault: object) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", str(FIXTURES / "misbehave.py"), *map(str, fault))


@attrs.define(eq=False)
class House:
    """A running server, and what a client and an operator of it do."""

    server: object
    events: list
    settings: Settings

    @property
    def supervisor(self):
        return self.server.supervisor

    @property
    def port(self) -> int:
        return int(self.server.addresses[0].rpartition(":")[2])

    def token(self, tenant="acme", scopes=("connect",), ttl_s=60.0):
        return self.supervisor.authenticator.issue(tenant=tenant, scopes=scopes, ttl_s=ttl_s, subject="tests")

    @contextlib.asynccontextmanager
    async def client(self, tenant="acme", path="/", *, headers=None, **options):
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        headers = [("Authorization", f"Bearer {self.token(tenant)}")] if headers is None else headers
        async with open_websocket(
            stream,
            host=f"127.0.0.1:{self.port}",
            target=f"/v1/tenants/{tenant}/connect{path}",
            headers=headers,
            handshake_timeout_s=60.0,
            **options,
        ) as websocket:
            yield websocket

    async def request(self, head: str) -> bytes:
        """Sends raw bytes and reads to the end."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            await stream.send_all(head.encode("latin-1"))
            received = b""
            async for data in stream:
                received += data
            return received

    async def describe(self, tenant="acme"):
        return await self.supervisor.describe(tenant)

    def logged(self, event):
        return [line for line in self.events if line["event"] == event]


@contextlib.asynccontextmanager
async def open_house(command=ECHO, *, state_dir=None, **changes):
    """Ends with a drain that must be done in its time, and leaves no process."""
    telemetry, events = captured_telemetry()
    with contextlib.ExitStack() as stack:
        if state_dir is None:
            state_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="tenantry-test-"))
        agent = changes.pop("agent", AgentSettings(command=command, grace_s=1.0))
        settings = Settings(bind=("127.0.0.1:0",), state_dir=state_dir, agent=agent, **changes)
        async with trio.open_nursery() as nursery:
            server = await nursery.start(functools.partial(serve, settings, telemetry=telemetry))
            house = House(server, events, settings)
            yield house
            with trio.fail_after(settings.drain_grace_s + 2):
                server.supervisor.request_drain()
                await server.supervisor.drain()
        assert not house.logged("tenant_crashed"), house.logged("tenant_crashed")
        assert not house.logged("connection_crashed"), house.logged("connection_crashed")


@pytest.fixture(autouse=True)
def _nothing_is_left_over():
    """No process that an agent's environment marks, and no descriptor of ours, outlives its test."""
    before = set(_descriptors())
    yield
    left = [pid for pid in _agents() if b"TENANTRY_TENANT=" in pid[1]]
    assert not left, f"processes left: {[pid for pid, _ in left]}"
    assert len(set(_descriptors()) - before) == 0


def _descriptors():
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            yield f"{entry.name} -> {entry.readlink()}"


def _agents():
    marker = b"tenantry-test-"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                environ = (entry / "environ").read_bytes()
                if marker in environ:
                    yield int(entry.name), environ
