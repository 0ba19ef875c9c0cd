"""An agent's output on its way to the log: lines of bounded length, at a bounded rate, nothing dropped untold.

`LineLimiter` is pure: bytes and times go in, events come out. `relay_output` reads the pipe. It holds no more
than one cut line, and reads a flood slower than it is written, so that the agent waits and nobody else.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, Final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from supervisor.settings import SandboxSettings
    from supervisor.telemetry import Telemetry

_READ_BYTES: Final = 64 * 1024
# Between two reads while lines are dropped: at most 6.4 MB/s of a flood are read only to be counted.
_FLOOD_PAUSE_S: Final = 0.01
_WINDOW_S: Final = 1.0


@attrs.frozen
class Line:
    """One line of the agent's. `cut` if it goes on in `Dropped.cut_bytes`."""

    text: str
    cut: bool = False


@attrs.frozen
class Dropping:
    """The first of more lines in this second than the limit: from here on they are counted only."""


@attrs.frozen
class Dropped:
    """What was not logged in the second that is over: whole lines, and bytes cut off long ones."""

    lines: int
    cut_bytes: int


Event = Line | Dropping | Dropped


@attrs.define
class LineLimiter:
    """Splits bytes into lines and limits them. Times are seconds of one clock that never goes back."""

    max_line_bytes: int
    max_lines_per_second: int
    _line: bytearray = attrs.field(factory=bytearray, init=False)
    _line_is_cut: bool = attrs.field(default=False, init=False)
    _window_ends_at: float = attrs.field(default=-math.inf, init=False)
    _lines: int = attrs.field(default=0, init=False)
    _dropped_lines: int = attrs.field(default=0, init=False)
    _cut_bytes: int = attrs.field(default=0, init=False)

    @property
    def flooded(self) -> bool:
        return self._dropped_lines > 0 or self._cut_bytes > 0

    @property
    def due_at(self) -> float:
        """When `tick` has something to tell; infinite if nothing was dropped."""
        return self._window_ends_at if self.flooded else math.inf

    def feed(self, data: bytes, now: float) -> Iterator[Event]:
        yield from self.tick(now)
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            if self._dropped_lines and not self._line and not self._line_is_cut:
                # A flood is counted without a look at its lines, each of which may be one byte.
                last = data.rindex(b"\n") + 1
                self._dropped_lines += data.count(b"\n", start, last)
                start = last
                break
            yield from self._extend(data[start:end])
            if self._line_is_cut:
                self._line_is_cut = False
            else:
                yield from self._put(cut=False)
            start = end + 1
        yield from self._extend(data[start:])

    def tick(self, now: float) -> Iterator[Event]:
        if now >= self._window_ends_at:
            yield from self._close_window()
            self._window_ends_at = now + _WINDOW_S

    def finish(self) -> Iterator[Event]:
        """At the end of the output: an unfinished line, and what is still untold."""
        if self._line:
            yield from self._put(cut=False)
        yield from self._close_window()

    def _extend(self, part: bytes) -> Iterator[Event]:
        if not self._line_is_cut:
            room = self.max_line_bytes - len(self._line)
            self._line += part[:room]
            part = part[room:]
            if part:
                yield from self._put(cut=True)
                self._line_is_cut = True
        self._cut_bytes += len(part)

    def _put(self, *, cut: bool) -> Iterator[Event]:
        line = self._line.removesuffix(b"\r").decode(errors="replace")
        self._line.clear()
        if self._lines < self.max_lines_per_second:
            self._lines += 1
            yield Line(line, cut)
            return
        if self._dropped_lines == 0:
            yield Dropping()
        self._dropped_lines += 1

    def _close_window(self) -> Iterator[Event]:
        if self.flooded:
            yield Dropped(self._dropped_lines, self._cut_bytes)
        self._lines = self._dropped_lines = self._cut_bytes = 0


async def relay_output(
    pipe: int, settings: SandboxSettings, telemetry: Telemetry, *, tenant: str, generation: int
) -> None:
    """Logs what comes through the non-blocking `pipe` until its end. Cancellation logs first what is in it now."""
    limiter = LineLimiter(settings.max_line_bytes, settings.max_lines_per_second)
    log = telemetry.log.bind(tenant=tenant, generation=generation)

    def tell(events: Iterator[Event]) -> None:
        for event in events:
            match event:
                case Line(text, cut):
                    log.info("agent_output", line=text, **({"cut": True} if cut else {}))
                case Dropping():
                    limit = settings.max_lines_per_second
                    log.warning("agent_output_dropping", max_lines_per_second=limit)
                case Dropped(lines, cut_bytes):
                    telemetry.metrics.agent_output_dropped.inc(lines)
                    log.warning("agent_output_dropped", lines=lines, cut_bytes=cut_bytes)

    try:
        while True:
            await trio.lowlevel.checkpoint()
            try:
                data = os.read(pipe, _READ_BYTES)
            except BlockingIOError:
                with trio.move_on_at(limiter.due_at):
                    await trio.lowlevel.wait_readable(pipe)
                tell(limiter.tick(trio.current_time()))
                continue
            if not data:
                break
            tell(limiter.feed(data, trio.current_time()))
            if limiter.flooded:
                await trio.sleep(_FLOOD_PAUSE_S)
    finally:
        with contextlib.suppress(BlockingIOError):
            tell(limiter.feed(os.read(pipe, _READ_BYTES), trio.current_time()))
        tell(limiter.finish())
