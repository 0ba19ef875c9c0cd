"""The carrier for any `trio.abc.Stream`: TLS, and memory streams in tests. Two tasks, one a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from supervisor.gateway.carrier import Direction

T = TypeVar("T")

_CHUNK_BYTES: Final = 64 * 1024


@attrs.define(eq=False)
class Pumps:
    """Carries between `client` and `agent`. See `Carrier`."""

    _client: trio.abc.Stream
    _agent: trio.abc.Stream
    _up: Direction
    _down: Direction
    # Only the way up is cut short in a write: an agent that does not read must not keep the client's end unseen,
    # while the client still gets whole what passed before the drop.
    _passing_up: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    async def run(self, conduct: Callable[[], Awaitable[T]], to_agent: bytes, to_client: bytes) -> T:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump_up, to_agent)
            nursery.start_soon(self._pump_down, to_client)
            outcome = await conduct()
            nursery.cancel_scope.cancel(reason="the splice is over")
        return outcome

    def drop(self) -> None:
        self._up.drop()
        self._down.drop()
        self._passing_up.cancel(reason="nothing goes to the agent any more")

    async def finish(self, last: bytes) -> None:
        try:
            if last:
                await self._client.send_all(last)
            await _send_eof(self._client)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._down.refuse()

    async def _pump_up(self, first: bytes) -> None:
        up = self._up
        with self._passing_up:
            await self._pump(up, self._client, self._agent, first)
            if up.passing and not up.failed:
                try:
                    await _send_eof(self._agent)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    up.refuse()
        if not up.ended:
            up.unsent = False
            await self._pump(up, self._client, self._agent, b"")

    async def _pump_down(self, first: bytes) -> None:
        await self._pump(self._down, self._agent, self._client, first)

    async def _pump(
        self, way: Direction, source: trio.abc.Stream, sink: trio.abc.Stream, data: bytes | bytearray
    ) -> None:
        """Carry `data`, then what `source` gives, until it ends."""
        while True:
            if data and (n := way.take(data, len(data))):
                way.unsent = True
                try:
                    await sink.send_all(data if n == len(data) else data[:n])
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    way.refuse()
                else:
                    way.sent()
            try:
                data = await source.receive_some(_CHUNK_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return way.end(failed=True)
            if not data:
                return way.end()


async def _send_eof(stream: trio.abc.Stream) -> None:
    """Shut down writing, where the stream can: TLS cannot without ending both ways."""
    if isinstance(stream, trio.abc.HalfCloseableStream):
        await stream.send_eof()
