"""docs/agent-contract.md, kept by the bundled agent and by one in Node.js: real processes on an inherited socket."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from tests.agent.wire import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, Wire, close_frame, frame, head

pytestmark = pytest.mark.slow

NODE = shutil.which("node") or "node"
AGENTS = {
    "python": [sys.executable, "-I", "-m", "agent"],
    "node": [NODE, str(Path(__file__).resolve().parents[2] / "fixtures" / "agent.mjs")],
}
MIB = 1024 * 1024


def node_is_recent():
    try:
        version = subprocess.run([NODE, "--version"], capture_output=True, check=True).stdout
    except OSError:
        return False
    return int(version[1:].split(b".")[0]) >= 20


def bounded(test):
    @functools.wraps(test)
    async def run(*args, **kwargs):
        with trio.fail_after(30):
            await test(*args, **kwargs)

    return run


class Agent:
    """A running agent, and the way to it."""

    def __init__(self, process, path):
        self.process = process
        self.path = path
        self.streams = []

    async def stream(self):
        self.streams.append(await trio.open_unix_socket(self.path))
        return self.streams[-1]

    async def open(self, path="/echo", **options):
        return await Wire.open(await self.stream(), path, **options)

    async def exit_status(self):
        return await trio.to_thread.run_sync(self.process.wait, 20)


@pytest.fixture
async def start(tmp_path):
    """`start(command)` runs an agent as a launcher does; at the end it must have left nothing on its output."""
    agents = []
    (tmp_path / "workspace").mkdir()

    def start(command, *, env=(), hand_over='LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 </dev/null'):
        path = str(tmp_path / f"agent-{len(agents)}")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(4096)
            process = subprocess.Popen(
                ["/bin/sh", "-c", hand_over, "sh", *command],
                stdin=listener.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=tmp_path / "workspace",
                env={
                    "PATH": os.environ["PATH"],
                    "LANG": "C.UTF-8",
                    "HOME": str(tmp_path / "workspace"),
                    "TENANTRY_WORKSPACE": str(tmp_path / "workspace"),
                    "TENANTRY_TENANT": "acme",
                    "TENANTRY_GENERATION": "1",
                    **dict(env),
                },
            )
        agents.append(Agent(process, path))
        return agents[-1]

    yield start
    for agent in agents:
        for stream in agent.streams:
            await stream.aclose()
        if agent.process.poll() is None:
            agent.process.terminate()
        output, _ = agent.process.communicate(timeout=10)
        assert output.decode() == getattr(agent, "says", "")


@pytest.fixture(params=AGENTS)
def command(request):
    if request.param == "node" and not node_is_recent():
        pytest.skip("Node.js 20 or later is not installed")
    return AGENTS[request.param]


@pytest.fixture
def agent(start, command):
    return start(command)


@bounded
async def test_it_echoes_what_it_gets(agent):
    wire = await agent.open()
    assert wire.status == 101
    for opcode, payload in [(TEXT, "é".encode()), (BINARY, b"\xff\0"), (TEXT, b""), (BINARY, b"x" * 70_000)]:
        await wire.send(opcode, payload)
        assert await wire.frame() == (opcode, payload)
    await wire.send(TEXT, b"one ", fin=False)
    await wire.send(PING, b"between")
    await wire.send(CONTINUATION, b"message")
    assert await wire.frame() == (PONG, b"between")
    assert await wire.frame() == (TEXT, b"one message")
    await wire.stream.send_all(close_frame(4000))
    assert await wire.frame() == (CLOSE, b"\x0f\xa0")
    await wire.ends()


@bounded
async def test_sixteen_mebibytes_pass_and_more_is_1009(agent):
    wire = await agent.open()
    message = os.urandom(16 * MIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.send, BINARY, message)
        assert await wire.frame() == (BINARY, message)

    async def send_too_much():
        with contextlib.suppress(trio.BrokenResourceError):
            await wire.send(BINARY, message + b"x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_too_much)
        opcode, payload = await wire.frame()
        assert (opcode, payload[:2]) == (CLOSE, b"\x03\xf1")
        nursery.cancel_scope.cancel()


@bounded
@pytest.mark.parametrize(("sent", "code"), [(b"\x81\x01a", 1002), (frame(TEXT, b"\xff"), 1007), (frame(3), 1002)])
async def test_a_broken_frame_closes_with_its_code(agent, sent, code):
    wire = await agent.open()
    await wire.stream.send_all(sent)
    assert (await wire.closed_with())[0] == code


@bounded
async def test_frames_in_one_segment_with_the_head_are_served(agent):
    stream = await agent.stream()
    await stream.send_all(head() + frame(TEXT, b"early"))
    wire = Wire(stream)
    await wire.read_answer()
    assert await wire.frame() == (TEXT, b"early")


@bounded
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_closes_all_with_1012_and_exits_0_within_the_drain(agent, number):
    """S3-14: side by side; refuses new upgrades meanwhile; those that do not answer delay it by 500 ms at most."""
    wires = [await agent.open() for _ in range(20)]
    silent = await agent.open()
    start = trio.current_time()
    agent.process.send_signal(number)
    for wire in wires:
        assert await wire.closed_with() == (1012, "Server restarting")
    assert trio.current_time() - start < 0.4
    assert await silent.frame() == (CLOSE, b"\x03\xf4Server restarting")
    assert (await agent.open()).status == 503
    assert await agent.exit_status() == 0
    assert 0.4 < trio.current_time() - start < 2


@bounded
async def test_it_exits_at_once_when_nobody_is_connected(agent):
    await (await agent.open()).stream.aclose()
    start = trio.current_time()
    agent.process.terminate()
    assert await agent.exit_status() == 0
    assert trio.current_time() - start < 0.4


@bounded
async def test_more_signals_are_harmless(agent):
    """S3-14: whenever they come, also when it is about to exit."""
    silent = await agent.open()
    while agent.process.poll() is None:
        agent.process.send_signal(signal.SIGTERM)
        agent.process.send_signal(signal.SIGINT)
        await trio.sleep(0.001)
    assert agent.process.returncode == 0
    assert silent.status == 101


@bounded
async def test_a_client_that_does_not_read_does_not_hold_up_the_drain(agent):
    wire = await agent.open()
    with trio.move_on_after(0.5):
        while True:
            await wire.send(BINARY, b"x" * 100_000)
    agent.process.terminate()
    start = trio.current_time()
    assert await agent.exit_status() == 0
    assert trio.current_time() - start < 2


@bounded
async def test_it_serves_at_a_path_where_that_is_set_instead(start, command, tmp_path):
    path = tmp_path / "own"
    agent = start(command, env={"TENANTRY_LISTEN": f"unix:{path}"}, hand_over='exec "$@" </dev/null')
    agent.path = str(path)
    while True:
        try:
            wire = await agent.open()
            break
        except OSError:  # It does not listen yet.
            await trio.sleep(0.01)
    await wire.send(TEXT, b"here")
    assert await wire.frame() == (TEXT, b"here")
    agent.process.terminate()
    assert (await wire.closed_with())[0] == 1012
    assert await agent.exit_status() == 0


async def until_executed(pid):
    """Until the shell has become the agent."""
    cmdline = trio.Path(f"/proc/{pid}/cmdline")
    while b"agent" not in (await cmdline.read_bytes()).split(b"\0")[:4]:
        await trio.sleep(0.001)


@bounded
async def test_a_signal_during_its_start_is_not_lost(start):
    """The bundled agent blocks signals before it imports anything slow."""
    for delay in (0.03, 0.05, 0.08, 0.1):
        agent = start(AGENTS["python"])
        await until_executed(agent.process.pid)
        await trio.sleep(delay)
        agent.process.terminate()
        # Before its first line the interpreter itself is still starting, and dies of the signal.
        assert await agent.exit_status() in (0, -signal.SIGTERM)
    assert agent.process.returncode == 0


@bounded
@pytest.mark.parametrize(
    ("hand_over", "words"),
    [
        ('exec "$@" 3<&0', "no socket to serve"),
        ('LISTEN_FDS=1 LISTEN_PID=1 exec "$@" 3<&0', "LISTEN_PID is '1'"),
        ('LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"', "fd 3 is no socket"),
        ('TENANTRY_LISTEN=tcp:1 exec "$@"', "it must be unix:/path"),
        ('TENANTRY_LISTEN=unix:/none/x exec "$@"', "cannot be bound"),
        ('TENANTRY_WORKSPACE=/none exec "$@"', "which is no directory"),
        ('exec "$@" --app nothing', "must be module:callable"),
        ('exec "$@" --app json:nothing', "--app json:nothing cannot be imported"),
        ('exec "$@" --app json:__name__', "is not callable"),
    ],
)
async def test_what_is_missing_at_the_start_is_said_and_exits_78(start, hand_over, words):
    agent = start(AGENTS["python"], hand_over=hand_over)
    agent.says = agent.process.communicate()[0].decode()
    agent.process.communicate = lambda timeout: (agent.says.encode(), None)
    assert words in agent.says
    assert agent.process.returncode == 78


@bounded
async def test_an_unknown_option_is_usage(start):
    agent = start([*AGENTS["python"], "--port", "80"])
    agent.says = agent.process.communicate()[0].decode()
    agent.process.communicate = lambda timeout: (agent.says.encode(), None)
    assert "usage: agent" in agent.says
    assert agent.process.returncode == 64


@bounded
async def test_the_sigterm_ends_the_processes_of_the_agent(start):
    agent = start(AGENTS["python"])
    wire = await agent.open("/")
    rude = ["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]
    pid = (await wire.call("process.start", argv=rude, detach=True))["pid"]
    assert (await wire.notification())["params"]["data"] == "ready\n"
    start_time = trio.current_time()
    agent.process.terminate()
    assert (await wire.closed_with())[0] == 1012
    assert await agent.exit_status() == 0
    assert trio.current_time() - start_time < 1
    assert not await trio.Path(f"/proc/{pid}").exists()


@bounded
async def test_ones_own_handler_is_served_everywhere_but_at_echo(start, tmp_path):
    (tmp_path / "workspace" / "mine.py").write_text(
        "async def handler(ws):\n    await ws.send_message(f'{ws.path}: {await ws.get_message()}')\n"
    )
    # The workspace shadows nothing.
    (tmp_path / "workspace" / "trio.py").write_text("raise SystemExit(1)\n")
    agent = start([*AGENTS["python"], "--app", "mine:handler"])
    for path in ("/", "/any/path"):
        wire = await agent.open(path)
        await wire.send(TEXT, b"hello")
        assert await wire.frame() == (TEXT, f"{path}: hello".encode())
        assert await wire.closed_with() == (1000, "")
    wire = await agent.open("/echo")
    await wire.send(TEXT, b"hello")
    assert await wire.frame() == (TEXT, b"hello")


@bounded
async def test_the_example_of_the_documentation_keeps_the_contract(start, tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "agent-contract.md").read_text()
    (tmp_path / "example.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    agent = start([sys.executable, "-I", str(tmp_path / "example.py")])
    wires = [await agent.open("/any") for _ in range(3)]
    for wire in wires:
        await wire.send(TEXT, b"hello")
        assert await wire.frame() == (TEXT, b"hello")
    silent = await agent.open()
    agent.process.terminate()
    for wire in wires:
        assert await wire.closed_with() == (1012, "Server restarting")
    assert (await agent.open()).status == 503
    assert (await silent.frame())[0] == CLOSE
    assert await agent.exit_status() == 0


@bounded
async def test_every_example_message_of_the_documentation_is_one(start):
    """Each request on the page, in its order, gets an answer of the shape that the page shows."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "agent-contract.md").read_text()
    agent = start(AGENTS["python"])
    wire = await agent.open("/")
    shown = {}
    for line in page.splitlines():
        if line.startswith("← ") and "result" in (message := json.loads(line[2:])):
            shown[message["id"]] = message["result"]
    for line in page.splitlines():
        if not line.startswith("→ "):
            continue
        request = json.loads(line[2:])
        # The page's p1 has ended by then; its own words for that are shown elsewhere.
        if request["method"] in ("process.stdin", "process.resize", "process.signal"):
            options = {"pty": {}} if request["method"] == "process.resize" else {}
            request["params"]["id"] = (await wire.call("process.start", argv=["sleep", "9"], **options))["id"]
        await wire.send(TEXT, json.dumps(request).encode())
        answer = await wire.answer(request["id"])
        assert answer["result"].keys() == shown[request["id"]].keys(), (request, answer)
        if request["method"] == "process.list":
            assert answer["result"]["processes"][0].keys() == shown[request["id"]]["processes"][0].keys()


@bounded
async def test_the_first_handshake_is_answered_soon(start, command):
    """A start costs what Trio's import costs; the figure is printed by `pytest -rP`."""
    took = []
    for _ in range(3):
        begin = time.perf_counter()
        agent = start(command)
        assert (await agent.open()).status == 101
        took.append(time.perf_counter() - begin)
    print(f"{command[0]}: {min(took) * 1000:.0f} ms")
    assert min(took) < 5
