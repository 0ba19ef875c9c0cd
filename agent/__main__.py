"""`python -m agent [--app module:callable]`: takes the socket, serves until SIGTERM or SIGINT, exits 0.

Signals are blocked before anything slow is imported: one that comes during the imports is kept, and drains.
Exit status: 0 drained, 64 usage, 78 no socket, no workspace, or no such app.
"""

from __future__ import annotations

import gc
import signal
import sys

TYPE_CHECKING = False  # `typing` is not free either.
if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import trio

    from agent.server import Handler, Server

_STOP = (signal.SIGTERM, signal.SIGINT)
_USAGE = 64
_CONFIGURATION = 78


def main() -> int:
    """Runs the agent; returns its exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    # What a parent chose to ignore would be ignored by every child of ours; Python's own two are reset for
    # children by `subprocess`.
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    app = None
    if len(sys.argv) > 1:  # argparse costs 10 ms of a start.
        import argparse

        parser = argparse.ArgumentParser(prog="agent", description="Serves a tenant's WebSockets.")
        parser.add_argument("--app", metavar="MODULE:CALLABLE", help="an `async def handler(ws)` of one's own")
        try:
            app = parser.parse_args().app
        except SystemExit as stop:
            return _USAGE if stop.code else 0

    # What is imported stays: a collection finds nothing in it, during the imports or at any later time (a quarter of
    # the processor time of a start, and most of that of an exit).
    gc.disable()
    import os
    from functools import partial

    import trio

    from agent.listening import NoSocket, open_listening_socket
    from agent.server import log

    workspace = os.path.realpath(os.environ.get("TENANTRY_WORKSPACE") or os.getcwd())
    try:
        if not os.path.isdir(workspace):
            raise _BadSetting(f"TENANTRY_WORKSPACE is {workspace!r}, which is no directory")
        handler = _load(app, workspace) if app is not None else None
        with open_listening_socket(os.environ) as listener:
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
            trio.run(partial(_serve, listeners, workspace, handler))
    except (NoSocket, _BadSetting) as error:
        log(str(error), error.__cause__)
        return _CONFIGURATION
    return 0


class _BadSetting(Exception):
    """What the command line or the environment asks for cannot be had."""


def _load(app: str, workspace: str) -> Handler:
    """The callable that `module:callable` names. The workspace comes last on the path: it must shadow nothing."""
    import importlib

    module, _, name = app.partition(":")
    if not module or not name:
        raise _BadSetting(f"--app is {app!r}; it must be module:callable")
    sys.path.append(workspace)
    try:
        handler = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise _BadSetting(f"--app {app} cannot be imported") from error
    if not callable(handler):
        raise _BadSetting(f"--app {app} is not callable")
    return handler  # type: ignore[no-any-return]


async def _serve(listeners: list[trio.SocketListener], workspace: str, handler: Handler | None) -> None:
    import os

    import trio

    from agent.routes import BundledRoutes, OwnRoutes
    from agent.server import Server

    with trio.open_signal_receiver(*_STOP) as signals:
        async with trio.open_nursery() as nursery:
            if handler is not None:
                server = Server(OwnRoutes(handler))
            else:
                routes = BundledRoutes(workspace, os.environ, nursery)
                server = Server(routes, on_drain=routes.end)
            gc.freeze()
            gc.enable()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            nursery.start_soon(_drain_on_signal, signals, server)
            await server.serve(listeners)
            # The receiver, when it is left, raises again what nobody took: it must not end a clean drain.
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
            nursery.cancel_scope.cancel()


async def _drain_on_signal(signals: AsyncIterator[int], server: Server) -> None:
    async for _ in signals:
        server.drain()


if __name__ == "__main__":
    status = main()
    gc.freeze()
    sys.exit(status)
