"""The root: every tenant in one nursery, what all of them share, and the drain of all.

`open_supervisor` gives one inside any Trio program; `supervisor.server` adds listeners, signals and an exit status.
There is no global state: two supervisors in one process do not meet.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs
import trio

from supervisor.drain import Timeline
from supervisor.errors import Draining, SupervisorError, Unavailable, UnknownTenant
from supervisor.gateway.app import create_app
from supervisor.gateway.auth import Authenticator
from supervisor.gateway.front import Front
from supervisor.gateway.relay import Relay
from supervisor.gateway.secret import load_or_create_secret
from supervisor.gateway.upgrade import serve_upgrade
from supervisor.sandbox.process import ProcessLauncher, open_process_launcher
from supervisor.sandbox.workspace import remove_home
from supervisor.store import open_store
from supervisor.telemetry import measure_loop_lag, open_telemetry
from supervisor.tenant.description import describe
from supervisor.tenant.lifecycle import State
from supervisor.tenant.name import check_tenant_name
from supervisor.tenant.tenant import LAST_WORDS_S, Ending, Tenant

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    from supervisor.gateway.front import Upgrade
    from supervisor.sandbox.launcher import Launcher
    from supervisor.settings import Settings
    from supervisor.store import Store
    from supervisor.telemetry import Telemetry


@attrs.define(eq=False)
class _Drain:
    """The one drain, which all who ask for it wait for. A hurry brings the scope's deadline forward."""

    scope: trio.CancelScope
    done: trio.Event = attrs.field(factory=trio.Event)
    complete: bool = False


@attrs.define(eq=False)
class Supervisor:
    """Owns every tenant. Made by `open_supervisor`; all its methods may be called from any task of the run."""

    settings: Settings
    store: Store
    launcher: Launcher
    telemetry: Telemetry
    authenticator: Authenticator
    relay: Relay
    wall_clock: Callable[[], float] = time.time

    front: Front = attrs.field(init=False)
    # Set when a drain is asked for, by a signal or by the API.
    drain_asked: trio.Event = attrs.field(init=False, factory=trio.Event)
    _timeline: Timeline | None = attrs.field(init=False, default=None)
    _drain: _Drain | None = attrs.field(init=False, default=None)
    _tenants: dict[str, Tenant] = attrs.field(init=False, factory=dict)
    _nursery: trio.Nursery = attrs.field(init=False)
    _deleting: set[str] = attrs.field(init=False, factory=set)
    # Grows when a record was deleted or revoked: what was read before may be out of date.
    _edition: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        app = create_app(self, self.authenticator, self.telemetry)
        self.front = Front(app, on_upgrade=self._on_upgrade, settings=self.settings, telemetry=self.telemetry)

    # ---- tenants -------------------------------------------------------------------------------------------

    async def tenant(self, name: str, *, create: bool) -> Tenant:
        """The tenant of that name, with its task running; created if it does not exist and `create` allows it.

        The caller must use it without an await in between. Raises BadTenantName, UnknownTenant, Draining,
        Unavailable while it is being deleted, and StoreError.
        """
        check_tenant_name(name)
        while True:
            if self.draining:
                raise Draining("the supervisor is being stopped; connect again in a moment")
            if name in self._deleting:
                raise Unavailable(f"tenant {name!r} is being deleted")
            tenant = self._tenants.get(name)
            if tenant is not None and tenant.opened.is_set() and not tenant.ending:
                return tenant
            if tenant is not None:
                await (tenant.ended if tenant.ending else tenant.opened).wait()
                continue
            edition = self._edition
            record = await self.store.get_tenant(name)
            if record is None:
                if not (create and self.authenticator.may_create):
                    raise UnknownTenant(f"there is no tenant {name!r}; create it with PUT /v1/tenants/{name}")
                record, _ = await self.store.put_tenant(name)
            up_to_date = edition == self._edition and name not in self._deleting
            if up_to_date and name not in self._tenants and not self.draining:
                self._tenants[name] = Tenant(
                    record,
                    self._home(name),
                    self.settings,
                    self.launcher,
                    self.store,
                    self.telemetry,
                    self.wall_clock,
                )
                self._nursery.start_soon(self._run_tenant, self._tenants[name])

    async def _run_tenant(self, tenant: Tenant) -> None:
        """The boundary of a tenant: its fault stops here, is told, and the next request makes it anew."""
        crashed = False
        try:
            await tenant.run()
        except* Exception as group:
            crashed = True
            self.telemetry.log.error("tenant_crashed", tenant=tenant.name, exc_info=group)
        finally:
            if self._tenants.get(tenant.name) is tenant:
                del self._tenants[tenant.name]
        if crashed and tenant.state not in (State.ASLEEP, State.FAILED):
            await self._settle(tenant)

    async def _settle(self, tenant: Tenant) -> None:
        """In the books a tenant that has crashed is asleep, unless a newer generation was begun meanwhile."""
        try:
            with trio.fail_after(LAST_WORDS_S):
                await self.store.record_state(
                    tenant.name,
                    generation=tenant.record.generation,
                    state=State.ASLEEP.value,
                    event="tenant.recovered",
                    data={"reason": "tenant_crashed", "former_state": tenant.state.value},
                )
        except (SupervisorError, trio.TooSlowError) as error:
            self.telemetry.log.error("journal_lost", tenant=tenant.name, events=1, reason=str(error))

    def _home(self, name: str) -> Path:
        return self.settings.state_dir.absolute() / "tenants" / name

    async def describe(self, name: str) -> dict[str, Any]:
        """What `GET /v1/tenants/{tenant}` shows. Never wakes. Raises BadTenantName, UnknownTenant, StoreError."""
        check_tenant_name(name)
        tenant = self._tenants.get(name)
        if tenant is not None:
            return tenant.describe()
        record = await self.store.get_tenant(name)
        if record is None:
            raise UnknownTenant(f"there is no tenant {name!r}")
        return describe(record)

    async def list_tenants(self, after: str = "", limit: int = 100) -> list[dict[str, Any]]:
        """A page of descriptions by name, those after `after`. Raises StoreError."""
        records = await self.store.list_tenants(after=after, limit=limit)
        return [
            self._tenants[record.name].describe() if record.name in self._tenants else describe(record)
            for record in records
        ]

    async def put_tenant(self, name: str, settings: Mapping[str, object] | None) -> tuple[dict[str, Any], bool]:
        """Creates the tenant, or changes its settings; the second value says whether it is new."""
        check_tenant_name(name)
        if name in self._deleting:
            raise Unavailable(f"tenant {name!r} is being deleted")
        record, created = await self.store.put_tenant(name, settings)
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.record = attrs.evolve(tenant.record, settings=record.settings)
        return await self.describe(name), created

    async def delete_tenant(self, name: str) -> None:
        """Ends the agent, closes its clients with 1001, removes its files, and forgets it. Raises UnknownTenant."""
        check_tenant_name(name)
        if name in self._deleting:
            raise Unavailable(f"tenant {name!r} is being deleted already")
        self._deleting.add(name)
        try:
            if await self.store.get_tenant(name) is None:
                raise UnknownTenant(f"there is no tenant {name!r}")
            tenant = self._tenants.get(name)
            if tenant is not None:
                tenant.end(Ending.DELETE)
                await tenant.ended.wait()
            await trio.to_thread.run_sync(remove_home, self._home(name))
            await self.store.delete_tenant(name)
        except OSError as error:
            raise Unavailable(f"the files of tenant {name!r} could not be removed: {error}") from error
        finally:
            self._deleting.discard(name)
            self._edition += 1

    async def wake(self, name: str, create: bool = False) -> dict[str, Any]:
        """Starts the agent unless it runs, and begins the idle window anew. Raises as a connect does."""
        tenant = await self.tenant(name, create=create)
        await tenant.wake()
        return tenant.describe()

    async def sleep(self, name: str) -> dict[str, Any]:
        """Puts the tenant to sleep and returns once its agent is gone."""
        await self.describe(name)
        tenant = self._tenants.get(name)
        if tenant is not None:
            await tenant.sleep()
        return await self.describe(name)

    async def touch(self, name: str) -> dict[str, Any]:
        """Begins the idle window anew; wakes nobody."""
        await self.describe(name)
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.touch()
        return await self.describe(name)

    async def revoke(self, name: str, before: float) -> dict[str, Any]:
        """Tokens of this tenant issued before `before` (wall clock) are no longer valid; their connections end."""
        check_tenant_name(name)
        record = await self.store.revoke_tokens(name, before=before)
        self._edition += 1
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.revoke(record.tokens_valid_after)
        return await self.describe(name)

    async def tokens_valid_after(self, name: str) -> float:
        """Also of a tenant that was deleted: its tokens stay revoked. 0.0 for a name that never was one."""
        tenant = self._tenants.get(name)
        return tenant.record.tokens_valid_after if tenant is not None else await self.store.tokens_valid_after(name)

    async def _on_upgrade(self, upgrade: Upgrade) -> None:
        await serve_upgrade(self, upgrade)

    async def measure(self) -> None:
        """Brings up to date the metrics that are cheaper to look up than to count."""
        metrics = self.telemetry.metrics
        states = Counter(tenant.state for tenant in self._tenants.values())
        for state in State:
            metrics.tenants.labels(state=state.value).set(states[state])
        for tenant in self._tenants.values():
            tenant.count_traffic()
        if isinstance(self.launcher, ProcessLauncher):
            metrics.zombies.set(await self.launcher.zombies())

    # ---- the end -------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        return self.drain_asked.is_set()

    def not_ready(self) -> list[str]:
        """Why the supervisor takes no new work; empty when it does."""
        return ["draining"] if self.draining else []

    def request_drain(self) -> None:
        """Asks for the drain: whoever serves this supervisor carries it out. Asked again, it hurries."""
        if not self.draining:
            self.telemetry.log.info("drain_asked")
            self._timeline = Timeline.starting(trio.current_time(), self.settings)
            self.drain_asked.set()
        else:
            self._hurry()

    def _hurry(self) -> None:
        assert self._timeline is not None
        self.telemetry.log.warning("drain_hurried")
        self._timeline = self._timeline.hurried(trio.current_time())
        if self._drain is not None:
            self._drain.scope.deadline = self._timeline.finish_at
        for tenant in self._tenants.values():
            tenant.end(Ending.DRAIN, kill_at=self._timeline.kill_at)

    async def drain(self) -> bool:
        """Ends every agent by the timeline; returns once nothing of any tenant is left, its clients told 1012.

        False if `finish_at` came first; the rest is then cut off by leaving. Asks for the drain if nobody has.
        """
        if self._drain is not None:
            await self._drain.done.wait()
            return self._drain.complete
        if not self.draining:
            self.request_drain()
        assert self._timeline is not None
        metrics, began_at = self.telemetry.metrics, self._timeline.began_at
        metrics.drains.inc()
        tenants = list(self._tenants.values())
        self.telemetry.log.info("drain_began", tenants=len(tenants), grace_s=self._timeline.kill_at - began_at)
        for tenant in tenants:
            tenant.end(Ending.DRAIN, kill_at=self._timeline.kill_at)
        drain = self._drain = _Drain(trio.CancelScope(deadline=self._timeline.finish_at))
        try:
            with drain.scope:
                for tenant in tenants:
                    await tenant.ended.wait()
        finally:
            drain.complete = all(tenant.ended.is_set() for tenant in tenants)
            drain.done.set()
        took_s = trio.current_time() - began_at
        metrics.drain_seconds.observe(took_s)
        self.telemetry.log.info("drain_ended", drained=drain.complete, took_s=round(took_s, 3))
        return drain.complete


@contextlib.asynccontextmanager
async def open_supervisor(
    settings: Settings,
    *,
    launcher: Launcher | None = None,
    store: Store | None = None,
    telemetry: Telemetry | None = None,
    addresses: Sequence[str] = (),
    control: socket.socket | None = None,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Supervisor]:
    """A supervisor in this task's Trio run, without listeners: `serve` adds them.

    What is not given is made from `settings`: the keeper first, before anything else is open, then the store.
    Leaving the block drains by the timeline; leaving it by an exception or a cancellation kills every agent.
    No signal handler is installed. Raises ConfigError and StoreError.
    """
    async with contextlib.AsyncExitStack() as stack:
        if telemetry is None:
            telemetry = stack.enter_context(open_telemetry(settings.log))
        if launcher is None:
            launcher = await stack.enter_async_context(open_process_launcher(settings, telemetry, control=control))
        if store is None:
            store = await stack.enter_async_context(open_store(settings.state_dir, wall_clock=wall_clock))
        for name in await store.settle():
            telemetry.log.warning("tenant_recovered", tenant=name, reason="the supervisor ended without a drain")
        secret = load_or_create_secret(settings.state_dir, settings)
        supervisor = Supervisor(
            settings,
            store,
            launcher,
            telemetry,
            Authenticator(secret, settings=settings, addresses=addresses, wall_clock=wall_clock),
            relay := Relay(),
            wall_clock=wall_clock,
        )
        async with trio.open_nursery() as base:
            await base.start(relay.run)
            base.start_soon(measure_loop_lag, telemetry.metrics)
            async with trio.open_nursery() as supervisor._nursery:
                yield supervisor
                await supervisor.drain()
                supervisor._nursery.cancel_scope.cancel(reason="the drain's time is over")
            base.cancel_scope.cancel(reason="the supervisor has ended")
