"""What /proc tells of a tree, and that only the tree is signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from supervisor.sandbox import tree

THREADED = """
import os, sys, threading, time
def child():
    if os.fork() == 0:
        time.sleep(100)
    time.sleep(100)
threading.Thread(target=child, daemon=True).start()
if os.fork() == 0:
    if os.fork() == 0:
        sys.stdin.read(1)
        print("ready", flush=True)
    time.sleep(100)
time.sleep(100)
"""


def start():
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", THREADED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdin.write(b"x")
    process.stdin.flush()
    assert process.stdout.readline() == b"ready\n"
    return process


def end(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_the_tree_is_found_whoever_of_its_threads_forked_with_children_files_and_without(monkeypatch):
    process = start()
    try:
        while len(tree.descendants(process.pid)) < 3:
            pass
        found = tree.descendants(process.pid)
        monkeypatch.setattr(tree, "_has_children_files", lambda: False)
        assert sorted(tree.descendants(process.pid)) == sorted(found)
        assert tree.parent(found[0]) == process.pid
        spared = next(pid for pid in found if tree.children(pid))
        assert len(tree.descendants(process.pid, {spared})) == 1
        assert tree.cpu_seconds_below(os.getpid())[1] >= 4
    finally:
        end(process)


def test_a_process_that_is_gone_is_nothing():
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    assert tree.children(process.pid) == []
    assert tree.state(process.pid) is None
    assert tree.parent(process.pid) is None
    assert tree.cpu_seconds_below(process.pid) == (0.0, 0)


def test_a_pid_that_another_process_has_now_is_not_signalled():
    process = subprocess.Popen(["/bin/sleep", "100"])
    try:
        tree._send(signal.SIGKILL, [process.pid], {1 << 22})
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        tree._send(signal.SIGKILL, [process.pid], {os.getpid()})
        assert process.wait() == -9
    finally:
        process.kill()
        process.wait()


def test_all_are_stopped_before_the_first_is_killed_and_those_that_came_meanwhile_too(monkeypatch):
    """A bomb at its limit of processes fills each place that a killed one leaves, but none that a stopped one keeps."""
    listings = iter([[1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    sent = []
    monkeypatch.setattr(tree, "descendants", lambda root, spare: next(listings))
    monkeypatch.setattr(tree, "_send", lambda number, pids, _: sent.append((number, pids)))
    assert tree.end(freeze=True) == 4
    stop, kill = signal.SIGSTOP, signal.SIGKILL
    assert sent == [(stop, [1, 2]), (stop, [3]), (stop, [4]), (kill, [1, 2, 3, 4])]


def test_a_tree_that_never_stands_still_is_killed_all_the_same(monkeypatch):
    growing = []
    monkeypatch.setattr(tree, "descendants", lambda root, spare: growing.append(len(growing)) or list(growing))
    sent = []
    monkeypatch.setattr(tree, "_send", lambda number, pids, _: sent.append(number))
    assert tree.end(freeze=True) > 0
    assert sent[-1] == signal.SIGKILL
    assert len(sent) < 20
