"""The database file: its engines, its transactions, and what the driver's faults mean in words.

The only module that knows SQLite's pragmas and codes. Everything here blocks: it is called in threads.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import QueuePool, StaticPool

from ..errors import ConfigError, StoreError
from .lock import sync_directory
from .schema import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy.engine.interfaces import DBAPIConnection

# Nobody else should write here. Who does (a shell, a backup) may do so this long; below the writer's shield of 5 s.
BUSY_TIMEOUT_S = 3.0
_NEEDED = (3, 35)  # RETURNING

# By the beginning of SQLite's name for the fault. What is not here is a bug and stays what it is.
_FAULTS = {
    "SQLITE_FULL": "the disk is full: free some space",
    "SQLITE_BUSY": "another program keeps the database locked: end its transaction",
    "SQLITE_LOCKED": "another program keeps the database locked: end its transaction",
    "SQLITE_IOERR": "the disk failed to read or write: see the kernel's log",
    "SQLITE_CANTOPEN": "the database cannot be opened: see that its directory exists and is writable",
    "SQLITE_PERM": "the database cannot be opened: see that its files are ours",
    "SQLITE_READONLY": "the database cannot be written: see that its files and disk are writable",
    "SQLITE_NOMEM": "there is no memory left",
    "SQLITE_CORRUPT": "the database is damaged: stop, and mend it as the next start says",
    "SQLITE_NOTADB": "the database is damaged: stop, and mend it as the next start says",
}
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_DriverError = (sa.exc.DBAPIError, sqlite3.Error)


def _fault(error: BaseException) -> str | None:
    """The entry of `_FAULTS` that a driver's error belongs to, if it is a fault of the world and not of ours."""
    name = getattr(getattr(error, "orig", error), "sqlite_errorname", None) or ""
    return next((fault for fault in _FAULTS if name.startswith(fault)), None)


@contextmanager
def transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """One transaction: committed and durable at the end of the block, rolled back if the block or the commit fails.

    Raises StoreError for a fault of the disk or the file. A connection that saw one is not used again: its
    descriptors may be dead for good while a new one works, as after a remount.
    """
    try:
        with engine.connect() as connection:
            try:
                with connection.begin():
                    yield connection
            except _DriverError as error:
                if _fault(error) and not isinstance(engine.pool, StaticPool):
                    connection.invalidate()
                raise
    except _DriverError as error:
        if fault := _fault(error):
            raise StoreError(
                f"the store failed, and nothing of this was written: {_FAULTS[fault]} ({_said(error)})"
            ) from error
        raise


def _said(error: BaseException) -> str:
    return str(getattr(error, "orig", error))


def open_engine(path: Path | None, *, readers: int = 0) -> sa.Engine:
    """An engine on the file, or in memory; with `readers` that many connections that cannot write, else one."""

    def connect(dbapi: DBAPIConnection, _record: object) -> None:
        try:
            # The driver's own transactions begin too late: not before DDL, and not with the lock.
            dbapi.isolation_level = None
            cursor = dbapi.cursor()
            mode = cursor.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if path is not None and mode != "wal":
                raise ConfigError(
                    f"{path} is on a file system where SQLite cannot keep a write-ahead log: "
                    "set state_dir to a local disk"
                )
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.execute("PRAGMA journal_size_limit = 67108864")
            if readers:
                cursor.execute("PRAGMA query_only = ON")
            cursor.close()
        except BaseException:
            dbapi.close()
            raise

    engine = sa.create_engine(
        sa.URL.create("sqlite", database=None if path is None else str(path)),
        poolclass=StaticPool if path is None else QueuePool,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_S},
        **({} if path is None else {"pool_size": readers or 1, "max_overflow": 0}),
    )
    begin = "BEGIN" if readers else "BEGIN IMMEDIATE"
    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


def open_database(path: Path | None) -> sa.Engine:
    """Makes or opens the database, looks whether it is whole, and migrates it. Gives the writer's engine.

    Raises ConfigError, which names the mend, if it is damaged, newer than we are, or not to be opened; StoreError
    if the disk is full or fails.
    """
    if sqlite3.sqlite_version_info < _NEEDED:
        raise ConfigError(f"SQLite {sqlite3.sqlite_version} is too old: Python needs one of 3.35 or newer")
    if path is not None:
        # SQLite would make it with the umask's mode; its -wal and -shm files take the mode of this one.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
        sync_directory(path.parent)
    engine = open_engine(path)
    try:
        with transaction(engine) as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
            if found != "ok":
                raise _damaged(path, " ".join(str(found).split()))
            migrate(connection)
    except StoreError as error:
        engine.dispose()
        if error.__cause__ and _fault(error.__cause__) in _DAMAGED:
            raise _damaged(path, _said(error.__cause__)) from error
        raise
    except BaseException:
        engine.dispose()
        raise
    return engine


def _damaged(path: Path | None, found: str) -> ConfigError:
    return ConfigError(
        f"the store {path} is damaged ({found}). Put a copy back; or save what can be read with "
        f"`sqlite3 {path} .recover | sqlite3 recovered.db` and put recovered.db in its place; or move {path} and "
        "the files beside it that begin with its name away, to start with no tenants"
    )
