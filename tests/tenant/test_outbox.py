"""What waits for a store that fails."""

from __future__ import annotations

import pytest
import trio

from supervisor.errors import StoreError
from supervisor.telemetry import captured_telemetry
from supervisor.tenant.outbox import MAX_WAITING, Outbox


async def test_writes_happen_in_order_and_a_failed_one_is_asked_again(autojump_clock):
    telemetry, events = captured_telemetry()
    outbox, written, full = Outbox(telemetry.log), [], True

    def writes(number):
        async def write():
            await trio.lowlevel.checkpoint()
            if full:
                raise StoreError("the disk is full")
            written.append(number)

        return write

    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        for number in range(3):
            outbox.post(writes(number))
        await trio.sleep(5)
        with pytest.raises(StoreError, match="the disk is full"):
            await outbox.flush()
        full = False
        await trio.sleep(2)
        assert written == [0, 1, 2]
        assert [event["event"] for event in events] == ["journal_delayed", "journal_resumed"]
        nursery.cancel_scope.cancel()


async def test_what_is_lost_to_a_long_failure_is_the_oldest_and_is_told(autojump_clock):
    telemetry, events = captured_telemetry()
    outbox, written, full = Outbox(telemetry.log), [], True

    def writes(number):
        async def write():
            await trio.lowlevel.checkpoint()
            if full:
                raise StoreError("the disk is full")
            written.append(number)

        return write

    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        for number in range(MAX_WAITING + 5):
            outbox.post(writes(number))
            if not number:
                await trio.sleep(0.5)
        full = False
        await trio.sleep(2)
        assert written == [0, *range(6, MAX_WAITING + 5)]
        assert [event["event"] for event in events] == ["journal_delayed", "journal_loses", "journal_resumed"]
        assert events[-1]["lost"] == 5
        nursery.cancel_scope.cancel()
