"""A tenant in words for the outside: one shape, whether it is awake, asleep or only a record in the store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervisor.store import TenantRecord


def rfc3339(instant: float) -> str:
    """Wall-clock seconds as RFC 3339, in UTC with milliseconds."""
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe(
    record: TenantRecord,
    *,
    pid: int | None = None,
    connections: int = 0,
    why_awake: list[str] | None = None,
    sleeps_at: float | None = None,
) -> dict[str, Any]:
    """What `GET /v1/tenants/{tenant}` shows; of a tenant that is only a record, the defaults are true."""
    last_exit = dict(record.last_exit) if record.last_exit is not None else None
    if last_exit is not None and isinstance(time := last_exit.get("time"), int | float):
        last_exit["time"] = rfc3339(time)
    return {
        "name": record.name,
        "state": record.state,
        "since": rfc3339(record.since),
        "generation": record.generation,
        "pid": pid,
        "restarts": record.restarts,
        "last_exit": last_exit,
        "connections": connections,
        "why_awake": why_awake or [],
        "sleeps_at": None if sleeps_at is None else rfc3339(sleeps_at),
        "settings": dict(record.settings),
    }
