"""One connection over memory streams and a mock clock: every deadline, every limit, every way to end."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from quart import Response
from quart_trio import QuartTrio

from supervisor.gateway import http, parser
from supervisor.settings import LimitSettings
from tests.gateway.front_kit import (
    KEY,
    PLAIN,
    UPGRADE,
    UPGRADE_HEADERS,
    Upgrades,
    make_kit,
    read_all,
    read_until,
    request,
)

CHUNKED = request(b"POST /body", b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n")
POST = request(b"POST /body", b"Content-Length: 5", body=b"hello")


@contextlib.asynccontextmanager
async def connected(kit, pair=trio.testing.memory_stream_pair, peer="memory"):
    """A client's end of a connection that the front serves; at the end it must be over by itself."""
    client, server = pair()
    done = trio.Event()

    async def serve():
        await kit.front.serve_stream(server, peer=peer)
        done.set()

    before = trio.lowlevel.current_statistics().tasks_living
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            client.done = done
            yield client
            await client.aclose()
            await done.wait()
    assert trio.lowlevel.current_statistics().tasks_living == before


def lockstep():
    """Nothing is buffered: a write is done when the other side has read it."""
    return trio.testing.lockstep_stream_pair()


async def ask(kit, data):
    """What one connection answers before it closes; the client waits for that."""
    async with connected(kit) as client:
        await client.send_all(data)
        return await read_all(client)


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def problem(answer: bytes) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head, answer
    assert b"\r\nDate: " in head or b"\r\ndate: " in head
    return json.loads(body)


# ---- requests and answers --------------------------------------------------------------------------------


async def test_an_answer_has_a_date_and_no_banner(autojump_clock):
    answer = await ask(make_kit(), PLAIN)
    head = answer.lower()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\nok")
    assert b"\r\ndate: " in head
    assert b"server" not in head
    assert b"hypercorn" not in head


async def test_an_upgrade_of_another_kind_is_served_as_http(autojump_clock):
    """Neither h2c nor prior knowledge leads to HTTP/2."""
    settings = b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"
    h2c = request(b"GET /ok", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", settings)
    answer = await ask(make_kit(), h2c + h2c)
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b" 101 " not in answer
    answer = await ask(make_kit(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    assert status(answer) == 505


@pytest.mark.parametrize("body", [POST, CHUNKED])
async def test_a_body_arrives_whole(body, autojump_clock):
    kit = make_kit()
    async with connected(kit) as client:
        for _ in range(3):
            await client.send_all(body)
            assert (await read_until(client, b"\r\n\r\n5")).startswith(b"HTTP/1.1 200 ")
    assert [len(body) for body in kit.app.bodies] == [5, 5, 5]


async def test_a_client_that_waits_for_100_continue_gets_it_once(autojump_clock):
    async with connected(make_kit()) as client:
        await client.send_all(request(b"POST /body", b"Content-Length: 5", b"Expect: 100-continue"))
        assert await read_until(client, b"\r\n\r\n") == b"HTTP/1.1 100 \r\n\r\n"
        await client.send_all(b"hello")
        answer = await read_until(client, b"\r\n\r\n5")
        assert b"100" not in answer[:20]


@pytest.mark.parametrize(
    "last",
    [request(b"GET /ok", b"Connection: close"), b"GET /ok HTTP/1.0\r\n\r\n", b"GET /ok HTTP/1.0\r\nHost: x\r\n\r\n"],
)
@pytest.mark.parametrize("behind", [b"", b"\r\n", PLAIN, b"\x00garbage"])
async def test_a_last_request_ends_the_connection_whatever_follows(last, behind, autojump_clock):
    """RFC 9112 section 9.6."""
    kit = make_kit()
    async with connected(kit) as client:
        began = trio.current_time()
        await client.send_all(last + behind)
        answer = await read_all(client)
        assert trio.current_time() - began < 1
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.endswith(b"ok")
    assert len(kit.app.scopes) == 1


async def test_pipelined_requests_are_answered_in_order(autojump_clock):
    paths = [b"/ok", b"/nowhere", b"/slow", b"/ok"]
    answer = await ask(make_kit(), b"".join(request(b"GET " + path) for path in paths))
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200", b"200"]


async def test_pipelining_is_bounded_in_memory(autojump_clock):
    """A client that writes ahead of a slow answer is no longer read from."""
    kit = make_kit(limits={"max_head_bytes": 1000})
    async with connected(kit, lockstep) as client:
        await client.send_all(request(b"GET /forever"))
        sent = 0
        with trio.move_on_after(60):
            while True:
                await client.send_all(b"GET /ok HTTP/1.1\r\n" * 10)
                sent += 180
        assert sent < 200_000
    # Not even one that leaves then, unseen, holds the app for long.
    assert trio.current_time() < 200
    assert kit.app.cancelled == ["forever"]


# ---- the app's faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [b"/crash", b"/silent"])
async def test_an_app_that_fails_before_its_answer_is_told_as_500(path, autojump_clock):
    kit = make_kit()
    async with connected(kit) as client:
        await client.send_all(request(b"GET " + path))
        answer = await read_until(client, b"}")
        assert problem(answer)["code"] == "internal"
        assert status(answer) == 500
        # The connection goes on.
        await client.send_all(PLAIN)
        await read_until(client, b"ok")
    (event,) = kit.events_named("http_app_crashed")
    assert (event["method"], event["path"]) == ("GET", path.decode())
    assert not kit.events_named("connection_crashed")


async def test_an_app_that_fails_inside_its_answer_cuts_it_off_visibly(autojump_clock):
    answer = await ask(make_kit(), request(b"GET /crash-late"))
    assert answer.endswith(b"4\r\nhalf\r\n")  # and no last chunk
    kit = make_kit()
    answer = await ask(kit, request(b"GET /wrong"))
    assert answer.partition(b"\r\n\r\n")[2] == b""
    assert len(kit.events_named("http_app_crashed")) == 1


async def test_an_app_that_answers_without_reading_the_body_ends_the_connection(autojump_clock):
    """Nothing waits for an app that has returned."""
    kit = make_kit()
    body = b"".join(b"1\r\nx\r\n" for _ in range(100))
    async with connected(kit) as client:
        await client.send_all(request(b"POST /deaf", b"Transfer-Encoding: chunked", body=body))
        answer = await read_all(client)
    assert status(answer) == 200


async def test_an_answer_given_early_counts_more_than_what_follows_in_the_body(autojump_clock):
    async def app(scope, receive, send):
        await trio.sleep(1)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    kit = make_kit(app=app)
    body = b"1\r\nx\r\n" * 11 + b"zz\r\n"
    answer = await ask(kit, request(b"POST /", b"Transfer-Encoding: chunked", body=body))
    assert status(answer) == 200
    assert answer.endswith(b"ok")
    assert kit.refused("malformed_request") == 0


async def test_an_app_that_has_answered_is_told_that_its_client_is_gone_as_often_as_it_asks(autojump_clock):
    told = []

    async def app(scope, receive, send):
        assert (await receive())["type"] == "http.request"
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})
        told.extend([await receive(), await receive()])

    async with connected(make_kit(app=app)) as client:
        await client.send_all(PLAIN)
        await read_until(client, b"\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        assert told == [{"type": "http.disconnect"}] * 2


async def test_a_write_that_the_app_gives_up_ends_the_connection_at_once(autojump_clock):
    """The app's timeout works, and nothing follows half a write."""
    kit = make_kit()
    async with connected(kit, lockstep) as client:
        began = trio.current_time()
        await client.send_all(request(b"GET /impatient"))
        got = bytes(await client.receive_some(100))
        await client.done.wait()
        assert trio.current_time() - began == pytest.approx(1)
        got += await read_all(client)
    assert b"rest" not in got


# ---- slow clients ----------------------------------------------------------------------------------------


async def test_a_slow_head_gets_408_at_its_deadline_and_no_drip_extends_it(autojump_clock):
    kit = make_kit()
    async with connected(kit) as client:
        began = trio.current_time()

        async def drip():
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await client.send_all(b"GET /ok HTTP/1.1\r\nHost: x\r\n")
                while True:
                    await trio.sleep(0.9)
                    await client.send_all(b"X: y\r\n")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            answer = await read_until(client, b"}")
            assert trio.current_time() - began == pytest.approx(10)
            nursery.cancel_scope.cancel()
    assert status(answer) == 408
    assert problem(answer)["code"] == "request_timeout"
    assert kit.refused("request_timeout") == 1


async def test_a_client_that_says_nothing_is_closed_without_a_word(autojump_clock):
    kit = make_kit()
    async with connected(kit) as client:
        began = trio.current_time()
        assert await read_all(client) == b""
        assert trio.current_time() - began == pytest.approx(10)
    assert kit.refused("request_timeout") == 0


async def test_a_kept_alive_connection_is_closed_when_idle_and_its_next_head_has_a_deadline_of_its_own(autojump_clock):
    kit = make_kit()
    async with connected(kit) as client:
        await client.send_all(PLAIN)
        await read_until(client, b"ok")
        began = trio.current_time()
        assert await read_all(client) == b""
        assert trio.current_time() - began == pytest.approx(5)
    async with connected(kit) as client:
        await client.send_all(PLAIN)
        await read_until(client, b"ok")
        await trio.sleep(4)
        began = trio.current_time()
        await client.send_all(b"GET")
        assert status(await read_until(client, b"}")) == 408
        assert trio.current_time() - began == pytest.approx(10)
    async with connected(kit) as client:
        # A head that came half behind the last request: due from when that was answered.
        await client.send_all(request(b"GET /slow") + b"GET")
        answer = await read_until(client, b"slow")
        assert trio.current_time() - began > 30
        began = trio.current_time()
        assert b"HTTP/1.1 408" in answer + await read_all(client)
        assert trio.current_time() - began == pytest.approx(10, abs=2.1)


@pytest.mark.parametrize("sent", [b"", b"hel"])
async def test_a_slow_body_gets_408_and_its_app_is_cancelled(sent, autojump_clock):
    """A body that drips is no reason to hold a connection."""
    kit = make_kit()
    async with connected(kit) as client:
        began = trio.current_time()
        await client.send_all(request(b"POST /body", b"Content-Length: 5000", body=sent))
        assert status(await read_until(client, b"}")) == 408
        assert trio.current_time() - began == pytest.approx(10, abs=0.1)
    assert kit.app.cancelled == ["body"]


async def test_a_body_above_the_minimum_rate_may_take_until_its_deadline(autojump_clock):
    kit = make_kit()
    async with connected(kit) as client:
        began = trio.current_time()
        await client.send_all(request(b"POST /body", b"Content-Length: 55000"))
        for _ in range(50):
            await trio.sleep(1)
            await client.send_all(b"x" * 1100)
        assert status(await read_until(client, b"55000")) == 200
        await client.send_all(request(b"POST /body", b"Content-Length: 500000"))
        began = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await trio.sleep(1)
                await client.send_all(b"x" * 1100)
        assert trio.current_time() - began == pytest.approx(61, abs=3)
        assert status(await read_all(client)) == 408


def test_the_bodys_deadline_is_its_rate_up_to_its_end():
    limits = LimitSettings(head_timeout_s=10, body_timeout_s=60, body_min_rate_bytes=1000)
    assert http.body_deadline(5, 0, limits) == 15
    assert http.body_deadline(5, 2000, limits) == 17
    assert http.body_deadline(5, 10**9, limits) == 65


async def test_an_apps_slowness_in_taking_a_body_is_not_the_clients(autojump_clock):
    async def app(scope, receive, send):
        size, more = 0, True
        while more:
            await trio.sleep(5)
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    kit = make_kit(app=app)
    async with connected(kit, lockstep) as client, trio.open_nursery() as nursery:

        async def upload():
            await client.send_all(request(b"POST /", b"Content-Length: 40"))
            for _ in range(40):
                await client.send_all(b"x")

        nursery.start_soon(upload)
        assert status(await read_until(client, b"40\r\n")) == 200
        assert trio.current_time() > 200


async def test_a_client_that_does_not_read_is_given_up_after_a_minute(autojump_clock):
    """A write without progress ends, and with it the app and the connection."""
    kit = make_kit()
    async with connected(kit, lockstep) as client:
        await client.send_all(request(b"GET /big"))
        began = trio.current_time()
        await client.done.wait()
        assert trio.current_time() - began == pytest.approx(60)
    assert kit.refused("answer_stalled") == 1
    assert kit.app.cancelled == ["big"]


async def test_a_client_that_reads_slowly_gets_everything(autojump_clock):
    kit = make_kit()
    async with connected(kit, lockstep) as client:
        await client.send_all(request(b"GET /big"))
        got = 0
        while got < 2_000_000:
            await trio.sleep(30)
            got += len(await client.receive_some(16384))
        assert trio.current_time() > 3600
    assert kit.refused("answer_stalled") == 0


# ---- sizes -----------------------------------------------------------------------------------------------


def head_of(size: int) -> bytes:
    rest = b"GET /ok HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: \r\n\r\n"
    return rest.replace(b"X: ", b"X: " + b"a" * (size - len(rest)))


@pytest.mark.parametrize("step", [1000, 100_000])
@pytest.mark.parametrize(("size", "expected"), [(65_536, 200), (65_537, 431), (90_000, 431), (300_000, 431)])
async def test_a_head_has_64_kib(size, expected, step, autojump_clock):
    head = head_of(size)
    assert len(head) == size
    async with connected(make_kit()) as client:
        with contextlib.suppress(trio.BrokenResourceError):
            for start in range(0, size, step):
                await client.send_all(head[start : start + step])
        assert status(await read_all(client)) == expected


async def test_a_head_that_never_ends_is_refused_when_it_is_too_long(autojump_clock):
    for endless in (b"a" * 70_000, b"GET /" + b"a" * 70_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000):
        answer = await ask(make_kit(), endless)
        assert status(answer) == 431


async def test_a_declared_body_above_the_limit_is_refused_before_the_app_sees_it(autojump_clock):
    kit = make_kit()
    huge = request(b"POST /body", b"Content-Length: 1048577", b"Expect: 100-continue")
    answer = await ask(kit, huge)
    assert status(answer) == 413
    assert kit.app.scopes == []
    assert status(await ask(kit, huge.replace(b"1048577", b"99999999999999999999"))) == 413


async def test_a_refused_client_may_finish_what_it_sends(autojump_clock):
    """RFC 9112 section 9.6: a reset would overtake the refusal; but it does not go on for ever."""
    async with connected(make_kit(), lockstep) as client:
        await client.send_all(request(b"POST /body", b"Content-Length: 2000000"))
        assert status(await read_until(client, b"}")) == 413
        began = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await client.send_all(b"x" * 1000)
                await trio.sleep(0.1)
        assert 1.5 < trio.current_time() - began < 2.5


async def test_a_chunked_body_above_the_limit_is_refused_and_its_app_cancelled(autojump_clock):
    kit = make_kit(limits={"max_body_bytes": 1000})
    chunk = b"1f4\r\n" + b"x" * 500 + b"\r\n"
    async with connected(kit) as client:
        await client.send_all(request(b"POST /body", b"Transfer-Encoding: chunked", body=chunk * 2 + b"0\r\n\r\n"))
        await read_until(client, b"1000")
        await client.send_all(request(b"POST /body", b"Transfer-Encoding: chunked", body=chunk * 2))
        await trio.testing.wait_all_tasks_blocked()
        await client.send_all(b"1\r\nx\r\n")
        assert status(await read_all(client)) == 413
    assert kit.app.cancelled == ["body"]


# ---- clients that leave ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [b"/forever", b"/slow", b"/stream"])
@pytest.mark.parametrize("extra", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Connection: close\r\n"])
@pytest.mark.parametrize("behind", [b"", PLAIN])
async def test_the_app_ends_when_its_client_leaves(path, extra, behind, autojump_clock):
    """Also behind a pipelined request, and where h11 waits for a switch of protocols."""
    kit = make_kit()
    async with connected(kit) as client:
        await client.send_all(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n" + extra + b"\r\n" + behind)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await client.aclose()
        await client.done.wait()
        assert trio.current_time() - began <= 1
    assert kit.app.cancelled == [path.decode().strip("/")]


async def test_a_client_that_only_shut_down_its_writing_gets_a_quick_answer(autojump_clock):
    async with connected(make_kit()) as client:
        await client.send_all(PLAIN)
        await client.send_eof()
        assert status(await read_all(client)) == 200


@pytest.mark.parametrize("cut", [1, 20, len(POST) - 1])
async def test_a_request_that_ends_too_early_is_400(cut, autojump_clock):
    async with connected(make_kit()) as client:
        await client.send_all(POST[:cut])
        await client.send_eof()
        assert status(await read_all(client)) == 400


async def test_a_refusal_of_head_has_no_body(autojump_clock):
    answer = await ask(make_kit(), request(b"HEAD /../x"))
    assert status(answer) == 400
    assert answer.endswith(b"\r\n\r\n")


# ---- upgrades --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "answered"),
    [(b"", 0), (PLAIN, 1), (PLAIN * 3, 3), (POST + CHUNKED, 2), (request(b"GET /slow"), 1)],
)
@pytest.mark.parametrize("eager", [b"", b"\x81\x85abcd.....", b"x" * 100_000])
@pytest.mark.parametrize("at_once", [True, False])
async def test_an_upgrade_takes_the_stream_wherever_it_comes(before, answered, eager, at_once, autojump_clock):
    """First, kept alive or pipelined, with eager frames in the same segment or behind."""
    kit = make_kit()
    async with connected(kit) as client:
        if at_once:
            await client.send_all(before + UPGRADE + eager)
        else:
            for part in (before, UPGRADE, eager):
                await client.send_all(part)
                await trio.testing.wait_all_tasks_blocked()
        answer = await read_until(client, b" 101 Switching Protocols\r\n\r\n")
        while len(answer.partition(b"Protocols\r\n\r\n")[2]) < len(eager):
            answer += await client.receive_some(65536)
        assert answer.endswith(b"Protocols\r\n\r\n" + eager)
        assert answer.count(b"HTTP/1.1 200 ") == answered
        await client.send_all(b"echo")
        await read_until(client, b"echo")
    (upgrade,) = kit.upgrades.seen
    assert (upgrade.peer, upgrade.scheme, upgrade.trusted, upgrade.taken) == ("memory", "http", False, False)
    assert kit.upgrades.targets == [b"/ws"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"GET /ws HTTP/1.0\r\nHost: x\r\n" + UPGRADE_HEADERS + b"\r\n", 400),
        (b"POST /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n" + UPGRADE_HEADERS + b"\r\nhello", 405),
        (b"GET /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n" + UPGRADE_HEADERS + b"\r\nhello", 400),
        (b"GET /ws HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + UPGRADE_HEADERS + b"\r\n0\r\n\r\n", 400),
        (b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n" + KEY + b"\r\n", 400),
        (UPGRADE.replace(b"Version: 13", b"Version: 8"), 426),
    ],
)
async def test_a_wrong_upgrade_is_refused_and_never_handed_over(raw, expected, autojump_clock):
    kit = make_kit()
    assert status(await ask(kit, raw)) == expected
    assert kit.upgrades.seen == []


async def test_nothing_of_http_is_alive_after_an_upgrade(autojump_clock):
    """A spliced connection lives for hours: it must not hold parser, buffers or tasks of its HTTP life."""

    def of_http():
        modules = (
            "hypercorn.protocol",
            "h11._connection",
            "h11._receivebuffer",
            "supervisor.gateway.http",
            "supervisor.gateway.parser",
        )
        kept = (http.HttpService, parser.Flag)
        return [
            thing
            for thing in gc.get_objects()
            if str(type(thing).__module__).startswith(modules) and not isinstance(thing, kept)
        ]

    kit = make_kit()
    gc.collect()
    gc.disable()
    try:
        before = len(of_http())
        async with connected(kit) as client:
            tasks = trio.lowlevel.current_statistics().tasks_living
            await client.send_all(PLAIN + POST + UPGRADE)
            await read_until(client, b" 101 ")
            await trio.testing.wait_all_tasks_blocked()
            assert len(of_http()) == before, of_http()
            assert trio.lowlevel.current_statistics().tasks_living == tasks
    finally:
        gc.enable()


# ---- the same bytes, cut anywhere ------------------------------------------------------------------------


async def _answers(pieces):
    kit = make_kit()
    async with connected(kit) as client:
        with contextlib.suppress(trio.BrokenResourceError):
            for piece in pieces:
                await client.send_all(piece)
                await trio.testing.wait_all_tasks_blocked()
            await client.send_eof()
        answer = await read_all(client)
    lines = [line for line in answer.split(b"\r\n") if not line.lower().startswith(b"date:")]
    return lines, kit.app.bodies, b"".join(kit.upgrades.trailing), kit.upgrades.targets


WHOLE = PLAIN + POST + CHUNKED + UPGRADE + b"\x81\x85abcd....."
STREAMS = [
    WHOLE,
    PLAIN + request(b"GET /a/../b"),
    POST + b"GET / HTTP/1.1\r\nHost: x\r\n y\r\n\r\n",
    request(b"POST /body", b"Transfer-Encoding: chunked", body=b"zz\r\n"),
    request(b"POST /body", b"Content-Length: 1", b"Content-Length: 1", body=b"x"),
]


def _run(pieces):
    return trio.run(partial(_answers, pieces), clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_no_cut_changes_what_a_stream_means(stream):
    expected = _run([stream])
    # The last bytes may be told as trailing or come later; together they are the same.
    for cut in range(1, len(stream)):
        lines, bodies, _, targets = _run([stream[:cut], stream[cut:]])
        assert (lines, bodies, targets) == (expected[0], expected[1], expected[3]), cut


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=30, unique=True))
def test_no_set_of_cuts_changes_what_a_stream_means(cuts):
    edges = [0, *sorted(cuts), len(WHOLE)]
    lines, bodies, _, targets = _run([WHOLE[a:b] for a, b in itertools.pairwise(edges)])
    expected = _run([WHOLE])
    assert (lines, bodies, targets) == (expected[0], expected[1], expected[3])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(WHOLE)), st.integers(0, 20))
def test_no_damage_to_a_stream_does_more_than_end_its_connection(noise, at, removed):
    async def damaged():
        kit = make_kit()
        async with connected(kit) as client:
            with contextlib.suppress(trio.BrokenResourceError):
                await client.send_all(WHOLE[:at] + noise + WHOLE[at + removed :])
                await client.send_eof()
            await read_all(client)
        assert not kit.events_named("connection_crashed"), kit.events
        assert not kit.events_named("http_app_crashed"), kit.events

    trio.run(damaged, clock=trio.testing.MockClock(autojump_threshold=0))


# ---- cancellation ----------------------------------------------------------------------------------------


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope before the n-th step that any task takes."""

    def __init__(self, scope, steps):
        self.scope, self.steps = scope, steps

    def before_task_step(self, task):
        self.steps -= 1
        if self.steps == 0:
            self.scope.cancel()


async def send_and_end(stream, data):
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(data)
        await stream.send_eof()


async def test_a_cancellation_at_any_await_leaves_nothing(autojump_clock):
    for steps in range(1, 10_000):
        kit = make_kit(limits={"connections": 1})
        client, server = trio.testing.memory_stream_pair()
        before = trio.lowlevel.current_statistics().tasks_living
        ended = False
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(send_and_end, client, PLAIN + POST + UPGRADE + b"x")
            trio.lowlevel.add_instrument(instrument := CancelAtStep(scope, steps))
            try:
                with scope, trio.fail_after(100):
                    await kit.front.serve_stream(server)
                    ended = True
            finally:
                trio.lowlevel.remove_instrument(instrument)
        assert trio.lowlevel.current_statistics().tasks_living == before
        with pytest.raises(trio.ClosedResourceError):
            await server.send_all(b"x")
        assert kit.front._places._taken == 0
        assert not kit.front._http
        assert not kit.events_named("connection_crashed"), kit.events
        if ended:
            break
    assert steps > 20


# ---- what is told ----------------------------------------------------------------------------------------


async def test_a_request_is_logged_without_its_query_and_headers(autojump_clock):
    """S3-01's tokens: neither query strings nor headers reach the log."""
    kit = make_kit()
    secret = b"Authorization: Bearer s3cret\r\nCookie: s3cret\r\nX: s3cret"
    streams = [
        request(b"GET /ok?token=s3cret", secret, b"Connection: close"),
        request(b"GET /crash?token=s3cret", secret, b"Connection: close"),
        request(b"GET /../ok?token=s3cret", secret),
        b"GET /s3cret s3cret HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\ns3cret\r\n\r\n",
        request(b"POST /body", b"Transfer-Encoding: chunked", body=b"s3cret\r\n"),
    ]
    for stream in streams:
        assert b"s3cret" not in await ask(kit, stream)
    assert "s3cret" not in repr(kit.events)
    first = kit.events_named("http_request")[0]
    assert (first["level"], first["method"], first["path"], first["status"]) == ("debug", "GET", "/ok", 200)
    assert first["duration_s"] >= 0
    assert kit.metrics.http_requests.labels("GET", "200")._value.get() == 1
    assert kit.refused("malformed_request") == 4


async def test_a_trusted_proxy_tells_the_app_who_the_client_is(autojump_clock):
    forwarded = request(b"GET /ok", b"X-Forwarded-For: 9.9.9.9", b"X-Forwarded-Proto: https", b"Connection: close")
    for trusted, expected in [(("10.0.0.1",), ("9.9.9.9", "https")), ((), ("10.0.0.1", "http"))]:
        kit = make_kit(trusted_proxies=trusted)
        async with connected(kit, peer="10.0.0.1") as client:
            await client.send_all(forwarded)
            await read_all(client)
        (scope,) = kit.app.scopes
        assert (scope["client"][0], scope["scheme"]) == expected
    seen = Upgrades()
    kit = make_kit(trusted_proxies=["10.0.0.1"], on_upgrade=seen)
    async with connected(kit, peer="10.0.0.1") as client:
        await client.send_all(UPGRADE.replace(b"Host: x", b"Host: x\r\nX-Forwarded-For: 9.9.9.9"))
        await read_until(client, b" 101 ")
    assert (seen.seen[0].peer, seen.seen[0].trusted) == ("9.9.9.9", True)


# ---- Quart-Trio ------------------------------------------------------------------------------------------


def quart_app():
    app = QuartTrio(__name__)
    app.cancelled = []

    @app.get("/ok")
    async def ok():
        return "ok"

    @app.post("/body")
    async def body():
        from quart import request as asked

        return str(len(await asked.get_data()))

    @app.get("/forever")
    async def forever():
        try:
            await trio.sleep_forever()
        finally:
            app.cancelled.append("forever")

    @app.get("/stream")
    async def stream():
        async def ticks():
            try:
                while True:
                    yield b"tick"
                    await trio.sleep(1)
            finally:
                app.cancelled.append("stream")

        response = Response(ticks())
        response.timeout = None
        return response

    return app


async def test_quart_trio_connections_close_when_told_to(autojump_clock):
    """50 of 50 stayed open under Hypercorn's own connection class."""
    kit = make_kit(app=quart_app())
    for last in (request(b"GET /ok", b"Connection: close"), b"GET /ok HTTP/1.0\r\nHost: x\r\n\r\n"):
        async with connected(kit) as client:
            began = trio.current_time()
            await client.send_all(PLAIN + POST + last)
            answer = await read_all(client)
            assert trio.current_time() - began < 1
        assert answer.count(b"HTTP/1.1 200 ") == 3
    assert not kit.events_named("connection_crashed")


@pytest.mark.parametrize("path", ["forever", "stream"])
async def test_a_quart_trio_handler_ends_when_its_client_leaves(path, autojump_clock):
    """Whoever leaves takes the work for it along."""
    app = quart_app()
    kit = make_kit(app=app)
    async with connected(kit) as client:
        await client.send_all(request(b"GET /" + path.encode()))
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()
        with trio.fail_after(2):
            await client.done.wait()
    if path == "forever":
        assert app.cancelled == [path]
    assert not kit.events_named("connection_crashed")
    assert not kit.events_named("http_app_crashed")


def test_hypercorns_settings_are_those_we_know(monkeypatch):
    """A key that Hypercorn does not read is an error, and it writes nowhere by itself."""
    config = parser.hypercorn_config(LimitSettings())
    assert config.log.error_logger.name == "tenantry.http"
    assert config.log.access_logger is None
    assert config.include_server_header is False
    assert config.h11_max_incomplete_size == 65536
    monkeypatch.delattr("hypercorn.config.Config.include_server_header")
    with pytest.raises(AttributeError, match="include_server_header"):
        parser.hypercorn_config(LimitSettings())
