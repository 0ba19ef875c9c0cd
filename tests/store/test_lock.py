"""One supervisor a directory, and who may look into it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from supervisor.errors import ConfigError
from supervisor.store import open_store
from supervisor.store.lock import directory_lock, make_state_dir


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


async def test_a_second_supervisor_is_refused_with_the_first_ones_pid(tmp_path, nothing_left):
    async with open_store(tmp_path) as store:
        with pytest.raises(ConfigError, match=f"in use by the process {os.getpid()}"):
            async with open_store(tmp_path):
                pass
        await store.put_tenant("a")
    async with open_store(tmp_path) as store:
        assert await store.get_tenant("a") is not None


@pytest.mark.slow
def test_the_lock_ends_with_its_holder_even_by_sigkill_and_an_exec_does_not_carry_it(tmp_path):
    """PITFALL 11.6: what the holder started must not hold the directory after it."""
    program = f"""
import pathlib, subprocess, sys
from supervisor.store.lock import directory_lock
with directory_lock(pathlib.Path({str(tmp_path)!r})):
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        child = int(holder.stdout.readline())
        try:
            with (
                pytest.raises(ConfigError, match=f"the process {holder.pid}:"),
                directory_lock(tmp_path),
            ):
                pass
            holder.kill()
            holder.wait()
            with directory_lock(tmp_path):
                assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
        finally:
            holder.kill()
            os.kill(child, 9)


def test_the_lock_is_not_inherited(tmp_path):
    with directory_lock(tmp_path):
        held = [fd for fd in os.listdir("/proc/self/fd") if _is(fd, tmp_path / "lock")]
        assert held
        assert not any(os.get_inheritable(int(fd)) for fd in held)


def _is(fd, path):
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    except FileNotFoundError:
        return False


async def test_files_are_0600_in_a_0700_directory_whatever_the_umask(tmp_path):
    state = tmp_path / "deep" / "state"
    old = os.umask(0)
    try:
        async with open_store(state) as store:
            await store.put_tenant("a")
            await store.list_tenants()
            modes = {entry.name: mode(entry) for entry in state.iterdir()}
    finally:
        os.umask(old)
    assert mode(state) == 0o700
    assert modes == dict.fromkeys(["lock", "tenantry.db", "tenantry.db-shm", "tenantry.db-wal"], 0o600)


async def test_a_database_that_is_too_open_is_closed_to_others(tmp_path):
    (tmp_path / "tenantry.db").touch()
    (tmp_path / "tenantry.db").chmod(0o666)
    async with open_store(tmp_path) as store:
        await store.put_tenant("a")
        assert {mode(path) for path in tmp_path.glob("tenantry.db*")} == {0o600}


def test_an_empty_directory_of_ours_is_tightened_and_one_in_use_is_left_as_it_is(tmp_path):
    fresh, shared = tmp_path / "fresh", tmp_path / "shared"
    for path in (fresh, shared):
        path.mkdir()
        path.chmod(0o755)
    (shared / "somebody's").touch()
    make_state_dir(fresh)
    make_state_dir(shared)
    assert (mode(fresh), mode(shared)) == (0o700, 0o755)


async def test_a_directory_that_cannot_be_made_is_a_setting_to_mend(tmp_path, nothing_left):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"state_dir .*file/state cannot be used: Not a directory"):
        async with open_store(tmp_path / "file" / "state"):
            pass
