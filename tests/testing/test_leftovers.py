"""Each kind of thing that can be left over is found and named, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import trio

from supervisor.testing.leftovers import (
    Check,
    LeftOver,
    descendants,
    marked,
    nothing_left,
    nothing_left_behind,
)

# Says when it is in place, and then waits for its end.
SLEEPER = "import time; print('READY', flush=True); time.sleep(60)"
# Loses its parent, its session and its name; what is left is the mark in its environment.
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    os._exit(0)
os.wait()
"""


def run(code, env=None):
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, env=env)
    return process, process.stdout.readline()


def test_an_empty_block_leaves_nothing():
    with nothing_left_behind():
        pass


def test_a_file_is_named_by_its_path(tmp_path):
    with pytest.raises(LeftOver, match=r"descriptor [0-9]+ -> .*/left$"), nothing_left_behind(within_s=0):
        file = (tmp_path / "left").open("w")
    file.close()


def test_a_descriptor_that_was_replaced_is_another(tmp_path):
    (tmp_path / "one").touch()
    with (tmp_path / "one").open() as one:
        check = Check()
        with (tmp_path / "two").open("w") as two:
            os.dup2(two.fileno(), one.fileno())
        assert [piece.rpartition("/")[2] for piece in check.left()] == ["two"]


def test_a_thread_is_named():
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="the busy one")
    with pytest.raises(LeftOver, match="thread 'the busy one'"), nothing_left_behind(within_s=0):
        thread.start()
    end.set()
    thread.join()


def test_a_process_is_named_by_its_command():
    with (
        pytest.raises(LeftOver, match=r"process [0-9]+ \(.*time.sleep.*state S") as left,
        nothing_left_behind(within_s=0),
    ):
        process, _ = run(SLEEPER)
    assert str(left.value).count("process") == 1
    assert descendants() == [process.pid]
    with process:
        process.kill()


def test_a_zombie_counts():
    check = Check()
    zombie = os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", "-c", ""], {})
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    assert [", state Z" in piece for piece in check.left()] == [True]
    os.waitpid(zombie, 0)
    assert check.left() == []


def test_a_daemon_that_lost_its_parents_is_found_by_its_mark():
    check = Check()
    process, line = run(DAEMON, env=check.env)
    daemon = int(line)
    with process:
        process.wait(5)
        assert daemon not in descendants()
        assert marked(check.mark) == [daemon]
        assert any(f"process {daemon} " in piece for piece in check.left())
        os.kill(daemon, 9)
    deadline = time.monotonic() + 5
    while check.left():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_ends_in_time_is_waited_for():
    with nothing_left_behind(within_s=5):
        process, _ = run("import time; print('READY', flush=True); time.sleep(0.05)")
        threading.Timer(0.1, process.communicate).start()


def test_what_was_there_before_is_nobodys_fault(tmp_path):
    process, _ = run(SLEEPER)
    with process, (tmp_path / "file").open("w"):
        with nothing_left_behind(within_s=0):
            pass
        process.kill()


def test_an_error_of_the_block_is_not_hidden(tmp_path):
    files = []

    def fails():
        with nothing_left_behind(within_s=0):
            files.append((tmp_path / "left").open("w"))
            raise LookupError

    with pytest.raises(LookupError):
        fails()
    files.pop().close()


async def test_a_task_in_an_outer_nursery_is_named(autojump_clock):
    async def never_ends():
        await trio.sleep_forever()

    async with trio.open_nursery() as outer:
        with pytest.raises(LeftOver, match=r"task '.*never_ends' below .*<test "):
            async with nothing_left(within_s=1):
                outer.start_soon(never_ends)
        outer.cancel_scope.cancel()


async def test_a_task_of_a_task_is_named_and_others_tasks_are_not(autojump_clock):
    async def parent(outer):
        outer.start_soon(trio.sleep_forever)

    async with trio.open_nursery() as outer:
        outer.start_soon(trio.sleep_forever, name="was there before")
        with pytest.raises(LeftOver) as left:
            async with nothing_left(within_s=1), trio.open_nursery() as inner:
                inner.start_soon(parent, outer)
        outer.cancel_scope.cancel()
    assert str(left.value).count("task ") == 1
    assert "sleep_forever" in str(left.value)


async def test_tasks_that_end_in_time_are_waited_for(autojump_clock):
    async with trio.open_nursery() as outer:
        async with nothing_left(within_s=2):
            outer.start_soon(trio.sleep, 1.5)
        assert trio.current_time() >= 1.5


async def test_the_bound_is_kept(autojump_clock):
    async with trio.open_nursery() as outer:
        with pytest.raises(LeftOver):
            async with nothing_left(within_s=1):
                outer.start_soon(trio.sleep, 2)
        assert trio.current_time() == pytest.approx(1, abs=0.1)


async def test_under_a_clock_that_stands_still_nothing_is_waited_for(mock_clock):
    async with trio.open_nursery() as outer:
        with pytest.raises(LeftOver, match="sleep_forever"):
            async with nothing_left():
                outer.start_soon(trio.sleep_forever)
        outer.cancel_scope.cancel()
    async with nothing_left():
        await trio.lowlevel.checkpoint()


async def test_idle_workers_of_trio_are_not_left_over():
    async with nothing_left(within_s=0.5):
        await trio.to_thread.run_sync(time.monotonic)


async def test_every_piece_is_told_at_once(tmp_path, autojump_clock):
    files = []

    def leave(nursery):
        nursery.start_soon(trio.sleep_forever)
        files.append((tmp_path / "left").open("w"))

    async with trio.open_nursery() as outer:
        with pytest.raises(LeftOver) as left:
            async with nothing_left(within_s=0):
                leave(outer)
        files.pop().close()
        outer.cancel_scope.cancel()
    assert "task " in str(left.value)
    assert "descriptor " in str(left.value)


async def test_whoever_asks_is_not_left_over():
    async with nothing_left() as check, trio.open_nursery() as nursery:
        assert check.left_tasks() == []
        nursery.start_soon(trio.sleep_forever)
        assert len(check.left_tasks()) == 1
        nursery.cancel_scope.cancel()
