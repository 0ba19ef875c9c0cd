"""What the store hands out: frozen records of what is on the disk, and the JSON that they carry.

Imports neither SQLAlchemy nor Trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import attrs
import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping


@attrs.frozen(kw_only=True)
class TenantRecord:
    """One tenant as stored. Times are the wall clock's, seconds since 1970."""

    name: str
    settings: Mapping[str, object]
    # Counts the agent processes; 0 before the first. Never goes back, not even over a delete (see tenants.py).
    generation: int
    state: str
    since: float
    restarts: int
    last_exit: Mapping[str, object] | None
    # Tokens issued before this are revoked.
    tokens_valid_after: float
    created_at: float
    # The number of the newest event of the journal.
    last_seq: int


@attrs.frozen(kw_only=True)
class Event:
    """One entry of a tenant's journal; `seq` counts up by one within the tenant."""

    tenant: str
    seq: int
    type: str
    time: float
    data: Mapping[str, object]


def to_json(value: Mapping[str, object]) -> str:
    return msgspec.json.encode(value).decode()


def from_json(text: str) -> dict[str, object]:
    return cast(dict[str, object], msgspec.json.decode(text))


def plain(value: Mapping[str, object]) -> dict[str, object]:
    """A deep copy as JSON has it, so that a record returned equals the one read later.

    It also takes the fault of a value that JSON cannot hold (TypeError) to the caller, before anything is
    written, and the caller's later changes away from the writer's thread.
    """
    return from_json(to_json(dict(value)))
