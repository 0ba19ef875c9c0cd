"""What an agent answers, and what of it may go on to a client."""

from __future__ import annotations

import h11
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import memory_stream_pair

from supervisor.errors import AgentProtocolError, AgentUnreachable
from supervisor.tenant.handshake import MAX_HEAD_BYTES, exchange, probe_head

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-Mine: 1\r\n\r\n"


async def answered(*pieces: bytes):
    """The answer to pieces that come one by one, and then the end; and the stream."""
    ours, theirs = memory_stream_pair()

    async def agent():
        await theirs.receive_some()
        for piece in pieces:
            await theirs.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
        await theirs.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent)
        answer = await exchange(ours, probe_head("acme"))
        body = b""
        if answer.status != 101:
            async for data in answer.body(ours):
                body += data
        nursery.cancel_scope.cancel()
    return answer, body


async def test_an_upgrade_goes_on_in_the_agents_words():
    answer, _ = await answered(SWITCH + b"\x81\x02hi")
    assert (answer.status, answer.head, answer.rest) == (101, SWITCH, b"\x81\x02hi")


@given(cut=st.integers(1, len(SWITCH) + 3))
def test_an_answer_cut_anywhere_is_the_same_answer(cut):
    whole = SWITCH + b"\x81\x02hi"

    async def main():
        ours, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery:

            async def agent():
                await theirs.send_all(whole[:cut])
                await trio.testing.wait_all_tasks_blocked()
                await theirs.send_all(whole[cut:])

            nursery.start_soon(agent)
            answer = await exchange(ours, probe_head("acme"))
            assert answer.head == SWITCH
            assert (b"\x81\x02hi").startswith(answer.rest)

    trio.run(main)


async def test_a_103_before_the_answer_is_not_the_answer():
    answer, _ = await answered(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + SWITCH)
    assert answer.head == SWITCH


EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 403 No\r\nContent-Length: 5\r\n\r\nhello" + EVIL, b"hello"),
        (b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n" + EVIL, b"hello"),
        (b"HTTP/1.1 204 None\r\nContent-Length: 5\r\n\r\n" + EVIL, b""),
        (b"HTTP/1.1 404 No\r\n\r\nto the end", b"to the end"),
    ],
)
async def test_a_refusal_is_one_answer_whatever_follows_it(raw, body):
    """RFC 9112 section 11.1: no second answer for a proxy in front of us to take for the next client's."""
    answer, passed = await answered(raw)
    assert passed == body
    assert b"EVIL" not in answer.head + passed
    assert answer.head.endswith(b"Connection: close\r\n\r\n")
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(answer.head + passed)
    client.receive_data(b"")
    events = []
    while not isinstance(event := client.next_event(), (h11.EndOfMessage, h11.ConnectionClosed)):
        events.append(event)
    assert b"".join(bytes(event.data) for event in events if isinstance(event, h11.Data)) == body


async def test_what_is_for_one_hop_or_the_whole_origin_is_not_passed_on():
    head = b"HTTP/1.1 403 No\r\nSet-Cookie: a=b\r\nKeep-Alive: 5\r\nTransfer-Encoding: chunked\r\nX-Mine: 1\r\n\r\n"
    answer, _ = await answered(head + b"0\r\n\r\n")
    assert answer.head == b"HTTP/1.1 403 No\r\nX-Mine: 1\r\nConnection: close\r\n\r\n"


async def test_a_body_that_ends_early_is_told():
    with pytest.raises((h11.RemoteProtocolError, ExceptionGroup)):
        await answered(b"HTTP/1.1 403 No\r\nContent-Length: 50\r\n\r\nhello")


@pytest.mark.parametrize(
    "raw", [b"x" * 5000 + b"\r\n\r\n", b"HTTP/1.1 101 X\r\nA: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n"]
)
async def test_garbage_is_a_protocol_error_with_few_words(raw):
    ours, theirs = memory_stream_pair()
    await theirs.send_all(raw)
    with pytest.raises(AgentProtocolError, match="not HTTP") as caught:
        await exchange(ours, probe_head("acme"))
    assert len(str(caught.value)) < 300


async def test_an_end_before_the_answer_is_unreachable():
    ours, theirs = memory_stream_pair()
    await theirs.send_eof()
    with pytest.raises(AgentUnreachable, match="before it answered"):
        await exchange(ours, probe_head("acme"))
