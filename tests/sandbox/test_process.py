"""The plain launcher, with real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio

from supervisor.errors import AgentStartFailed, AgentUnreachable
from supervisor.sandbox import process as process_module
from supervisor.sandbox import tree
from supervisor.sandbox.launcher import ExitStatus
from supervisor.settings import SandboxSettings, Settings
from tests.sandbox.kit import FAMILY, WAIT, open_fds, open_tester, until

SERVE = """
import os, socket
listener = socket.socket(fileno=3)
open("serving", "w").close()
while True:
    connection, _ = listener.accept()
    connection.sendall(b"hello")
    connection.close()
"""

# 32 and 33 belong to the C library, which lets no program change them: they stay as whoever started us left them.
C_LIBRARY_SIGNALS = 1 << 31 | 1 << 32


# Statuses and the end of the tree


@pytest.mark.slow
async def test_200_exit_statuses_are_all_right(tester):
    """No status is lost, stolen or mixed up, also not with twenty starts side by side."""
    seen = {}

    async def run(number, limit):
        async with limit:
            code = f"exit {number}" if number % 4 else "kill -9 $$"
            agent = await tester.finish(tester.shell(code, tenant=f"t{number}", generation=number))
            seen[number] = (await agent.wait_exited()).returncode

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            limit = trio.CapacityLimiter(20)
            for number in range(200):
                nursery.start_soon(run, number, limit)
    assert seen == {number: number if number % 4 else -9 for number in range(200)}
    assert tester.launcher.statistics().agents == 0
    assert await tester.launcher.zombies() == 0


async def test_exit_is_told_before_the_rest_of_the_tree_is_gone_and_run_returns_after(tester):
    """The exit of the main process is seen at once; `run` owns the whole tree."""
    returned = trio.Event()

    async def run(task_status):
        await tester.launcher.run(tester.python(FAMILY + "raise SystemExit(7)"), task_status=task_status)
        returned.set()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(run)
            assert await agent.wait_exited() == ExitStatus(7)
            assert not returned.is_set()
            await returned.wait()
            assert tester.alive() == []
    assert tester.file("ready").exists()
    # The five that ignore signals, the two that they have, the orphan and its parent: the parent main reaped.
    assert tester.launcher.statistics().orphans_reaped == 6


@pytest.mark.parametrize("way", ["kill", "cancel"])
async def test_setsid_grandchildren_that_ignore_sigterm_are_dead_after(tester, way):
    """All of the process tree or nothing."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.python(FAMILY + WAIT))
            await until(tester.file("ready").exists)
            assert len(tester.alive()) == 7
            if way == "kill":
                agent.kill()
            else:
                nursery.cancel_scope.cancel()
    assert agent.exit_status == ExitStatus(-9)
    assert tester.alive() == []


async def test_sigterm_goes_to_the_main_process_alone(tester):
    """Systemd's KillMode=mixed."""
    code = """
    import os, signal, time
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, lambda *_: open("wrong", "w").close())
        open("child", "w").close()
        while True:
            time.sleep(100)
    def end(*_):
        time.sleep(0.1)
        raise SystemExit(5)
    signal.signal(signal.SIGTERM, end)
    while not os.path.exists("child"):
        time.sleep(0.001)
    open("ready", "w").close()
    while True:
        time.sleep(100)
    """
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.python(code))
            await until(tester.file("ready").exists)
            agent.terminate()
            assert await agent.wait_exited() == ExitStatus(5)
            agent.terminate()
            agent.kill()
    assert not tester.file("wrong").exists()
    agent.terminate()
    agent.kill()
    assert await agent.cpu_seconds() >= 0
    with pytest.raises(AgentUnreachable, match=r"acme.*has ended"):
        await agent.connect()


async def test_sigterm_ends_a_stopped_main_process(tester):
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.shell("kill -STOP $$; sleep 100"))
            await until(lambda: tree.state(agent.pid) == "T")
            agent.terminate()
    assert agent.exit_status == ExitStatus(-15)


@pytest.mark.slow
async def test_cancellation_at_any_instant_leaves_no_process_and_no_descriptor(tester):
    before = open_fds()
    with trio.fail_after(60):
        for step in range(40):
            with trio.move_on_after(step * 0.00025):
                await tester.launcher.run(tester.python(WAIT, generation=step))
            assert tester.alive() == []
    assert open_fds().keys() == before.keys()
    assert (await tester.finish(tester.shell("exit 3"))).exit_status == ExitStatus(3)


@pytest.mark.slow
async def test_100_runs_leave_no_descriptor(tester):
    await tester.finish(tester.spec("/bin/true"))
    before = open_fds()
    with trio.fail_after(60):
        for number in range(100):
            await tester.finish(tester.spec("/bin/true", generation=number))
    assert open_fds().keys() == before.keys()
    assert len(os.listdir(f"/proc/{tester.launcher.statistics().keeper_pid}/fd")) < 12


# What forks faster than it dies


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        # Everybody starts again every child that died.
        """
        def live(depth):
            children = set()
            while True:
                while depth and len(children) < 4:
                    pid = os.fork()
                    if pid == 0:
                        live(depth - 1)
                    children.add(pid)
                if depth:
                    children.discard(os.wait()[0])
                else:
                    open("ready", "w").close()
                    time.sleep(100)
        live(3)
        """,
        # A process that is never the same: the child goes on, its parent ends, each time an orphan.
        """
        os.setsid = lambda: None
        if os.fork():
            time.sleep(100)
        open("ready", "w").close()
        while True:
            if os.fork():
                os._exit(0)
        """,
    ],
    ids=["respawning", "fleeing"],
)
async def test_a_fork_bomb_loses(tester, body):
    code = "import os, time\n" + "\n".join(line[8:] for line in body.splitlines())
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(tester.launcher.run, tester.python(code))
            await until(tester.file("ready").exists)
            began_at = trio.current_time()
            nursery.cancel_scope.cancel()
    assert tester.alive() == []
    assert trio.current_time() - began_at < 8
    assert tester.told("agent_stays") == []


# What the agent gets


async def test_the_agent_gets_what_is_promised_and_nothing_else(tester, monkeypatch):
    """The contract, 1 and 3: fds, environment, directory, session."""
    monkeypatch.setenv("SECRET_OF_THE_SUPERVISOR", "x")
    code = """
    import json, os, socket, sys
    sys.stdin.read() == "" or 1 / 0
    umask = os.umask(0)
    report = dict(
        env=dict(os.environ), fds=sorted(map(int, os.listdir("/proc/self/fd")))[:-1], cwd=os.getcwd(),
        session=os.getsid(0) == os.getpid(), group=os.getpgid(0) == os.getpid(), pid=os.getpid(), umask=umask,
        listens=socket.socket(fileno=3).getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN),
        same=os.fstat(1) == os.fstat(2),
    )
    json.dump(report, open("report", "w"))
    """
    secret = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(secret, True)
    try:
        spec = tester.python(code, generation=9, env={"EXTRA": "ä\udcff", "HOME": "/tmp", "TENANTRY_TENANT": "other"})
        agent = await tester.finish(spec)
    finally:
        os.close(secret)
    report = json.loads(tester.file("report").read_text())
    workspace = str(tester.home / "acme" / "workspace")
    assert report["env"] == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "EXTRA": "ä\udcff",
        "TENANTRY_TEST_MARK": tester.mark,
        "TENANTRY_TENANT": "acme",
        "TENANTRY_GENERATION": "9",
        "TENANTRY_WORKSPACE": workspace,
        "TENANTRY_LINK_FD": "4",
        "LISTEN_FDS": "1",
        "LISTEN_PID": str(agent.pid),
    }
    assert report["fds"] == [0, 1, 2, 3, 4]
    assert report["cwd"] == workspace
    assert report["pid"] == agent.pid
    assert report["umask"] == 0o077
    assert report["session"]
    assert report["group"]
    assert report["listens"] == 1
    assert report["same"]


async def test_signals_privileges_and_limits_are_as_promised(tmp_path):
    """Mask empty, dispositions default, no_new_privs, rlimits, no core."""
    sandbox = SandboxSettings(open_files=100, file_size_bytes=5_000_000, cpu_time_s=60, processes=3000)
    blocked = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        async with open_tester(tmp_path, Settings(sandbox=sandbox)) as tester:
            # The keeper has them now; a thread that is made from here on, and lives longer than this test, must not.
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            await tester.finish(tester.spec("/bin/cat", "/proc/self/status"))
            status = dict(line.split(":\t", 1) for line in tester.lines())
            await tester.finish(tester.spec("/bin/cat", "/proc/self/limits"))
            limits = {line[:26].strip(): line[26:].split()[:2] for line in tester.lines()}
    finally:
        signal.signal(signal.SIGUSR2, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for mask in ("SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"):
        assert int(status[mask], 16) & ~C_LIBRARY_SIGNALS == 0, mask
    assert status["NoNewPrivs"] == "1"
    assert limits["Max open files"] == ["100", "100"]
    assert limits["Max file size"] == ["5000000", "5000000"]
    assert limits["Max cpu time"] == ["59", "60"]
    assert limits["Max processes"] == ["3000", "3000"]
    assert limits["Max core file size"] == ["0", "0"]


async def test_a_limit_above_our_own_becomes_our_own(tmp_path):
    own = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    async with open_tester(tmp_path, Settings(sandbox=SandboxSettings(open_files=own + 1))) as tester:
        await tester.finish(tester.shell("ulimit -n; ulimit -Hn"))
        assert tester.lines() == [str(own), str(own)]


def proc(pid, name):
    return Path(f"/proc/{pid}/{name}").read_text()


async def test_the_keeper_and_the_shims_are_not_dumpable_and_know_nothing(tester):
    async with trio.open_nursery() as nursery:
        agent = await nursery.start(tester.launcher.run, tester.spec("/bin/sleep", "100"))
        keeper = tester.launcher.statistics().keeper_pid
        shim = tree.parent(agent.pid)
        assert tree.parent(shim) == keeper
        for pid, name in [(keeper, "tenantry-keeper"), (shim, "tenantry-shim")]:
            assert proc(pid, "comm").strip() == name
            assert "PATH" not in proc(pid, "environ")
        # Output, listener and link are the agent's alone.
        assert len(os.listdir(f"/proc/{shim}/fd")) <= 9
        nursery.cancel_scope.cancel()


# Starts that fail


@pytest.mark.parametrize(
    ("command", "number", "words"),
    [
        (("/no/such/program",), errno.ENOENT, "cannot execute /no/such/program: No such file or directory"),
        (("no-such-program",), errno.ENOENT, "cannot execute no-such-program: No such file or directory"),
        (("/etc/passwd",), errno.EACCES, "cannot execute /etc/passwd: Permission denied"),
        (("./script",), errno.ENOENT, "the interpreter that it names is not"),
        (("a\0b",), None, "cannot execute a"),
    ],
)
async def test_a_program_that_cannot_be_executed_is_told_with_errno_and_words(tester, command, number, words):
    """Launcher.run: AgentStartFailed comes bare, before `started`, and names tenant, program and reason."""
    tester.file("x").parent.mkdir(parents=True)
    tester.file("script").write_text("#!/no/interpreter\n")
    tester.file("script").chmod(0o755)
    with trio.fail_after(10), pytest.raises(AgentStartFailed, match="acme") as caught:
        await tester.launcher.run(tester.spec(*command))
    assert words in str(caught.value)
    assert caught.value.errno == number
    assert tester.launcher.statistics().agents == 0


async def test_a_program_is_found_on_the_agents_own_path(tester):
    tester.file("x").parent.mkdir(parents=True)
    tester.file("mine").symlink_to("/bin/true")
    agent = await tester.finish(tester.spec("mine", env={"PATH": str(tester.file("x").parent)}))
    assert agent.exit_status == ExitStatus(0)


async def test_a_home_that_cannot_be_made_fails_the_start_and_leaves_no_descriptor(tester):
    (tester.home / "acme").write_text("in the way")
    before = open_fds()
    with pytest.raises(AgentStartFailed, match="cannot be prepared") as caught:
        await tester.launcher.run(tester.spec("/bin/true"))
    assert caught.value.errno in (errno.EEXIST, errno.ENOTDIR)
    assert open_fds().keys() == before.keys()


async def test_a_command_too_long_for_a_packet_fails_the_start(tester):
    with trio.fail_after(10), pytest.raises(AgentStartFailed, match="bytes of command and environment") as caught:
        await tester.launcher.run(tester.spec("/bin/true", "x" * 1_000_000))
    assert caught.value.errno == errno.EMSGSIZE


async def test_the_limit_on_open_files_fails_a_start_clearly_and_is_recovered_from(tester):
    await tester.finish(tester.spec("/bin/true"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filled = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with suppress(OSError):
            while True:
                filled.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(8):
            with pytest.raises(AgentStartFailed, match="Too many open files") as caught:
                await tester.launcher.run(tester.spec("/bin/true"))
            assert caught.value.errno == errno.EMFILE
            os.close(filled.pop())
    finally:
        for fd in filled:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (await tester.finish(tester.spec("/bin/true"))).exit_status == ExitStatus(0)


# The lock


async def test_a_busy_workspace_fails_the_start_after_its_time(tester, monkeypatch):
    """No generation starts without the lock."""
    monkeypatch.setattr(process_module, "_LOCK_TIMEOUT_S", 0.1)
    async with trio.open_nursery() as nursery:
        await nursery.start(tester.launcher.run, tester.spec("/bin/sleep", "100"))
        with trio.fail_after(10), pytest.raises(AgentStartFailed, match="busy") as caught:
            await tester.launcher.run(tester.shell("touch wrong", generation=2))
        assert caught.value.errno == errno.EBUSY
        nursery.cancel_scope.cancel()
    assert not tester.file("wrong").exists()


async def test_the_next_agent_waits_for_the_lock_and_delays_nobody_else(tester):
    """Two spawns do not wait behind each other's locks; a wait ends with the lock."""
    await tester.finish(tester.spec("/bin/true"))
    lock = os.open(tester.home / "acme" / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tester.finish, tester.shell("touch got-it"))
            await trio.sleep(0.02)
            assert (await tester.finish(tester.spec("/bin/true", tenant="other"))).exit_status == ExitStatus(0)
            assert not tester.file("got-it").exists()
            os.close(lock)
    assert tester.file("got-it").exists()


async def test_a_start_cancelled_while_it_waits_for_the_lock_ends_at_once(tester):
    await tester.finish(tester.spec("/bin/true"))
    lock = os.open(tester.home / "acme" / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with trio.fail_after(2), trio.move_on_after(0.05) as scope:
        await tester.launcher.run(tester.spec("/bin/true"))
    assert scope.cancelled_caught
    os.close(lock)


# Connections


async def test_a_connection_reaches_the_agent_and_nothing_of_the_socket_is_on_disk(tester):
    """No path limit, no stale file, nothing for a neighbour to find."""
    deep = tester.home / ("d" * 200)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            spec = attrs.evolve(tester.python(SERVE), home=deep / "acme")
            agent = await nursery.start(tester.launcher.run, spec)
            # Before it accepts: the connection waits in the backlog.
            async with await agent.connect() as stream:
                assert await stream.receive_some() == b"hello"
            assert sorted(os.listdir(deep / "acme")) == ["lock", "workspace"]
            assert {os.stat(deep / "acme" / name).st_mode & 0o777 for name in ("lock", "workspace")} == {0o600, 0o700}
            nursery.cancel_scope.cancel()


async def test_a_connection_to_a_dead_agent_is_refused_at_once(tester):
    """No copy of the listener is left to hang in, before the exit is told or after."""
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.python(SERVE))
            await until(tester.file("serving").exists)
            os.kill(agent.pid, signal.SIGKILL)
            # Without a turn for the task that would see it.
            while tree.state(agent.pid) not in ("Z", None):
                pass
            assert agent.exit_status is None
            with pytest.raises(AgentUnreachable, match=r"Connection refused|has ended"):
                await agent.connect()
            await agent.wait_exited()
            with pytest.raises(AgentUnreachable, match="has ended"):
                await agent.connect()


async def test_a_full_backlog_is_waited_for(tester):
    """EAGAIN means wait, never failed and never connected."""
    code = """
    import os, socket, time
    listener = socket.socket(fileno=3)
    listener.listen(1)
    open("ready", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.002)
    while True:
        connection, _ = listener.accept()
        connection.sendall(b"hello")
        connection.close()
    """
    greeted = []

    async def greet(agent):
        async with await agent.connect() as stream:
            greeted.append(await stream.receive_some())

    with trio.fail_after(10):
        async with trio.open_nursery() as outer:
            agent = await outer.start(tester.launcher.run, tester.python(code))
            await until(tester.file("ready").exists)
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(greet, agent)
                await trio.sleep(0.1)
                assert greeted == []
                before = open_fds()
                with trio.move_on_after(0.05) as scope:
                    await agent.connect()
                assert scope.cancelled_caught
                assert open_fds().keys() == before.keys()
                tester.file("go").touch()
            assert greeted == 20 * [b"hello"]
            outer.cancel_scope.cancel()


async def test_an_exit_ends_those_who_wait_for_a_full_backlog(tester):
    """An exit ends waiting connects at once."""
    code = """
    import socket, time
    listener = socket.socket(fileno=3)
    listener.listen(0)
    open("ready", "w").close()
    time.sleep(100)
    """
    refused = []

    async def connect(agent, streams):
        try:
            streams.append(await agent.connect())
        except AgentUnreachable:
            refused.append(trio.current_time())

    streams = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.python(code))
            await until(tester.file("ready").exists)
            for _ in range(5):
                nursery.start_soon(connect, agent, streams)
            await trio.sleep(0.05)
            assert refused == []
            agent.kill()
    assert len(streams) + len(refused) == 5
    assert len(refused) >= 3
    for stream in streams:
        await stream.aclose()


async def test_the_link_is_a_stream_to_the_agents_fd_4_and_closed_at_the_end(tester):
    """The contract 4."""
    code = """
    import os, socket
    link = socket.socket(fileno=int(os.environ["TENANTRY_LINK_FD"]))
    link.sendall(link.recv(100).upper())
    link.recv(100)
    """
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.python(code))
            await agent.link.send_all(b"over the link")
            assert await agent.link.receive_some() == b"OVER THE LINK"
            nursery.cancel_scope.cancel()
    with pytest.raises(trio.ClosedResourceError):
        await agent.link.send_all(b"x")


# What is known of it


async def test_cpu_seconds_counts_the_whole_tree_and_never_falls(tester):
    """Processor use defers sleep, whoever of the tree uses it."""
    code = """
    import os, time
    def burn():
        while time.process_time() < 0.15:
            pass
    if os.fork() == 0:
        burn()
        os._exit(0)
    os.wait()
    if os.fork() == 0:
        burn()
        open("ready", "w").close()
        time.sleep(100)
    time.sleep(100)
    """
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            agent = await nursery.start(tester.launcher.run, tester.python(code))
            first = await agent.cpu_seconds()
            await until(tester.file("ready").exists)
            used = await agent.cpu_seconds()
            assert first < 0.2
            assert 0.27 <= used < 2
            nursery.cancel_scope.cancel()
    assert await agent.cpu_seconds() == used


async def test_a_launcher_changes_nothing_of_its_process(tmp_path):
    """No global state: a library that somebody embeds."""

    def ours():
        with open("/proc/self/status") as file:
            kept = [line for line in file if line.startswith(("Sig", "Shd", "NoNew", "Umask"))]
        return kept, signal.getsignal(signal.SIGCHLD), os.environ.copy(), os.getcwd(), resource.getrlimit(7)

    before = ours()
    async with open_tester(tmp_path / "one") as one, open_tester(tmp_path / "two") as two:
        assert one.launcher.statistics().keeper_pid != two.launcher.statistics().keeper_pid
        assert (await one.finish(one.shell("exit 1"))).exit_status == ExitStatus(1)
        assert (await two.finish(two.shell("exit 2"))).exit_status == ExitStatus(2)
        inside = ours()
    assert inside == before
    assert ours() == before
    # Nothing of ours is left for somebody else to reap.
    assert [pid for pid in tree.children(os.getpid()) if tree.state(pid) == "Z"] == []


async def test_the_names_of_what_runs_are_those_of_statistics(tester):
    assert tester.launcher.statistics().agents == 0
    async with trio.open_nursery() as nursery:
        await nursery.start(tester.launcher.run, tester.spec("/bin/sleep", "100"))
        await nursery.start(tester.launcher.run, tester.spec("/bin/sleep", "100", tenant="other"))
        assert tester.launcher.statistics().agents == 2
        assert tester.launcher.statistics().keeper_restarts == 0
        nursery.cancel_scope.cancel()
    assert tester.launcher.statistics().agents == 0


async def test_the_output_arrives_line_by_line_with_its_tenant_and_generation(tester):
    code = r"import os; os.write(1, b'one\ntw'); os.write(2, b'o\n\xff\n'); os.write(1, b'no end')"
    await tester.finish(tester.python(code, generation=4))
    assert [event for event in tester.events if event["event"] == "agent_output"] == [
        {"event": "agent_output", "level": "info", "tenant": "acme", "generation": 4, "line": line}
        for line in ["one", "two", "\ufffd", "no end"]
    ]


@pytest.mark.slow
async def test_a_flood_of_output_is_bounded_and_told_and_delays_nobody(tmp_path):
    sandbox = SandboxSettings(max_lines_per_second=20, max_line_bytes=100)
    code = "import os\nwhile True: os.write(1, b'y\\n' * 30000 + b'x' * 1000)"
    async with open_tester(tmp_path, Settings(sandbox=sandbox)) as tester:
        worst_s = 0.0
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                agent = await nursery.start(tester.launcher.run, tester.python(code))
                began_at = trio.current_time()
                while trio.current_time() < began_at + 2.5:
                    before = trio.current_time()
                    await trio.sleep(0.005)
                    worst_s = max(worst_s, trio.current_time() - before)
                used = await agent.cpu_seconds()
                nursery.cancel_scope.cancel()
        assert 20 <= len(tester.lines()) <= 80
        assert tester.told("agent_output_dropping")
        assert sum(event["lines"] for event in tester.told("agent_output_dropped")) > 10_000
        assert worst_s < 0.25
        assert used < 1.5


async def test_the_last_words_of_a_killed_agent_are_logged(tester):
    code = "import os, time; os.write(1, b'x' * 60000 + b'\\nlast\\n'); open('said', 'w').close(); time.sleep(100)"
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(tester.launcher.run, tester.python(code))
            await until(tester.file("said").exists)
            nursery.cancel_scope.cancel()
    assert tester.lines()[-1] == "last"
