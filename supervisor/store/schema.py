"""The tables, and the numbered migrations that make them.

The tables are what statements are built from; a migration is fixed text that never changes once released, so a
database of any age comes to the same schema. Both say the same thing, which a test holds against each other.
Types are those that SQLite and PostgreSQL share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

_metadata = sa.MetaData()

tenants = sa.Table(
    "tenants",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("since", sa.Double, nullable=False),
    sa.Column("restarts", sa.BigInteger, nullable=False),
    sa.Column("last_exit", sa.Text),
    sa.Column("tokens_valid_after", sa.Double, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
)

# What a deleted name leaves behind: the counters that must not start again (see tenants.py).
former_tenants = sa.Table(
    "former_tenants",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("tokens_valid_after", sa.Double, nullable=False),
)

journal = sa.Table(
    "journal",
    _metadata,
    sa.Column("tenant", sa.ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("data", sa.Text, nullable=False),
)

_versions = sa.Table(
    "schema_versions",
    _metadata,
    sa.Column("version", sa.BigInteger, primary_key=True),
)

# The migration to version N is the N-th; each is a sequence of statements.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE tenants (
            name TEXT PRIMARY KEY NOT NULL,
            settings TEXT NOT NULL,
            generation BIGINT NOT NULL,
            state TEXT NOT NULL,
            since DOUBLE PRECISION NOT NULL,
            restarts BIGINT NOT NULL,
            last_exit TEXT,
            tokens_valid_after DOUBLE PRECISION NOT NULL,
            created_at DOUBLE PRECISION NOT NULL,
            last_seq BIGINT NOT NULL
        )""",
        """CREATE TABLE former_tenants (
            name TEXT PRIMARY KEY NOT NULL,
            generation BIGINT NOT NULL,
            last_seq BIGINT NOT NULL,
            tokens_valid_after DOUBLE PRECISION NOT NULL
        )""",
        """CREATE TABLE journal (
            tenant TEXT NOT NULL REFERENCES tenants (name) ON DELETE CASCADE,
            seq BIGINT NOT NULL,
            type TEXT NOT NULL,
            time DOUBLE PRECISION NOT NULL,
            data TEXT NOT NULL,
            PRIMARY KEY (tenant, seq)
        )""",
    ),
)


def migrate(connection: sa.Connection, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Brings the schema to the newest version, within the caller's transaction: all of it or nothing.

    Raises ConfigError if the database was written by a newer version than this program knows.
    """
    if sa.inspect(connection).has_table(_versions.name):
        found = connection.scalar(sa.select(sa.func.max(_versions.c.version))) or 0
    else:
        connection.exec_driver_sql("CREATE TABLE schema_versions (version BIGINT PRIMARY KEY NOT NULL)")
        found = 0
    if found > len(migrations):
        raise ConfigError(
            f"the store has schema version {found}, and this Tenantry knows versions up to {len(migrations)}: "
            "it was written by a newer release; start that one, or set another state_dir"
        )
    for version, statements in enumerate(migrations[found:], start=found + 1):
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.execute(sa.insert(_versions), {"version": version})
