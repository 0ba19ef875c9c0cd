"""The tenants' statements. Each function runs in the caller's transaction and tells what it found as its value.

A refusal (no such tenant, an older generation) is a value and never an exception: an exception would roll back the
others' units of the same group commit.

Why a deleted name leaves its counters behind: whatever still runs or waits for the former tenant is told by its
generation, a reader by the number of its last event, a revoked token by its time. If a new tenant of that name
began at zero, all three would take it for the old one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from . import journal
from .journal import Entry
from .records import Event, TenantRecord, from_json, to_json
from .schema import former_tenants, tenants

if TYPE_CHECKING:
    from collections.abc import Mapping

# States in which a supervisor was doing something for the tenant: after an unclean end they are not true any more.
UNSETTLED = ("starting", "running", "draining")

_name = tenants.c.name == sa.bindparam("tenant")
_GET = sa.select(tenants).where(_name)
_LIST = (
    sa.select(tenants)
    .where(tenants.c.name > sa.bindparam("after"))
    .order_by(tenants.c.name)
    .limit(sa.bindparam("limit", type_=sa.BigInteger))
)
_VALID_AFTER = sa.union_all(
    sa.select(tenants.c.tokens_valid_after).where(_name),
    sa.select(former_tenants.c.tokens_valid_after).where(former_tenants.c.name == sa.bindparam("tenant")),
)
_SETTINGS = sa.update(tenants).where(_name).values(settings=sa.bindparam("new_settings")).returning(*tenants.c)
_BEGIN_GENERATION = (
    sa.update(tenants)
    .where(_name)
    .values(
        generation=tenants.c.generation + 1,
        state="starting",
        since=sa.bindparam("now"),
        last_seq=tenants.c.last_seq + 1,
    )
    .returning(tenants.c.generation, tenants.c.last_seq)
)
_STATE = (
    sa.update(tenants)
    .where(_name, tenants.c.generation == sa.bindparam("fence"))
    .values(
        state=sa.bindparam("new_state"),
        since=sa.bindparam("now"),
        restarts=tenants.c.restarts + sa.bindparam("restarted", type_=sa.BigInteger),
        last_exit=sa.func.coalesce(sa.bindparam("exit", type_=sa.Text), tenants.c.last_exit),
        last_seq=tenants.c.last_seq + 1,
    )
    .returning(tenants.c.last_seq)
)
_REVOKE = (
    sa.update(tenants)
    .where(_name)
    .values(
        tokens_valid_after=sa.case(
            (tenants.c.tokens_valid_after < sa.bindparam("before"), sa.bindparam("before")),
            else_=tenants.c.tokens_valid_after,
        )
    )
    .returning(*tenants.c)
)
_UNSETTLED = tenants.c.state.in_(UNSETTLED)
_SELECT_UNSETTLED = sa.select(tenants).where(_UNSETTLED).order_by(tenants.c.name).with_for_update()
_SETTLE = (
    sa.update(tenants)
    .where(_UNSETTLED)
    .values(state="asleep", since=sa.bindparam("now"), last_seq=tenants.c.last_seq + 1)
)
_DELETE = sa.delete(tenants).where(_name).returning(*tenants.c)
_LEAVE_COUNTERS = sa.insert(former_tenants)
_TAKE_COUNTERS = (
    sa.delete(former_tenants)
    .where(former_tenants.c.name == sa.bindparam("tenant"))
    .returning(former_tenants.c.generation, former_tenants.c.last_seq, former_tenants.c.tokens_valid_after)
)
_CREATE = sa.insert(tenants).returning(*tenants.c)


def tokens_valid_after(connection: sa.Connection, name: str) -> float:
    """Of the tenant, or of the last one that had the name; 0.0 if there was none."""
    return float(connection.execute(_VALID_AFTER, {"tenant": name}).scalar() or 0.0)


def get(connection: sa.Connection, name: str) -> TenantRecord | None:
    row = connection.execute(_GET, {"tenant": name}).one_or_none()
    return None if row is None else _record(row)


def page(connection: sa.Connection, after: str, limit: int) -> list[TenantRecord]:
    return [_record(row) for row in connection.execute(_LIST, {"after": after, "limit": limit})]


def put(
    connection: sa.Connection, name: str, settings: Mapping[str, object] | None, now: float
) -> tuple[TenantRecord, bool]:
    """The tenant with these settings, and whether it is new. None keeps what is there; the same changes nothing."""
    found = get(connection, name)
    if found is None:
        _create(connection, name, settings or {}, now)
        journal.append(connection, name, [Entry("tenant.created", now, {})])
    elif settings is not None and settings != found.settings:
        # The journal is read by more people than settings are: it tells which, and never the values.
        changed = sorted(
            key
            for key in settings.keys() | found.settings.keys()
            if key not in settings or key not in found.settings or settings[key] != found.settings[key]
        )
        connection.execute(_SETTINGS, {"tenant": name, "new_settings": to_json(settings)})
        journal.append(connection, name, [Entry("tenant.updated", now, {"changed": changed})])
    else:
        return found, False
    row = connection.execute(_GET, {"tenant": name}).one()
    return _record(row), found is None


def _create(connection: sa.Connection, name: str, settings: Mapping[str, object], now: float) -> None:
    former = connection.execute(_TAKE_COUNTERS, {"tenant": name}).one_or_none()
    connection.execute(
        _CREATE,
        {
            "name": name,
            "settings": to_json(settings),
            "generation": former.generation if former else 0,
            "state": "asleep",
            "since": now,
            "restarts": 0,
            "last_exit": None,
            "tokens_valid_after": former.tokens_valid_after if former else 0.0,
            "created_at": now,
            "last_seq": former.last_seq if former else 0,
        },
    )


def delete(connection: sa.Connection, name: str) -> bool:
    """Its journal goes with it, by the foreign key."""
    row = connection.execute(_DELETE, {"tenant": name}).one_or_none()
    if row is None:
        return False
    connection.execute(
        _LEAVE_COUNTERS,
        {
            "name": name,
            "generation": row.generation,
            "last_seq": row.last_seq,
            "tokens_valid_after": row.tokens_valid_after,
        },
    )
    return True


def begin_generation(connection: sa.Connection, name: str, data: Mapping[str, object], now: float) -> int | None:
    """The next generation's number; None if there is no such tenant."""
    row = connection.execute(_BEGIN_GENERATION, {"tenant": name, "now": now}).one_or_none()
    if row is None:
        return None
    data = {**data, "generation": row.generation}
    journal.insert(connection, [Event(tenant=name, seq=row.last_seq, type="tenant.starting", time=now, data=data)])
    return int(row.generation)


def record_state(
    connection: sa.Connection,
    name: str,
    *,
    generation: int,
    state: str,
    entry: Entry,
    last_exit: Mapping[str, object] | None,
    restarted: bool,
) -> Event | None:
    """Writes the state and its event if `generation` is the tenant's own; else nothing, and None (the fence)."""
    parameters = {
        "tenant": name,
        "fence": generation,
        "new_state": state,
        "now": entry.time,
        "restarted": int(restarted),
        "exit": None if last_exit is None else to_json(last_exit),
    }
    seq = connection.execute(_STATE, parameters).scalar_one_or_none()
    if seq is None:
        return None
    event = Event(tenant=name, seq=seq, type=entry.type, time=entry.time, data=entry.data)
    journal.insert(connection, [event])
    return event


def revoke_tokens(connection: sa.Connection, name: str, before: float) -> TenantRecord | None:
    row = connection.execute(_REVOKE, {"tenant": name, "before": before}).one_or_none()
    return None if row is None else _record(row)


def settle(connection: sa.Connection, now: float) -> list[str]:
    """Puts to sleep, in the books, every tenant that a supervisor was busy with when it ended."""
    found = connection.execute(_SELECT_UNSETTLED).all()
    connection.execute(_SETTLE, {"now": now})
    journal.insert(
        connection,
        [
            Event(
                tenant=row.name,
                seq=row.last_seq + 1,
                type="tenant.recovered",
                time=now,
                data={
                    "reason": "supervisor_restarted",
                    "former_state": row.state,
                    "generation": row.generation,
                },
            )
            for row in found
        ],
    )
    return [row.name for row in found]


def _record(row: sa.Row[Any]) -> TenantRecord:
    return TenantRecord(
        name=row.name,
        settings=from_json(row.settings),
        generation=row.generation,
        state=row.state,
        since=row.since,
        restarts=row.restarts,
        last_exit=None if row.last_exit is None else from_json(row.last_exit),
        tokens_valid_after=row.tokens_valid_after,
        created_at=row.created_at,
        last_seq=row.last_seq,
    )
