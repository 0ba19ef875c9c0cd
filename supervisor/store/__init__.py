"""What must survive a restart: tenants and their journal, in SQLite under the state directory.

What a call returned is on the disk, whole; what failed left nothing. One thread writes, in group commits.
"""

from __future__ import annotations

from .records import Event, TenantRecord
from .store import Store, StoreStatistics, open_memory_store, open_store
from .writer import OutcomeUnknown

__all__ = [
    "Event",
    "OutcomeUnknown",
    "Store",
    "StoreStatistics",
    "TenantRecord",
    "open_memory_store",
    "open_store",
]
