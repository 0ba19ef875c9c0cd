"""A supervisor with listeners (`serve`), and the whole program (`run_server`): signals, watchdog, exit status."""

from __future__ import annotations

import contextlib
import gc
import resource
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from supervisor.errors import SupervisorError
from supervisor.gateway.listeners import open_listeners, tls_context
from supervisor.sandbox.process import open_process_launcher
from supervisor.signals import EXIT_WATCHDOG, Watchdog, watch_signals
from supervisor.supervisor import Supervisor, open_supervisor
from supervisor.telemetry import open_telemetry

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from supervisor.sandbox.launcher import Launcher
    from supervisor.settings import Settings
    from supervisor.telemetry import Telemetry


@attrs.frozen
class Server:
    """What `serve` gives: where it listens, and the supervisor behind it."""

    addresses: list[str]
    supervisor: Supervisor


async def serve(
    settings: Settings,
    *,
    launcher: Launcher | None = None,
    telemetry: Telemetry | None = None,
    control: socket.socket | None = None,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until a drain is asked for, and drains: `server = await nursery.start(serve, settings)`.

    Reports the bound addresses once clients can connect. Cancellation kills every agent and closes every
    connection. Raises ConfigError and StoreError before that.
    """
    async with contextlib.AsyncExitStack() as stack:
        if telemetry is None:
            telemetry = stack.enter_context(open_telemetry(settings.log))
        if launcher is None:
            # The keeper is made before anything else is open.
            launcher = await stack.enter_async_context(open_process_launcher(settings, telemetry, control=control))
        listeners, addresses = await open_listeners(settings.bind, tls=tls_context(settings.tls))
        for listener in listeners:
            stack.callback(listener.close)
        supervisor = await stack.enter_async_context(
            open_supervisor(settings, launcher=launcher, telemetry=telemetry, addresses=addresses)
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.front.serve, listeners)
            telemetry.log.info("listening", addresses=addresses)
            task_status.started(Server(addresses, supervisor))
            await supervisor.drain_asked.wait()
            supervisor.front.refuse_new()
            await supervisor.drain()
            supervisor.front.terminate()


def run_server(settings: Settings, *, control: socket.socket | None = None, announce: Callable[[Server], None]) -> int:
    """The whole program: signals, watchdog, exit status. 0 after a drain, 70 after one that was forced.

    `announce` is called once clients can connect. Raises ConfigError and StoreError bare.
    """
    return trio.run(_run_server, settings, control, announce)


async def _run_server(settings: Settings, control: socket.socket | None, announce: Callable[[Server], None]) -> int:
    _raise_open_files_limit()
    watchdog = Watchdog()
    server: Server | None = None
    status = 0

    def drain(_signal: object) -> None:
        if server is None:
            nursery.cancel_scope.cancel(reason="a signal came before the start was done")
        else:
            server.supervisor.request_drain()

    def force(_signal: object) -> None:
        nonlocal status
        status = EXIT_WATCHDOG
        nursery.cancel_scope.cancel(reason="a third signal")

    async def guard(supervisor: Supervisor) -> None:
        await supervisor.drain_asked.wait()
        watchdog.arm(settings.drain_grace_s, "the drain")

    try:
        async with trio.open_nursery() as signals:
            await signals.start(watch_signals, [drain, drain, force])
            async with trio.open_nursery() as nursery:
                with open_telemetry(settings.log) as telemetry:
                    async with trio.open_nursery() as serving:
                        server = await serving.start(partial(serve, settings, telemetry=telemetry, control=control))
                        serving.start_soon(guard, server.supervisor)
                        announce(server)
                        # What is loaded stays: a full collection would hold the loop up for a tenth of a second.
                        gc.collect()
                        gc.freeze()
            signals.cancel_scope.cancel(reason="the server has ended")
    except BaseExceptionGroup as group:
        # Why not `except*`: before Python 3.11.4 what is raised in one comes out in a group again.
        ours, others = group.split(SupervisorError)
        if ours is None or others is not None:
            raise
        raise _first(ours) from None
    finally:
        watchdog.disarm()
    return status


def _first(group: BaseExceptionGroup[SupervisorError]) -> SupervisorError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _raise_open_files_limit() -> None:
    """Two descriptors a connection: a service manager's soft limit of 1024 is for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
