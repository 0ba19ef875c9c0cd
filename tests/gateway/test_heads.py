"""What a head means, as tables: refused, passed on, answered, and from whom."""

from __future__ import annotations

import json

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.gateway import heads

KEY = ("Sec-WebSocket-Key", "bKdPyn3u98cTfZJSh4TNeQ==")
UPGRADE = [("Host", "x"), ("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"), KEY]


def parsed(raw: bytes) -> h11.Request:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    return event


def request(target="/", fields=(("Host", "x"),), *, method="GET", version="1.1") -> h11.Request:
    lines = [f"{method} {target} HTTP/{version}", *(f"{name}: {value}" for name, value in fields)]
    return parsed(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))


def without(name):
    return [field for field in UPGRADE if field[0] != name]


def replaced(name, value):
    return [(key, value if key == name else old) for key, old in UPGRADE]


# ---- refusal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/a/b",
        "/a?b=..",
        "/a//b",
        "/a/..b",
        "/a/b..",
        "/.hidden",
        "/a.b/...",
        "/%20",
        "/a;b=1/c",
        "/a%252e%252e",
        "/?xxxxxxxx",
        "/%C3%A9",
        "/ok?next=http://other/",
        "/a?b=%2F%00",
        "/~user/!$&'()*+,=:@",
    ],
)
def test_a_plain_target_passes(target):
    assert heads.refusal(request(target)) is None


@pytest.mark.parametrize(
    "target",
    [
        "/a\\b",
        "/..\\x",
        "/..",
        "/.",
        "/a/../b",
        "/a/./b",
        "/%2e%2e/",
        "/%2E%2e",
        "/.%2e",
        "/a/%2e",
        "/a%2fb",
        "/a%2Fb",
        "/a%5cb",
        "/a%00b",
        "/a%0ab",
        "/a%0d%0aX:%20y",
        "/a%7f",
        "/..;x/a",
        "/%2e%2e;x",
        "/a#b",
        "/%",
        "/%2",
        "/%zz",
        "/a%g0",
        "http://x/",
        "https://x/a",
        "x:80",
        "*",
        "foo",
        "?a",
        "//..",
        "//metrics",
        "//x",
        "/a/..",
    ],
)
def test_a_target_that_two_readers_could_read_differently_is_refused(target):
    """S3-01's neighbours: no dot segment, encoded separator or other form reaches a route or an agent."""
    refusal = heads.refusal(request(target))
    assert (refusal.status, refusal.code) == (400, "malformed_request")


@given(st.lists(st.sampled_from(["..", ".", "%2e", "%2E", ".;x", "..;", "a", "", "%2f", "%5C", "b.c"]), max_size=6))
def test_no_target_that_passes_holds_a_dot_segment_however_it_is_decoded(segments):
    target = ("/" + "/".join(segments)).encode()
    if heads.target_refusal(target) is None:
        once = target.replace(b"%2e", b".").replace(b"%2E", b".")
        assert not {b".", b".."} & {segment.partition(b";")[0] for segment in once.split(b"/")}
        assert b"%2f" not in target
        assert b"%5C" not in target


@pytest.mark.parametrize(
    "host",
    [
        "x",
        "x:80",
        "a.b-c.d",
        "a_b",
        "127.0.0.1:8000",
        "[::1]",
        "[::1]:8000",
        "[::ffff:192.0.2.1]",
        "x.",
        "X:0",
        "a" * 63 + "." + "b" * 63,
    ],
)
def test_a_host_is_a_name_or_an_address_with_a_port(host):
    assert heads.refusal(request(fields=[("Host", host)])) is None


@pytest.mark.parametrize(
    "host",
    [
        "",
        "x y",
        "\xff\xfe[[:",
        "u@x",
        "x/",
        "x:",
        "x:y",
        "x:65536",
        "x:123456",
        "[::1",
        "::1",
        "[x]",
        "x,y",
        "%78",
        "-x",
        ".x",
        "x#",
        "x?y",
        "http://x",
        "x..",
        "x..y",
        "a" * 64,
        "x." + "a" * 64,
        "a." * 200,
        "[..]",
        "[" + "a" * 64 + "]",
        "[1::2::3]",
    ],
)
def test_any_other_host_is_refused(host):
    refusal = heads.refusal(request(fields=[("Host", host)]))
    assert refusal.status == 400
    assert "Host" in refusal.detail


@given(st.lists(st.sampled_from([*"a9_-.:[]", "a" * 62, "localhost", "::1", ".."]), max_size=8))
def test_no_host_that_passes_is_too_much_for_the_apps_router(parts):
    host = "".join(parts)
    if heads.refusal(h11.Request(method="GET", target="/", headers=[("Host", host)])) is None:
        host.encode("idna")  # what Werkzeug does with it, before any handler of ours could answer


def test_no_host_and_two_hosts_are_refused():
    for fields in ([], [("Host", "x"), ("Host", "x")], [("Host", "x"), ("HOST", "y")]):
        built = h11.Request(method="GET", target="/", headers=[("Host", "x")])
        object.__setattr__(built, "headers", parsed(b"GET / HTTP/1.0\r\n\r\n").headers)
        raw = b"GET / HTTP/1.1\r\n" + b"".join(f"{n}: {v}\r\n".encode() for n, v in fields) + b"\r\n"
        with pytest.raises(h11.RemoteProtocolError):
            parsed(raw)  # the parser's own rule, which we rely on
        assert heads.refusal(built).status == 400  # and ours, should the parser lose it
    assert heads.refusal(request(fields=[], version="1.0")) is None


@pytest.mark.parametrize(
    ("fields", "version", "status"),
    [
        ([("Transfer-Encoding", "chunked")], "1.1", None),
        ([("Content-Length", "3")], "1.1", None),
        ([("Content-Length", "3")], "1.0", None),
        ([("Transfer-Encoding", "chunked")], "1.0", 400),
        ([("Transfer-Encoding", "chunked"), ("Content-Length", "3")], "1.1", 400),
        ([("Content-Length", "3"), ("transfer-encoding", "Chunked")], "1.1", 400),
        ([], "2.0", 505),
        ([], "0.9", 505),
        ([], "1.2", 505),
        ([("X", "a\x01b")], "1.1", 400),
        ([("X", "a\x7fb")], "1.1", 400),
        ([("X", "tab\tis fine, and so is \xe9")], "1.1", None),
    ],
)
def test_framing_and_versions_have_one_reading(fields, version, status):
    """What a proxy in front could frame differently is refused."""
    refusal = heads.refusal(request(fields=[("Host", "x"), *fields], version=version))
    assert (refusal and refusal.status) == status


@pytest.mark.parametrize(("method", "refused"), [("GET", 0), ("PROPFIND", 0), ("M-SEARCH", 0), ("get", 1), ("G*T", 1)])
def test_methods_are_in_capitals(method, refused):
    assert bool(heads.refusal(request(method=method))) == bool(refused)


@pytest.mark.parametrize(
    "line",
    [b"X: a\nY: b\r\n", b"X: a\r\n b\r\n", b"X: a\r\n\tb\r\n", b"X: a\rb\r\n", b"\nX: y\r\n", b"X: y\r\r\n"],
)
def test_a_line_that_others_would_cut_elsewhere_is_refused_wherever_the_bytes_are_split(line):
    head = b"GET / HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n"
    for cut in range(len(head)):
        assert heads.lax_line(head[:cut], 0) or heads.lax_line(head, cut), cut


def test_a_strict_head_is_not_lax_wherever_it_is_split():
    head = b"GET / HTTP/1.1\r\nHost: x\r\nX: a b\tc\r\n\r\n"
    for cut in range(len(head)):
        assert heads.lax_line(head[:cut], 0) is None
        assert heads.lax_line(head, cut) is None


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\ncontent-LENGTH: 6\r\n",
        b"Content-Length: 5, 5\r\n",
    ],
)
def test_a_length_given_twice_is_refused_even_if_both_agree(lines):
    head = b"POST / HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n"
    assert heads.raw_refusal(head).status == 400
    assert heads.raw_refusal(head.replace(lines, b"Content-Length: 5\r\nX: Content-Length: 6,7\r\n")) is None


def test_too_many_fields_are_refused():
    assert heads.raw_refusal(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 256 + b"\r\n") is None
    assert heads.raw_refusal(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 257 + b"\r\n").status == 431


# ---- upgrades --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "wants"),
    [
        (UPGRADE, True),
        (replaced("Upgrade", "WebSocket"), True),
        (replaced("Upgrade", "h2c, websocket"), True),
        (replaced("Upgrade", "h2c"), False),
        (without("Upgrade"), False),
    ],
)
def test_what_asks_for_a_websocket(fields, wants):
    assert heads.wants_upgrade(request(fields=fields)) is wants


@pytest.mark.parametrize(
    ("fields", "kwargs", "status"),
    [
        (UPGRADE, {}, None),
        (replaced("Connection", "keep-alive, UPGRADE"), {}, None),
        ([*without("Connection"), ("Connection", "x"), ("Connection", "upgrade")], {}, None),
        (UPGRADE, {"method": "POST"}, 405),
        (UPGRADE, {"version": "1.0"}, 400),
        (without("Connection"), {}, 400),
        (replaced("Connection", "upgraded"), {}, 400),
        ([*UPGRADE, ("Content-Length", "0")], {}, 400),
        ([*UPGRADE, ("Transfer-Encoding", "chunked")], {}, 400),
        (without("Sec-WebSocket-Version"), {}, 426),
        (replaced("Sec-WebSocket-Version", "8"), {}, 426),
        (replaced("Sec-WebSocket-Version", "13, 8"), {}, 426),
        ([*UPGRADE, ("Sec-WebSocket-Version", "13")], {}, 426),
        (without("Sec-WebSocket-Key"), {}, 400),
        ([*UPGRADE, KEY], {}, 400),
        (replaced("Sec-WebSocket-Key", "a"), {}, 400),
        (replaced("Sec-WebSocket-Key", "bKdPyn3u98cTfZJSh4TNeQ=="[:-4]), {}, 400),
        (replaced("Sec-WebSocket-Key", "!KdPyn3u98cTfZJSh4TNeQ=="), {}, 400),
        (replaced("Sec-WebSocket-Key", "\xe9KdPyn3u98cTfZJSh4TNeQ=="), {}, 400),
    ],
)
def test_an_opening_handshake_is_as_the_rfc_asks(fields, kwargs, status):
    """RFC 6455 section 4.2.1, S3-08: a wrong request is answered at once, and nothing is started."""
    refusal = heads.upgrade_refusal(request(fields=fields, **kwargs))
    assert (refusal and refusal.status) == status
    if status == 426:
        assert ("Sec-WebSocket-Version", "13") in refusal.headers


# ---- the agent's head ------------------------------------------------------------------------------------


def agent_lines(fields, target="/p", **kwargs):
    head = heads.agent_head(request(fields=fields), target=target, **kwargs)
    assert head.endswith(b"\r\n\r\n")
    return head[:-4].decode("latin-1").split("\r\n")


def test_the_agent_gets_the_clients_head_in_its_order_and_spelling():
    fields = [
        ("hOsT", "x:8000"),
        ("X-Own", "a,  b"),
        ("Sec-WebSocket-Protocol", "b ,a"),
        ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"),
        *UPGRADE[1:],
        ("x-own", "c"),
        ("Origin", "http://x:8000"),
    ]
    assert agent_lines(fields, "/a%20b?c=1&d", add=[("Tenantry-Tenant", "acme")]) == [
        "GET /a%20b?c=1&d HTTP/1.1",
        "hOsT: x:8000",
        "X-Own: a,  b",
        "Sec-WebSocket-Protocol: b ,a",
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: bKdPyn3u98cTfZJSh4TNeQ==",
        "x-own: c",
        "Origin: http://x:8000",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Tenantry-Tenant: acme",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "Cookie",
        "Keep-Alive",
        "Proxy-Authorization",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Expect",
        "HTTP2-Settings",
        "Tenantry-Tenant",
        "tenantry-subject",
        "TENANTRY-X",
        "Tenantry_Tenant",
        "Tenantry.Tenant",
        "tenantry!x",
        "Proxy_Authorization",
        "Forwarded",
        "X-Forwarded-For",
        "X-Forwarded-Anything",
        "X-Real-IP",
        "X_Real_IP",
        "x_forwarded_for",
        "X-Named",
    ],
)
def test_what_is_ours_or_this_hops_does_not_reach_the_agent(name):
    """The token never reaches an agent, and no client speaks in our name."""
    fields = [*UPGRADE, ("Connection", "x-named"), (name, "secret")]
    assert "secret" not in "\n".join(agent_lines(fields))


def test_forwarded_headers_of_a_trusted_proxy_reach_the_agent():
    lines = agent_lines([*UPGRADE, ("X-Forwarded-For", "1.2.3.4"), ("Forwarded", "for=1.2.3.4")], trusted=True)
    assert "X-Forwarded-For: 1.2.3.4" in lines
    assert "Forwarded: for=1.2.3.4" in lines


def test_naming_the_handshake_in_connection_does_not_take_it_away():
    fields = [*UPGRADE, ("Connection", "host, sec-websocket-key, sec-websocket-version, upgrade, tenantry-tenant")]
    lines = agent_lines(fields, add=[("Tenantry-Tenant", "acme")])
    assert {"Host: x", "Sec-WebSocket-Version: 13", "Tenantry-Tenant: acme", "Upgrade: websocket"} <= set(lines)
    assert sum(line.lower().startswith("connection:") for line in lines) == 1


@pytest.mark.parametrize(
    ("offered", "passed"),
    [
        ("tenantry.bearer.abc", None),
        ("tenantry.bearer.abc, chat", "chat"),
        ("chat ,tenantry.bearer.abc,  superchat", "chat, superchat"),
        ("TENANTRY.Bearer.abc, chat", "chat"),
        ("chat,  superchat", "chat,  superchat"),
    ],
)
def test_a_token_offered_as_subprotocol_stays_here(offered, passed):
    lines = [line for line in agent_lines([*UPGRADE, ("Sec-WebSocket-Protocol", offered)]) if "Protocol" in line]
    assert lines == ([] if passed is None else [f"Sec-WebSocket-Protocol: {passed}"])


@pytest.mark.parametrize(
    ("target", "passed"),
    [
        ("/", "/"),
        ("/?", "/?"),
        ("/?a=1&b", "/?a=1&b"),
        ("/?token=x", "/"),
        ("/?ticket=x", "/"),
        ("/?a=1&token=x&b=%20", "/?a=1&b=%20"),
        ("/?tok%65n=x&a", "/?a"),
        ("/?token", "/"),
        ("/?token=x&token=y", "/"),
        ("/?mytoken=1&Token=2", "/?mytoken=1&Token=2"),
        ("/?a=?token=x", "/?a=?token=x"),
        ("/?&&", "/?&&"),
    ],
)
def test_a_token_or_ticket_in_the_query_stays_here(target, passed):
    assert agent_lines(UPGRADE, target)[0] == f"GET {passed} HTTP/1.1"


@pytest.mark.parametrize("target", ["", "x", "/a b", "/a\r\nX: y", "/\u00e9", "http://x/", "/a\x00"])
def test_a_target_that_would_break_the_head_raises(target):
    with pytest.raises(ValueError, match=r"target|ascii"):
        agent_lines(UPGRADE, target)


@pytest.mark.parametrize("field", [("A b", "c"), ("A", "b\r\nC: d"), ("", "x"), ("A:", "x"), ("A", "\u2192")])
def test_an_added_header_that_would_break_the_head_raises(field):
    with pytest.raises(ValueError, match=r"header|latin-1"):
        agent_lines(UPGRADE, add=[field])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Connection", "X-A", "Cookie", "tenantry-x", "Authorization", "Sec-WebSocket-Protocol"]),
            st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12),
        ),
        max_size=6,
    )
)
def test_the_agents_head_is_always_one_valid_upgrade(extra):
    head = heads.agent_head(request(fields=[*UPGRADE, *extra]), target="/", add=[("Tenantry-Tenant", "a")])
    again = parsed(head)
    assert heads.refusal(again) is None
    assert heads.upgrade_refusal(again) is None
    values = [value for name, value in again.headers if name == b"tenantry-tenant"]
    assert values == [b"a"]


# ---- problems --------------------------------------------------------------------------------------------


def test_a_problem_is_a_whole_response_that_a_parser_takes():
    """S3-05: what failed, whether it can be tried again, and when."""
    raw = heads.problem_response(
        503,
        "connect_failed",
        "All four attempts failed: é",
        retryable=True,
        retry_after_s=1.2,
        extra_headers=[("X-A", "b")],
        now=0,
    )
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.receive_data(raw)
    response, data, end = client.next_event(), client.next_event(), client.next_event()
    assert (response.status_code, response.reason) == (503, b"Service Unavailable")
    fields = dict(response.headers)
    assert fields[b"content-type"] == b"application/problem+json"
    assert fields[b"retry-after"] == b"2"
    assert fields[b"connection"] == b"close"
    assert fields[b"date"] == b"Thu, 01 Jan 1970 00:00:00 GMT"
    assert fields[b"x-a"] == b"b"
    assert json.loads(bytes(data.data)) == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "All four attempts failed: é",
        "code": "connect_failed",
        "retryable": True,
        "retry_after_ms": 1200,
    }
    assert isinstance(end, h11.EndOfMessage)
    assert client.their_state is h11.MUST_CLOSE


def test_a_problem_need_not_close_or_name_a_time():
    raw = heads.problem_response(404, "unknown_tenant", "none", close=False)
    assert b"Connection" not in raw
    assert b"Retry-After" not in raw
    assert b'"retry_after_ms": null' in raw
    assert heads.problem_response(599, "x", "y").startswith(b"HTTP/1.1 599 Error\r\n")


# ---- peers -----------------------------------------------------------------------------------------------

TRUSTED = heads.trusted_networks(["10.0.0.0/8", "::1", "unix"])


@pytest.mark.parametrize(
    ("peer", "fields", "found"),
    [
        ("1.2.3.4", {"x-forwarded-for": "9.9.9.9"}, "1.2.3.4"),
        ("10.0.0.1", {}, "10.0.0.1"),
        ("10.0.0.1", {"x-forwarded-for": "9.9.9.9"}, "9.9.9.9"),
        ("unix", {"x-forwarded-for": "9.9.9.9"}, "9.9.9.9"),
        ("::ffff:10.0.0.1", {"x-forwarded-for": "9.9.9.9"}, "9.9.9.9"),
        ("10.0.0.1", {"x-forwarded-for": "6.6.6.6, 9.9.9.9, 10.1.1.1"}, "9.9.9.9"),
        ("10.0.0.1", {"x-forwarded-for": "10.0.0.3, 10.0.0.2"}, "10.0.0.3"),
        ("10.0.0.1", {"x-forwarded-for": "spoofed, 10.0.0.2"}, "10.0.0.2"),
        ("10.0.0.1", {"x-forwarded-for": "garbage"}, "10.0.0.1"),
        ("10.0.0.1", {"x-forwarded-for": ""}, "10.0.0.1"),
        ("10.0.0.1", {"x-forwarded-for": "[2001:db8::1]:443"}, "2001:db8::1"),
        ("10.0.0.1", {"x-forwarded-for": "9.9.9.9:1234"}, "9.9.9.9"),
        ("10.0.0.1", {"forwarded": 'for="[2001:db8::1]:47";proto=https'}, "2001:db8::1"),
        ("10.0.0.1", {"forwarded": "for=6.6.6.6, For=9.9.9.9;by=10.0.0.1"}, "9.9.9.9"),
        ("10.0.0.1", {"forwarded": "for=unknown"}, "10.0.0.1"),
        ("10.0.0.1", {"forwarded": "for=_hidden, for=10.0.0.2"}, "10.0.0.2"),
        ("10.0.0.1", {"forwarded": "for=9.9.9.9", "x-forwarded-for": "9.9.9.9"}, "9.9.9.9"),
        ("10.0.0.1", {"forwarded": "for=9.9.9.9", "x-forwarded-for": "6.6.6.6"}, "10.0.0.1"),
    ],
)
def test_who_the_client_is_counts_only_from_a_trusted_proxy(peer, fields, found):
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    assert heads.peer_address(peer, headers, TRUSTED) == found


@pytest.mark.parametrize(
    ("peer", "fields", "found"),
    [
        ("1.2.3.4", {"x-forwarded-proto": "https"}, "http"),
        ("10.0.0.1", {}, "http"),
        ("10.0.0.1", {"x-forwarded-proto": "https"}, "https"),
        ("10.0.0.1", {"x-forwarded-proto": "http, WSS"}, "https"),
        ("10.0.0.1", {"x-forwarded-proto": "gopher"}, "http"),
        ("10.0.0.1", {"forwarded": "for=a;proto=http, for=b;proto=https"}, "https"),
        ("10.0.0.1", {"forwarded": "proto=https", "x-forwarded-proto": "http"}, "http"),
    ],
)
def test_the_scheme_counts_only_from_a_trusted_proxy(peer, fields, found):
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    assert heads.peer_scheme("http", peer, headers, TRUSTED) == found


def test_a_proxy_that_is_no_network_is_an_error():
    with pytest.raises(ValueError, match="nonsense"):
        heads.trusted_networks(["nonsense"])


@pytest.mark.parametrize(
    ("peer", "key"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("memory", "memory"),
    ],
)
def test_an_ipv6_customer_is_one_peer(peer, key):
    assert heads.peer_key(peer) == key
