"""The journal's statements: numbered events of a tenant, without gaps. Each function runs in the caller's transaction.

Why the numbers come from `UPDATE ... SET last_seq = last_seq + n ... RETURNING`: considered a sequence and
max(seq) + 1; the first leaves gaps and shows its numbers out of order on PostgreSQL, the second races there. The
update locks the tenant's row until the commit, so numbers are taken and become visible in one order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import sqlalchemy as sa

from .records import Event, from_json, to_json
from .schema import journal, tenants

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@attrs.frozen
class Entry:
    """An event that has no number yet."""

    type: str
    time: float
    data: Mapping[str, object]


_TAKE_NUMBERS = (
    sa.update(tenants)
    .where(tenants.c.name == sa.bindparam("tenant"))
    .values(last_seq=tenants.c.last_seq + sa.bindparam("count", type_=sa.BigInteger))
    .returning(tenants.c.last_seq)
)
_INSERT = sa.insert(journal)
_READ = (
    sa.select(journal)
    .where(journal.c.tenant == sa.bindparam("tenant"), journal.c.seq > sa.bindparam("after"))
    .order_by(journal.c.seq)
    .limit(sa.bindparam("limit", type_=sa.BigInteger))
)


def append(connection: sa.Connection, tenant: str, entries: Sequence[Entry]) -> list[Event] | None:
    """Numbers the entries and writes them, all in one statement each. None if there is no such tenant."""
    last = connection.execute(_TAKE_NUMBERS, {"tenant": tenant, "count": len(entries)}).scalar_one_or_none()
    if last is None:
        return None
    first = last - len(entries) + 1
    events = [
        Event(tenant=tenant, seq=seq, type=entry.type, time=entry.time, data=entry.data)
        for seq, entry in enumerate(entries, start=first)
    ]
    insert(connection, events)
    return events


def insert(connection: sa.Connection, events: Sequence[Event]) -> None:
    """Writes events whose numbers were taken in this same transaction."""
    rows = [
        {"tenant": event.tenant, "seq": event.seq, "type": event.type, "time": event.time, "data": to_json(event.data)}
        for event in events
    ]
    if rows:
        connection.execute(_INSERT, rows)


def read(connection: sa.Connection, tenant: str, after: int, limit: int) -> list[Event]:
    """The events numbered above `after`, in order, at most `limit`."""
    rows = connection.execute(_READ, {"tenant": tenant, "after": after, "limit": limit})
    return [
        Event(tenant=row.tenant, seq=row.seq, type=row.type, time=row.time, data=from_json(row.data)) for row in rows
    ]
