"""The supervisor's end of the keeper: starts it, asks it to spawn, and starts another one if it dies.

It owns the keeper's process and control socket. It changes nothing process-wide: no signal handler, no
subreaper. A keeper that is the init was started before us; it cannot be replaced, and its death is fatal.
"""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from supervisor.errors import AgentStartFailed, SupervisorError
from supervisor.sandbox import keeper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from supervisor.telemetry import Telemetry

_START_S: Final = 10.0
# How long a spawn waits for a keeper that is being started again, or that does not read.
_REQUEST_S: Final = 5.0
# From one start of a keeper to the next, where it dies at once.
_RESTART_S: Final = 1.0
_END_S: Final = 10.0
_PACKET_BYTES: Final = 64 * 1024


class KeeperDied(SupervisorError):
    """The init process, which is parent of every agent, is gone or did not start; nothing can go on."""

    code = "keeper_died"


@attrs.define(eq=False)
class Keeper:
    """One keeper at a time. Use `start`, then `watch` in a task of its own, then `aclose`."""

    _telemetry: Telemetry
    # The init's socket, if there is an init; else the keeper is a child of ours.
    _init_control: socket.socket | None
    _control: socket.socket | None = attrs.field(default=None, init=False)
    _process: subprocess.Popen[bytes] | None = attrs.field(default=None, init=False)
    _up: trio.Event = attrs.field(factory=trio.Event, init=False)
    _sending: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    pid: int | None = attrs.field(default=None, init=False)
    restarts: int = attrs.field(default=0, init=False)
    # Processes that were left by shims which did not end by themselves, and in an init all that it adopted.
    orphans: int = attrs.field(default=0, init=False)

    async def start(self) -> None:
        """Returns once the keeper answers. Raises KeeperDied if it does not within 10 s."""
        try:
            self._control = self._init_control or self._spawn()
            self._control.setblocking(False)
            with trio.move_on_after(_START_S):
                if message := await receive(self._control):
                    self.pid = message["ready"]
                    self._up.set()
                    return
        except OSError as error:
            raise KeeperDied(f"the keeper cannot be started: {error}") from error
        finally:
            if not self._up.is_set():
                await self._release(kill=True)  # noqa: ASYNC102 (shields itself, bounded)
        raise KeeperDied(f"the keeper said nothing for {_START_S:g} s, or ended; its own words are on stderr")

    async def watch(self) -> None:
        """Runs until cancelled. Raises KeeperDied if the keeper was the init and is gone."""
        while True:
            began_at = trio.current_time()
            if self._control is not None:
                await self._follow(self._control)
                self._up = trio.Event()
                pid, self.pid = self.pid, None
                if self._init_control is not None:
                    raise KeeperDied("the init process is gone, and with it every agent")
                returncode = await self._release()
                self._telemetry.log.error("keeper_died", pid=pid, returncode=returncode)
                self.restarts += 1
                self._telemetry.metrics.keeper_restarts.inc()
            await trio.sleep_until(began_at + _RESTART_S)
            try:
                await self.start()
            except KeeperDied as error:
                self._telemetry.log.error("keeper_not_started", why=str(error), next_try_in_s=_RESTART_S)
            else:
                self._telemetry.log.warning("keeper_restarted", pid=self.pid)

    async def request(self, request: dict[str, Any], fds: Sequence[int]) -> None:
        """Sends a spawn request; what becomes of it is told on the status socket, the first of `fds`.

        Raises AgentStartFailed if no keeper takes it within 5 s, or if it is too long for a packet.
        """
        data = json.dumps(request).encode()
        with trio.move_on_after(_REQUEST_S):
            # One at a time: Trio lets only one task wait for room in a socket.
            async with self._sending:
                while True:
                    await self._up.wait()
                    try:
                        await self._send(data, fds)
                    except (BrokenPipeError, ConnectionResetError):
                        # `watch` sees the end too, and takes `_up` away.
                        await trio.sleep(0.001)
                    except OSError as error:
                        why = f"the keeper cannot be asked with {len(data)} bytes of command and environment"
                        raise AgentStartFailed(f"{why}: {error.strerror}", error.errno) from error
                    else:
                        return
        raise AgentStartFailed(f"no keeper took the request within {_REQUEST_S:g} s; try again")

    async def aclose(self) -> None:
        """Lets go of the keeper, and waits, shielded and at most 10 s, until it and its shims are gone."""
        pid, self._up = self.pid, trio.Event()
        started = self._process is not None
        if await self._release() is None and started:
            self._telemetry.log.error("keeper_stays", pid=pid, waited_s=_END_S)

    def _spawn(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Why Popen in Trio's own thread, which it blocks for about a millisecond: considered Trio's
        # open_process; chose this, as it must not be cancelled between the fork and our knowing of it.
        with theirs:
            try:
                self._process = subprocess.Popen(
                    keeper.command_line(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    # No secret, and nothing of ours; a Python built as a shared library may need this one.
                    env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        return ours

    async def _follow(self, control: socket.socket) -> None:
        """Until the keeper's end."""
        while message := await receive(control):
            self.orphans += message["orphans"]
            self._telemetry.metrics.orphans_reaped.inc(message["orphans"])

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        while True:
            control = self._control
            if control is None:
                raise BrokenPipeError
            try:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                control.sendmsg([data], [rights], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(control)
            else:
                return

    async def _release(self, *, kill: bool = False) -> int | None:
        """Closes the control socket and waits for the process; returns its status, None if it stays."""
        control, self._control = self._control, None
        if control is not None:
            trio.lowlevel.notify_closing(control)
            control.close()
        process, self._process = self._process, None
        if process is None:
            return None
        if kill:
            process.kill()
        with trio.move_on_after(_END_S, shield=True):
            return await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        return None


async def receive(packets: socket.socket) -> dict[str, Any] | None:
    """The next JSON object of a non-blocking SOCK_SEQPACKET socket; None at its end. Cancellation loses nothing."""
    while True:
        try:
            data = packets.recv(_PACKET_BYTES)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(packets)
        except ConnectionResetError:
            # The other side closed without reading all of ours. What it sent before is still to come.
            continue
        else:
            return json.loads(data) if data else None
