"""Which Host and Origin are ours: what stops DNS rebinding, and other sites' pages in a visitor's browser.

A page of another site can make a browser send requests to an address that only the visitor reaches; what it
cannot change are these two headers. Pure: built once from the settings, asked with headers.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

import attrs

from supervisor.errors import ConfigError, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from supervisor.settings import Settings

_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


class HostNotAllowed(Refused):
    """The Host header names somebody else (RFC 9110 section 15.5.20)."""

    code = "host_not_allowed"
    status = 421


class OriginNotAllowed(Refused):
    """The request was made by the page of another site."""

    code = "origin_not_allowed"
    status = 403


@attrs.frozen
class HostCheck:
    """Built by `host_check`; `private` says that nobody beyond this machine is meant to reach us."""

    loopback_only: bool
    private: bool
    _names: frozenset[str]
    _authorities: frozenset[str]
    _any_address: bool
    _public_origin: tuple[str, str, int] | None
    _same_origin_only: bool

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises HostNotAllowed or OriginNotAllowed, with words that name the setting; Refused without a Host."""
        values: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in headers:
            if name.lower() in values:
                values[name.lower()].append(value.decode("latin-1").strip())
        hosts, origins = values[b"host"], values[b"origin"]
        if len(hosts) != 1:
            raise Refused("exactly one Host header is required")
        # Only what was parsed is repeated to the sender: it then holds no character of HTML or of a terminal.
        host = _authority(hosts[0])
        if host is None:
            raise Refused("the Host header is no host name or address with an optional port")
        if not self._allows(host):
            raise HostNotAllowed(
                f"Host {host.hostname!r} is not one of ours: add it to `allowed_hosts`, or set `public_url`"
            )
        if not origins:
            return
        if len(origins) > 1 or not self._allows_origin(origins[0], host):
            raise OriginNotAllowed(
                "the request comes from the page of another site (Origin): if that site is yours, "
                "add its host to `allowed_hosts`, or set `public_url`"
            )

    def _allows(self, authority: SplitResult) -> bool:
        name = _name(authority)
        if name in self._names or _is_loopback(name) or authority.netloc.lower() in self._authorities:
            return True
        # Bound to every address, "the bind address" is each of them. An address in Host cannot be rebound:
        # a browser sends it only for a page that came from this very address.
        return self._any_address and _address(name) is not None

    def _allows_origin(self, text: str, host: SplitResult) -> bool:
        origin = _url(text)
        if origin is None or origin.scheme not in ("http", "https"):
            return False
        if self._public_origin is not None and _origin(origin) == self._public_origin:
            return True
        if self._same_origin_only and _is_loopback(_name(origin)):
            return origin.netloc.lower() == host.netloc.lower()
        return self._allows(origin)


def host_check(settings: Settings, addresses: Sequence[str]) -> HostCheck:
    """Judges the settings against the bound `addresses` ("127.0.0.1:8000", "unix:/path").

    Raises ConfigError where Host could not be checked, or where auth is off beyond loopback.
    """
    names, any_address, beyond = set(), False, []
    for address in addresses:
        if address.startswith("unix:"):
            continue
        authority = _authority(address.rpartition("://")[2])
        name = "" if authority is None else _name(authority)
        names.add(name)
        if not _is_loopback(name):
            beyond.append(address)
            parsed = _address(name)
            any_address |= parsed is not None and parsed.is_unspecified
    names.discard("")

    if beyond and not settings.auth.enabled:
        raise ConfigError(
            f"auth.enabled = false with bind {beyond[0]!r} would let everybody in: bind to 127.0.0.1 or to a "
            "unix socket, or leave auth enabled"
        )
    if beyond and not settings.allowed_hosts and settings.public_url is None:
        raise ConfigError(
            f"bind {beyond[0]!r} can be reached from other machines: set `public_url` to the address that "
            "clients use, or `allowed_hosts` to its host names, so that the Host header can be checked"
        )
    authorities = set()
    for entry in settings.allowed_hosts:
        authority = _authority(entry)
        if authority is None:
            raise ConfigError(
                f"allowed_hosts has {entry!r}: an entry is a host name or an address, with a port if only "
                "that one is allowed, such as 'agents.example.org' or '192.0.2.7:8443'"
            )
        if authority.port is None:
            names.add(_name(authority))
        else:
            authorities.add(authority.netloc.lower())
    public_origin = None
    if settings.public_url is not None:
        url = _url(settings.public_url)
        if url is None or url.scheme not in ("http", "https"):
            raise ConfigError(
                f"public_url is {settings.public_url!r}: it is an http or https URL, such as "
                "'https://agents.example.org'"
            )
        public_origin = _origin(url)
        names.add(_name(url))
    return HostCheck(
        loopback_only=not beyond,
        private=not beyond and not (settings.allowed_hosts or settings.public_url or settings.trusted_proxies),
        names=frozenset(names),
        authorities=frozenset(authorities),
        any_address=any_address,
        public_origin=public_origin,
        # Without a token the Origin is all that keeps another program's page on this machine out.
        same_origin_only=not settings.auth.enabled,
    )


def _authority(text: str) -> SplitResult | None:
    return None if "/" in text else _url(f"http://{text}")


def _url(text: str) -> SplitResult | None:
    """A URL of a host name or address that is what it seems: no user, no space, a port in range."""
    if not text.isascii() or any(not "!" <= mark <= "~" or mark in "*@\\<>\"'%?#" for mark in text):
        return None
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError:
        return None
    return url if url.hostname else None


def _name(url: SplitResult) -> str:
    return (url.hostname or "").removesuffix(".")


def _origin(url: SplitResult) -> tuple[str, str, int]:
    return url.scheme, _name(url), url.port or _DEFAULT_PORTS[url.scheme]


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback(name: str) -> bool:
    address = _address(name)
    if address is not None:
        return address.is_loopback
    # RFC 6761 section 6.3: browsers never ask the DNS for these.
    return name == "localhost" or name.endswith(".localhost")
