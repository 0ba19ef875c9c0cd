from __future__ import annotations

import itertools
import os
import threading

import pytest

from supervisor.store import open_memory_store, open_store

TIMES = 1_000.0


@pytest.fixture
def wall_clock():
    """A clock that every reading moves on by one second, so that a stored time tells which reading it was."""
    return itertools.count(TIMES).__next__


@pytest.fixture(params=["memory", "file"])
async def store(request, tmp_path, wall_clock):
    opened = open_memory_store(wall_clock=wall_clock)
    if request.param == "file":
        opened = open_store(tmp_path / "state", wall_clock=wall_clock)
    async with opened as store:
        yield store


@pytest.fixture
def nothing_left():
    """Nothing of a store outlives it: no descriptor, and no thread but Trio's idle ones."""

    def count():
        threads = {thread.name for thread in threading.enumerate() if "store" in thread.name}
        return threads, sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _fds())

    before = count()
    yield
    assert count() == before


def _fds():
    for fd in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{fd}"):
            yield fd
