"""Whatever happens to two tenants, in whatever order: nobody hangs, nothing overlaps, and what is told is true.

A whole supervisor in memory, on the mock clock. Hypothesis chooses what the agents do and what is asked of the
supervisor, and when; instants are chosen so that many things fall into the same one.
"""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from supervisor.client import WebSocketError
from supervisor.errors import SupervisorError
from supervisor.settings import AgentSettings, Settings
from supervisor.testing import faults
from supervisor.testing.agents import echo_agent, in_turn
from supervisor.testing.world import open_world

TENANTS = ("alice", "bob")
# Every rung may need a whole start_timeout, its reset a second; and the ladder may be begun anew by others.
VERDICT_S = 400.0
# Clients, the agent's grace, the tail, whoever is left.
ENDED_S = 4.0 + 5.0 + 5.0 + 5.0 + 2.0

PROGRAMS = {
    "echo": lambda: echo_agent,
    "slow": lambda: faults.slow_start(12),
    "too slow": lambda: faults.slow_start(31),
    "exits": faults.exits_at_start,
    "dies": faults.dies_at_the_upgrade,
    "dies connected": faults.dies_when_connected,
    "hangs": lambda: faults.hangs_after(1),
    "503": faults.refuses,
    "503 then serves": lambda: faults.refuses_then_serves(2),
    "403": lambda: faults.refuses(403),
    "never accepts": faults.never_accepts,
    "never answers": faults.never_answers,
    "lives half a second": lambda: faults.ready_then_dies(0.5),
    "lives a second": lambda: faults.ready_then_dies(1.0),
    "lives a while": lambda: faults.ready_then_dies(3.0),
    "ignores SIGTERM": faults.ignores_sigterm,
    "garbage": faults.speaks_garbage,
    "floods": faults.floods,
    "no close": faults.closes_without_close,
}
DELAYS = st.sampled_from([0.0, 0.0, 0.001, 0.5, 1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 10.0, 30.0, 31.0])
ACTIONS = ("connect", "connect", "connect", "leave", "kill", "sleep", "wake", "touch", "revoke", "delete", "wait")


@attrs.frozen
class Step:
    after_s: float
    action: str
    tenant: str
    # How long a client stays, or waits before it leaves.
    lasts_s: float


STEPS = st.lists(
    st.builds(Step, DELAYS, st.sampled_from(ACTIONS), st.sampled_from(TENANTS), DELAYS), min_size=1, max_size=14
)


@attrs.define(eq=False)
class Story:
    """Carries the steps out, each in a task of its own, and looks at the tenants meanwhile."""

    world: object
    waiting: int = 0

    async def do(self, step):
        self.waiting += 1
        supervisor, name = self.world.supervisor, step.tenant
        try:
            match step.action:
                case "connect":
                    await self.connect(step, leaves=False)
                case "leave":
                    await self.connect(step, leaves=True)
                case "kill":
                    if name in self.world.launcher.alive:
                        self.world.launcher.alive[name].kill()
                case "sleep":
                    await within(ENDED_S, supervisor.sleep, name)
                case "wake":
                    await within(VERDICT_S, partial(supervisor.wake, create=True), name)
                case "touch":
                    await within(0.1, supervisor.touch, name)
                case "revoke":
                    await within(0.1, supervisor.revoke, name, supervisor.wall_clock())
                case "delete":
                    await within(ENDED_S, supervisor.delete_tenant, name)
        except SupervisorError:
            pass  # a verdict, too
        finally:
            self.waiting -= 1

    async def connect(self, step, *, leaves):
        with trio.move_on_after(step.lasts_s if leaves else math.inf):
            try:
                with trio.fail_after(VERDICT_S):
                    connection = self.world.connect(step.tenant, handshake_timeout_s=1000)
                    websocket = await connection.__aenter__()
            except WebSocketError:
                return
            try:
                with trio.move_on_after(step.lasts_s):
                    while True:
                        await websocket.receive()
            except WebSocketError:
                pass
            finally:
                await connection.__aexit__(None, None, None)

    async def look(self):
        """What is told is what is there, whenever everything has come to rest."""
        while True:
            await wait_all_tasks_blocked()
            for name in TENANTS:
                tenant = self.world.supervisor._tenants.get(name)
                state = tenant.state.value if tenant is not None else "asleep"
                alive = name in self.world.launcher.alive
                assert not (alive and state in ("asleep", "failed")), f"{name} is {state}, and its agent lives"
                assert not (state in ("running", "draining") and not alive), f"{name} is {state} without an agent"
            await trio.sleep(0.25)


async def within(seconds, function, *args):
    with trio.fail_after(seconds):
        return await function(*args)


async def check_the_journal(supervisor, name):
    record = await supervisor.store.get_tenant(name)
    if record is None:
        return
    events = await supervisor.store.read_events(name)
    numbers = [event.seq for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert numbers[-1] == record.last_seq
    changes = [event.type for event in events if event.type not in ("tenant.created", "tenant.updated")]
    assert record.state in ("asleep", "failed")
    if changes:
        assert changes[-1] == f"tenant.{record.state}"


async def tell(programs, steps, end, state_dir):
    wanted = Settings(
        state_dir=state_dir,
        sleep_after_s=20.0,
        drain_grace_s=9.0,
        agent=AgentSettings(grace_s=5.0),
    )
    async with open_world(wanted, in_turn(*(PROGRAMS[name]() for name in programs))) as world:
        story = Story(world)
        async with trio.open_nursery() as looking, trio.open_nursery() as nursery:
            looking.start_soon(story.look)
            for step in steps:
                await trio.sleep(step.after_s)
                nursery.start_soon(story.do, step)
            if end == "everybody has had a verdict":
                nursery.cancel_scope.deadline = trio.current_time() + 2 * VERDICT_S
                while story.waiting:
                    await trio.sleep(1)
            began = trio.current_time()
            assert await world.supervisor.drain()
            assert trio.current_time() - began <= 7.01
            assert not world.launcher.alive
            looking.cancel_scope.cancel()
        assert not nursery.cancel_scope.cancelled_caught
        for name in TENANTS:
            await check_the_journal(world.supervisor, name)
        bad = {"tenant_crashed", "connection_crashed", "journal_lost", "illegal_transition"}
        assert not [line for line in world.log if line["event"] in bad]


@pytest.fixture
def inline_threads(monkeypatch):
    """A thread takes real time, through which the mock clock would jump."""

    async def run_sync(function, *args, **_options):
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.sampled_from(sorted(PROGRAMS)), min_size=1, max_size=5),
    STEPS,
    st.sampled_from(["everybody has had a verdict", "at once"]),
)
def test_whatever_happens_everybody_gets_a_verdict_and_nothing_is_left(inline_threads, programs, steps, end):
    """S3-04, S3-09 to S3-12, S3-29: the ten rules, under every interleaving that chance finds."""
    with tempfile.TemporaryDirectory() as directory:
        trio.run(tell, programs, steps, end, Path(directory), clock=MockClock(autojump_threshold=0))
