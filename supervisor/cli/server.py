"""A running server as the client verbs see it: where it is, the token for it, and plain HTTP requests.

Every request is bounded. A token that is made here lives briefly, and goes only to a server on this machine.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, quote, urlencode, urlsplit

import attrs

from supervisor.cli import CONFIGURATION, NOT_ALLOWED, UNAVAILABLE, Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from supervisor.settings import Settings

_TIMEOUT_S: Final = 15.0
_MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
_OWN_TOKEN_TTL_S: Final = 60.0
# A connection ends when its token does.
_OWN_CONNECT_TTL_S: Final = 30 * 86400.0


@attrs.frozen
class Server:
    """`url` is http:// or https:// without a path; with `unix_path` the connection goes there instead."""

    url: str
    unix_path: Path | None
    # Of a tenant, or None for all: the token for it.
    token: Callable[[str | None], str | None] = attrs.field(repr=False)

    def __str__(self) -> str:
        return f"unix:{self.unix_path}" if self.unix_path else self.url

    def connect_url(self, tenant: str, path: str = "") -> str:
        """The address of the WebSocket to the tenant's agent."""
        return f"ws{self.url.removeprefix('http')}/v1/tenants/{quote(tenant, safe='')}/connect/{path.lstrip('/')}"

    def request(self, method: str, target: str, body: object = None) -> Any:
        """Sends one request and returns the JSON of its answer. Raises Failure with the server's own words."""
        token = self.token(None)
        headers = {"Accept": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = self._open()
        try:
            connection.request(method, target, None if body is None else json.dumps(body), headers)
            with connection.getresponse() as answer:
                content = answer.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise unreachable(self, error) from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise refused(f"{self} refused to {method} {target.partition('?')[0]}", answer.status, content)
        try:
            return json.loads(content)
        except ValueError as error:
            raise Failure(f"{self} answered something that is no JSON: is it Tenantry?", UNAVAILABLE) from error

    def _open(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        if self.unix_path is not None:
            return _UnixConnection(self.unix_path)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def unreachable(server: Server, error: Exception) -> Failure:
    why = getattr(error, "strerror", None) or error
    return Failure(f"no answer from {server}: {why}. Is it running? `--url` or TENANTRY_URL says where", UNAVAILABLE)


def refused(what: str, status: int, content: bytes) -> Failure:
    """The words of a problem (RFC 9457), if the answer has some."""
    try:
        problem = json.loads(content)
        detail = str(problem.get("detail") or problem.get("title"))
    except (ValueError, AttributeError):
        detail = content.decode(errors="replace").strip().partition("\n")[0][:200] or http.client.responses.get(
            status, ""
        )
    mend = ". Give a token with --token or TENANTRY_TOKEN; `tenantry token create` makes one" if status == 401 else ""
    exit_status = NOT_ALLOWED if status in (401, 403) else UNAVAILABLE if status >= 500 else 1
    return Failure(f"{what}: {detail} ({status}){mend}", exit_status)


def list_tenants(server: Server) -> list[dict[str, Any]]:
    """All of them, page by page."""
    found: list[dict[str, Any]] = []
    after: str | None = ""
    while after is not None:
        page = server.request("GET", f"/v1/tenants?{urlencode({'after': after, 'limit': 1000})}")
        found += page["tenants"]
        after = page["next_after"]
    return found


def find_server(settings: Settings, *, url: str | None, token: str | None) -> Server:
    """The server of `url`, else the one that has these settings. Raises Failure where they name none."""
    base, unix_path = _address(url) if url else _bound(settings)

    def own_token(tenant: str | None) -> str:
        if tenant is None:
            return make_token(settings, tenant=None, scopes=["admin"], ttl_s=_OWN_TOKEN_TTL_S, subject="cli")
        return make_token(settings, tenant=tenant, scopes=["connect"], ttl_s=_OWN_CONNECT_TTL_S, subject="cli")

    if token:
        return Server(base, unix_path, lambda tenant: token)
    # A token that this machine's secret signed is shown to nobody else.
    here = unix_path is not None or not url or _is_loopback(urlsplit(base))
    if not here or not settings.auth.enabled or not os.path.exists(_secret_file(settings)):
        return Server(base, unix_path, lambda tenant: None)
    return Server(base, unix_path, own_token)


def make_token(
    settings: Settings, *, tenant: str | None, scopes: Sequence[str], ttl_s: float | None, subject: str
) -> str:
    """Signs a token with the secret of these settings. Raises Refused for one that cannot be, and ConfigError."""
    from supervisor.gateway.auth import Authenticator, load_or_create_secret

    secret = load_or_create_secret(settings.state_dir, settings)
    return Authenticator(secret, settings=settings, addresses=()).issue(
        tenant=tenant, scopes=scopes, ttl_s=ttl_s, subject=subject
    )


def _secret_file(settings: Settings) -> Path:
    return settings.auth.secret_file or settings.state_dir / "secret"


def _address(url: str) -> tuple[str, Path | None]:
    if url.startswith("unix:"):
        return "http://localhost", Path("/" + url.removeprefix("unix:").lstrip("/")) if url[5:6] == "/" else Path(
            url[5:]
        )
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        good = None
    if not good or parts.path not in ("", "/"):
        raise Failure(
            f'{url!r} is not the address of a server, such as "http://127.0.0.1:8000" or "unix:/path"', CONFIGURATION
        )
    return f"{parts.scheme}://{parts.netloc}", None


def _bound(settings: Settings) -> tuple[str, Path | None]:
    scheme = "http" if settings.tls.certificate is None else "https"
    for bind in settings.bind:
        host, _, port = bind.rpartition(":")
        if bind.startswith("unix:"):
            return _address(bind)
        if not bind.startswith("fd://") and port != "0":
            loopback = {"": "127.0.0.1", "*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
            return f"{scheme}://{loopback.get(host, host)}:{port}", None
    raise Failure("the settings do not tell where the server is: say it with --url or TENANTRY_URL", CONFIGURATION)


def _is_loopback(parts: SplitResult) -> bool:
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"
