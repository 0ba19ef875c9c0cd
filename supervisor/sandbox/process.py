"""The plain launcher: an agent as an ordinary process of ours, kept apart but not confined.

Its own session, clean environment, closed descriptors, rlimits and no_new_privs: that keeps honest agents apart
and is no security boundary. The process tree, its exit and its end are the shim's work; this module makes what
the agent gets, and waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from supervisor.errors import AgentStartFailed, AgentUnreachable
from supervisor.sandbox import tree, workspace
from supervisor.sandbox.keeper_client import Keeper, receive
from supervisor.sandbox.launcher import ExitStatus
from supervisor.sandbox.output import relay_output

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from supervisor.sandbox.launcher import AgentSpec
    from supervisor.settings import SandboxSettings, Settings
    from supervisor.telemetry import Telemetry

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# How long the shim tries to lock a workspace in which something of an earlier agent is not gone yet.
_LOCK_TIMEOUT_S: Final = 5.0
# SIGKILL is the kernel's promise; this is how long we believe it before we say so.
_END_S: Final = 10.0
_OUTPUT_END_S: Final = 1.0
_FULL_BACKLOG_WAIT_S: Final = (0.001, 0.02)
# So many processes are read in less time than a thread takes to start.
_FEW_PROCESSES: Final = 16


@attrs.frozen
class LauncherStatistics:
    """A snapshot, for the operator."""

    # None while a keeper is being started.
    keeper_pid: int | None
    agents: int
    orphans_reaped: int
    keeper_restarts: int


@attrs.define(eq=False)
class ProcessAgent:
    """An AgentProcess that is one. `link` is the supervisor's end of the agent's fd 4, closed when `run` returns."""

    _status: socket.socket
    _address: str
    link: trio.SocketStream
    # For the words of errors only.
    _name: str
    pid: int | None = attrs.field(default=None, init=False)
    exit_status: ExitStatus | None = attrs.field(default=None, init=False)
    _shim: int | None = attrs.field(default=None, init=False)
    _exited: trio.Event = attrs.field(factory=trio.Event, init=False)
    is_empty: bool = attrs.field(default=False, init=False)
    # How many processes beside the main one the shim reaped; None until it has told, or if it was killed.
    orphans: int | None = attrs.field(default=None, init=False)
    _cpu_s: float = attrs.field(default=0.0, init=False)
    _processes: int = attrs.field(default=0, init=False)

    async def connect(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        wait_s, longest_wait_s = _FULL_BACKLOG_WAIT_S
        try:
            with contextlib.ExitStack() as on_failure:
                raw = on_failure.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                raw.setblocking(False)
                while not self._try_connect(raw):
                    await trio.sleep(wait_s)
                    wait_s = min(wait_s * 2, longest_wait_s)
                on_failure.pop_all()
        except OSError as error:
            raise AgentUnreachable(f"{self._name} cannot be connected to: {error.strerror}") from error
        return trio.SocketStream(trio.socket.from_stdlib_socket(raw))

    def _try_connect(self, raw: socket.socket) -> bool:
        # Why not Trio's connect: it takes EAGAIN, which a unix socket says for a full backlog, for a connection
        # in progress, and calls that connected. There is nothing to wait for but time.
        if self.exit_status is not None or self.is_empty:
            raise AgentUnreachable(f"{self._name} has ended")
        try:
            raw.connect(self._address)
        except BlockingIOError:
            return False
        return True

    async def wait_exited(self) -> ExitStatus:
        await self._exited.wait()
        assert self.exit_status is not None
        return self.exit_status

    def terminate(self) -> None:
        self._command(signal=int(signal.SIGTERM))

    def kill(self) -> None:
        self._command(kill=True)

    async def cpu_seconds(self) -> float:
        if self._shim is not None and not self.is_empty:
            if self._processes <= _FEW_PROCESSES:
                cpu_s, self._processes = tree.cpu_seconds_below(self._shim)
            else:
                cpu_s, self._processes = await trio.to_thread.run_sync(tree.cpu_seconds_below, self._shim)
            # What a process reaped without a look is in nobody's sum any more.
            self._cpu_s = max(self._cpu_s, cpu_s)
        return self._cpu_s

    async def wait_started(self) -> None:
        """Raises AgentStartFailed, with the shim's reason."""
        message = await receive(self._status)
        if message is None:
            raise AgentStartFailed(f"{self._name} was not started: the keeper ended, or reached a limit; try again")
        if "failed" in message:
            raise AgentStartFailed(f"{self._name} was not started: {message['failed']}", message["errno"])
        self.pid, self._shim = message["started"], message["shim"]

    async def wait_empty(self) -> None:
        """Follows the shim's reports until nothing is left, which is the end of its socket."""
        while not self.is_empty:
            message = await receive(self._status)
            if message is None:
                self.is_empty = True
            elif "exited" in message:
                self._set_exited(ExitStatus(message["exited"]))
            elif "empty" in message:
                self.orphans = message["orphans"]

    def close(self) -> None:
        self.is_empty = True
        if self.exit_status is None:
            # Its shim was killed, and the main process with it; or it was never started.
            self._set_exited(ExitStatus(-signal.SIGKILL))

    def _set_exited(self, status: ExitStatus) -> None:
        self.exit_status = status
        self._exited.set()

    def _command(self, **command: object) -> None:
        # To a shim that is gone, or does not read, there is nothing to say: the socket's close kills too.
        if not self.is_empty:
            with contextlib.suppress(OSError):
                self._status.send(json.dumps(command).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


@attrs.define(eq=False)
class ProcessLauncher:
    """A Launcher. `open_process_launcher` makes it."""

    _settings: SandboxSettings
    _telemetry: Telemetry
    _keeper: Keeper
    _agents: int = attrs.field(default=0, init=False)
    _orphans: int = attrs.field(default=0, init=False)

    async def run(
        self, spec: AgentSpec, *, task_status: trio.TaskStatus[ProcessAgent] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See Launcher.run. Raises AgentStartFailed also if the workspace stays busy for 5 s."""
        with contextlib.ExitStack() as held, contextlib.ExitStack() as theirs:
            try:
                directory = workspace.prepare_home(spec.home)
                agent, output, handles = _open_handles(spec, held, theirs)
            except OSError as error:
                why = f"{_name(spec)} was not started: {spec.home} cannot be prepared: {error.strerror}"
                raise AgentStartFailed(why, error.errno) from error
            async with self._owned(spec, agent):
                try:
                    await self._keeper.request(_request(spec, directory, self._settings), handles)
                finally:
                    # The agent's copies are the only ones from now on: connects are refused when it has ended.
                    theirs.close()
                await agent.wait_started()
                async with trio.open_nursery() as nursery:
                    relaying = trio.CancelScope(shield=True)
                    nursery.start_soon(self._relay, spec, output, relaying)
                    try:
                        task_status.started(agent)
                        await agent.wait_empty()
                    finally:
                        agent.kill()
                        # The pipe ends with the tree; this is for a tree that does not.
                        relaying.deadline = trio.current_time() + _OUTPUT_END_S

    def statistics(self) -> LauncherStatistics:
        keeper = self._keeper
        return LauncherStatistics(keeper.pid, self._agents, self._orphans + keeper.orphans, keeper.restarts)

    async def zombies(self) -> int:
        """How many children of the keeper or of a shim have ended and are not reaped; 0 but for an instant."""
        pid = self._keeper.pid
        return 0 if pid is None else await trio.to_thread.run_sync(_count_zombies, pid)

    @contextlib.asynccontextmanager
    async def _owned(self, spec: AgentSpec, agent: ProcessAgent) -> AsyncIterator[None]:
        """Whatever happens inside, nothing of the agent is alive afterwards, or the log tells."""
        log = self._telemetry.log
        self._agents += 1
        try:
            yield
        finally:
            agent.kill()
            with trio.move_on_after(_END_S, shield=True):
                await agent.wait_empty()
            known = {"tenant": spec.tenant, "generation": spec.generation, "pid": agent.pid}
            if not agent.is_empty:
                why = "SIGKILL did not end it; it stays locked in its workspace until the kernel lets it go"
                log.error("agent_stays", **known, waited_s=_END_S, why=why)
            elif agent.pid is not None and agent.orphans is None:
                log.warning("agent_shim_lost", **known, why="the process that watched it was killed; so was the agent")
            self._agents -= 1
            self._orphans += agent.orphans or 0
            self._telemetry.metrics.orphans_reaped.inc(agent.orphans or 0)
            agent.close()

    async def _relay(self, spec: AgentSpec, output: int, scope: trio.CancelScope) -> None:
        with scope:
            await relay_output(output, self._settings, self._telemetry, tenant=spec.tenant, generation=spec.generation)


@contextlib.asynccontextmanager
async def open_process_launcher(
    settings: Settings, telemetry: Telemetry, *, control: socket.socket | None = None
) -> AsyncIterator[ProcessLauncher]:
    """Starts the keeper and gives the launcher; at the end lets the keeper go and waits for it, at most 10 s.

    Open it before anything else, so that the keeper is small and holds nothing. With `control`, the socket of an
    init that is our parent, no keeper is started. Raises KeeperDied if none can be started, or, out of the
    block and in a group, when the init dies. The block's own errors come out in a group, as from any nursery.
    """
    keeper = Keeper(telemetry, control)
    try:
        await keeper.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.watch)
            yield ProcessLauncher(settings.sandbox, telemetry, keeper)
            nursery.cancel_scope.cancel(reason="the launcher is closed")
    finally:
        with trio.CancelScope(shield=True):
            await keeper.aclose()


def _open_handles(
    spec: AgentSpec, held: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[ProcessAgent, int, list[int]]:
    """The agent, the readable end of its output, and what goes to the shim, in the order of `shim.Handles`.

    `theirs` holds our copies of the latter, `held` all that we keep. Raises OSError.
    """
    status, shims_status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    held.enter_context(status)
    theirs.enter_context(shims_status)
    link, agents_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.enter_context(agents_link)
    held.enter_context(link)
    lock = workspace.open_lock(spec.home)
    theirs.callback(os.close, lock)
    listener, path_fd = workspace.open_listener(spec.home)
    theirs.enter_context(listener)
    held.callback(os.close, path_fd)
    output, agents_output = os.pipe2(os.O_CLOEXEC)
    theirs.callback(os.close, agents_output)
    held.callback(os.close, output)
    os.set_blocking(output, False)
    status.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(link))
    held.callback(stream.socket.close)
    agent = ProcessAgent(status, workspace.address(path_fd), stream, _name(spec))
    return agent, output, [shims_status.fileno(), lock, agents_output, listener.fileno(), agents_link.fileno()]


def _request(spec: AgentSpec, directory: Path, settings: SandboxSettings) -> dict[str, Any]:
    environment = {
        "PATH": _PATH,
        "HOME": str(directory),
        "LANG": "C.UTF-8",
        **spec.env,
        "TENANTRY_TENANT": spec.tenant,
        "TENANTRY_GENERATION": str(spec.generation),
        "TENANTRY_WORKSPACE": str(directory),
    }
    return {
        "argv": list(spec.command),
        "env": environment,
        "cwd": str(directory),
        "limits": _limits(settings),
        "lock_timeout_s": _LOCK_TIMEOUT_S,
    }


def _limits(settings: SandboxSettings) -> dict[str, tuple[int, int]]:
    """What is asked for, or less where the supervisor itself may have less: a limit is an upper bound."""
    asked = {
        "RLIMIT_NOFILE": settings.open_files,
        "RLIMIT_FSIZE": settings.file_size_bytes,
        "RLIMIT_AS": settings.address_space_bytes,
        "RLIMIT_CPU": settings.cpu_time_s,
        "RLIMIT_NPROC": settings.processes,
    }
    limits = {}
    for name, value in asked.items():
        if value > 0:
            own = resource.getrlimit(getattr(resource, name))[1]
            hard = value if own == resource.RLIM_INFINITY else min(value, own)
            limits[name] = (hard, hard)
    if "RLIMIT_CPU" in limits:
        # SIGXCPU at the limit, which tells why; SIGKILL a second later to an agent that catches it.
        soft, hard = limits["RLIMIT_CPU"]
        limits["RLIMIT_CPU"] = (max(soft - 1, 1), hard)
    return limits


def _name(spec: AgentSpec) -> str:
    return f"the agent of {spec.tenant} (generation {spec.generation})"


def _count_zombies(keeper: int) -> int:
    ours = tree.children(keeper)
    return sum(tree.state(pid) == "Z" for pid in [*ours, *(below for pid in ours for below in tree.children(pid))])
