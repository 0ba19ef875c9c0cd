"""A stand-in for the command line, run through the real `supervisor.__main__.main`; see test_boot.py."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def tell(*words):
    print(*words, flush=True)


def start_sleep():
    import subprocess

    subprocess.Popen(["/bin/sleep", "100"], start_new_session=True)


async def drain(launcher, signalled):
    """Ends at the first signal; an init ends what it leaves behind."""
    if os.environ.get("LEAVE"):
        start_sleep()
    tell("READY", os.getpid(), os.getppid())
    await signalled.wait()
    return 0


async def count(launcher, signalled):
    """For a while, whatever comes."""
    import trio

    tell("READY", os.getpid(), os.getppid())
    await signalled.wait()
    await trio.sleep(0.5)
    return 0


async def orphans(launcher, signalled):
    """Children of ours and of agents, each of which leaves an orphan: who is told a status that is not its own?"""
    import subprocess
    import tempfile

    import trio

    from supervisor.sandbox.launcher import AgentSpec

    home = Path(tempfile.mkdtemp())
    wrong = []
    leave = "sleep 0.01 & exit 7"

    async def child(limit):
        async with limit:
            result = await trio.run_process(["/bin/sh", "-c", leave], check=False, stdin=subprocess.DEVNULL)
            if result.returncode != 7:
                wrong.append(result.returncode)

    async def agent(number, limit):
        async with limit, trio.open_nursery() as nursery:
            command = ("/bin/sh", "-c", leave)
            spec = AgentSpec(tenant=f"t{number}", generation=1, command=command, home=home / f"t{number}")
            process = await nursery.start(launcher.run, spec)
            if (await process.wait_exited()).returncode != 7:
                wrong.append(process.exit_status)

    async with trio.open_nursery() as nursery:
        limit = trio.CapacityLimiter(10)
        for number in range(60):
            nursery.start_soon(child, limit)
            nursery.start_soon(agent, number, limit)
    while launcher.statistics().orphans_reaped < 120:
        await trio.sleep(0.01)
    tell("wrong", len(wrong), "zombies", await launcher.zombies())
    return 0


async def status(launcher, signalled):
    return int(os.environ["STATUS"])


async def killed(launcher, signalled):
    os.kill(os.getpid(), 9)


def main(control):
    import trio

    from supervisor.sandbox.process import open_process_launcher
    from supervisor.settings import Settings
    from supervisor.signals import watch_signals
    from supervisor.telemetry import captured_telemetry

    async def run():
        signalled = trio.Event()

        def act(number):
            tell("signal", number.name)
            signalled.set()

        telemetry, _ = captured_telemetry()
        opened = open_process_launcher(Settings(), telemetry, control=control)
        async with opened as launcher, trio.open_nursery() as nursery:
            await nursery.start(watch_signals, [act])
            code = await globals()[os.environ.get("MODE", "drain")](launcher, signalled)
            nursery.cancel_scope.cancel()
        return code

    if sys.argv[1] != "serve":
        import signal

        tell("control", control, "blocked", sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        return 0
    code = trio.run(run)
    tell("drained")
    return code


if __name__ == "__main__":
    if os.environ.get("TTY"):
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    cli = types.ModuleType("supervisor.cli")
    cli.main = lambda *, control: main(control)
    sys.modules["supervisor.cli"] = cli
    from supervisor.__main__ import main as boot

    boot()
