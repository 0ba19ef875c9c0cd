"""HTTP/1.1 heads as values: what is refused, what goes on to an agent, what a refusal looks like, who the peer is.

Pure: no Trio, no clock, no socket. The rules are stricter than the parser's wherever two readers of the
same bytes could disagree (request smuggling) or where a path could mean something else to an agent. No
function here puts a header's value or a query string into a text that could reach a log.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import math
import re
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus, unquote_to_bytes

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import h11

BEARER_SUBPROTOCOL = "tenantry.bearer."
# Query values by which a browser may say who it is; they are for us and go no further.
SECRET_QUERY_NAMES = frozenset({"token", "ticket"})

# RFC 9110 section 7.6.1, and what is meaningless in a request without a body.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_MAX_FIELDS = 256
# A line that ends in LF alone, a CR that ends no line, and obs-fold (RFC 9112 sections 2.2 and 5.2).
_LAX_LINE = re.compile(rb"(?<!\r)\n|\r[^\n]|\n[ \t]")
_CONTENT_LENGTH_LINE = re.compile(rb"\ncontent-length[ \t]*:([^\r\n]*)", re.IGNORECASE)
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_MARK = re.compile(rb"[^0-9a-z]")
_METHOD = re.compile(rb"[A-Z]+(?:-[A-Z]+)*")
# A label that is empty or longer than 63 is no name, and the app's router would raise for it.
_HOST = re.compile(
    rb"(?:\[([0-9A-Fa-f:.]+)\]|(?=.{1,255}\Z)[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(?:\.[A-Za-z0-9_-]{1,63})*\.?)(?::([0-9]{1,5}))?"
)
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
# What no path has by RFC 3986, and what would be a separator or an end of string to some reader.
_NOT_IN_TARGET = re.compile(rb"[^\x21-\x7e]|[#\\]")
_NOT_IN_SEGMENT = re.compile(rb"[\x00-\x1f\x7f/\\]")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@attrs.frozen
class Refusal:
    """Why a request is not served. `detail` is for its sender and holds nothing that is secret."""

    status: int
    code: str
    detail: str
    headers: tuple[tuple[str, str], ...] = ()


def _malformed(detail: str) -> Refusal:
    return Refusal(400, "malformed_request", detail)


def _values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _tokens(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> set[bytes]:
    """The comma-separated, case-insensitive tokens of all fields of that name."""
    return {token.strip().lower() for value in _values(headers, name) for token in value.split(b",") if token.strip()}


# ---- what is refused -------------------------------------------------------------------------------------


def lax_line(head: bytes | bytearray, start: int) -> Refusal | None:
    """Refuses lines that other servers would cut elsewhere. Everything before `start` was judged before."""
    if _LAX_LINE.search(head, max(0, start - 2)):
        return _malformed("A line of the head does not end in CRLF, or continues on the next line (obs-fold).")
    return None


def raw_refusal(head: bytes | bytearray) -> Refusal | None:
    """Refuses what the parser's lenience hides, judged from the bytes of a whole head.

    A duplicate Content-Length is refused even where both say the same (RFC 9112 section 6.3 allows either),
    since the parser would merge them in silence.
    """
    if head.count(b"\n") > _MAX_FIELDS + 2:
        return Refusal(431, "too_many_fields", f"The request has more than {_MAX_FIELDS} header fields.")
    lengths = _CONTENT_LENGTH_LINE.findall(head)
    if len(lengths) > 1 or any(b"," in value for value in lengths):
        return _malformed("Content-Length is given more than once.")
    return None


def chunk_refusal(line: bytes | bytearray) -> Refusal | None:
    """Refuses the line before a chunk (RFC 9112 section 7.1) that another server would cut elsewhere."""
    if _CONTROL.search(line.removesuffix(b"\r\n")):
        return _malformed("The line before a chunk contains a control character.")
    return None


def refusal(request: h11.Request) -> Refusal | None:
    """Why this head, which the parser accepted, is not served; None if it is (RFC 9112, RFC 9110)."""
    headers = list(request.headers)
    version = request.http_version
    if version not in (b"1.0", b"1.1"):
        return Refusal(505, "http_version_not_supported", "Only HTTP/1.1 is spoken here.")
    if not _METHOD.fullmatch(request.method):
        return Refusal(501, "method_not_implemented", "The method is not one of HTTP's; they are in capitals.")
    if any(_CONTROL.search(value) for _, value in headers):
        return _malformed("A header's value contains a control character.")
    return (
        _host_refusal(_values(headers, b"host"), required=version == b"1.1")
        or _framing_refusal(headers, version)
        or target_refusal(request.target)
    )


def _host_refusal(hosts: Sequence[bytes], *, required: bool) -> Refusal | None:
    if not hosts and not required:
        return None
    if len(hosts) != 1:
        return _malformed("Exactly one Host header is required.")
    match = _HOST.fullmatch(hosts[0])
    if match is None or (match[1] and not _is_ipv6(match[1])) or (match[2] and int(match[2]) > 65535):
        return _malformed("The Host header is no host name or address with an optional port.")
    return None


def _is_ipv6(text: bytes) -> bool:
    try:
        ipaddress.IPv6Address(text.decode("ascii"))
    except ValueError:
        return False
    return True


def _framing_refusal(headers: Sequence[tuple[bytes, bytes]], version: bytes) -> Refusal | None:
    encodings = _values(headers, b"transfer-encoding")
    lengths = _values(headers, b"content-length")
    if len(lengths) > 1:
        return _malformed("Content-Length is given more than once.")
    if not encodings:
        return None
    if version != b"1.1":
        return _malformed("Transfer-Encoding is not part of HTTP/1.0.")
    if lengths:
        return _malformed("Transfer-Encoding and Content-Length exclude each other.")
    if len(encodings) != 1 or encodings[0].lower() != b"chunked":
        return Refusal(501, "transfer_coding_not_implemented", "The only transfer coding is chunked.")
    return None


def target_refusal(target: bytes) -> Refusal | None:
    """Only origin-form (`/path?query`), and no path that changes its meaning when it is decoded or resolved."""
    if not target.startswith(b"/"):
        return _malformed("The request target is a path that begins with '/'; no other form is served.")
    if target.startswith(b"//"):
        # To a router the same as one slash, to a proxy's rules another path, and to a URL's resolver a host.
        return _malformed("The request target begins with two slashes.")
    if _NOT_IN_TARGET.search(target):
        return _malformed("The request target contains a character that must be percent-encoded.")
    path = target.partition(b"?")[0]
    if _BAD_PERCENT.search(path):
        return _malformed("The path contains a '%' that begins no percent-encoded byte.")
    for encoded in path.split(b"/"):
        segment = unquote_to_bytes(encoded)
        if _NOT_IN_SEGMENT.search(segment):
            return _malformed("A segment of the path contains an encoded slash, backslash or control character.")
        # Some servers cut path parameters off before they resolve dots: `..;x` is `..` to them.
        if segment.partition(b";")[0] in (b".", b".."):
            return _malformed("The path contains a dot segment.")
    return None


def wants_upgrade(request: h11.Request) -> bool:
    """Whether the request asks for a WebSocket at all; `upgrade_refusal` then says if it asks rightly."""
    return b"websocket" in _tokens(request.headers, b"upgrade")


def upgrade_refusal(request: h11.Request) -> Refusal | None:
    """What RFC 6455 section 4.2.1 asks of the opening handshake, for a request that `refusal` lets pass."""
    headers = list(request.headers)
    if request.method != b"GET":
        return Refusal(405, "method_not_allowed", "A WebSocket is opened with GET.", (("Allow", "GET"),))
    if request.http_version != b"1.1":
        return _bad_upgrade("A WebSocket is opened over HTTP/1.1.")
    if b"upgrade" not in _tokens(headers, b"connection"):
        return _bad_upgrade("The Connection header does not name 'Upgrade'.")
    if _values(headers, b"content-length") or _values(headers, b"transfer-encoding"):
        return _bad_upgrade("An upgrade has no body: neither Content-Length nor Transfer-Encoding.")
    if _values(headers, b"sec-websocket-version") != [b"13"]:
        return Refusal(
            426,
            "websocket_version",
            "The only WebSocket version is 13.",
            (("Sec-WebSocket-Version", "13"),),
        )
    keys = _values(headers, b"sec-websocket-key")
    if len(keys) != 1 or not _is_key(keys[0]):
        return _bad_upgrade("Sec-WebSocket-Key must be given once, 16 bytes in base64.")
    return None


def _bad_upgrade(detail: str) -> Refusal:
    return Refusal(400, "bad_upgrade", detail)


def _is_key(key: bytes) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except binascii.Error:
        return False


# ---- what goes on to the agent ---------------------------------------------------------------------------


def agent_head(
    request: h11.Request, *, target: str, add: Iterable[tuple[str, str]] = (), trusted: bool = False
) -> bytes:
    """The head that the agent sees: the client's own, in its order and spelling, without what is ours.

    Removed: credentials, hop-by-hop headers and those that Connection names, the client's `Tenantry-*`, the
    subprotocols and the query values that carry a token, and unless the peer is a `trusted` proxy what
    claims to know the client's address. Names are compared with `_`, `.` and other marks as `-`, since many
    servers do not tell them apart. Raises ValueError if `target` or `add` would break the head.
    """
    named = {_MARK.sub(b"-", token) for token in _tokens(request.headers, b"connection")}
    lines = [b"GET %s HTTP/1.1" % _without_secrets(target)]
    for name, value in request.headers.raw_items():
        key = _MARK.sub(b"-", name.lower())
        if key == b"sec-websocket-protocol":
            value = _public_subprotocols(value)
            if not value:
                continue
        elif not _passes(key, named, trusted=trusted):
            continue
        lines.append(b"%s: %s" % (name, value))
    lines += [b"Connection: Upgrade", b"Upgrade: websocket"]
    lines += [_field(name, value) for name, value in add]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _passes(key: bytes, named: set[bytes], *, trusted: bool) -> bool:
    if key == b"host" or key.startswith(b"sec-websocket-"):
        return True  # Naming these in Connection cannot take them away: without them there is no handshake.
    if key in named or key in _HOP_BY_HOP or key in (b"authorization", b"cookie"):
        return False
    if key.startswith(b"tenantry-"):
        return False
    return trusted or not (key in (b"forwarded", b"x-real-ip") or key.startswith(b"x-forwarded-"))


def _public_subprotocols(value: bytes) -> bytes:
    offered = [offer.strip() for offer in value.split(b",")]
    public = [offer for offer in offered if not offer.lower().startswith(BEARER_SUBPROTOCOL.encode())]
    return value if len(public) == len(offered) else b", ".join(public)


def _without_secrets(target: str) -> bytes:
    path, question, query = target.partition("?")
    kept = [pair for pair in query.split("&") if unquote_plus(pair.partition("=")[0]) not in SECRET_QUERY_NAMES]
    if query and not kept:
        question = ""
    target = path + question + "&".join(kept)
    encoded = target.encode("ascii")  # UnicodeEncodeError is a ValueError
    if not encoded.startswith(b"/") or _NOT_IN_TARGET.search(encoded):
        raise ValueError("the target for the agent is no origin-form request target")
    return encoded


def _field(name: str, value: str) -> bytes:
    line = f"{name}: {value}".encode("latin-1")
    if not re.fullmatch(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+", name) or _CONTROL.search(line):
        raise ValueError(f"header {name!r} has a name or a value that cannot be sent")
    return line


# ---- what a refusal looks like ---------------------------------------------------------------------------


def problem_body(
    status: int, code: str, detail: str, *, retryable: bool = False, retry_after_s: float | None = None
) -> bytes:
    """The JSON of a problem (RFC 9457). `code` is the stable word for programs."""
    retry_after_ms = None if retry_after_s is None else math.ceil(retry_after_s * 1000)
    problem = {
        "type": "about:blank",
        "title": _title(status),
        "status": status,
        "detail": detail,
        "code": code,
        "retryable": retryable,
        "retry_after_ms": retry_after_ms,
    }
    return json.dumps(problem).encode()


def problem_response(
    status: int,
    code: str,
    detail: str,
    *,
    retryable: bool = False,
    retry_after_s: float | None = None,
    extra_headers: Iterable[tuple[str, str]] = (),
    close: bool = True,
    now: float | None = None,
) -> bytes:
    """A whole HTTP/1.1 response that says a problem; `now` (Unix time) gives it a Date."""
    body = problem_body(status, code, detail, retryable=retryable, retry_after_s=retry_after_s)
    fields = [("Content-Type", "application/problem+json"), ("Content-Length", str(len(body)))]
    if now is not None:
        fields.append(("Date", formatdate(now, usegmt=True)))
    if retry_after_s is not None:
        fields.append(("Retry-After", str(math.ceil(retry_after_s))))
    if close:
        fields.append(("Connection", "close"))
    lines = [f"HTTP/1.1 {status} {_title(status)}".encode()]
    lines += [_field(name, value) for name, value in (*fields, *extra_headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


# ---- who the peer is -------------------------------------------------------------------------------------


def trusted_networks(proxies: Iterable[str]) -> tuple[Network | str, ...]:
    """Parses `trusted_proxies`: addresses, networks, or "unix" for peers on a unix socket. Raises ValueError."""
    return tuple(entry if entry == "unix" else ipaddress.ip_network(entry, strict=False) for entry in proxies)


def is_trusted(peer: str, trusted: Iterable[Network | str]) -> bool:
    address = _address(peer)
    return any(
        peer == entry if isinstance(entry, str) else address is not None and address in entry for entry in trusted
    )


def peer_address(peer: str, headers: Iterable[tuple[bytes, bytes]], trusted: Sequence[Network | str]) -> str:
    """The client's address: the peer's own, or what a trusted proxy says it is, read from the nearest hop back.

    `headers` have lower-case names. A hop that is no address ends the way back at the hop before it. Where
    Forwarded and X-Forwarded-For disagree, a proxy passed one of them on unread, and the peer's own counts.
    """
    if not is_trusted(peer, trusted):
        return peer
    headers = list(headers)
    ways = [
        way
        for way in (
            [item.get("for", "") for item in _forwarded(headers)],
            [
                hop.strip()
                for value in _values(headers, b"x-forwarded-for")
                for hop in value.decode("latin-1").split(",")
            ],
        )
        if way
    ]
    found = {_last_untrusted(peer, way, trusted) for way in ways}
    return found.pop() if len(found) == 1 else peer


def peer_scheme(
    scheme: str, peer: str, headers: Iterable[tuple[bytes, bytes]], trusted: Sequence[Network | str]
) -> str:
    """ "http" or "https" as the client used it: the connection's own, or what a trusted proxy says."""
    if not is_trusted(peer, trusted):
        return scheme
    headers = list(headers)
    said = [item["proto"].lower() for item in _forwarded(headers)[-1:] if "proto" in item]
    said += [
        value.decode("latin-1").rpartition(",")[2].strip().lower()
        for value in _values(headers, b"x-forwarded-proto")[-1:]
    ]
    known = {{"ws": "http", "wss": "https"}.get(one, one) for one in said} & {"http", "https"}
    return known.pop() if len(known) == 1 else scheme


def peer_key(peer: str) -> str:
    """What a cap a peer counts by: an IPv4 address, or the /64 of an IPv6 address, which is one customer's."""
    address = _address(peer)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return peer if address is None else str(address)


def _last_untrusted(peer: str, way: Sequence[str], trusted: Sequence[Network | str]) -> str:
    for hop in reversed(way):
        address = _address(hop)
        if address is None:
            return peer
        peer = str(address)
        if not is_trusted(peer, trusted):
            return peer
    return peer


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address with or without a port, brackets or quotes; IPv4 mapped into IPv6 is IPv4."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _forwarded(headers: Sequence[tuple[bytes, bytes]]) -> list[dict[str, str]]:
    """The elements of Forwarded (RFC 7239). Quoted strings hold no comma or semicolon that we could use."""
    return [
        dict(_pairs(element))
        for value in _values(headers, b"forwarded")
        for element in value.decode("latin-1").split(",")
    ]


def _pairs(element: str) -> Iterator[tuple[str, str]]:
    for pair in element.split(";"):
        name, equals, value = pair.partition("=")
        if equals:
            yield name.strip().lower(), value.strip().strip('"')
