"""The connect path: one ladder a tenant, and every caller on it (S3-05 to S3-12).

Callers come here with the head of an upgrade. They wait for an attempt, which the tenant's owner opens on a live
generation, speak their exchange, and report how it failed; the first failure of an attempt counts for the ladder,
all others are its echoes. A caller that leaves takes only itself away. No lock: what is written between two awaits
is one step.
"""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from supervisor.errors import (
    AgentError,
    AgentExited,
    AgentStartFailed,
    AgentTimeout,
    AgentUnreachable,
    ConnectFailed,
)
from supervisor.tenant.handshake import Answer, exchange
from supervisor.tenant.ladder import Ladder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from structlog.typing import FilteringBoundLogger

    from supervisor.settings import Settings
    from supervisor.telemetry import Metrics
    from supervisor.tenant.generation import Generation

# An agent that answers so is alive, and cannot serve just now: the attempt is repeated (S3-07).
RETRYABLE_STATUSES = frozenset({500, 502, 503, 504})
# Exchanges under way at one moment: below the backlog of a listening socket (somaxconn is 4096, in older kernels
# 128; the launcher reads a full backlog as "wait").
MAX_EXCHANGES = 1000
# A dying process's sockets close before its exit is reported; this long we wait for the better word.
EXIT_REPORT_S = 0.5


class AgentSilent(AgentTimeout):
    """No answer in time, and not a byte to anybody else meanwhile: it hangs."""


class AgentBusy(AgentError):
    """It answered 500, 502, 503 or 504: alive, but not able to serve."""


@attrs.define(eq=False)
class Attempt:
    """One rung on one generation, open to every caller. `deadline` holds until the generation is ready."""

    rung: int
    generation: Generation
    deadline: float
    # Which of the tenant's ladders it is on: when that one was given up, so were all who had failed on it.
    ladder: int
    failed: bool = False

    @property
    def open(self) -> bool:
        """A newcomer may try: nobody failed yet, or the agent is known to serve others; and nobody ends it."""
        return not self.generation.ending and (not self.failed or self.generation.ready_at is not None)


@attrs.frozen
class Connected:
    """An answered upgrade; the stream is now the caller's to close."""

    stream: trio.abc.Stream
    answer: Answer
    generation: Generation


@attrs.define(eq=False)
class _Decision:
    """What is awaited between two attempts: the next one, or why there will be none."""

    made: trio.Event = attrs.field(factory=trio.Event)
    waiting: int = 0
    attempt: Attempt | None = None
    error: Callable[[], Exception] | None = None


@attrs.define(eq=False)
class ConnectPath:
    """The ladder, its callers and the attempt that is open. `changed` tells the owner to look again."""

    tenant: str
    settings: Settings
    log: FilteringBoundLogger
    metrics: Metrics
    changed: Callable[[], None]
    became_ready: Callable[[Generation], None]
    has_clients: Callable[[], bool]

    ladder: Ladder = attrs.field(init=False)
    callers: int = attrs.field(init=False, default=0)
    _climbers: int = attrs.field(init=False, default=0)
    _attempt: Attempt | None = attrs.field(init=False, default=None)
    _next: _Decision = attrs.field(init=False, factory=_Decision)
    _given_up: int = attrs.field(init=False, default=0)
    _verdict: Callable[[], Exception] = attrs.field(init=False, default=ConnectFailed)
    _refusal: Callable[[], Exception] | None = attrs.field(init=False, default=None)
    _exchanges: trio.Semaphore = attrs.field(init=False, factory=lambda: trio.Semaphore(MAX_EXCHANGES))

    def __attrs_post_init__(self) -> None:
        self.ladder = Ladder(self.settings.connect_retry_s)

    # ---- for callers ---------------------------------------------------------------------------------------

    async def connect(self, head: bytes) -> Connected:
        """Speaks one upgrade to the agent. Returns every answer but 500, 502, 503 and 504 (S3-08).

        Raises ConnectFailed when the ladder is at its end, or what `refuse` was given. A connection is retried, a
        message never: the caller has sent nothing but the head (S3-19). Cancellation takes this caller away, and
        when it was the last one the ladder stops (S3-12).
        """
        last: Attempt | None = None
        own: list[str] = []
        with self._counted() as climbs:
            while True:
                attempt = await self._attempt_after(last)
                try:
                    return await self._try(attempt, head)
                except AgentError as error:
                    self._failed(attempt, error)
                    own.append(str(error))
                # Others may bring the ladder back to its first rung again and again: an agent that serves them all,
                # and dies of this head each time, would be killed without end.
                if len(own) > len(self.settings.connect_retry_s) + 1:
                    raise self._connect_failed(f"{len(own)} attempts failed, the last one so: {own[-1]}")
                if last is None:
                    climbs()
                last = attempt

    @contextlib.contextmanager
    def _counted(self) -> Iterator[Callable[[], None]]:
        climbing = False

        def climbs() -> None:
            nonlocal climbing
            climbing = True
            self._climbers += 1

        self.callers += 1
        self.changed()
        try:
            yield climbs
        finally:
            self.callers -= 1
            self._climbers -= climbing
            self.changed()

    async def _attempt_after(self, last: Attempt | None) -> Attempt:
        if self._refusal is not None:
            raise self._refusal()
        if last is not None and last.ladder < self._given_up:
            raise self._verdict()
        self._settle()
        attempt = self._attempt
        if attempt is not None and attempt is not last and attempt.open:
            return attempt
        decision = self._next
        decision.waiting += 1
        self.changed()
        try:
            await decision.made.wait()
        finally:
            decision.waiting -= 1
        if decision.error is not None:
            raise decision.error()
        assert decision.attempt is not None
        return decision.attempt

    async def _try(self, attempt: Attempt, head: bytes) -> Connected:
        """One connect and one exchange, within the attempt's deadline."""
        generation = attempt.generation
        began = trio.current_time()
        deadline = attempt.deadline
        if generation.ready_at is not None:
            deadline = began + self.settings.connect_timeout_s
        heard = generation.heard()
        stream: trio.abc.Stream | None = None
        answer: Answer | None = None
        scope = trio.CancelScope(deadline=deadline)
        generation.exchanges.add(scope)
        if generation.ending:
            scope.cancel(reason="the agent is being ended")
        try:
            with scope:
                async with self._exchanges:
                    stream = await generation.process.connect()
                    answer = await exchange(stream, head)
        except AgentUnreachable:
            with trio.move_on_after(EXIT_REPORT_S):
                await generation.exited.wait()
            if not generation.exited.is_set():
                raise
        finally:
            generation.exchanges.discard(scope)
            if stream is not None and (answer is None or answer.status in RETRYABLE_STATUSES):
                await trio.aclose_forcefully(stream)
        if stream is None or answer is None:
            if generation.process.exit_status is not None:
                raise AgentExited(f"the agent ended before it answered: {generation.process.exit_status}")
            words = f"no answer within {deadline - began:.3g} s"
            if generation.heard() == heard:
                raise AgentSilent(words)
            raise AgentTimeout(f"{words}, though the agent speaks to others")
        generation.answers += 1
        if answer.status in RETRYABLE_STATUSES:
            raise AgentBusy(f"the agent answered {answer.status}")
        if generation.ready_at is None and generation is self._generation:
            generation.ready_at = trio.current_time()
            self.became_ready(generation)
        self.metrics.connects.labels(rung=str(attempt.rung)).inc()
        return Connected(stream, answer, generation)

    def _failed(self, attempt: Attempt, error: AgentError) -> None:
        """Counts an attempt's first failure, and says whether its generation must be reset (S3-09, S3-11)."""
        generation = attempt.generation
        self._settle()
        current = self._attempt
        echo = attempt.failed or current is None or current.failed or current.generation is not generation
        attempt.failed = True
        if echo or current is None or (generation.ending and not generation.exited.is_set()):
            return  # counted already; or it was ended, which is nobody's failure
        current.failed = True
        if isinstance(error, AgentExited) and generation.stable:
            return  # it had lived: the next one is started at once
        never_ready = generation.ready_at is None
        alive = isinstance(error, (AgentBusy, AgentTimeout)) and not isinstance(error, AgentSilent)
        self._count(str(error), never_ready and _start_status(error))
        last_rung = self.ladder.exhausted
        generation.reset_wanted = (
            isinstance(error, AgentSilent)
            or (never_ready and (last_rung or not alive))
            or (last_rung and isinstance(error, AgentUnreachable) and not self.has_clients())
        )
        if last_rung and not generation.reset_wanted and not generation.exited.is_set():
            self._give_up()
            self._attempt = Attempt(0, generation, attempt.deadline, self._given_up)
        self.changed()

    # ---- for the owner -------------------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Somebody waits for an attempt to be opened."""
        return self._next.waiting > 0

    @property
    def _generation(self) -> Generation | None:
        return self._attempt.generation if self._attempt is not None else None

    def open(self, generation: Generation, deadline: float) -> None:
        """The next attempt is this one: everybody who waits goes, and so do newcomers until it fails."""
        attempt = Attempt(self.ladder.rung, generation, deadline, self._given_up)
        self._attempt = attempt
        self._decide(_Decision(attempt=attempt))

    def next_rung_at(self) -> float:
        """When a living generation is to be tried again, because somebody waits for that."""
        attempt = self._attempt
        if attempt is None or not attempt.failed or not self.wanted or attempt.generation.reset_wanted:
            return math.inf
        return self.ladder.not_before

    def start_failed(self, error: AgentStartFailed) -> bool:
        """There is no generation to try. True if that was the last rung."""
        self._count(str(error), "failed")
        return self.ladder.exhausted and self._give_up()

    def generation_ended(self, generation: Generation, *, by_itself: bool, words: str) -> bool:
        """No attempt is open any more. True if that was the last rung's end."""
        self._settle()
        attempt, self._attempt = self._attempt, None
        if by_itself and not generation.stable:
            if attempt is not None and not attempt.failed:
                self._count(words, generation.ready_at is None and "exited")
        elif not generation.reset_wanted:
            self.ladder.reset()  # it had lived, or we ended it
        return self.ladder.exhausted and self._give_up()

    @property
    def closed(self) -> bool:
        return self._refusal is not None

    def refuse(self, error: Callable[[], Exception], *, for_good: bool) -> None:
        """Sends away everybody who waits; `for_good` also everybody who comes later."""
        if for_good:
            self._refusal = error
        self._send_away(error)

    # ---- the ladder ----------------------------------------------------------------------------------------

    def _count(self, words: str, start_status: str | bool) -> None:
        self.ladder.fail(words, trio.current_time())
        self.log.warning("connect_attempt_failed", attempt=self.ladder.rung, reason=words)
        if start_status:
            self.metrics.starts.labels(status=start_status).inc()

    def _settle(self) -> None:
        """Back to the first rung: once when a generation becomes stable, and whenever nobody climbs on a stable one."""
        attempt = self._attempt
        if attempt is None or attempt.generation.ready_at is None:
            return
        generation = attempt.generation
        ready_for = trio.current_time() - attempt.generation.ready_at
        becomes_stable = not generation.stable and ready_for >= self.settings.stable_after_s
        generation.stable = generation.stable or becomes_stable
        if becomes_stable or (generation.stable and not self._climbers):
            self.ladder.reset()
            if (attempt.rung or attempt.failed) and not generation.ending:
                self.open(generation, attempt.deadline)

    def _give_up(self) -> bool:
        story = self.ladder.story()
        self.ladder.reset()
        self.log.error("connect_given_up", reason=story)
        self.metrics.connects.labels(rung="failed").inc()

        self._send_away(partial(self._connect_failed, story))
        return True

    def _connect_failed(self, story: str) -> ConnectFailed:
        failed = ConnectFailed(f"the agent of tenant {self.tenant!r} could not be reached: {story}")
        failed.retry_after_s = self.settings.connect_retry_s[-1] if self.settings.connect_retry_s else 1.0
        return failed

    def _send_away(self, verdict: Callable[[], Exception]) -> None:
        """Everybody who waits hears it now, and whoever is in an exchange when that fails."""
        self._verdict = verdict
        self._given_up += 1
        self._decide(_Decision(error=verdict))

    def _decide(self, decision: _Decision) -> None:
        waiting, self._next = self._next, _Decision()
        waiting.attempt, waiting.error = decision.attempt, decision.error
        waiting.made.set()


def _start_status(error: AgentError) -> str:
    if isinstance(error, AgentExited):
        return "exited"
    return "timeout" if isinstance(error, AgentTimeout) else "failed"
