"""One tenant: one task, one nursery, which owns its agent, its clients and the wait for the next rung.

`run` is the only place where an agent is started or ended, so there is nothing to lock: everybody else says what is
wanted, and `run` looks again. "Running" is what the kernel says of the process now, never a remembered flag (S3-04).
"""

from __future__ import annotations

import contextlib
import math
import time
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import trio

from supervisor.drain import LINGER_S
from supervisor.errors import AgentStartFailed, Draining, StoreError, Unavailable
from supervisor.sandbox.launcher import AgentSpec
from supervisor.tenant import clients
from supervisor.tenant.clients import Client, Clients
from supervisor.tenant.connect import EXIT_REPORT_S, Connected, ConnectPath
from supervisor.tenant.description import describe
from supervisor.tenant.generation import Generation
from supervisor.tenant.handshake import probe_head
from supervisor.tenant.idle import Idleness
from supervisor.tenant.lifecycle import Happening, State, advance
from supervisor.tenant.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from supervisor.sandbox.launcher import AgentProcess, Launcher
    from supervisor.settings import Settings
    from supervisor.store import Store, TenantRecord
    from supervisor.telemetry import Telemetry

# From SIGTERM to SIGKILL of an agent that the ladder resets; never longer than until the next rung.
RESET_GRACE_S = 1.0
# A tenant that has had nothing to do for this long is forgotten: its record stays in the store.
FORGET_AFTER_S = 60.0
# For whoever is still in a tenant's nursery when its clients were told to go: a Close takes no longer.
SEE_OFF_S = 2 * LINGER_S + 1.0
# For the last events of a tenant that ends, when the store does not answer.
LAST_WORDS_S = 1.0


class Ending(Enum):
    """Why an agent ended; the value stands in `last_exit.reason`."""

    EXITED = "exited"
    RESET = "reset"
    ABANDONED = "abandoned"
    SLEEP = "sleep"
    DELETE = "delete"
    DRAIN = "drain"


FINAL = frozenset({Ending.DELETE, Ending.DRAIN})
_HAPPENING = {
    Ending.EXITED: Happening.EXITED,
    Ending.RESET: Happening.RESET,
    Ending.ABANDONED: Happening.ABANDONED,
}
_CLOSE = {Ending.SLEEP: clients.SLEEP, Ending.DELETE: clients.DELETED, Ending.DRAIN: clients.RESTARTING}


@attrs.define(eq=False)
class Tenant:
    """Make one and start `run` in a nursery; the other methods may be called from any task."""

    record: TenantRecord
    home: Path
    settings: Settings
    launcher: Launcher
    store: Store
    telemetry: Telemetry
    wall_clock: Callable[[], float] = time.time

    state: State = attrs.field(init=False, default=State.ASLEEP)
    since: float = attrs.field(init=False)
    # `run` has begun, and may be given clients.
    opened: trio.Event = attrs.field(init=False, factory=trio.Event)
    ended: trio.Event = attrs.field(init=False, factory=trio.Event)

    clients: Clients = attrs.field(init=False)
    _path: ConnectPath = attrs.field(init=False)
    _idleness: Idleness = attrs.field(init=False)
    _outbox: Outbox = attrs.field(init=False)
    _nursery: trio.Nursery | None = attrs.field(init=False, default=None)
    _generation: Generation | None = attrs.field(init=False, default=None)
    # Held while an agent is being started: who asks for its end need not wait for its beginning.
    _start: trio.CancelScope | None = attrs.field(init=False, default=None)
    # Set while no agent of ours runs, is started or is ended.
    _at_rest: trio.Event = attrs.field(init=False, factory=trio.Event)
    _asked: Ending | None = attrs.field(init=False, default=None)
    _kill_at: float = attrs.field(init=False, default=math.inf)
    _changed: trio.Event = attrs.field(init=False, factory=trio.Event)
    _counted: tuple[int, int] = attrs.field(init=False, default=(0, 0))

    def __attrs_post_init__(self) -> None:
        log = self.telemetry.log.bind(tenant=self.name)
        self.clients = Clients(self.telemetry.metrics, self.touch, self.wall_clock)
        self._path = ConnectPath(
            self.name,
            self.settings,
            log,
            self.telemetry.metrics,
            changed=self._look,
            became_ready=self._became_ready,
            has_clients=lambda: bool(self.clients),
        )
        self._idleness = Idleness(self.settings.sleep_after_s, self.settings.sleep_with_connections)
        self._outbox = Outbox(log)
        self._at_rest.set()
        self.since = self.record.since
        if self.record.state == State.FAILED.value:
            self.state = State.FAILED

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def ending(self) -> bool:
        """It takes no caller any more: wait for `ended`, and make another."""
        return self._path.closed

    @property
    def connections(self) -> int:
        """Clients in this tenant's hands, from `start_client` to the end of what it runs."""
        return len(self._nursery.child_tasks) if self._nursery is not None else 0

    # ---- what others may ask -------------------------------------------------------------------------------

    async def connect(self, head: bytes) -> Connected:
        """Speaks one upgrade to the agent, started if it sleeps: `ConnectPath.connect` says how."""
        connected = await self._path.connect(head)
        self.touch()
        return connected

    async def wake(self) -> None:
        """Makes the agent run: asks it for an upgrade to `/` unless it is ready, and begins the idle window anew.

        Raises as `connect` does.
        """
        if self.state is not State.RUNNING:
            connected = await self.connect(probe_head(self.name))
            await trio.aclose_forcefully(connected.stream)
        else:
            self.touch()

    def touch(self) -> None:
        """Begins the idle window anew; does not wake (S3-21)."""
        self._idleness.worked(trio.current_time())
        self._look()

    async def sleep(self) -> None:
        """Puts the tenant to sleep; returns once nothing of its agent is left. Whoever waits to connect gets 503."""
        self._path.refuse(partial(Unavailable, f"tenant {self.name!r} was put to sleep; try again"), for_good=False)
        at_rest = self._at_rest
        if not at_rest.is_set():
            self.end(Ending.SLEEP)
        await at_rest.wait()

    def end(self, why: Ending, *, kill_at: float = math.inf) -> None:
        """Asks for the agent's end, at once in words, and by SIGKILL at `kill_at` at the latest (Trio's clock).

        SLEEP lets the next caller start another; DELETE and DRAIN let nobody, and `run` returns: `ended` is set.
        Asked again, only an earlier `kill_at` and a more final reason count.
        """
        if self._asked not in FINAL:
            self._asked = why
        self._kill_at = min(self._kill_at, kill_at)
        if why in FINAL:
            self._refuse_for_good()
        if self._start is not None:
            self._start.cancel(reason=f"the tenant is ended: {why.value}")
        if self._generation is not None:
            self._generation.break_off(f"the tenant is ended: {why.value}")
        self._look()

    def start_client(self, serve: Callable[[], Awaitable[None]]) -> None:
        """Runs one client's connection in this tenant's nursery. `serve` is its own crash boundary.

        Raises Unavailable if the tenant is ending.
        """
        if self._nursery is None or self._asked in FINAL:
            raise self._ending_error()
        self._nursery.start_soon(serve)

    @contextlib.contextmanager
    def attached(self, client: Client) -> Iterator[None]:
        """While the block runs, the client counts as a connection, and is told when the agent is ended."""
        with self.clients.attached(client):
            if self._asked is not None:
                client.close(*_CLOSE[self._asked], within_s=LINGER_S)
            elif client.issued_at <= self.record.tokens_valid_after:
                client.close(*clients.REVOKED, within_s=LINGER_S)  # while it waited for the agent
            yield

    def describe(self) -> dict[str, Any]:
        """What `GET /v1/tenants/{tenant}` shows. Wakes nobody."""
        generation, now = self._generation, trio.current_time()
        connections, callers = len(self.clients), self._path.callers
        alive = generation is not None and generation.process.exit_status is None
        sleeps_at = self._sleeps_at() if self.state is State.RUNNING else None
        return describe(
            attrs.evolve(self.record, state=self.state.value, since=self.since),
            pid=generation.process.pid if alive and generation is not None else None,
            connections=connections,
            why_awake=self._idleness.why_awake(connections=connections, callers=callers, now=now)
            if self._generation is not None or callers
            else [],
            sleeps_at=None if sleeps_at is None else self.wall_clock() + sleeps_at - now,
        )

    async def close_code(self, generation: Generation) -> tuple[int, str]:
        """For a client whose agent went without a Close: 1012 if the process is gone, 1011 if it lives."""
        with trio.move_on_after(EXIT_REPORT_S):
            await generation.exited.wait()
        if self._asked is not None:
            return _CLOSE[self._asked]
        return clients.AGENT_CLOSED if generation.process.exit_status is None else clients.AGENT_ENDED

    def count_traffic(self) -> None:
        """Adds what has passed since the last call to the metrics."""
        generation, metrics = self._generation, self.telemetry.metrics
        if generation is None:
            return
        traffic, (up, down) = generation.traffic, self._counted
        metrics.bytes_up.inc(traffic.up_bytes - up)
        metrics.bytes_down.inc(traffic.down_bytes - down)
        self._counted = traffic.up_bytes, traffic.down_bytes

    def revoke(self, before: float) -> None:
        """Tokens issued until `before` (wall clock, seconds) are no longer valid: their connections end with 1008."""
        self.record = attrs.evolve(self.record, tokens_valid_after=before)
        self.clients.revoke(before)

    # ---- the owner -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Owns the tenant until it is ended for good, or has long had nothing to do.

        Returns with no process, no client and no unwritten event left. Cancellation kills the agent's tree and
        closes its clients without a word; an event that is not stored yet is then lost, and `settle` of the next
        start tells it.
        """
        try:
            async with trio.open_nursery() as writing:
                writing.start_soon(self._outbox.run)
                async with trio.open_nursery() as self._nursery:
                    self.opened.set()
                    while await self._until_wanted():
                        self._at_rest = trio.Event()
                        await self._run_generation()
                        self._at_rest.set()
                    await self._see_clients_off()
                    self._nursery.cancel_scope.deadline = trio.current_time() + SEE_OFF_S
                await self._store_last_words()
                writing.cancel_scope.cancel(reason="the tenant has ended")
        finally:
            self._refuse_for_good()
            self._nursery = self._generation = None
            self._at_rest.set()
            self.opened.set()
            self.ended.set()
            self._look()

    async def _store_last_words(self) -> None:
        try:
            with trio.fail_after(LAST_WORDS_S):
                await self._outbox.flush()
        except (StoreError, trio.TooSlowError) as error:
            self._path.log.error("journal_lost", events=len(self._outbox), reason=str(error) or "no answer in time")

    async def _until_wanted(self) -> bool:
        """True when a caller waits and the ladder lets it go; False when this tenant's task may end."""
        idle_since = trio.current_time()
        while True:
            now = trio.current_time()
            if self._asked in FINAL:
                if self.state is State.STARTING:
                    self._advance(Happening.ABANDONED)
                return False
            self._asked = None
            if self._path.callers or self.clients:
                idle_since = now
            until = idle_since + FORGET_AFTER_S
            if self._path.wanted:
                until = self._path.ladder.not_before
                at_once = now >= until
                if self.state in (State.ASLEEP, State.FAILED):
                    self._advance(Happening.WANTED, stored=not at_once)
                if at_once:
                    return True
            elif self.state is State.STARTING and not self._path.callers:
                self._advance(Happening.ABANDONED)
            elif now >= until:
                self._refuse_for_good()
                return False
            with trio.move_on_at(until):
                await self._wait_changed()

    async def _run_generation(self) -> None:
        """Starts an agent, lets callers at it, and ends it when there is a reason. Returns with its tree empty."""
        log = self._path.log
        generation: Generation | None = None
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as self._start:
                try:
                    generation = await self._start_agent(nursery)
                except AgentStartFailed as error:
                    if self._path.start_failed(error):
                        self._advance(Happening.GAVE_UP)
            self._start = None
            if generation is None:
                return
            self._generation = generation
            log.info("agent_started", generation=generation.number, pid=generation.process.pid)
            nursery.start_soon(self._watch_exit, generation)
            self._path.open(generation, generation.started_at + self.settings.start_timeout_s)
            why = await self._until_it_must_end(generation)
            generation.ending = True
            await self._end_agent(generation, why)
            # Whatever is left of the tree: nothing of it outlives its main process.
            generation.process.kill()
        status = generation.process.exit_status
        last_exit: dict[str, object] = {
            "generation": generation.number,
            "reason": why.value,
            "returncode": status.returncode if status is not None else None,
            "signal": status.signal if status is not None else None,
            "time": self.wall_clock(),
        }
        log.info("agent_ended", generation=generation.number, reason=why.value, status=str(status))
        by_itself = why is Ending.EXITED
        gave_up = self._path.generation_ended(generation, by_itself=by_itself, words=f"the agent ended: {status}")
        happening = _HAPPENING.get(why, Happening.STOPPED)
        self.count_traffic()
        self._generation, self._counted = None, (0, 0)
        self._advance(happening, last_exit=last_exit, restarted=why in (Ending.EXITED, Ending.RESET))
        if gave_up:
            self._advance(Happening.GAVE_UP)

    async def _start_agent(self, nursery: trio.Nursery) -> Generation:
        spec = AgentSpec(
            tenant=self.name,
            generation=await self._begin_generation(),
            command=self.settings.agent.command,
            env=self.settings.agent.env,
            home=self.home,
        )
        started_at = trio.current_time()
        try:
            with trio.fail_after(self.settings.start_timeout_s):
                process: AgentProcess = await nursery.start(self.launcher.run, spec)
        except trio.TooSlowError:
            raise AgentStartFailed(f"no process within {self.settings.start_timeout_s:g} s") from None
        return Generation(spec.generation, process, started_at)

    async def _begin_generation(self) -> int:
        """The new generation's number, stored before anything of it exists. Raises AgentStartFailed."""
        try:
            with trio.fail_after(self.settings.connect_timeout_s):
                await self._outbox.flush()
                number = await self.store.begin_generation(self.name, data={"attempt": self._path.ladder.rung + 1})
        except StoreError as error:
            raise AgentStartFailed(f"the start could not be stored: {error}") from error
        except trio.TooSlowError:
            raise AgentStartFailed("the start could not be stored: the store does not answer") from None
        self.since = self.wall_clock()
        self.record = attrs.evolve(self.record, generation=number)
        return number

    async def _watch_exit(self, generation: Generation) -> None:
        await generation.watch_exit()
        self._look()

    async def _until_it_must_end(self, generation: Generation) -> Ending:
        ready_by = generation.started_at + self.settings.start_timeout_s
        while True:
            now = trio.current_time()
            if generation.exited.is_set():
                return Ending.EXITED
            if self._asked is not None:
                return self._asked
            if generation.reset_wanted:
                return Ending.RESET
            if generation.ready_at is None and now >= ready_by and not self._path.callers:
                return Ending.ABANDONED
            if now >= self._path.next_rung_at():
                self._path.open(generation, now + self.settings.connect_timeout_s)
            idle_look_at = self._idle_look_at(generation)
            if now >= idle_look_at:
                cpu_s = await generation.process.cpu_seconds()
                idle = self._idleness.looked(now, cpu_s)
                # It may have ended meanwhile, and others may have come or asked.
                if idle and not generation.ending and not self._path.callers:
                    return Ending.SLEEP
                continue
            recheck_at = now + self._idleness.recheck_s(connections=len(self.clients))
            until = min(self._path.next_rung_at(), self.clients.close_expired(), idle_look_at, recheck_at)
            if generation.ready_at is None and now < ready_by:
                until = min(until, ready_by)
            with trio.move_on_at(until):
                await self._wait_changed()

    def _idle_look_at(self, generation: Generation) -> float:
        if generation.ready_at is None:
            return math.inf
        self._idleness.saw_data(generation.traffic.data_frames, trio.current_time())
        sleeps_at = self._sleeps_at()
        return math.inf if sleeps_at is None else self._idleness.next_look(sleeps_at)

    def _sleeps_at(self) -> float | None:
        return self._idleness.sleeps_at(connections=len(self.clients), callers=self._path.callers)

    async def _end_agent(self, generation: Generation, why: Ending) -> None:
        """The stop ladder: Close, SIGTERM, a grace, SIGKILL to the whole tree, in the order that `why` asks for."""
        if why is Ending.EXITED:
            return
        if why not in _HAPPENING:
            self._advance(Happening.STOPPING)
        now = trio.current_time()
        kill_at = now + self.settings.agent.grace_s
        if why in (Ending.SLEEP, Ending.DELETE):
            # Nothing is being lost, so the clients are told first.
            self.clients.close_all(_CLOSE[why])
            await self._until(lambda: not self.clients, now + 2 * LINGER_S)
            kill_at = trio.current_time() + self.settings.agent.grace_s
        elif why is Ending.RESET:
            exhausted = self._path.ladder.exhausted
            kill_at = now if exhausted else min(now + RESET_GRACE_S, self._path.ladder.not_before)
        generation.process.terminate()
        await self._until(generation.exited.is_set, kill_at)
        if not generation.exited.is_set():
            self._path.log.warning("agent_killed", generation=generation.number, reason=why.value)
            if why in _CLOSE:
                self.clients.close_all(_CLOSE[self._asked or why])
            generation.process.kill()
        await generation.exited.wait()

    async def _see_clients_off(self) -> None:
        """An agent that ended in time has sent its tail and its Close; a client that does not read gets no longer."""
        await self._until(
            lambda: not self.clients, min(self._kill_at, trio.current_time() + self.settings.agent.grace_s)
        )
        self.clients.close_all(_CLOSE[self._asked or Ending.DRAIN])

    async def _until(self, condition: Callable[[], bool], deadline: float) -> None:
        """Until it holds, or the deadline, or `kill_at`, which a hurried drain brings forward."""
        while not condition() and trio.current_time() < min(deadline, self._kill_at):
            with trio.move_on_at(min(deadline, self._kill_at)):
                await self._wait_changed()

    def _became_ready(self, generation: Generation) -> None:
        metrics = self.telemetry.metrics
        metrics.starts.labels(status="ready").inc()
        metrics.start_seconds.observe(trio.current_time() - generation.started_at)
        self._idleness.worked(trio.current_time())
        if self.state is State.STARTING:
            self._advance(Happening.READY)
        self._look()

    def _advance(
        self,
        happening: Happening,
        *,
        stored: bool = True,
        last_exit: dict[str, object] | None = None,
        restarted: bool = False,
    ) -> None:
        """The one place where the state changes, and its event is written."""
        self.state = advance(self.state, happening)
        self.since = self.wall_clock()
        self.record = attrs.evolve(
            self.record,
            last_exit=last_exit or self.record.last_exit,
            restarts=self.record.restarts + restarted,
        )
        if stored:
            data: dict[str, object] = {"happening": happening.value}
            self._outbox.post(
                partial(
                    self.store.record_state,
                    self.name,
                    generation=self.record.generation,
                    state=self.state.value,
                    event=f"tenant.{self.state.value}",
                    data=data | ({"last_exit": last_exit} if last_exit else {}),
                    last_exit=last_exit,
                    restarted=restarted,
                )
            )
        self._look()

    def _refuse_for_good(self) -> None:
        self._path.refuse(self._ending_error, for_good=True)

    def _ending_error(self) -> Exception:
        if self._asked is Ending.DELETE:
            return Unavailable(f"tenant {self.name!r} is being deleted")
        if self._asked is Ending.DRAIN:
            return Draining("the supervisor is being stopped; connect again in a moment")
        return Unavailable(f"tenant {self.name!r} has just been put away; try again")

    async def _wait_changed(self) -> None:
        await self._changed.wait()

    def _look(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
