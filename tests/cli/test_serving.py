"""The whole program as a person uses it: `tenantry serve` in one process, the client verbs in others."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow
_PROGRAM = [sys.executable, "-m", "supervisor"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TENANTRY_")}
    environ |= {"TENANTRY_STATE_DIR": str(directory / "state"), "TENANTRY_BIND": "127.0.0.1:0"}
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [*_PROGRAM, "serve"], env=environ, cwd=directory, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        announced = "".join(process.stdout.readline() for _ in range(3))
        environ["TENANTRY_URL"] = re.search(r"http://127\.0\.0\.1:\d+", announced)[0]
        yield SimpleNamespace(environ=environ, announced=announced, process=process, directory=directory)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(15)
        process.stdout.close()
    assert status == 0, (directory / "log").read_text()


@pytest.fixture
def tenantry(served):
    def tenantry(*argv, **kwargs):
        kwargs.setdefault("stdin", subprocess.DEVNULL) if "input" not in kwargs else None
        return subprocess.run(
            [*_PROGRAM, *argv], env=served.environ, cwd=served.directory, capture_output=True, timeout=30, **kwargs
        )

    return tenantry


def test_exec_runs_a_command_and_passes_everything_on(tenantry):
    ran = tenantry("exec", "demo", "--", "sh", "-c", "cat; echo problem >&2; exit 7", input=b"in\x00\xffput")
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, b"in\x00\xffput", b"problem\n")


def test_exec_gives_128_and_the_signal(tenantry):
    assert tenantry("exec", "demo", "sh", "-c", "kill -9 $$").returncode == 137


def test_exec_of_what_is_not_there_is_127(tenantry):
    ran = tenantry("exec", "demo", "--", "no-such-program")
    assert ran.returncode == 127
    assert ran.stderr == b"tenantry: the agent did not start it: no-such-program: no such program\n"


def test_exec_carries_megabytes_to_the_byte(tenantry):
    data = os.urandom(3_000_000)
    ran = tenantry("exec", "demo", "cat", input=data)
    assert ran.returncode == 0
    assert ran.stdout == data


def test_exec_passes_an_interrupt_on(served):
    program = [*_PROGRAM, "exec", "demo", "sh", "-c", "trap 'echo caught; exit 3' INT; echo ready; sleep 60 & wait"]
    with subprocess.Popen(program, env=served.environ, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(10) == 3


def test_tenants_lists_whom_exec_created(tenantry):
    assert tenantry("exec", "another", "true").returncode == 0
    listed = json.loads(tenantry("tenants", "--json").stdout)
    assert {"another"} <= {tenant["name"] for tenant in listed}
    assert tenantry("tenants").stdout.startswith(b"TENANT")


def test_a_token_that_was_created_opens_its_tenant_alone(served, tenantry):
    token = tenantry("token", "create", "demo").stdout.decode().strip()
    assert tenantry("exec", "--token", token, "demo", "true").returncode == 0
    ran = tenantry("exec", "--token", token, "another", "true")
    assert ran.returncode == 77
    assert b"another" in ran.stderr


def test_the_line_of_the_announcement_works_as_it_is_pasted(served):
    line = served.announced.splitlines()[2].removeprefix("Attach  ")
    ran = subprocess.run(["sh", "-c", line], cwd="/", capture_output=True, input=b"echo pasted\n", timeout=30)
    assert (ran.returncode, ran.stdout) == (0, b"pasted\n"), ran.stderr


def test_attach_gives_a_terminal(served):
    """stty, a size and Ctrl-C as a person has them, and the caller's terminal as it was."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ |= served.environ
        os.execv(_PROGRAM[0], [*_PROGRAM, "attach", "demo", "--", "sh"])

    seen = b""

    def wait_for(words):
        nonlocal seen
        until = time.monotonic() + 20
        while words not in seen and time.monotonic() < until:
            seen += os.read(master, 65536)
        assert words in seen
        seen = seen.partition(words)[2]

    try:
        wait_for(b"Ctrl-] leaves")
        os.write(master, b"test -t 0 && echo a-terminal''-it-is; stty size\r")
        wait_for(b"a-terminal-it-is")
        wait_for(b"24 80")
        os.write(master, b"sleep 50\r")
        time.sleep(0.3)
        os.write(master, b"\x03")
        os.write(master, b"echo still''-here; exit 5\r")
        wait_for(b"still-here")
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(master)
    assert os.waitstatus_to_exitcode(status) == 5


def test_raw_talks_to_any_path_of_the_agent(tenantry):
    ran = tenantry("attach", "--raw", "--path", "echo", "demo", input=b"one\ntwo\n")
    assert (ran.returncode, ran.stdout) == (0, b"one\ntwo\n"), ran.stderr


def test_drain_ends_the_server(tmp_path, served):
    environ = served.environ | {"TENANTRY_STATE_DIR": str(tmp_path), "TENANTRY_URL": ""}
    with subprocess.Popen(
        [*_PROGRAM, "serve"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        environ["TENANTRY_URL"] = process.stdout.readline().decode().split()[-1]
        ran = subprocess.run([*_PROGRAM, "drain"], env=environ, capture_output=True, timeout=30)
        assert ran.returncode == 0, ran.stderr
        process.stdout.read()
        assert process.wait(15) == 0
