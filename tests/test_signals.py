"""The stop signals in order, none of them deadly, and the watchdog behind them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import trio

from supervisor.signals import watch_signals

PRELUDE = """
import os, signal, sys, time, trio
from supervisor.signals import Watchdog, watch_signals
"""


def python(code, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


async def test_each_signal_is_the_next_action_and_the_last_one_stays():
    """1st drains, 2nd shortens the grace, 3rd forces."""
    seen = []
    actions = [lambda number, name=name: seen.append((name, number)) for name in ("drain", "hurry", "force")]
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(watch_signals, actions)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                signal.raise_signal(number)
                await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.cancel_scope.cancel()
    assert seen == [
        ("drain", signal.SIGTERM),
        ("hurry", signal.SIGINT),
        ("force", signal.SIGHUP),
        ("force", signal.SIGTERM),
    ]


async def test_a_signal_that_waited_is_the_first_and_the_mask_is_as_before_in_the_end():
    """Blocked from the program's first statement, unblocked once the receiver is open."""
    seen = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        signal.raise_signal(signal.SIGTERM)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                await nursery.start(watch_signals, [seen.append])
                await trio.testing.wait_all_tasks_blocked(0.02)
                nursery.cancel_scope.cancel()
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_a_late_impatient_signal_changes_no_exit_status():
    """A receiver that closes sends itself again what was not taken."""
    code = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(watch_signals, [print])
        nursery.cancel_scope.cancel()
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
trio.run(main)
sys.exit(3)
"""
    process = python(code)
    process.communicate(timeout=20)
    assert process.returncode == 3


@pytest.mark.slow
def test_nohup_is_respected():
    code = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(watch_signals, [lambda number: (print(number.name), nursery.cancel_scope.cancel())])
        signal.raise_signal(signal.SIGHUP)
        await trio.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep_forever()
trio.run(main)
"""
    process = python(code)
    output, _ = process.communicate(timeout=20)
    assert output == "SIGTERM\n"
    assert process.returncode == 0


@pytest.mark.slow
def test_the_watchdog_ends_a_blocked_loop_with_70_and_one_line():
    """A drain that does not end is ended, whatever holds it."""
    code = """
async def main():
    Watchdog().arm(0.1, "drain")
    with trio.CancelScope(shield=True):
        time.sleep(60)
trio.run(main)
"""
    began_at = time.monotonic()
    process = python(code)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 70
    assert errors == "tenantry: drain: not done after 0.1 s, exit 70\n"
    assert time.monotonic() - began_at < 5


@pytest.mark.slow
def test_a_disarmed_or_replaced_watchdog_does_nothing():
    code = """
dog = Watchdog()
dog.arm(0.05, "first")
dog.arm(30, "second")
time.sleep(0.2)
dog.disarm()
dog.disarm()
sys.exit(4)
"""
    process = python(code)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 4


@pytest.mark.slow
def test_the_watchdog_ends_the_process_though_nobody_reads_its_stderr():
    code = """
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 65536)
except BlockingIOError:
    os.set_blocking(2, True)
Watchdog().arm(0.05, "drain")
time.sleep(60)
"""
    process = python(code)
    try:
        assert process.wait(timeout=20) == 70
    finally:
        process.kill()
        process.communicate()
