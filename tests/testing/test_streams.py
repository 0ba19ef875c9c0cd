"""The streams in memory against Trio's own rules for streams, and where they are like a kernel's sockets."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from supervisor.testing.streams import open_stream_pair


async def test_they_keep_every_rule_of_a_half_closeable_stream():
    async def make():
        return open_stream_pair()

    async def make_clogged():
        left, right = open_stream_pair(buffer_bytes=1)
        await left.send_all(b"x")
        await right.send_all(b"x")
        return left, right

    with trio.fail_after(5):
        await trio.testing.check_half_closeable_stream(make, make_clogged)


async def test_a_small_write_needs_no_reader_and_a_large_one_waits(autojump_clock):
    left, right = open_stream_pair(buffer_bytes=1000)
    await left.send_all(bytes(1000))
    with trio.move_on_after(1) as scope:
        await left.send_all(bytes(5))
    assert scope.cancelled_caught
    assert len(await right.receive_some()) == 1000
    await left.send_all(b"after")
    assert await right.receive_some() == b"after"


async def test_what_was_sent_before_the_end_can_still_be_read():
    left, right = open_stream_pair()
    await left.send_all(b"last words")
    left.close()
    assert left.closed
    assert await right.receive_some(4) == b"last"
    assert await right.receive_some() == b" words"
    assert await right.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await right.send_all(b"x")


async def test_a_send_that_waits_is_woken_by_the_other_ends_close():
    left, right = open_stream_pair(buffer_bytes=1)
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def close_later():
                await trio.testing.wait_all_tasks_blocked()
                right.close()

            with pytest.raises(trio.BrokenResourceError):
                await left.send_all(bytes(10))


def test_no_buffer_at_all_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        open_stream_pair(buffer_bytes=0)
