"""The pytest plugin: a whole supervisor in memory, and WebSocket clients of it, for tests on a mock clock.

It is loaded in every pytest run where Tenantry is installed, other people's included. So it imports nothing but
pytest until a test asks for one of its fixtures; those need pytest-trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from supervisor.client import WebSocket
    from supervisor.settings import Settings
    from supervisor.supervisor import Supervisor
    from supervisor.testing.launcher import Program
    from supervisor.testing.leftovers import Check
    from supervisor.testing.world import World


@pytest.fixture
def supervisor_settings(tmp_path: Path) -> Settings:
    """The settings of `supervisor`: the defaults, with a state directory of its own. Override it for others."""
    from supervisor.settings import Settings

    return Settings(state_dir=tmp_path / "state")


@pytest.fixture
def agent_app() -> Program:
    """What every agent of `supervisor` runs: it echoes. Override it with a program of your own, or one of `faults`."""
    from supervisor.testing.agents import echo_agent

    return echo_agent


@pytest.fixture
async def tenantry_world(supervisor_settings: Settings, agent_app: Program) -> AsyncIterator[World]:
    """What `supervisor`, `supervisor_log` and `tenant_client` are parts of."""
    from supervisor.testing.world import open_world

    async with open_world(supervisor_settings, agent_app) as world:
        yield world


@pytest.fixture
def supervisor(tenantry_world: World) -> Supervisor:
    """A supervisor with agents in memory, a store in memory and no listener; drained when the test is over.

    Ask for `autojump_clock` too, and an hour takes milliseconds; the wall clock goes with it. `supervisor.launcher`
    is its `MemoryLauncher`. The test fails if an agent raised, two generations overlapped, or anything is left.
    """
    return tenantry_world.supervisor


@pytest.fixture
def supervisor_log(tenantry_world: World) -> list[dict[str, Any]]:
    """Every line of the supervisor's log so far, as dicts with `event` and `level`. Shown when a test fails."""
    return tenantry_world.log


@pytest.fixture
def tenant_client(tenantry_world: World) -> Callable[..., AbstractAsyncContextManager[WebSocket]]:
    """`async with tenant_client("alice", "/path") as websocket:` goes through the whole gateway, with a token.

    See `supervisor.testing.world.World.connect` for its arguments and what it raises.
    """
    return tenantry_world.connect


@pytest.fixture
def nothing_left_over() -> Iterator[Check]:
    """Fails the test if a process, a descriptor or a thread that began with it is there 2 s after its end.

    Put `nothing_left_over.env` into the environment of processes that may lose their parents.
    """
    from supervisor.testing.leftovers import nothing_left_behind

    with nothing_left_behind() as check:
        yield check
