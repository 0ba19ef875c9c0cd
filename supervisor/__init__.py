"""Tenantry: every tenant gets an agent process of its own, in a sandbox, behind one address.

Importing this package imports nothing else: the public names are resolved at their first use (PEP 562), so that
PID 1 can block its signals before anything slow is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.server import Server as Server
    from supervisor.server import serve as serve
    from supervisor.settings import Settings as Settings
    from supervisor.supervisor import Supervisor as Supervisor
    from supervisor.supervisor import open_supervisor as open_supervisor

_HOME = {
    "Settings": "supervisor.settings",
    "Server": "supervisor.server",
    "Supervisor": "supervisor.supervisor",
    "open_supervisor": "supervisor.supervisor",
    "serve": "supervisor.server",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
