"""`process.*` over JSON-RPC, with real commands: nothing lost, nothing reordered, nothing left behind."""

from __future__ import annotations

import base64
import functools
import json
import os
import signal

import pytest
import trio
import trio.testing

from agent import processes
from agent.routes import BundledRoutes
from agent.server import Server
from tests.agent.wire import TEXT, Wire

pytestmark = pytest.mark.slow


def bounded(test):
    @functools.wraps(test)
    async def run(*args, **kwargs):
        with trio.fail_after(20):
            await test(*args, **kwargs)

    return run


@pytest.fixture
async def desk(tmp_path, nursery):
    """`await desk()` connects a client to the bundled agent's `/`; at the end no process may be left."""
    async with trio.open_nursery() as owner:
        environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(tmp_path), "TENANTRY_LINK_FD": "4"}
        routes = BundledRoutes(str(tmp_path.resolve()), environ, owner)
        server = Server(routes)

        async def connect():
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(server.serve_stream, theirs)
            return await Wire.open(ours, "/")

        connect.routes = routes
        yield connect
        with trio.fail_after(5):
            await routes.end()
        if routes._desk is not None:
            assert routes._desk.processes._alive == 0
            routes._desk.workspace.close()
        owner.cancel_scope.cancel()


def sh(script):
    return ["/bin/sh", "-c", script]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def until(condition):
    # What a real process does is seen in no event.
    while not condition():
        await trio.sleep(0.005)


@bounded
async def test_output_comes_before_the_exit_and_after_the_answer(desk):
    wire = await desk()
    await wire.ask("process.start", argv=sh("echo out; echo err >&2; exit 3"))
    first = await wire.message()
    assert first["id"] == 1
    started = first["result"]
    output, end = await wire.until_exit(started["id"])
    assert output == {"stdout": b"out\n", "stderr": b"err\n"}
    assert end == {
        "id": started["id"],
        "returncode": 3,
        "signal": None,
        "output_complete": True,
        "left_behind": 0,
    }


@bounded
async def test_a_megabyte_arrives_whole_and_in_order(desk):
    wire = await desk()
    started = await wire.call("process.start", argv=sh("seq 1 200000"))
    output, end = await wire.until_exit(started["id"])
    assert output["stdout"] == b"".join(b"%d\n" % n for n in range(1, 200001))
    assert end["output_complete"]


@bounded
async def test_output_is_text_where_it_is_text_and_base64_where_not(desk):
    wire = await desk()
    started = await wire.call(
        "process.start", argv=sh(r"printf '\303'; sleep 0.1; printf '\251'; sleep 0.1; printf '\377'")
    )
    first, second = await wire.notification(), await wire.notification()
    assert (first["params"]["data"], first["params"]["encoding"]) == ("é", "utf-8")
    assert (second["params"]["data"], second["params"]["encoding"]) == ("/w==", "base64")
    await wire.until_exit(started["id"])
    started = await wire.call("process.start", argv=sh("printf a"), encoding="base64")
    assert (await wire.notification())["params"]["data"] == "YQ=="
    await wire.until_exit(started["id"])


@bounded
async def test_half_a_character_at_the_end_is_not_lost(desk):
    wire = await desk()
    started = await wire.call("process.start", argv=sh(r"printf 'a\303'"))
    output, _ = await wire.until_exit(started["id"])
    assert output["stdout"] == b"a\xc3"


@bounded
async def test_the_environment_is_clean_and_the_place_the_workspace(desk, tmp_path):
    (tmp_path / "sub").mkdir()
    os.environ["SECRET_OF_THE_TEST"] = "x"
    try:
        wire = await desk()
        started = await wire.call("process.start", argv=["env"], env={"MORE": "1=2"}, cwd="sub")
        output, _ = await wire.until_exit(started["id"])
    finally:
        del os.environ["SECRET_OF_THE_TEST"]
    names = dict(line.split("=", 1) for line in output["stdout"].decode().splitlines())
    assert names == {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(tmp_path), "MORE": "1=2"}
    started = await wire.call("process.start", argv=["pwd"], cwd="sub")
    assert (await wire.until_exit(started["id"]))[0]["stdout"] == f"{tmp_path}/sub\n".encode()


@bounded
@pytest.mark.parametrize("pty", [{}, {"pty": {}}])
async def test_a_child_has_no_descriptor_signal_mask_or_disposition_of_ours(desk, pty):
    """A program starts with the signals as a shell would give them."""
    wire = await desk()
    signal.pthread_sigmask(signal.SIG_BLOCK, set())
    started = await wire.call(
        "process.start", argv=sh("ls /proc/self/fd; grep -E 'Sig(Blk|Ign)' /proc/self/status"), **pty
    )
    output, _ = await wire.until_exit(started["id"])
    *descriptors, blocked_name, blocked, ignored_name, ignored = output["stdout"].decode().split()
    assert descriptors == ["0", "1", "2", "3"]
    assert (blocked_name, int(blocked, 16)) == ("SigBlk:", 0)
    # 32 and 33 belong to the C library, which lets no program change them: they stay as whoever started us left them.
    assert (ignored_name, int(ignored, 16) & ~(1 << 31 | 1 << 32)) == ("SigIgn:", 0)


@bounded
async def test_input_is_written_in_order_and_ends(desk):
    wire = await desk()
    started = await wire.call("process.start", argv=["cat"])
    expected = b""
    ids = []
    for n in range(40):
        data = b"%d " % n * 500
        expected += data
        ids.append(await wire.ask("process.stdin", id=started["id"], data=data.decode()))
    ids.append(await wire.ask("process.stdin", id=started["id"], data="/w==", encoding="base64", eof=True))
    output, answered = b"", set()
    while True:
        message = await wire.message()
        if "id" in message:
            assert message["result"] == {}
            answered.add(message["id"])
        elif message["method"] == "process.exit":
            break
        else:
            params = message["params"]
            data = params["data"]
            output += data.encode() if params["encoding"] == "utf-8" else base64.b64decode(data)
    assert output == expected + b"\xff"
    assert answered == set(ids)


@bounded
async def test_a_process_that_does_not_read_its_input_holds_up_nobody(desk):
    wire = await desk()
    started = await wire.call("process.start", argv=["sleep", "100"])
    for _ in range(processes.MAX_INPUTS):
        await wire.ask("process.stdin", id=started["id"], data="a" * 100_000)
    error = await wire.error("process.stdin", id=started["id"], data="a")
    assert error["data"]["code"] == "busy"
    assert (await wire.call("process.list"))["processes"][0]["running"]
    await wire.ask("process.signal", id=started["id"], signal="KILL")
    refused = 0
    while (message := await wire.message()).get("method") != "process.exit":
        refused += message.get("error", {}).get("data", {}).get("code") in ("closed", "exited")
    assert message["params"]["signal"] == "SIGKILL"
    assert refused >= processes.MAX_INPUTS - 1


@bounded
async def test_input_to_what_has_closed_it_is_an_error(desk):
    wire = await desk()
    started = await wire.call("process.start", argv=sh("exec <&-; echo closed; sleep 100"))
    assert (await wire.notification())["params"]["data"] == "closed\n"
    error = await wire.error("process.stdin", id=started["id"], data="a")
    assert error["data"]["code"] == "closed"
    await wire.call("process.signal", id=started["id"], signal=9)
    await wire.until_exit(started["id"])
    error = await wire.error("process.stdin", id=started["id"], data="a")
    assert error["data"]["code"] == "unknown_process"


@bounded
async def test_a_terminal_is_one_with_a_size(desk):
    wire = await desk()
    script = "tty; stty size; read line; stty size; echo got $line"
    started = await wire.call("process.start", argv=sh(script), pty={"rows": 7, "cols": 33})
    output = b""
    while b"7 33" not in output:
        output += (await wire.notification())["params"]["data"].encode()
    assert b"/dev/pts/" in output
    await wire.call("process.resize", id=started["id"], rows=50, cols=120)
    await wire.call("process.stdin", id=started["id"], data="hello\n")
    output, end = await wire.until_exit(started["id"])
    assert b"50 120\r\n" in output["stdout"]
    assert b"got hello\r\n" in output["stdout"]
    assert (end["returncode"], end["output_complete"]) == (0, True)


@bounded
async def test_the_environment_of_a_terminals_program_is_in_nobodys_arguments(desk, monkeypatch):
    """Everybody on the machine can read the arguments of a process, and its environment only its owner."""
    commands = []
    open_process = trio.lowlevel.open_process

    async def noting(command, **options):
        commands.append(command)
        return await open_process(command, **options)

    monkeypatch.setattr(trio.lowlevel, "open_process", noting)
    wire = await desk()
    secret = "s3cret=\n\u00e9" + "x" * 100_000
    started = await wire.call("process.start", argv=sh('printf %s "$KEY" | wc -c'), env={"KEY": secret}, pty={})
    output, end = await wire.until_exit(started["id"])
    assert end["returncode"] == 0
    assert int(output["stdout"]) == len(secret.encode())
    assert "s3cret" not in "".join(commands[0])


@bounded
async def test_control_c_on_a_terminal_is_a_signal(desk):
    wire = await desk()
    started = await wire.call("process.start", argv=["cat"], pty={})
    await wire.call("process.stdin", id=started["id"], data="a\n")
    shown = ""
    while shown.count("a") < 2:  # The terminal's own echo, and then what `cat` says.
        shown += (await wire.notification())["params"]["data"]
    await wire.call("process.stdin", id=started["id"], data="\x03")
    _, end = await wire.until_exit(started["id"])
    assert end["signal"] == "SIGINT"


@bounded
async def test_all_that_a_terminal_showed_arrives(desk):
    wire = await desk()
    started = await wire.call("process.start", argv=["seq", "1", "50000"], pty={})
    output, end = await wire.until_exit(started["id"])
    assert output["stdout"] == b"".join(b"%d\r\n" % n for n in range(1, 50001))
    assert end["output_complete"]


@bounded
async def test_a_signal_reaches_the_whole_group(desk):
    wire = await desk()
    child = "trap 'echo child; exit' USR1; echo ready; while :; do sleep 0.01; done"
    script = 'trap "echo parent; exit 0" USR1; sh -c "$CHILD" & wait; wait'
    started = await wire.call("process.start", argv=sh(script), env={"CHILD": child})
    assert (await wire.notification())["params"]["data"] == "ready\n"
    await wire.call("process.signal", id=started["id"], signal="SIGUSR1")
    output, _ = await wire.until_exit(started["id"])
    assert set(output["stdout"].split()) == {b"parent", b"child"}


@bounded
@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("process.start", {"argv": ["no-such-program"]}, "not_found"),
        ("process.start", {"argv": ["./none"]}, "not_found"),
        ("process.start", {"argv": ["./none"], "pty": {}}, "not_found"),
        ("process.start", {"argv": ["./script"]}, "start_failed"),
        ("process.start", {"argv": ["./text"]}, "start_failed"),
        ("process.start", {"argv": ["./text"], "pty": {}}, "start_failed"),
        ("process.start", {"argv": ["/"]}, "start_failed"),
        ("process.start", {"argv": ["true"], "cwd": ".."}, "outside_workspace"),
        ("process.start", {"argv": ["true"], "cwd": "none"}, "start_failed"),
        ("process.start", {"argv": []}, -32602),
        ("process.start", {"argv": ["a\0b"]}, -32602),
        ("process.start", {"argv": ["true"], "env": {"a=b": "c"}}, -32602),
        ("process.start", {"argv": ["true"], "pty": {"rows": 0}}, -32602),
        ("process.start", {"argv": ["true"], "shell": True}, -32602),
        ("process.signal", {"id": "p1", "signal": "TERM"}, "unknown_process"),
        ("process.signal", {"id": "p1", "signal": "NONE"}, -32602),
        ("process.signal", {"id": "p1", "signal": 0}, -32602),
        ("process.stdin", {"id": "p1", "data": "?", "encoding": "base64"}, "unknown_process"),
        ("process.resize", {"id": "p1", "rows": 1, "cols": 1}, "unknown_process"),
        ("process.dance", {}, -32601),
        ("file.read", {"path": "../x"}, "outside_workspace"),
    ],
)
async def test_what_cannot_be_done_is_a_proper_error(desk, tmp_path, method, params, code):
    (tmp_path / "script").write_text("\x7fELF nonsense")
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "text").write_text("no program")
    wire = await desk()
    error = await wire.error(method, **params)
    assert code == (error["data"]["code"] if "data" in error else error["code"])
    assert (await wire.call("process.list"))["processes"] == []


@bounded
async def test_the_wrong_kind_of_request_for_a_process_is_an_error(desk):
    wire = await desk()
    plain = (await wire.call("process.start", argv=["sleep", "100"]))["id"]
    terminal = (await wire.call("process.start", argv=["sleep", "100"], pty={}))["id"]
    assert (await wire.error("process.resize", id=plain, rows=1, cols=1))["data"]["code"] == "no_terminal"
    assert (await wire.error("process.stdin", id=terminal, eof=True))["code"] == -32602


@bounded
async def test_messages_that_are_no_requests_get_errors_and_notifications_none(desk, capsys):
    wire = await desk()
    await wire.send(TEXT, b"{")
    assert (await wire.message())["error"]["code"] == -32700
    await wire.send(TEXT, b"[]")
    assert (await wire.message())["error"]["code"] == -32600
    await wire.send(TEXT, b'{"jsonrpc":"2.0","method":"process.signal","params":{"id":"p9","signal":"TERM"}}')
    assert (await wire.call("process.list")) == {"processes": []}
    assert "process.signal as a notification failed" in capsys.readouterr().err


@bounded
async def test_a_client_that_leaves_ends_what_it_started_with_all_below_it(desk, tmp_path):
    wire, other = await desk(), await desk()
    script = "trap '' TERM; sleep 1000 & echo $! $$ > pids; sh -c 'trap \"\" TERM; sleep 1000' & wait; wait"
    await wire.call("process.start", argv=sh(script))
    await until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    start = trio.current_time()
    await wire.stream.aclose()
    await until(lambda: not any(map(alive, pids)))
    assert trio.current_time() - start < processes.LEAVE_GRACE_S + 1
    listed = (await other.call("process.list"))["processes"][0]
    while listed["running"]:
        listed = (await other.call("process.list"))["processes"][0]
    assert listed["returncode"] in (-9, 0)


@bounded
async def test_a_job_in_a_group_of_its_own_is_ended_too(desk, tmp_path):
    """A shell with job control gives each job a process group; the session takes them all in."""
    wire = await desk()
    await wire.call("process.start", argv=["bash", "-c", "set -m; sleep 1000 & echo $! > pid; wait"], pty={})
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    pid = int((tmp_path / "pid").read_text())
    assert os.getpgid(pid) == pid
    await wire.stream.aclose()
    await until(lambda: not alive(pid))


@bounded
async def test_what_a_command_leaves_behind_is_ended_and_told(desk, tmp_path):
    """A grandchild that holds the pipe delays the exit by a bounded time, and is killed."""
    wire = await desk()
    start = trio.current_time()
    started = await wire.call("process.start", argv=sh("sleep 1000 & echo $! > pid; echo done"))
    output, end = await wire.until_exit(started["id"])
    assert processes.LINGER_S <= trio.current_time() - start < 3
    assert output["stdout"] == b"done\n"
    assert (end["returncode"], end["left_behind"], end["output_complete"]) == (0, 1, True)
    assert not alive(int((tmp_path / "pid").read_text()))


@bounded
async def test_one_that_finishes_its_output_soon_is_waited_for(desk):
    wire = await desk()
    started = await wire.call("process.start", argv=sh("(sleep 0.2; echo late) & echo early"))
    output, end = await wire.until_exit(started["id"])
    assert output["stdout"] == b"early\nlate\n"
    assert (end["left_behind"], end["output_complete"]) == (0, True)


ESCAPE = """
import os, pathlib, sys, time
if os.fork() == 0:
    os.setsid()
    pathlib.Path("pid").write_text(str(os.getpid()))
    exec(sys.argv[1])
while not pathlib.Path("pid").exists():
    time.sleep(0.01)
print("done")
"""


@bounded
async def test_a_holder_of_the_pipe_out_of_reach_is_told_of(desk, tmp_path):
    """It called setsid: the session cannot reach it, so the end of the output is not known."""
    wire = await desk()
    started = await wire.call("process.start", argv=["python3", "-c", ESCAPE, "time.sleep(60)"])
    output, end = await wire.until_exit(started["id"])
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert (output["stdout"], end["output_complete"]) == (b"done\n", False)


@bounded
async def test_a_flood_from_out_of_reach_does_not_hold_the_exit_for_ever(desk, tmp_path):
    wire = await desk()
    started = await wire.call("process.start", argv=["python3", "-c", ESCAPE, "while True: os.write(1, b'x' * 65536)"])
    _, end = await wire.until_exit(started["id"])
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert not end["output_complete"]


@bounded
async def test_output_that_never_ends_does_not_hold_the_exit_for_ever(desk, monkeypatch):
    """However quick who holds the pipe may be: what the command itself left in it is bounded."""

    async def always_something(self, fd):
        await trio.lowlevel.checkpoint()
        return b"x" * 65536

    monkeypatch.setattr(processes.Process, "_read", always_something)
    wire = await desk()
    started = await wire.call("process.start", argv=["true"])
    _, end = await wire.until_exit(started["id"])
    assert not end["output_complete"]


@bounded
async def test_input_that_nobody_will_read_is_told_at_the_exit(desk, tmp_path):
    wire = await desk()
    started = await wire.call("process.start", argv=["python3", "-c", ESCAPE, "time.sleep(60)"])
    request = await wire.ask("process.stdin", id=started["id"], data="x" * 1_000_000)
    while (message := await wire.message()).get("id") != request:
        pass
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert message["error"]["data"]["code"] == "exited"


@bounded
async def test_no_output_flows_before_the_client_knows_the_process(desk, tmp_path, nursery):
    heard = []

    async def sink(method, params):
        heard.append(method)
        return True

    owner = processes.Processes(nursery, {"PATH": os.environ["PATH"]})
    command = processes.Command(
        argv=["echo", "a"], env={}, cwd=str(tmp_path), terminal=None, encoding="utf-8", detach=False
    )
    process = await owner.start(command, sink)
    await trio.sleep(0.1)
    assert heard == []
    process.release()
    await until(lambda: len(heard) == 2)
    assert heard == ["process.output", "process.exit"]


@bounded
async def test_a_process_that_is_being_started_at_the_end_is_ended_too(desk, monkeypatch):
    spawn, spawning = processes._spawn, trio.Event()

    async def slow_spawn(*args):
        process = await spawn(*args)
        spawning.set()
        await trio.sleep(0.1)
        return process

    monkeypatch.setattr(processes, "_spawn", slow_spawn)
    wire = await desk()
    await wire.ask("process.start", argv=["sleep", "1000"])
    await spawning.wait()
    with trio.fail_after(2):
        await desk.routes.end()


@bounded
async def test_a_client_that_does_not_read_stops_the_process_and_not_the_agent(desk, nursery, tmp_path):
    """Output waits for the client: the program blocks on its pipe, and nothing piles up."""
    await desk()
    # A stream of which nothing is taken unless the client reads.
    ours, theirs = trio.testing.lockstep_stream_pair()
    server = Server(desk.routes)
    nursery.start_soon(server.serve_stream, theirs)
    wire, other = await Wire.open(ours, "/"), await desk()
    script = (
        "i=0; while :; do i=$((i+1)); echo $i > progress.new; mv progress.new progress; head -c 65536 /dev/zero; done"
    )
    started = await wire.call("process.start", argv=sh(script))

    def progress():
        return int((tmp_path / "progress").read_text() or 0) if (tmp_path / "progress").exists() else 0

    await until(lambda: progress() > 0)
    await trio.sleep(0.3)
    reached = progress()
    assert reached < 10
    await trio.sleep(0.3)
    assert progress() == reached
    await other.call("process.signal", id=started["id"], signal="KILL")
    _, end = await wire.until_exit(started["id"])
    assert (end["signal"], end["output_complete"]) == ("SIGKILL", True)


@bounded
async def test_a_detached_process_outlives_its_client_and_its_loss_is_counted(desk, tmp_path):
    wire, other = await desk(), await desk()
    started = await wire.call("process.start", argv=sh("echo one; read go; echo two; exit 5"), detach=True)
    assert (await wire.notification())["params"]["data"] == "one\n"
    await wire.stream.aclose()
    await trio.sleep(0.1)
    (listed,) = (await other.call("process.list"))["processes"]
    assert (listed["running"], listed["detached"], listed["pid"]) == (True, True, started["pid"])
    await other.call("process.stdin", id=started["id"], data="go\n")
    while listed["running"]:
        (listed,) = (await other.call("process.list"))["processes"]
    assert (listed["returncode"], listed["discarded_bytes"]) == (5, len("two\n"))


@bounded
async def test_a_client_that_stays_does_not_make_us_remember_what_has_ended(desk, monkeypatch):
    sessions = []
    start = processes.Processes.start
    monkeypatch.setattr(
        processes.Processes,
        "start",
        lambda self, command, sink: sessions.append(sink.__self__) or start(self, command, sink),
    )
    wire = await desk()
    for _ in range(3):
        await wire.until_exit((await wire.call("process.start", argv=sh("exit")))["id"])
    assert len(sessions[0]._own) == 1


@bounded
async def test_a_detached_command_may_leave_something_behind(desk, tmp_path):
    wire = await desk()
    started = await wire.call("process.start", argv=sh("sleep 1000 >/dev/null 2>&1 & echo $! > pid"), detach=True)
    _, end = await wire.until_exit(started["id"])
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)
    assert end["left_behind"] == 0


@bounded
async def test_the_end_of_the_agent_ends_all_within_its_drain(desk, tmp_path):
    """SIGTERM first, SIGKILL to what ignores it, detached or not."""
    wire = await desk()
    polite = await wire.call(
        "process.start", argv=sh("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.01; done"), detach=True
    )
    assert (await wire.notification())["params"]["data"] == "ready\n"
    rude = await wire.call("process.start", argv=sh("trap '' TERM; echo ready; while :; do sleep 1; done"))
    assert (await wire.notification())["params"]["data"] == "ready\n"
    start = trio.current_time()
    await desk.routes.end()
    assert 0.25 < trio.current_time() - start < 0.5
    assert not alive(rude["pid"])
    ended = {p["id"]: p["returncode"] for p in (await wire_after(wire, "process.list"))["processes"]}
    assert ended == {polite["id"]: 0, rude["id"]: -9}
    assert (await wire_error(wire, "process.start", argv=["true"]))["data"]["code"] == "busy"


@bounded
async def test_files_are_written_read_listed_and_removed(desk, tmp_path):
    wire = await desk()
    text = "é" * 1_500_000
    assert await wire.call("file.write", path="a/b", data=text, parents=True) == {"size": 3_000_000}
    assert (tmp_path / "a" / "b").read_text() == text
    first = await wire.call("file.read", path="a/b")
    second = await wire.call("file.read", path="a/b", offset=2 * 1024 * 1024)
    assert first["data"] + second["data"] == text
    assert (first["eof"], second["eof"]) == (False, True)
    (entry,) = (await wire.call("file.list", path="a"))["entries"]
    assert (entry["name"], entry["type"], entry["size"]) == ("b", "file", 3_000_000)
    assert (await wire.call("file.stat", path="a"))["type"] == "directory"
    assert await wire.call("file.remove", path="a", recursive=True) == {}
    assert (await wire.error("file.stat", path="a"))["data"]["code"] == "not_found"


async def wire_after(wire, method):
    """An answer that notifications may precede."""
    request = await wire.ask(method)
    while (message := await wire.message()).get("id") != request:
        pass
    return message["result"]


async def wire_error(wire, method, **params):
    request = await wire.ask(method, **params)
    while (message := await wire.message()).get("id") != request:
        pass
    return message["error"]


@bounded
@pytest.mark.parametrize("delay", [0, 0.001, 0.005, 0.02, 0.1])
async def test_a_client_that_leaves_at_any_moment_leaves_no_process_and_no_descriptor(desk, delay):
    await desk()
    await desk()
    # The imports and the workspace's descriptor are there by now.
    await trio.sleep(0.05)
    before = len(os.listdir("/proc/self/fd"))
    for pty in (None, {}):
        wire = await desk()
        request = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "process.start",
            "params": {"argv": ["sleep", "1000"], "pty": pty},
        }
        await wire.send(TEXT, json.dumps(request).encode())
        await trio.sleep(delay)
        await wire.stream.aclose()
    await until(lambda: desk.routes._desk.processes._alive == 0)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
