"""PID 1: no signal lost, no orphan left, no status stolen; and the same program where it is not PID 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from supervisor.sandbox import tree

PROGRAM = Path(__file__).with_name("boot_program.py")
NAMESPACE = ["unshare", "-Urpf", "--kill-child", "--mount-proc"]


@cache
def refusal():
    """Why there is no PID namespace to be had here; None if there is."""
    try:
        result = subprocess.run([*NAMESPACE, "/bin/true"], capture_output=True, text=True, timeout=10, check=False)
    except OSError as error:
        return str(error)
    return result.stderr.strip() or "refused" if result.returncode else None


@pytest.fixture
def namespace():
    if why := refusal():
        pytest.skip(f"no PID namespace: {why}")
    return NAMESPACE


@contextmanager
def boot(*prefix, arguments=("serve",), **environment):
    process = subprocess.Popen(
        [*prefix, sys.executable, str(PROGRAM), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def first(process, within_s=5.0):
    """The pid, outside, of what is PID 1 inside."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if found := tree.children(process.pid):
            return found[0]
    raise AssertionError("nothing started")


def blocks(pid, number):
    with open(f"/proc/{pid}/status") as file:
        mask = next(line for line in file if line.startswith("SigBlk")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


def ready(process):
    words = process.stdout.readline().split()
    assert words[0] == "READY", words
    return int(words[1]), int(words[2])


@pytest.mark.slow
@pytest.mark.parametrize("after_ms", [0, 1, 3, 6, 10, 20, 40, 80, 160, 400])
def test_pid_1_loses_no_sigterm_from_its_first_statement_on(namespace, after_ms):
    """While importing, while it becomes the init, while the supervisor starts, and after."""
    with boot(*namespace) as process:
        pid = first(process)
        # Not SIGTERM: unshare blocks that one too, for a while before it becomes our program.
        while not blocks(pid, signal.SIGUSR1):
            assert process.poll() is None
        time.sleep(after_ms / 1000)
        os.kill(pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert "signal SIGTERM\ndrained\n" in output
    assert process.returncode == 0


@pytest.mark.slow
def test_a_signal_that_is_blocked_before_python_starts_is_not_lost_either(namespace):
    """The interpreter's own start is before any statement of ours: `env --block-signal` covers that too."""
    block = ["env", "--block-signal=TERM,USR1"]
    if subprocess.run([*block, "true"], capture_output=True, check=False).returncode:
        pytest.skip("env cannot block signals: coreutils before 8.31")
    with boot(*namespace, *block) as process:
        pid = first(process)
        while not blocks(pid, signal.SIGUSR1):
            assert process.poll() is None
        os.kill(pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert "signal SIGTERM\ndrained\n" in output
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_pid_1_passes_on_what_stops_a_service(namespace, number):
    with boot(*namespace) as process:
        pid = first(process)
        inside, above = ready(process)
        assert (inside, above) == (2, 1)
        os.kill(pid, number)
        output, _ = process.communicate(timeout=20)
    assert output == f"signal {number.name}\ndrained\n"
    assert process.returncode == 0


@pytest.mark.slow
def test_pid_1_reaps_every_orphan_and_steals_no_status(namespace):
    """60 children of the supervisor and 60 agents, each of which leaves an orphan."""
    with boot(*namespace, MODE="orphans") as process:
        output, _ = process.communicate(timeout=60)
    assert output == "wrong 0 zombies 0\ndrained\n"
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "status"), [({"MODE": "status", "STATUS": "70"}, 70), ({"MODE": "killed"}, 137)]
)
@pytest.mark.parametrize("inside", [True, False])
def test_the_init_ends_with_the_supervisors_status(environment, status, inside, request):
    """128 and the signal's number if it was killed."""
    prefix = request.getfixturevalue("namespace") if inside else []
    arguments = ("serve",) if inside else ("serve", "--init")
    with boot(*prefix, arguments=arguments, **environment) as process:
        process.communicate(timeout=20)
    assert process.returncode == status


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["--init", "TENANTRY_INIT"])
def test_init_can_be_asked_for_and_ends_all_that_is_left(asked):
    arguments = ("serve", "--init") if asked == "--init" else ("serve",)
    with boot(arguments=arguments, TENANTRY_INIT="" if asked == "--init" else "1", LEAVE="1") as process:
        supervisor, init = ready(process)
        assert init == process.pid
        [left] = tree.children(supervisor)
        process.terminate()
        output, _ = process.communicate(timeout=20)
        assert output == "signal SIGTERM\ndrained\n"
        assert process.returncode == 0
        assert tree.state(left) is None
        assert tree.state(supervisor) is None


@pytest.mark.slow
def test_ctrl_c_reaches_a_supervisor_below_an_init_once():
    """The terminal signals the whole foreground group: the init forwards it, and nobody else gets it."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), "serve", "--init"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TTY": "1", "MODE": "count"},
    )
    with process:
        try:
            os.close(theirs)
            supervisor, _ = ready(process)
            assert os.getpgid(supervisor) == supervisor
            os.write(ours, b"\x03")
            output, _ = process.communicate(timeout=20)
        finally:
            process.kill()
            os.close(ours)
    assert output == "signal SIGINT\ndrained\n"


@pytest.mark.slow
def test_without_an_init_a_signal_is_not_lost_either():
    with boot() as process:
        while not blocks(process.pid, signal.SIGTERM):
            assert process.poll() is None
        process.terminate()
        output, _ = process.communicate(timeout=20)
    assert "signal SIGTERM\ndrained\n" in output
    assert process.returncode == 0


@pytest.mark.parametrize("arguments", [("token", "create", "serve"), ("exec", "acme", "--", "serve")])
def test_other_verbs_neither_become_init_nor_block_signals(arguments):
    with boot(arguments=arguments) as process:
        output, _ = process.communicate(timeout=20)
    assert output == "control None blocked []\n"
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("init", ["", "--init"])
def test_serve_needs_none_of_its_streams(closed, init, tmp_path):
    """Closed by the caller they lead to /dev/null, and no socket or file of ours gets their number."""
    arguments = f"serve {init} --bind unix:{tmp_path}/s --state-dir {tmp_path}/state"
    process = subprocess.Popen(["sh", "-c", f"exec {sys.executable} -m supervisor {arguments} {closed}"])
    try:
        deadline = time.monotonic() + 10.0
        while not (tmp_path / "s").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None
        serving = tree.children(process.pid)[0] if init else process.pid
        for fd, redirection in enumerate(("<&-", ">&-", "2>&-")):
            if redirection in closed.split():
                assert os.readlink(f"/proc/{serving}/fd/{fd}") == "/dev/null"
        process.terminate()
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
