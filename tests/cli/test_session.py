"""`exec` and `attach` against an agent that a test plays over a socket, with pipes and pseudo-terminals as streams."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import signal
import termios
from functools import partial
from types import SimpleNamespace

import pytest
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from supervisor.cli import Failure, session
from supervisor.cli.server import Server
from supervisor.cli.session import Streams


class Agent:
    """One connection of the bundled agent's JSON-RPC, answered by the test."""

    def __init__(self, stream):
        self.stream = stream
        self.ws = WSConnection(ConnectionType.SERVER)
        self.messages = []
        self.request = None
        self.pongs = []

    async def accept(self):
        while self.request is None:
            self.ws.receive_data(await self.stream.receive_some())
            self.request = next((e for e in self.ws.events() if isinstance(e, Request)), None)
        await self.stream.send_all(self.ws.send(AcceptConnection()))

    async def refuse(self, status, problem):
        while self.request is None:
            self.ws.receive_data(await self.stream.receive_some())
            self.request = next((e for e in self.ws.events() if isinstance(e, Request)), None)
        head = RejectConnection(
            status_code=status, headers=[(b"content-type", b"application/problem+json")], has_body=True
        )
        body = RejectData(json.dumps(problem).encode(), body_finished=True)
        await self.stream.send_all(self.ws.send(head) + self.ws.send(body))
        await self.stream.aclose()

    async def next(self):
        """The next message, or the code of the client's Close, or None at the end."""
        while not self.messages:
            data = await self.stream.receive_some()
            if not data:
                return None
            self.ws.receive_data(data)
            for event in self.ws.events():
                if isinstance(event, TextMessage):
                    self.messages.append(event.data)
                elif isinstance(event, CloseConnection):
                    await self.stream.send_all(self.ws.send(event.response()))
                    self.messages.append(int(event.code))
                elif isinstance(event, Pong):
                    self.pongs.append(bytes(event.payload))
        return self.messages.pop(0)

    async def call(self):
        """The next call: its method and parameters; `answer` answers it."""
        message = await self.next()
        if not isinstance(message, str):
            return message, {}
        call = json.loads(message)
        self.number = call["id"]
        return call["method"], call["params"]

    async def send(self, **message):
        await self.stream.send_all(self.ws.send(TextMessage(json.dumps({"jsonrpc": "2.0", **message}))))

    async def answer(self, **result):
        await self.send(id=self.number, result=result)

    async def fail(self, code, message):
        await self.send(id=self.number, error={"code": -32000, "message": message, "data": {"code": code}})

    async def output(self, data, stream="stdout"):
        try:
            text, encoding = data.decode(), "utf-8"
        except UnicodeDecodeError:
            text, encoding = base64.b64encode(data).decode(), "base64"
        params = {"id": "p1", "stream": stream, "data": text, "encoding": encoding}
        await self.send(method="process.output", params=params)

    async def exit(self, returncode):
        await self.send(method="process.exit", params={"id": "p1", "returncode": returncode, "signal": None})

    async def started(self):
        await self.accept()
        method, params = await self.call()
        assert method == "process.start"
        await self.answer(id="p1", pid=7)
        return params

    async def close(self, code, reason=""):
        await self.stream.send_all(self.ws.send(CloseConnection(code, reason)))
        with contextlib.suppress(trio.BrokenResourceError):
            while await self.stream.receive_some():
                pass
        await self.stream.aclose()


def given(params):
    assert params.pop("encoding") == "base64"
    return base64.b64decode(params["data"])


@pytest.fixture
async def play(nursery):
    """Plays an agent with `script(agent)`; gives the Server that leads to it. Errors of the script reach the test."""

    async def play(script):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]

        async def serve(stream):
            await script(Agent(stream))

        nursery.start_soon(trio.serve_listeners, serve, listeners)
        return Server(f"http://127.0.0.1:{port}", None, lambda tenant: f"token-of-{tenant}")

    return play


@pytest.fixture
def pipes():
    """stdin, stdout and stderr as pipes; what the caller holds of them is `typed`, `out()`, `err()`."""
    ends = [os.pipe() for _ in range(3)]
    open_fds = {fd for pair in ends for fd in pair}

    def close(fd):
        if fd in open_fds:
            open_fds.remove(fd)
            os.close(fd)

    def content(pair):
        close(pair[1])
        with open(os.dup(pair[0]), "rb") as file:
            return file.read()

    def typed(data, *, end=True):
        os.write(ends[0][1], data)
        if end:
            close(ends[0][1])

    yield SimpleNamespace(
        streams=Streams(ends[0][0], ends[1][1], ends[2][1]),
        ends=ends,
        typed=typed,
        out=lambda: content(ends[1]),
        err=lambda: content(ends[2]),
        close=close,
    )
    for fd in list(open_fds):
        close(fd)


def run(verb, *args, **kwargs):
    """As `session.run` does it, inside of this test's Trio run."""

    async def runs():
        with trio.fail_after(5):
            try:
                return await verb(*args, **kwargs)
            except BaseExceptionGroup as group:
                raise session._one(group) from None

    return runs()


# ---- exec -----------------------------------------------------------------------------------------------------


async def test_exec_passes_streams_and_status(play, pipes):
    async def script(agent):
        params = await agent.started()
        assert params == {"argv": ["prog", "-x"], "cwd": "sub"}
        assert agent.request.target == "/v1/tenants/acme/connect/"
        assert (b"authorization", b"Bearer token-of-acme") in agent.request.extra_headers
        method, params = await agent.call()
        assert (method, given(params)) == ("process.stdin", b"in\xff\x00put")
        await agent.answer()
        assert await agent.call() == ("process.stdin", {"id": "p1", "eof": True})
        await agent.answer()
        await agent.output("grün".encode())
        await agent.output(b"\xff\xfe", "stderr")
        await agent.exit(7)
        assert await agent.next() == 1000

    server = await play(script)
    pipes.typed(b"in\xff\x00put")
    assert await run(session.execute, server, "acme", ["prog", "-x"], "sub", pipes.streams) == 7
    assert pipes.out() == "grün".encode()
    assert pipes.err() == b"\xff\xfe"


@pytest.mark.parametrize(("returncode", "status"), [(0, 0), (255, 255), (-9, 137), (-15, 143)])
async def test_a_death_by_a_signal_is_128_and_its_number(returncode, status, play, pipes):
    async def script(agent):
        await agent.started()
        await agent.exit(returncode)

    assert await run(session.execute, await play(script), "acme", ["x"], ".", pipes.streams) == status


async def test_output_before_the_answer_was_seen_is_not_lost(play, pipes):
    async def script(agent):
        await agent.accept()
        await agent.call()
        # All in one segment.
        frames = [
            {"id": 1, "result": {"id": "p1", "pid": 7}},
            {
                "method": "process.output",
                "params": {"id": "p1", "stream": "stdout", "data": "quick", "encoding": "utf-8"},
            },
            {"method": "process.exit", "params": {"id": "p1", "returncode": 0}},
        ]
        data = b"".join(agent.ws.send(TextMessage(json.dumps({"jsonrpc": "2.0", **frame}))) for frame in frames)
        await agent.stream.send_all(data)

    assert await run(session.execute, await play(script), "acme", ["x"], ".", pipes.streams) == 0
    assert pipes.out() == b"quick"


async def test_a_command_that_reads_no_more_goes_on(play, pipes):
    async def script(agent):
        await agent.started()
        await agent.call()
        await agent.fail("closed", "the input of process p1 is closed")
        await agent.output(b"still here")
        await agent.exit(0)

    server = await play(script)
    pipes.typed(b"ignored")
    assert await run(session.execute, server, "acme", ["x"], ".", pipes.streams) == 0
    assert pipes.out() == b"still here"


@pytest.mark.parametrize(("code", "status"), [("not_found", 127), ("start_failed", 126), ("busy", 1), (None, 1)])
async def test_what_cannot_be_started_has_the_status_that_a_shell_gives(code, status, play, pipes):
    async def script(agent):
        await agent.accept()
        await agent.call()
        await agent.fail(code, "nosuch: no such program")

    with pytest.raises(Failure, match="the agent did not start it: nosuch: no such program") as caught:
        await run(session.execute, await play(script), "acme", ["nosuch"], ".", pipes.streams)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1001, "the tenant was put to sleep"),
        (1008, "the token is no longer valid"),
        (1012, "the agent was restarted"),
        (None, "the connection broke"),
    ],
)
@pytest.mark.parametrize("moment", ["starting", "running", "feeding"])
async def test_a_connection_that_ends_first_is_told_with_its_reason(code, words, moment, play, pipes):
    async def script(agent):
        if moment == "starting":
            await agent.accept()
            await agent.call()
        else:
            await agent.started()
            await agent.output(b"before")
        if moment == "feeding":
            await agent.call()
        if code is None:
            await agent.stream.aclose()
        else:
            await agent.close(code)

    server = await play(script)
    pipes.typed(b"x", end=False)
    with pytest.raises(Failure, match=words) as caught:
        await run(session.execute, server, "acme", ["x"], ".", pipes.streams)
    assert caught.value.status == 69


@pytest.mark.parametrize(
    ("status", "exit_status", "words"),
    [(401, 77, "no token for you (401). Give a token"), (403, 77, "(403)"), (404, 1, "(404)"), (503, 69, "(503)")],
)
async def test_a_refused_upgrade_is_told_in_the_servers_words(status, exit_status, words, play, pipes):
    async def script(agent):
        await agent.refuse(status, {"title": "t", "detail": "no token for you"})

    with pytest.raises(Failure) as caught:
        await run(session.execute, await play(script), "acme", ["x"], ".", pipes.streams)
    assert words in str(caught.value)
    assert "no connection to the agent of tenant 'acme': no token for you" in str(caught.value)
    assert caught.value.status == exit_status


async def test_an_agent_that_speaks_something_else_is_told(play, pipes):
    async def script(agent):
        await agent.accept()
        await agent.stream.send_all(agent.ws.send(TextMessage("Welcome!")))
        while await agent.next() != 1001:
            pass

    with pytest.raises(Failure, match="does not speak JSON-RPC"):
        await run(session.execute, await play(script), "acme", ["x"], ".", pipes.streams)


@pytest.mark.slow
async def test_a_closed_stdout_ends_the_command(play, pipes):
    closed = trio.Event()

    async def script(agent):
        await agent.started()
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await agent.output(b"y\n" * 1000)
                await trio.sleep(0.01)
        closed.set()

    server = await play(script)
    pipes.close(pipes.ends[1][0])
    assert await run(session.execute, server, "acme", ["yes"], ".", pipes.streams) == 141
    with trio.fail_after(5):
        await closed.wait()


async def test_a_slow_stdout_holds_the_agent_back_and_pings_are_answered(play, pipes):
    """A full pipe stops the command in the end, not the connection: what comes in is bounded, and Pongs go out."""
    sent = trio.Event()

    async def script(agent):
        await agent.started()
        await agent.stream.send_all(agent.ws.send(TextMessage("{}")) + agent.ws.send(Ping(b"alive?")))
        for _ in range(30):
            await agent.output(b"x" * 10_000)
        await agent.exit(0)
        sent.set()
        assert await agent.next() == 1000
        assert agent.pongs == [b"alive?"]

    server = await play(script)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run, session.execute, server, "acme", ["x"], ".", pipes.streams))
        with trio.fail_after(5):
            await sent.wait()
        received = b""
        while len(received) < 300_000:
            received += await trio.to_thread.run_sync(os.read, pipes.ends[1][0], 65536)
    assert received == b"x" * 300_000


async def test_the_input_that_is_not_needed_stays_for_the_next_program(play, pipes):
    """`while read line; do tenantry exec ...` loses no more than what the command was given."""

    async def script(agent):
        await agent.started()
        await agent.exit(0)

    server = await play(script)
    assert await run(session.execute, server, "acme", ["x"], ".", pipes.streams) == 0
    pipes.typed(b"for the next")
    assert os.read(pipes.streams.stdin, 100) == b"for the next"
    assert os.get_blocking(pipes.streams.stdin)


@pytest.mark.parametrize("kind", ["file", "null"])
async def test_stdin_may_be_a_file(kind, play, pipes, tmp_path):
    async def script(agent):
        await agent.started()
        received = b""
        while "eof" not in (params := (await agent.call())[1]):
            received += given(params)
            await agent.answer()
        await agent.answer()
        await agent.output(str(len(received)).encode())
        await agent.exit(0)

    path = tmp_path / "input"
    path.write_bytes(bytes(100_000))
    fd = os.open(path if kind == "file" else os.devnull, os.O_RDONLY)
    try:
        streams = Streams(fd, pipes.streams.stdout, pipes.streams.stderr)
        assert await run(session.execute, await play(script), "acme", ["x"], ".", streams) == 0
    finally:
        os.close(fd)
    assert pipes.out() == (b"100000" if kind == "file" else b"0")


async def test_the_first_interrupt_is_the_commands_and_the_second_ours(play, pipes):
    signalled = []

    async def script(agent):
        await agent.started()
        os.kill(os.getpid(), signal.SIGINT)
        method, params = await agent.call()
        signalled.append((method, params))
        await agent.answer()
        os.kill(os.getpid(), signal.SIGINT)
        assert await agent.next() in (1000, 1001)

    assert await run(session.execute, await play(script), "acme", ["x"], ".", pipes.streams) == 130
    assert signalled == [("process.signal", {"id": "p1", "signal": "SIGINT"})]


async def test_a_command_that_dies_of_the_passed_signal_gives_its_status(play, pipes):
    async def script(agent):
        await agent.started()
        os.kill(os.getpid(), signal.SIGTERM)
        await agent.call()
        await agent.answer()
        await agent.exit(-signal.SIGTERM)

    assert await run(session.execute, await play(script), "acme", ["x"], ".", pipes.streams) == 143


# ---- attach ---------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal():
    """A pseudo-terminal as the caller's; `master` is what the person types into and looks at."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 100))
    yield SimpleNamespace(master=master, slave=slave, streams=Streams(slave, slave, slave))
    with contextlib.suppress(OSError):
        os.close(master)
    os.close(slave)


async def test_attach_gives_a_terminal_to_the_shell_and_takes_it_back(play, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-test")
    before = termios.tcgetattr(terminal.slave)
    seen = []

    async def script(agent):
        params = await agent.started()
        assert params["pty"] == {"rows": 40, "cols": 100}
        assert params["env"]["TERM"] == "xterm-test"
        assert params["argv"][0] == "sh"
        # Raw: Ctrl-C and Return go through as they are.
        seen.append(termios.tcgetattr(terminal.slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG))
        os.write(terminal.master, b"ls\x03\r")
        received = b""
        while received != b"ls\x03\r":
            method, params = await agent.call()
            assert method == "process.stdin"
            received += given(params)
            await agent.answer()
        await agent.output(b"file\r\n")
        await agent.exit(3)

    assert await run(session.attach, await play(script), "acme", (), terminal.streams) == 3
    assert seen == [0]
    assert termios.tcgetattr(terminal.slave) == before
    seen_by_person = b""
    while not seen_by_person.endswith(b"file\r\n"):
        seen_by_person += os.read(terminal.master, 1000)
    assert seen_by_person == b"Connected to acme; Ctrl-] leaves.\r\nfile\r\n"


async def test_a_new_size_of_the_terminal_is_passed_on(play, terminal):
    async def script(agent):
        await agent.started()
        termios.tcsetwinsize(terminal.slave, (50, 120))
        os.kill(os.getpid(), signal.SIGWINCH)
        assert await agent.call() == ("process.resize", {"id": "p1", "rows": 50, "cols": 120})
        await agent.answer()
        await agent.exit(0)

    assert await run(session.attach, await play(script), "acme", ("top",), terminal.streams) == 0


@pytest.mark.parametrize("how", ["key", "closed", "hangup", "killed", "failed"])
async def test_the_terminal_is_restored_however_it_ends(how, play, terminal):
    before = termios.tcgetattr(terminal.slave)
    fed = []

    async def script(agent):
        await agent.started()
        if how == "key":
            os.write(terminal.master, b"x\x1dy")
            fed.append(given((await agent.call())[1]))
            await agent.answer()
        elif how == "closed":
            await agent.close(1012, "Server restarting")
            return
        elif how == "hangup":
            os.kill(os.getpid(), signal.SIGHUP)
        elif how == "killed":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            await agent.send(method="process.output", params={})
        assert await agent.next() in (1000, 1001)

    attached = partial(run, session.attach, await play(script), "acme", (), terminal.streams)
    if how == "closed":
        with pytest.raises(Failure, match="the agent was restarted"):
            await attached()
    elif how == "failed":
        with pytest.raises(KeyError):
            await attached()
    else:
        assert await attached() == {"key": 0, "hangup": 129, "killed": 143}[how]
    assert termios.tcgetattr(terminal.slave) == before
    assert fed == ([b"x"] if how == "key" else [])


async def test_attach_without_a_terminal_feeds_the_shell(play, pipes):
    async def script(agent):
        params = await agent.started()
        assert "pty" not in params
        assert given((await agent.call())[1]) == b"echo hi\n"
        await agent.answer()
        await agent.call()
        await agent.answer()
        await agent.output(b"hi\n")
        await agent.exit(0)

    server = await play(script)
    pipes.typed(b"echo hi\n")
    assert await run(session.attach, server, "acme", (), pipes.streams) == 0
    assert pipes.out() == b"hi\n"


# ---- attach --raw ---------------------------------------------------------------------------------------------


async def echo(agent):
    await agent.accept()
    while isinstance(message := await agent.next(), str):
        await agent.stream.send_all(agent.ws.send(TextMessage(message.upper())))


@pytest.mark.slow
async def test_raw_sends_lines_and_prints_messages(play, pipes):
    server = await play(echo)
    pipes.typed("one\nzwölf\n\nlast".encode())
    assert await run(session.talk, server, "acme", "echo", pipes.streams) == 0
    assert pipes.out().decode() == "ONE\nZWÖLF\n\nLAST\n"


@pytest.mark.parametrize(
    ("code", "words"), [(1000, None), (1012, "the agent was restarted"), (4000, "closed the conn")]
)
async def test_raw_ends_as_the_agent_ends(code, words, play, pipes):
    async def script(agent):
        await agent.accept()
        await agent.stream.send_all(agent.ws.send(TextMessage("bye")))
        await agent.close(code)

    server = await play(script)
    if words is None:
        assert await run(session.talk, server, "acme", "", pipes.streams) == 0
    else:
        with pytest.raises(Failure, match=words):
            await run(session.talk, server, "acme", "", pipes.streams)
    assert pipes.out() == b"bye\n"


async def test_raw_ends_when_nobody_reads_its_output(play, pipes):
    server = await play(echo)
    pipes.close(pipes.ends[1][0])
    pipes.typed(b"x\n", end=False)
    assert await run(session.talk, server, "acme", "", pipes.streams) == 141
