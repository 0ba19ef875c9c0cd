"""The pages and what they are made of, read once from the package; and the header fields that go with them.

Nothing that a page needs comes from another host, and no script or style is inline, so that the policy can be
as strict as it is.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Final

import attrs

_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# For every answer: what is no page is never taken for one.
SAFE_HEADERS: Final = (
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
_PAGE_HEADERS: Final = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
)


@attrs.frozen
class Asset:
    """A file of the package as it is served."""

    body: bytes
    etag: str
    headers: tuple[tuple[str, str], ...]


def load_assets() -> dict[str, Asset]:
    """Every file of `static/` by its name."""
    directory = resources.files("supervisor.gateway") / "static"
    return {
        file.name: _asset(file.name, file.read_bytes())
        for file in directory.iterdir()
        if file.name.rpartition(".")[2] in _TYPES
    }


def _asset(name: str, body: bytes) -> Asset:
    suffix = name.rpartition(".")[2]
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = (
        ("Content-Type", _TYPES[suffix]),
        # Kept by the browser, and asked for again each time: a new version shows at once.
        ("Cache-Control", "no-cache"),
        ("ETag", etag),
    )
    return Asset(body, etag, headers + (_PAGE_HEADERS if suffix == "html" else ()))
