"""A launcher whose agents are tasks: no process, no keeper, no thread, so it works under an autojump clock.

It keeps what `Launcher` and `AgentProcess` promise, exit statuses included, and is strict with whoever uses it: two
generations of one tenant that overlap, or one that is not newer than the last, are errors.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Awaitable, Callable

import attrs
import trio

from supervisor.errors import AgentStartFailed, AgentUnreachable
from supervisor.sandbox.launcher import AgentProcess, AgentSpec, ExitStatus
from supervisor.testing.streams import BUFFER_BYTES, MemoryStream, open_stream_pair

# An agent's main function: its return is the process's end, and its value the status (None is 0).
Program = Callable[["AgentContext"], Awaitable[int | None]]


@attrs.define(eq=False)
class MemoryLauncher:
    """Runs `program` for every agent. `connection_bytes` is what a connection buffers in each direction."""

    program: Program
    connection_bytes: int = BUFFER_BYTES
    # Every spec that was asked for, in order, failed starts included.
    starts: list[AgentSpec] = attrs.field(init=False, factory=list)
    # The processes whose `run` has not returned, by tenant.
    alive: dict[str, MemoryProcess] = attrs.field(init=False, factory=dict)
    # What agents raised, and what was asked against the rules. `check` raises it.
    errors: list[Exception] = attrs.field(init=False, factory=list)
    _start_errors: list[AgentStartFailed] = attrs.field(init=False, factory=list)
    _last_generation: dict[str, int] = attrs.field(init=False, factory=dict)

    def fail_next_starts(self, *errors: AgentStartFailed) -> None:
        """The next starts raise these, one each, in place of starting."""
        self._start_errors += errors

    def check(self) -> None:
        """Raises what went wrong inside agents, or between this launcher and its user, as one group."""
        if self.errors:
            raise ExceptionGroup("in agents run in memory", self.errors)

    async def run(
        self, spec: AgentSpec, *, task_status: trio.TaskStatus[AgentProcess] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """`Launcher.run`. Raises AssertionError, which `check` raises again, if a generation is out of turn."""
        self.starts.append(spec)
        self._assert_in_turn(spec)
        if self._start_errors:
            await trio.lowlevel.checkpoint()
            raise self._start_errors.pop(0)
        process = self.alive[spec.tenant] = MemoryProcess(spec, self.connection_bytes)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.run, self.program, self.errors)
                task_status.started(process)
        finally:
            del self.alive[spec.tenant]

    def _assert_in_turn(self, spec: AgentSpec) -> None:
        newest = self._last_generation.get(spec.tenant, -math.inf)
        self._last_generation[spec.tenant] = spec.generation
        other = self.alive.get(spec.tenant)
        if other is not None:
            words = f"was started while generation {other.spec.generation} still ran"
        elif spec.generation <= newest:
            words = f"was started after generation {newest}"
        else:
            return
        error = AssertionError(f"generation {spec.generation} of tenant {spec.tenant!r} {words}")
        self.errors.append(error)
        raise error


class MemoryProcess(AgentProcess):
    """An agent in memory, as its supervisor sees it; `cpu_s` may be set by a test."""

    def __init__(self, spec: AgentSpec, connection_bytes: int = BUFFER_BYTES) -> None:
        self.spec = spec
        self.cpu_s = 0.0
        self._connection_bytes = connection_bytes
        self._status: ExitStatus | None = None
        self._exited = trio.Event()
        # Set by the first cause of the end; the status appears when nothing of the program runs any more.
        self._ends_with: int | None = None
        self._stopped = False
        self._listening = True
        self._ends: list[MemoryStream] = []
        self._to_backlog, self._backlog = trio.open_memory_channel[MemoryStream](math.inf)
        self._sigterm: trio.Event | None = None
        self._program_scope = trio.CancelScope()
        self._process_scope = trio.CancelScope()

    @property
    def pid(self) -> int | None:
        return None

    @property
    def exit_status(self) -> ExitStatus | None:
        return self._status

    @property
    def connections(self) -> int:
        """How many connections of the agent's are open at its end, those not accepted yet included."""
        return sum(not end.closed for end in self._ends)

    async def connect(self) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if not self._listening:
            raise AgentUnreachable(f"the agent of tenant {self.spec.tenant!r} does not listen")
        ours, theirs = open_stream_pair(buffer_bytes=self._connection_bytes)
        self._ends = [end for end in self._ends if not end.closed]
        self._ends.append(theirs)
        self._to_backlog.send_nowait(theirs)
        return ours

    async def wait_exited(self) -> ExitStatus:
        await self._exited.wait()
        assert self._status is not None
        return self._status

    def terminate(self) -> None:
        """SIGTERM: the event of a program that catches it, the end of one that does not, nothing to a stopped one."""
        if self._stopped:
            return
        if self._sigterm is not None:
            self._sigterm.set()
        else:
            self._end(-signal.SIGTERM)

    def kill(self) -> None:
        self._end(-signal.SIGKILL)

    async def cpu_seconds(self) -> float:
        await trio.lowlevel.checkpoint()
        return self.cpu_s

    async def run(self, program: Program, errors: list[Exception]) -> None:
        """Runs the program to its end. A cancellation is a SIGKILL."""
        try:
            with self._process_scope:
                with self._program_scope:
                    try:
                        returncode = await program(AgentContext(self))
                    except Exception as error:
                        # What still runs after the end would not exist in a real process.
                        if self._ends_with is None:
                            errors.append(error)
                        returncode = 1
                    self._end(returncode or 0)
                if self._stopped:
                    await trio.sleep_forever()
        finally:
            self._end(-signal.SIGKILL)
            assert self._ends_with is not None
            self._status = ExitStatus(int(self._ends_with))
            self._exited.set()

    def _end(self, returncode: int) -> None:
        # The kernel closes a process's sockets before anybody hears of its end, and after a SIGKILL nothing more is
        # said, whatever a `finally` of the program may try. Cancelled first, so that no task takes the closing of its
        # streams for an error.
        if self._ends_with is None:
            self._ends_with = returncode
            self._process_scope.cancel(reason="the process ended")
            self._stop_listening()
            for end in self._ends:
                end.close()

    def _stop_listening(self) -> None:
        self._listening = False
        # Accepted connections go on; those in the backlog are reset.
        while self._backlog.statistics().current_buffer_used:
            self._backlog.receive_nowait().close()
        self._to_backlog.close()

    def _stop(self) -> None:
        self._stopped = True
        self._program_scope.cancel(reason="the process was stopped")


class AgentContext:
    """A program's view of its own process: what it was started for, its listening socket, its signals, its end."""

    def __init__(self, process: MemoryProcess) -> None:
        self._process = process

    @property
    def spec(self) -> AgentSpec:
        return self._process.spec

    async def accept(self) -> MemoryStream:
        """The next connection. Raises trio.EndOfChannel after `stop_listening`."""
        return await self._process._backlog.receive()

    def stop_listening(self) -> None:
        """Closes the listening socket: connects fail from now on, and those in the backlog are reset."""
        self._process._stop_listening()

    def catch_sigterm(self) -> trio.Event:
        """From now on SIGTERM sets this event, and does nothing else; before, it ends the process (-15)."""
        if self._process._sigterm is None:
            self._process._sigterm = trio.Event()
        return self._process._sigterm

    def exit(self, returncode: int) -> None:
        """Ends the process at once: its streams are closed now, its tasks cancelled. Negative is a death by signal."""
        self._process._end(returncode)

    def stop(self) -> None:
        """SIGSTOP: nothing of the program runs any more, its streams stay open, and only SIGKILL has an effect.

        The program is cancelled for that, so it must not close its streams when it is.
        """
        self._process._stop()
