"""What the tests of real processes share: agents in a few lines, and the question whether anything is left."""

from __future__ import annotations

import os
import sys
import textwrap
import uuid
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from supervisor.sandbox import tree
from supervisor.sandbox.launcher import AgentSpec
from supervisor.sandbox.process import open_process_launcher
from supervisor.settings import Settings
from supervisor.telemetry import captured_telemetry

ROOT = Path(__file__).parents[2]
_MARK = "TENANTRY_TEST_MARK"

# Two setsid grandchildren below a child, which ignore what they can; each says so by a file, then all wait.
FAMILY = """
import os, signal, time
def child(name, inner=()):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for other in inner:
            child(other)
        open(name, "w").close()
        while True:
            time.sleep(100)
child("a", ["a1", "a2"])
child("b", ["b1"])
if os.fork() == 0:
    child("orphan")
    os._exit(0)
os.wait()
while not all(map(os.path.exists, ["a", "a1", "a2", "b", "b1", "orphan"])):
    time.sleep(0.002)
open("ready", "w").close()
"""
WAIT = "time.sleep(100)\n"


@attrs.define
class Tester:
    """A launcher with a home for each tenant, and a mark in the environment of every process below it."""

    launcher: object
    telemetry: object
    events: list
    home: Path
    mark: str = attrs.field(factory=lambda: uuid.uuid4().hex)

    def spec(self, *command, tenant="acme", generation=1, env=None):
        return AgentSpec(
            tenant=tenant,
            generation=generation,
            command=command,
            env={_MARK: self.mark, **(env or {})},
            home=self.home / tenant,
        )

    def python(self, code, **kwargs):
        return self.spec(sys.executable, "-I", "-S", "-c", textwrap.dedent(code), **kwargs)

    def shell(self, code, **kwargs):
        return self.spec("/bin/sh", "-c", code, **kwargs)

    def file(self, name, tenant="acme"):
        return self.home / tenant / "workspace" / name

    def alive(self):
        return alive(self.mark)

    def lines(self):
        return [event["line"] for event in self.events if event["event"] == "agent_output"]

    def told(self, event):
        return [one for one in self.events if one["event"] == event]

    async def finish(self, spec):
        """Runs an agent to its end; its process, for what is known of it."""
        async with trio.open_nursery() as nursery:
            return await nursery.start(self.launcher.run, spec)


@asynccontextmanager
async def open_tester(home, settings=None, **kwargs):
    telemetry, events = captured_telemetry()
    async with open_process_launcher(settings or Settings(), telemetry, **kwargs) as launcher:
        tester = Tester(launcher, telemetry, events, home)
        yield tester
    assert tester.alive() == []


def alive(mark):
    """The pids of all processes, zombies excepted, that were started with this mark in their environment."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue
            if f"{_MARK}={mark}".encode() in environment.split(b"\0") and tree.state(int(name)) not in ("Z", None):
                found.append(int(name))
    return found


async def until(condition, *, within_s=10.0):
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.003)


def open_fds():
    return {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)}


def _is_open(name):
    return os.path.lexists(f"/proc/self/fd/{name}")
