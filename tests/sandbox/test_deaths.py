"""Whoever dies, of supervisor, keeper and shim: nothing of theirs is alive, and no two agents share a home."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
import trio

from supervisor.sandbox import tree
from supervisor.sandbox.keeper_client import KeeperDied
from supervisor.sandbox.launcher import ExitStatus
from supervisor.sandbox.process import open_process_launcher
from supervisor.settings import Settings
from supervisor.telemetry import captured_telemetry
from tests.sandbox.kit import FAMILY, ROOT, WAIT, alive, open_tester, until

# A supervisor of its own, with an agent and its family running.
BOSS = """
import sys, trio
from pathlib import Path
from tests.sandbox.kit import FAMILY, WAIT, open_tester
async def main(home, mark):
    async with open_tester(home) as tester, trio.open_nursery() as nursery:
        tester.mark = mark
        agent = await nursery.start(tester.launcher.run, tester.python(FAMILY + WAIT))
        print(tester.launcher.statistics().keeper_pid, agent.pid, flush=True)
        await trio.sleep_forever()
trio.run(main, Path(sys.argv[1]), sys.argv[2])
"""


# A workspace tells of every overlap: an agent that finds another's file at its start, or loses its own.
ALONE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    os.close(os.open("mine", os.O_CREAT | os.O_EXCL))
except FileExistsError:
    open("overlap", "w").close()
if os.fork() == 0:
    os.setsid()
    open("ready", "w").close()
    while True:
        time.sleep(0.0005)
        # The last of the tree to be seen alive renews this again and again.
        open("beat", "w").write(str(time.monotonic()))
time.sleep(100)
"""


def start_process(command):
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)


@asynccontextmanager
async def boss(home, mark):
    """A supervisor in a process of its own: its Popen, and the pids of keeper and agent."""
    command = [sys.executable, "-c", BOSS, str(home), mark]
    with start_process(command) as process:
        try:
            line = await trio.to_thread.run_sync(process.stdout.readline)
            keeper, agent = map(int, line.split())
            await until((home / "acme" / "workspace" / "ready").exists)
            yield process, keeper, agent
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["supervisor", "keeper", "supervisor and keeper", "shim", "supervisor and shim"])
async def test_nothing_is_alive_2_seconds_after_sigkill_of(tmp_path, victims):
    """Whatever the agent does. `setsid`, double forks and ignored signals are in FAMILY."""
    mark = f"boss-{os.getpid()}-{victims}"
    with trio.fail_after(30):
        async with boss(tmp_path, mark) as (process, keeper, agent):
            assert len(alive(mark)) == 7
            shim = tree.parent(agent)
            assert tree.parent(shim) == keeper
            pids = {"supervisor": process.pid, "keeper": keeper, "shim": shim}
            for victim in victims.split(" and "):
                os.kill(pids[victim], signal.SIGKILL)
            await until(lambda: not alive(mark), within_s=2)
            if "supervisor" in victims:
                gone = (keeper, shim)
                await until(lambda: all(tree.state(pid) in ("Z", None) for pid in gone), within_s=2)


@pytest.mark.slow
async def test_the_next_start_after_a_killed_supervisor_finds_a_clean_house(tmp_path):
    """Issue 4: the next start neither overlaps nor is refused."""
    mark = f"boss-{os.getpid()}-next"
    with trio.fail_after(30):
        async with boss(tmp_path, mark) as (process, _, _), open_tester(tmp_path) as tester:
            process.kill()
            tester.mark = mark
            agent = await tester.finish(tester.shell('test "$(cat /proc/*/environ 2>/dev/null | grep -c x)" && exit 4'))
            assert agent.exit_status == ExitStatus(4)
            assert alive(mark) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kill", "murdered shim", "murdered keeper"])
async def test_two_generations_never_overlap_in_a_home(tester, way):
    """The lock is held until the tree is empty, also if its holder is killed."""
    beat = tester.file("beat")
    with trio.fail_after(60):
        # A keeper that died at once is started again a second later.
        for generation in range(3 if way == "murdered keeper" else 8):
            async with trio.open_nursery() as nursery:
                spec = tester.python(ALONE, generation=generation)
                agent = await nursery.start(tester.launcher.run, spec)
                await until(lambda: beat.exists() and beat.read_text())
                if way == "kill":
                    agent.kill()
                elif way == "murdered shim":
                    os.kill(tree.parent(agent.pid), signal.SIGKILL)
                else:
                    os.kill(tester.launcher.statistics().keeper_pid, signal.SIGKILL)
            assert tester.alive() == []
            assert not tester.file("overlap").exists()
            tester.file("mine").unlink()
            beat.unlink()


async def test_a_start_beside_a_murdered_shim_waits_until_its_tree_is_empty(tester):
    """The keeper's copy of the lock outlives the shim."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.python(FAMILY + WAIT))
            await until(tester.file("ready").exists)
            first = set(tester.alive())
            seen = []

            async def second():
                later = await nursery.start(tester.launcher.run, tester.shell("sleep 100", generation=2))
                seen.extend(first & set(tester.alive()))
                later.kill()

            nursery.start_soon(second)
            await trio.sleep(0.05)
            os.kill(tree.parent(agent.pid), signal.SIGKILL)
    assert seen == []
    assert agent.exit_status == ExitStatus(-9)
    [event] = tester.told("agent_shim_lost")
    assert event["tenant"] == "acme"
    # Whose they were nobody can tell any more, so the keeper counts them.
    await until(lambda: tester.launcher.statistics().orphans_reaped >= 7, within_s=5)


@pytest.mark.slow
async def test_an_agent_that_stops_its_shim_ends_itself(tester):
    """Whatever the agent does. A stopped shim would hear neither of a kill nor of the keeper's end."""
    stop = "os.kill(os.getppid(), signal.SIGSTOP)\n"
    with trio.fail_after(20):
        agent = await tester.finish(tester.python(FAMILY + stop + WAIT))
        assert agent.exit_status == ExitStatus(-signal.SIGKILL)
        assert tester.alive() == []
        assert (await tester.finish(tester.shell("exit 3"))).exit_status == ExitStatus(3)


async def test_a_murdered_shim_touches_no_other_agent(tester):
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            other = await nursery.start(tester.launcher.run, tester.python(FAMILY + WAIT, tenant="other"))
            agent = await nursery.start(tester.launcher.run, tester.spec("/bin/sleep", "100"))
            await until(tester.file("ready", tenant="other").exists)
            os.kill(tree.parent(agent.pid), signal.SIGKILL)
            await agent.wait_exited()
            assert len(tester.alive()) >= 7
            assert other.exit_status is None
            nursery.cancel_scope.cancel()


async def test_a_dead_keeper_is_replaced_and_its_agents_have_ended(tester):
    """The tenants recover by the ladder; a start in between waits."""
    first = tester.launcher.statistics().keeper_pid
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.python(FAMILY + WAIT))
            await until(tester.file("ready").exists)
            os.kill(first, signal.SIGKILL)
            assert await agent.wait_exited() == ExitStatus(-9)
        assert tester.alive() == []
        assert (await tester.finish(tester.shell("exit 3"))).exit_status == ExitStatus(3)
    statistics = tester.launcher.statistics()
    assert statistics.keeper_restarts == 1
    assert statistics.keeper_pid not in (None, first)
    [event] = tester.told("keeper_died")
    assert (event["pid"], event["returncode"]) == (first, -9)
    assert b"tenantry_keeper_restarts_total 1.0" in tester.telemetry.metrics.render()


async def test_the_keeper_ignores_what_is_sent_to_stop_a_service(tester):
    """A service manager signals the whole group: the supervisor drains, the keeper waits for it."""
    keeper = tester.launcher.statistics().keeper_pid
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.spec("/bin/sleep", "100"))
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
                os.kill(keeper, number)
                os.kill(tree.parent(agent.pid), number)
            await trio.sleep(0.05)
            assert agent.exit_status is None
            assert tester.launcher.statistics().keeper_pid == keeper
            nursery.cancel_scope.cancel()
    assert tester.told("keeper_died") == []


async def test_a_dead_init_is_fatal(tmp_path):
    """An init cannot be started again by its child."""
    import socket

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(b'{"ready": 1}')
    with trio.fail_after(5), pytest.RaisesGroup(KeeperDied, flatten_subgroups=True):
        async with open_tester(tmp_path, control=ours) as tester:
            assert tester.launcher.statistics().keeper_pid == 1
            theirs.close()
            await trio.sleep_forever()
    assert ours.fileno() == -1


async def test_a_keeper_that_cannot_start_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with trio.fail_after(10), pytest.raises(KeeperDied, match="ended"):
        async with open_tester(tmp_path):
            pytest.fail("started")
    monkeypatch.setattr(sys, "executable", "/no/python")
    telemetry, events = captured_telemetry()
    with trio.fail_after(10), pytest.raises(KeeperDied, match="/no/python"):
        async with open_process_launcher(Settings(), telemetry):
            pytest.fail("started")
    # What never was cannot stay.
    assert "keeper_stays" not in [event["event"] for event in events]


async def test_without_a_keeper_a_start_fails_after_a_bounded_time(tmp_path, monkeypatch):
    from supervisor.errors import AgentStartFailed
    from supervisor.sandbox import keeper_client

    monkeypatch.setattr(keeper_client, "_REQUEST_S", 0.1)
    async with open_tester(tmp_path) as tester:
        python = sys.executable
        monkeypatch.setattr(sys, "executable", "/bin/false")
        os.kill(tester.launcher.statistics().keeper_pid, signal.SIGKILL)
        with trio.fail_after(10):
            await until(lambda: tester.told("keeper_died"))
            with pytest.raises(AgentStartFailed, match="no keeper"):
                await tester.launcher.run(tester.spec("/bin/true"))
            await until(lambda: tester.told("keeper_not_started"))
            monkeypatch.setattr(sys, "executable", python)
            await until(lambda: tester.told("keeper_restarted"))
        assert (await tester.finish(tester.spec("/bin/true"))).exit_status == ExitStatus(0)


async def test_a_copy_of_the_sockets_in_a_fork_of_the_supervisors_program_keeps_nothing_alive(tmp_path):
    """The keeper watches the process too, not only the end of its socket."""
    mark = f"boss-{os.getpid()}-copy"
    program = BOSS.replace(
        "await trio.sleep_forever()",
        "import os, time\n        os.fork() or time.sleep(20)\n"
        "        print(flush=True)\n        await trio.sleep_forever()",
    )
    command = [sys.executable, "-c", program, str(tmp_path), mark]
    with trio.fail_after(20), start_process(command) as process:
        await trio.to_thread.run_sync(process.stdout.readline)
        await until((tmp_path / "acme" / "workspace" / "ready").exists)
        await trio.to_thread.run_sync(process.stdout.readline)
        [copy] = [pid for pid in tree.children(process.pid) if tree.children(pid) == []]
        process.kill()
        try:
            await until(lambda: not alive(mark), within_s=2)
        finally:
            os.kill(copy, signal.SIGKILL)
