"""Migrations: what they make is what the statements are built from, and they happen whole or not at all."""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest
import sqlalchemy as sa

from supervisor.errors import ConfigError
from supervisor.store import database, open_store, schema

SECOND = ("ALTER TABLE tenants ADD COLUMN colour TEXT", "CREATE TABLE further (x BIGINT)")


def tables(path):
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
        versions = connection.execute("SELECT version FROM schema_versions ORDER BY 1").fetchall()
    connection.close()
    return dict(rows), [version for (version,) in versions]


def use_migrations(monkeypatch, *further):
    migrations = (*schema.MIGRATIONS, *further)
    monkeypatch.setattr(database, "migrate", lambda connection: schema.migrate(connection, migrations))


def test_the_migrations_make_the_tables_that_the_statements_use():
    engine = database.open_database(None)
    declared = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    schema._metadata.create_all(declared)

    def shape(connection):
        inspector = sa.inspect(connection)
        return {
            table: (
                [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(table)],
                inspector.get_pk_constraint(table)["constrained_columns"],
                connection.exec_driver_sql(f"PRAGMA foreign_key_list({table})").all(),
            )
            for table in inspector.get_table_names()
        }

    # SQLite has one floating type, and several names for it are read back.
    with engine.connect() as made, declared.connect() as wanted:
        assert repr(shape(made)) == repr(shape(wanted)).replace("'DOUBLE'", "'REAL'")
    engine.dispose()
    declared.dispose()


async def test_an_older_database_is_migrated_and_keeps_what_it_has(tmp_path, monkeypatch):
    async with open_store(tmp_path) as store:
        await store.put_tenant("acme", {"a": 1})
    use_migrations(monkeypatch, SECOND)
    async with open_store(tmp_path) as store:
        assert await store.read(
            lambda connection: connection.exec_driver_sql("SELECT name, colour FROM tenants").all()
        ) == [("acme", None)]
    assert tables(tmp_path / "tenantry.db")[1] == [1, 2]


async def test_a_newer_database_is_refused_and_left_alone(tmp_path, monkeypatch, nothing_left):
    with monkeypatch.context() as newer:
        use_migrations(newer, SECOND)
        async with open_store(tmp_path):
            pass
    before = (tmp_path / "tenantry.db").read_bytes()
    with pytest.raises(ConfigError, match=r"schema version 2, and this Tenantry knows versions up to 1.*newer"):
        async with open_store(tmp_path):
            pass
    assert (tmp_path / "tenantry.db").read_bytes() == before


async def test_a_migration_that_fails_midway_leaves_the_old_version_whole(tmp_path, monkeypatch, nothing_left):
    """PITFALL 11.7: the driver opens no transaction before DDL by itself."""
    path = tmp_path / "tenantry.db"
    async with open_store(tmp_path) as store:
        await store.put_tenant("acme")
    before = tables(path)
    with monkeypatch.context() as broken:
        use_migrations(broken, SECOND, ("CREATE TABLE third (x BIGINT)", "NOT SQL"))
        with pytest.raises(sa.exc.OperationalError, match="syntax"):
            async with open_store(tmp_path):
                pass
    assert tables(path) == before
    async with open_store(tmp_path) as store:
        assert await store.get_tenant("acme") is not None
    use_migrations(monkeypatch, SECOND, ("CREATE TABLE third (x BIGINT)",))
    async with open_store(tmp_path):
        pass
    assert tables(path)[1] == [1, 2, 3]


async def test_a_first_start_that_fails_midway_leaves_nothing_that_stops_the_next(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        use_migrations(broken, ("NOT SQL",))
        with pytest.raises(sa.exc.OperationalError):
            async with open_store(tmp_path):
                pass
    async with open_store(tmp_path) as store:
        await store.put_tenant("acme")


@pytest.mark.slow
async def test_a_kill_in_the_middle_of_a_migration_leaves_the_old_version_whole(tmp_path):
    async with open_store(tmp_path) as store:
        await store.put_tenant("acme")
    before = tables(tmp_path / "tenantry.db")
    program = f"""
import os, pathlib, trio
from supervisor.store import database, open_store, schema
def migrate(connection):
    # A page cache of one page, so that what is not committed reaches the log before the kill.
    connection.exec_driver_sql("PRAGMA cache_size = 1")
    schema.migrate(connection, (*schema.MIGRATIONS, {SECOND!r}))
    for number in range(200):
        connection.exec_driver_sql("INSERT INTO further VALUES (?)", (number,))
        connection.exec_driver_sql(f"CREATE TABLE t{{number}} (x BIGINT)")
    os.kill(os.getpid(), 9)
database.migrate = migrate
async def main():
    async with open_store(pathlib.Path({str(tmp_path)!r})):
        pass
trio.run(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, timeout=30)  # noqa: ASYNC221
    assert ended.returncode == -9
    assert (tmp_path / "tenantry.db-wal").stat().st_size > 0
    async with open_store(tmp_path) as store:
        assert await store.get_tenant("acme") is not None
    assert tables(tmp_path / "tenantry.db") == before
