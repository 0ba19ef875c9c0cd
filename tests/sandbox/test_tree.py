"""What /proc tells of a tree, and that only the tree is signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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
        assert tree.state(process.pid) in "RS"
        tree._send(signal.SIGKILL, [process.pid], {os.getpid()})
        assert process.wait() == -9
    finally:
        process.kill()
        process.wait()
