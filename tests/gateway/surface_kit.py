"""A supervisor that only remembers, and an HTTP client of the app without a server: for tests of the surface."""

from __future__ import annotations

import json
from typing import Any

import attrs
import trio

from supervisor.errors import Draining, UnknownTenant
from supervisor.gateway.app import create_app
from supervisor.gateway.auth import Authenticator
from supervisor.settings import Settings
from supervisor.store.records import Event, TenantRecord
from supervisor.telemetry import captured_telemetry
from supervisor.tenant.description import describe

SECRET = b"the secret of the tests, which is long enough...."
NOW = 1_790_000_000.5


class FakeStore:
    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}

    async def read_events(self, name: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        await trio.lowlevel.checkpoint()
        return [event for event in self.events.get(name, []) if event.seq > after][:limit]

    def append(self, name: str, kind: str, **data: Any) -> None:
        events = self.events.setdefault(name, [])
        events.append(Event(tenant=name, seq=len(events) + 1, type=kind, time=NOW, data=data))


class FakeSupervisor:
    """Tenants in a dict; `calls` tells what was asked, in order."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.store = FakeStore()
        self.tenants: dict[str, TenantRecord] = {}
        self.valid_after: dict[str, float] = {}
        self.connections: dict[str, int] = {}
        self.reasons: list[str] = []
        self.draining = False
        self.calls: list[tuple[Any, ...]] = []
        self.fault: Exception | None = None

    def not_ready(self) -> list[str]:
        return self.reasons

    def request_drain(self) -> None:
        self.calls.append(("drain",))

    async def measure(self) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append(("measure",))

    async def tokens_valid_after(self, name: str) -> float:
        return self.valid_after.get(name, 0.0)

    async def list_tenants(self, after: str, limit: int) -> list[dict[str, Any]]:
        return [self._told(name) for name in sorted(self.tenants) if name > after][:limit]

    async def describe(self, name: str) -> dict[str, Any]:
        await self._called("describe", name)
        self._known(name)
        return self._told(name)

    async def put_tenant(self, name: str, settings: dict[str, Any] | None) -> tuple[dict[str, Any], bool]:
        await self._called("put", name, settings)
        created = name not in self.tenants
        self.add(name, settings or {})
        return self._told(name), created

    async def delete_tenant(self, name: str) -> None:
        await self._called("delete", name)
        self._known(name)
        del self.tenants[name]

    async def wake(self, name: str, create: bool) -> dict[str, Any]:
        await self._called("wake", name, create)
        if self.draining:
            raise Draining("the supervisor is being stopped")
        if create and name not in self.tenants:
            self.add(name)
        self._known(name)
        self.set(name, state="running", generation=self.tenants[name].generation + 1)
        return self._told(name)

    async def sleep(self, name: str) -> dict[str, Any]:
        await self._called("sleep", name)
        self._known(name)
        self.set(name, state="asleep")
        return self._told(name)

    async def touch(self, name: str) -> dict[str, Any]:
        await self._called("touch", name)
        self._known(name)
        return self._told(name)

    async def revoke(self, name: str, before: float) -> dict[str, Any]:
        await self._called("revoke", name, before)
        self._known(name)
        self.valid_after[name] = max(before, self.valid_after.get(name, 0.0))
        return self._told(name)

    def add(self, name: str, settings: dict[str, Any] | None = None) -> None:
        self.tenants[name] = TenantRecord(
            name=name,
            settings=settings or {},
            generation=0,
            state="asleep",
            since=NOW,
            restarts=0,
            last_exit=None,
            tokens_valid_after=0.0,
            created_at=NOW,
            last_seq=0,
        )
        self.store.append(name, "tenant.created")

    def set(self, name: str, **changes: Any) -> None:
        self.tenants[name] = attrs.evolve(self.tenants[name], **changes)
        if "state" in changes:
            self.store.append(name, f"tenant.{changes['state']}", generation=self.tenants[name].generation)

    async def _called(self, *call: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append(call)
        if self.fault is not None:
            raise self.fault

    def _known(self, name: str) -> None:
        if name not in self.tenants:
            raise UnknownTenant(f"there is no tenant {name!r}")

    def _told(self, name: str) -> dict[str, Any]:
        awake = self.tenants[name].state == "running"
        return describe(
            self.tenants[name],
            pid=4711 if awake else None,
            connections=self.connections.get(name, 0),
            why_awake=["1 connection"] if self.connections.get(name) else [],
            sleeps_at=NOW + 600 if awake else None,
        )


@attrs.define
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Surface:
    """An app with its fakes. `request` speaks ASGI with it as the gateway's connection does."""

    def __init__(self, settings: Settings | None = None, *, addresses: tuple[str, ...] = ("127.0.0.1:8000",)) -> None:
        self.now = NOW
        self.supervisor = FakeSupervisor(settings)
        self.telemetry, self.log = captured_telemetry()
        self.authenticator = Authenticator(
            SECRET, settings=self.supervisor.settings, addresses=addresses, wall_clock=lambda: self.now
        )
        self.app = create_app(self.supervisor, self.authenticator, self.telemetry)

    def token(self, tenant: str | None = "acme", *scopes: str, ttl_s: float | None = 3600) -> str:
        return self.authenticator.issue(
            tenant=tenant, scopes=scopes or ["connect"], ttl_s=ttl_s, subject=f"user of {tenant}"
        )

    async def request(
        self,
        method: str,
        target: str,
        *,
        token: str | None = None,
        body: Any = None,
        data: bytes | None = None,
        headers: dict[str, str] | None = None,
        more: trio.Event | None = None,
    ) -> Reply:
        """`more` holds the end of the body back until it is set."""
        path, _, query = target.partition("?")
        fields = {"host": "localhost:8000"}
        if token is not None:
            fields["authorization"] = f"Bearer {token}"
        if body is not None:
            data = json.dumps(body).encode()
        if data is not None:
            fields["content-type"] = "application/json"
        fields |= headers or {}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields.items() if value],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
            "extensions": {},
        }
        sent: list[dict[str, Any]] = []
        steps = iter(
            [{"type": "http.request", "body": data or b"", "more_body": more is not None}]
            + [{"type": "http.request", "body": b"", "more_body": False}] * (more is not None)
        )

        async def receive() -> dict[str, Any]:
            step = next(steps, None)
            if step is None:
                await trio.sleep_forever()
            if more is not None and not step["more_body"]:
                await more.wait()
            return step

        async def send(message: dict[str, Any]) -> None:
            await trio.lowlevel.checkpoint()
            sent.append(message)

        await self.app(scope, receive, send)
        assert sent[0]["type"] == "http.response.start"
        assert not sent[-1]["more_body"]
        return Reply(
            sent[0]["status"],
            {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]},
            b"".join(message["body"] for message in sent[1:]),
        )
