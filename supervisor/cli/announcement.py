"""What `serve` prints when it is ready: an address to open and a command line to paste.

The token is in the fragment of the address, which browsers send to nobody, so that it reaches no log of a server.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from supervisor.server import Server

_TOKEN_TTL_S: Final = 12 * 3600.0


def announce_server(server: Server) -> None:
    """Prints where `server` is, with a token for its operator if only this machine or a terminal gets to see it."""
    authenticator = server.supervisor.authenticator
    token = None
    # In a container stdout is a log, and who reads it is not known.
    if server.supervisor.settings.auth.enabled and (authenticator.private or sys.stdout.isatty()):
        token = authenticator.issue(tenant=None, scopes=["admin"], ttl_s=_TOKEN_TTL_S, subject="operator")
    announce(server.addresses, token)


def announce(addresses: Sequence[str], token: str | None) -> None:
    """Prints to stdout; `addresses` are printable, and `token` is None where none is needed or may be shown."""
    lines = [f"Tenantry serves {', '.join(addresses)}"]
    address = next((address for address in addresses if address.startswith("http")), addresses[0])
    if address.startswith("http"):
        lines.append(f"Open    {address}/{'#token=' + quote(token, safe='') if token else ''}")
    program = sys.argv[0] if Path(sys.argv[0]).name == "tenantry" else f"{sys.executable} -m supervisor"
    variables = f"TENANTRY_URL={shlex.quote(address)} " + (f"TENANTRY_TOKEN={shlex.quote(token)} " if token else "")
    lines.append(f"Attach  {variables}{program} attach demo")
    # Whoever started us may have closed stdout, or gone: that is no reason not to serve.
    with contextlib.suppress(OSError, ValueError):
        # In one write: the log goes to the same terminal, and print() would write the last newline after it.
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
