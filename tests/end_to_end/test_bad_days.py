"""The whole program as its own process: killed in every way, as PID 1, over TLS, out of descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import trio

from supervisor.cli.server import make_token
from supervisor.client import ConnectionClosed, WebSocketError, open_websocket, open_websocket_url
from supervisor.settings import Settings

from .conftest import ECHO, misbehave

pytestmark = pytest.mark.slow

NAMESPACE = ("unshare", "-Urpf", "--kill-child", "--mount-proc")


def why_no_namespace() -> str | None:
    try:
        tried = subprocess.run([*NAMESPACE, "/bin/true"], capture_output=True, text=True, timeout=10, check=False)
    except OSError as error:
        return str(error)
    return (tried.stderr.strip() or "refused") if tried.returncode else None


@attrs.define(eq=False)
class Program:
    """A `tenantry serve` of our own, its log, and clients of it."""

    process: subprocess.Popen
    state_dir: Path
    log: Path
    address: str

    def lines(self, event=None):
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if event in (None, line["event"])]

    def token(self, tenant="acme"):
        settings = Settings(state_dir=self.state_dir)
        return make_token(settings, tenant=tenant, scopes=["connect"], ttl_s=60, subject="tests")

    def client(self, tenant="acme", **options):
        scheme = "wss" if self.address.startswith("https") else "ws"
        host = self.address.partition("://")[2] if "://" in self.address else "localhost"
        return open_websocket_url(
            f"{scheme}://{host}/v1/tenants/{tenant}/connect/",
            token=self.token(tenant),
            unix_path=Path(self.address.removeprefix("unix:")) if self.address.startswith("unix:") else None,
            handshake_timeout_s=30,
            **options,
        )

    def keeper(self):
        return next(
            pid for pid in children(self.process.pid) if b"keeper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )

    async def ended(self, seconds=12.0) -> int:
        with trio.fail_after(seconds):
            while self.process.poll() is None:
                await trio.sleep(0.01)
        return self.process.returncode


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def processes_of(state_dir):
    """Every process with this state directory in its environment: the agents and what they started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if str(state_dir).encode() in (entry / "environ").read_bytes():
                    yield int(entry.name)


async def nothing_alive(state_dir, seconds=2.0):
    with trio.move_on_after(seconds):
        while list(processes_of(state_dir)):
            await trio.sleep(0.02)
    assert list(processes_of(state_dir)) == []


@contextlib.asynccontextmanager
async def program(state_dir, *, command=ECHO, bind="127.0.0.1:0", prefix=(), extra="", **popen):
    config = state_dir.parent / f"{state_dir.name}.toml"
    config.write_text(
        f'bind = "{bind}"\nstate_dir = "{state_dir}"\nstable_after = "100ms"\n{extra}\n'
        f'[agent]\ncommand = {json.dumps(list(command))}\ngrace = "1s"\n'
    )
    log = state_dir.parent / f"{state_dir.name}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "supervisor", "serve", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=Path(__file__).resolve().parents[2],
            env={"PATH": os.environ["PATH"]},
            **popen,
        )
    try:
        line = await trio.to_thread.run_sync(process.stdout.readline)
        assert line.startswith(b"Tenantry serves "), log.read_text()
        yield Program(process, state_dir, log, line.decode().split()[2].rstrip(","))
    finally:
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        process.wait()


async def talks(websocket):
    with trio.fail_after(10):
        await websocket.send("hi")
        assert await websocket.receive() == "hi"


async def code_at_the_end(websocket, seconds=10.0):
    with pytest.raises(ConnectionClosed) as caught, trio.fail_after(seconds):
        while True:
            await websocket.receive()
    return caught.value.code


@pytest.mark.parametrize("victims", [("supervisor",), ("keeper",), ("supervisor", "keeper"), ("keeper", "supervisor")])
async def test_nothing_outlives_sigkill_and_the_next_start_finds_a_clean_house(victims, tmp_path):
    """With grandchildren that called setsid and ignore SIGTERM."""
    state = tmp_path / "state"
    async with program(state, command=misbehave("forks-grandchildren")) as first, contextlib.AsyncExitStack() as stack:
        websocket = await stack.enter_async_context(first.client())
        await talks(websocket)
        assert len(list(processes_of(state))) > 1
        pids = {"supervisor": first.process.pid, "keeper": first.keeper()}
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        await nothing_alive(state)
        if "supervisor" not in victims:
            assert await code_at_the_end(websocket) == 1012
            await talks(await stack.enter_async_context(first.client()))
            first.process.terminate()
            assert await first.ended() == 0
    async with program(state) as second:
        recovered = [line["tenant"] for line in second.lines("tenant_recovered")]
        assert recovered == (["acme"] if "supervisor" in victims else [])
        async with second.client() as websocket:
            await talks(websocket)
            assert second.lines("agent_started")[0]["generation"] >= 2
        second.process.terminate()
        assert await second.ended() == 0
    await nothing_alive(state)


async def test_sigterm_drains_with_1012_and_exit_status_0(tmp_path):
    """S3-14: the plan's third manual check, on the program itself."""
    async with program(tmp_path / "state") as server, server.client() as websocket:
        await talks(websocket)
        server.process.terminate()
        assert await code_at_the_end(websocket) == 1012
        assert await server.ended() == 0


@pytest.mark.parametrize(("signals", "status"), [(2, 0), (3, 70)])
async def test_a_second_signal_shortens_the_grace_and_a_third_forces(signals, status, tmp_path):
    state = tmp_path / "state"
    extra = 'drain_grace = "40s"'
    async with program(state, command=misbehave("ignores-sigterm"), extra=extra) as server:
        config = (tmp_path / "state.toml").read_text()
        assert 'grace = "1s"' in config
        async with server.client() as websocket:
            await talks(websocket)
            began = trio.current_time()
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                await trio.sleep(0.05)
            assert await code_at_the_end(websocket) in (1012, 1006)
        assert await server.ended() == status
        assert trio.current_time() - began < 5
    await nothing_alive(state)


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1, 0.3])
async def test_a_signal_during_the_start_ends_it_with_status_0(after_s, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(f'bind = "127.0.0.1:0"\nstate_dir = "{tmp_path / "state"}"\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "supervisor", "serve", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parents[2],
    )
    # Blocked from its first statement on; before that it is the interpreter's to die of.
    with trio.fail_after(10):
        while not _blocks(process.pid, signal.SIGTERM):
            await trio.sleep(0.001)
    await trio.sleep(after_s)
    process.terminate()
    with trio.fail_after(12):
        while process.poll() is None:
            await trio.sleep(0.01)
    assert process.returncode == 0


def _blocks(pid, number):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("SigBlk", "SigCgt")) and int(line.split()[1], 16) >> (number - 1) & 1:
            return True
    return False


async def test_as_pid_1_it_serves_drains_and_exits_with_0(tmp_path):
    """PID 1 of a PID namespace is the init, and passes SIGTERM on."""
    if why := why_no_namespace():
        pytest.skip(f"no PID namespace: {why}")
    async with program(tmp_path / "state", prefix=NAMESPACE) as server, server.client() as websocket:
        await talks(websocket)
        (init,) = children(server.process.pid)
        os.kill(init, signal.SIGTERM)
        assert await code_at_the_end(websocket) == 1012
        assert await server.ended() == 0
    await nothing_alive(tmp_path / "state")


async def test_a_unix_socket_serves_as_well(tmp_path):
    path = tmp_path / "socket"
    async with program(tmp_path / "state", bind=f"unix:{path}") as server:
        async with server.client() as websocket:
            await talks(websocket)
        server.process.terminate()
        assert await server.ended() == 0
    assert not path.exists()


async def test_an_inherited_socket_serves_as_well(tmp_path):
    """Socket activation: `fd://3`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        shim = (
            sys.executable,
            "-c",
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.argv[2], sys.argv[2:])",
        )
        async with program(
            tmp_path / "state", bind="fd://3", prefix=(*shim, str(listener.fileno())), pass_fds=[listener.fileno()]
        ) as server:
            server.address = f"http://127.0.0.1:{port}"
            async with server.client() as websocket:
                await talks(websocket)
            server.process.terminate()
            assert await server.ended() == 0


@pytest.fixture
def certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    return tmp_path / "cert.pem", tmp_path / "key.pem"


async def test_over_tls_it_serves_passes_megabytes_and_drains(certificate, tmp_path):
    cert, key = certificate
    extra = f'tls.certificate = "{cert}"\ntls.key = "{key}"'
    async with program(tmp_path / "state", extra=extra) as server:
        assert server.address.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        async with server.client(ssl_context=context) as websocket:
            await talks(websocket)
            message = os.urandom(3 * 1024 * 1024)
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(websocket.send, message)
                    assert await websocket.receive() == message
            server.process.terminate()
            assert await code_at_the_end(websocket) == 1012
        assert await server.ended() == 0


async def test_out_of_descriptors_it_says_so_and_goes_on_when_that_ends(tmp_path):
    """Two a connection: above the limit clients are refused clearly, and nobody who is connected notices."""
    prefix = ("sh", "-c", 'ulimit -n 100; exec "$@"', "sh")
    async with program(tmp_path / "state", prefix=prefix) as server:
        async with server.client() as first:
            await talks(first)
            refused = 0
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(60):
                    try:
                        await talks(await stack.enter_async_context(bounded(server)))
                    except (WebSocketError, trio.TooSlowError, OSError):
                        refused += 1
                await talks(first)
                assert refused > 5
            with trio.fail_after(15):
                while True:
                    try:
                        async with bounded(server) as again:
                            await talks(again)
                        break
                    except (WebSocketError, trio.TooSlowError, OSError):
                        await trio.sleep(0.2)
            await talks(first)
        assert server.lines("accept_failed") or server.lines("connect_refused")
        server.process.terminate()
        assert await server.ended() == 0


@contextlib.asynccontextmanager
async def bounded(server):
    port = int(server.address.rpartition(":")[2])
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with open_websocket(
        stream,
        host=f"127.0.0.1:{port}",
        target="/v1/tenants/acme/connect/",
        headers=[("Authorization", f"Bearer {server.token()}")],
        handshake_timeout_s=0.5,
        close_timeout_s=0.2,
    ) as websocket:
        yield websocket
