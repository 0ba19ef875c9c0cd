"""Starting and ending what is measured, and what the kernel says of it: memory, processor time, descendants."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import attrs
import trio

STOP_S = 12.0


class Failed(Exception):
    """Something of the benchmark itself does not work, such as a program that does not start."""


@contextlib.asynccontextmanager
async def running(command, *, log, env=None, stdin=subprocess.DEVNULL, stdout=None):
    """The program in a process; ended by SIGTERM, and by SIGKILL 12 s later. `log` gets its stderr, and its stdout."""
    with log.open("ab") as output:
        process = await trio.lowlevel.open_process(
            [str(part) for part in command],
            env=env,
            stdin=stdin,
            stdout=output if stdout is None else stdout,
            stderr=output,
        )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            with trio.move_on_after(STOP_S):
                await process.wait()
            if process.poll() is None:
                process.kill()
            await process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    await stream.aclose()


async def read_lines(process, until, timeout_s=60.0):
    """The lines of its stdout up to and including the first that starts with `until`."""
    received = b""
    with trio.move_on_after(timeout_s):
        async for data in process.stdout:
            received += data
            lines = received.decode().split("\n")
            if any(line.startswith(until) for line in lines[:-1]):
                return lines[:-1]
    raise Failed(f"{process.args[0]} did not say {until!r}; it said {received.decode()!r}")


def pss_bytes(pid):
    """Its memory, with what it shares divided by the number of those who share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise Failed(f"/proc/{pid}/smaps_rollup has no Pss")


def cpu_s(pid):
    """Processor time so far, of all its threads; to 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@attrs.frozen
class House:
    """The processes of a supervisor. Those of an agent beside its main one are not looked for."""

    supervisor: int
    keeper: int
    shims: list[int]
    agents: list[int]

    @classmethod
    def of(cls, supervisor):
        [keeper] = children(supervisor)
        shims = children(keeper)
        return cls(supervisor, keeper, shims, [agent for shim in shims for agent in children(shim)])


def machine():
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "unknown"
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": os.uname().release,
        "load_average": os.getloadavg()[0],
    }
