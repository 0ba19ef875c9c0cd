"""Bad days of the disk: said in words, nothing half-written, and the next write works once the cause is gone."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import pytest
import trio
from sqlalchemy import event

from supervisor.errors import ConfigError, StoreError
from supervisor.store import database, open_store


async def pragma(store, name):
    """As the writer's connection has it."""
    return await store.write(lambda connection: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())


async def test_the_connections_are_set_for_durability(tmp_path):
    async with open_store(tmp_path) as store:
        assert await pragma(store, "journal_mode") == "wal"
        assert await pragma(store, "synchronous") == 2  # FULL
        assert await pragma(store, "foreign_keys") == 1
        assert await pragma(store, "busy_timeout") == 3000
        reading = await store.read(lambda connection: connection.exec_driver_sql("PRAGMA query_only").scalar_one())
        assert reading == 1


async def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(tmp_path):
    async with open_store(tmp_path) as store:
        await store.put_tenant("a")
        pages = await pragma(store, "page_count") + 4

        def limit(dbapi, *_):
            dbapi.execute(f"PRAGMA max_page_count = {pages}")

        engine = store._writer._engine
        engine.dispose()
        event.listen(engine, "connect", limit)
        answers = {}

        async def append(size):
            try:
                answers[size] = (await store.append_event("a", type="x", data={"text": "x" * size})).seq
            except StoreError as error:
                answers[size] = str(error)

        async with trio.open_nursery() as nursery:
            for size in (1, 100_000, 2, 3):
                nursery.start_soon(append, size)
        assert "the disk is full: free some space" in answers.pop(100_000)
        assert sorted(answers.values()) == [2, 3, 4]
        assert [entry.seq for entry in await store.read_events("a")] == [1, 2, 3, 4]
        event.remove(engine, "connect", limit)
        engine.dispose()
        await append(100_000)
        assert answers[100_000] == 5


async def test_a_connection_that_saw_a_fault_is_not_used_again(tmp_path):
    """Its descriptors may be dead for good; here it is a limit that only it has."""
    async with open_store(tmp_path) as store:
        await store.put_tenant("a")
        await pragma(store, "max_page_count = 1")
        with pytest.raises(StoreError, match="full"):
            await store.append_event("a", type="x", data={"text": "x" * 100_000})
        assert (await store.append_event("a", type="x", data={"text": "x" * 100_000})).seq == 2


FULL = """
import os, pathlib, sys, trio
from supervisor.errors import StoreError
from supervisor.store import open_store
state = pathlib.Path(sys.argv[1])
ballast = state / "ballast"
async def main():
    async with open_store(state) as store:
        await store.put_tenant("a")
        kept, refused = 1, 0
        fd = os.open(ballast, os.O_WRONLY | os.O_CREAT)
        try:
            while os.write(fd, bytes(4096)):
                pass
        except OSError as error:
            print("the disk:", error.strerror)
        os.close(fd)
        while refused < 5:
            try:
                event = await store.append_event("a", type="x", data={"text": "x" * 3000})
                kept += 1
                assert event.seq == kept
            except StoreError as error:
                refused += 1
                print("refused:", error)
        assert len(await store.read_events("a")) == kept
        print("readable:", kept)
        ballast.unlink()
        assert (await store.append_event("a", type="x", data={"text": "x" * 3000})).seq == kept + 1
        print("recovered")
    async with open_store(state) as store:
        assert [event.seq for event in await store.read_events("a")] == list(range(1, kept + 2))
        print("whole")
trio.run(main)
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_is_said_survived_and_recovered_from(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    script = f'mount -t tmpfs -o size=1m none {mount} && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", script, "sh"]
    if (probe := subprocess.run([*command, "true"], capture_output=True, check=False)).returncode:
        pytest.skip(f"no tmpfs of our own here: {probe.stderr.decode().strip()}")
    ended = subprocess.run(
        [*command, sys.executable, "-c", FULL, mount], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("refused: the store failed, and nothing of this was written: the disk is full") == 5
    assert "readable:" in ended.stdout
    assert ended.stdout.splitlines()[-2:] == ["recovered", "whole"]


async def test_a_file_that_is_no_database_is_refused_with_the_mend(tmp_path, nothing_left):
    (tmp_path / "tenantry.db").write_bytes(b"this is no database" * 500)
    with pytest.raises(ConfigError, match=r"damaged \(file is not a database\).*\.recover"):
        async with open_store(tmp_path):
            pass
    assert (tmp_path / "tenantry.db").read_bytes().startswith(b"this is no database")


async def test_a_damaged_database_is_refused_with_the_mend(tmp_path, nothing_left):
    path = tmp_path / "tenantry.db"
    async with open_store(tmp_path) as store:
        await store.put_tenant("a")
        for _ in range(20):
            await store.append_event("a", type="x", data={"text": "x" * 3000})
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(os.urandom(size - 4096 * 5))
    with pytest.raises(ConfigError, match=r"is damaged \(.*Put a copy back"):
        async with open_store(tmp_path):
            pass


async def test_damage_found_later_is_an_error_of_that_call(tmp_path):
    async with open_store(tmp_path) as store:
        await store.put_tenant("a")
        for _ in range(20):
            await store.append_event("a", type="x", data={"text": "x" * 3000})
        await store.write(lambda connection: None)
        with sqlite3.connect(tmp_path / "tenantry.db") as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        other.close()
        with (tmp_path / "tenantry.db").open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(4096 * 15))
        with pytest.raises(StoreError, match="damaged"):
            await store.read_events("a")


async def test_a_database_locked_at_the_start_is_no_damage(tmp_path, monkeypatch, nothing_left):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    async with open_store(tmp_path):
        pass
    other = sqlite3.connect(tmp_path / "tenantry.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        async with open_store(tmp_path):
            pass
    other.close()
    async with open_store(tmp_path):
        pass


async def test_an_old_sqlite_is_named(tmp_path, monkeypatch, nothing_left):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 0))
    with pytest.raises(ConfigError, match="too old"):
        async with open_store(tmp_path):
            pass
