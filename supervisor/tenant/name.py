"""What a tenant may be called."""

from __future__ import annotations

import re
from typing import Final

from supervisor.errors import BadTenantName

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def check_tenant_name(name: str) -> str:
    """Returns the name; raises BadTenantName if it is none."""
    if not _NAME.fullmatch(name):
        raise BadTenantName(
            "a tenant's name has 1 to 63 characters: lower-case letters, digits and '-', not beginning with '-'"
        )
    return name
