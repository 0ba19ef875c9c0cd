"""What waits for a store that fails."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from supervisor.errors import StoreError
from supervisor.telemetry import captured_telemetry
from supervisor.tenant.outbox import MAX_WAITING, Outbox


class Desk:
    """An outbox, and a disk that is full until it is not."""

    def __init__(self):
        telemetry, self.events = captured_telemetry()
        self.outbox, self.written, self.full = Outbox(telemetry.log), [], True

    async def write(self, number):
        await trio.lowlevel.checkpoint()
        if self.full:
            raise StoreError("the disk is full")
        self.written.append(number)


async def test_writes_happen_in_order_and_a_failed_one_is_asked_again(autojump_clock):
    desk = Desk()
    outbox = desk.outbox
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        for number in range(3):
            outbox.post(partial(desk.write, number))
        await trio.sleep(5)
        with pytest.raises(StoreError, match="the disk is full"):
            await outbox.flush()
        desk.full = False
        await trio.sleep(2)
        assert desk.written == [0, 1, 2]
        assert [event["event"] for event in desk.events] == ["journal_delayed", "journal_resumed"]
        nursery.cancel_scope.cancel()


async def test_what_is_lost_to_a_long_failure_is_the_oldest_and_is_told(autojump_clock):
    desk = Desk()
    outbox = desk.outbox
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        for number in range(MAX_WAITING + 5):
            outbox.post(partial(desk.write, number))
            if not number:
                await trio.sleep(0.5)
        desk.full = False
        await trio.sleep(2)
        assert desk.written == [0, *range(6, MAX_WAITING + 5)]
        assert [event["event"] for event in desk.events] == ["journal_delayed", "journal_loses", "journal_resumed"]
        assert desk.events[-1]["lost"] == 5
        nursery.cancel_scope.cancel()
