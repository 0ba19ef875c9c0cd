"""What the supervisor tells its operator: a log of events, one line each, and Prometheus metrics.

Both are objects that are passed on; nothing here is global, so two supervisors in one process do not mix. A
log call never raises and never blocks: a thread of its own writes, and what the sink does not take in time
is dropped, counted, and told as soon as the sink takes lines again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

import attrs
import structlog
import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client.metrics_core import Metric
    from structlog.typing import FilteringBoundLogger

    from supervisor.settings import LogSettings

    Event = dict[str, Any]
    Processor = Callable[[object, str, Event], Event]

# What waits for a sink that does not take lines, before the next ones are dropped.
_MAX_QUEUE_BYTES: Final = 4 * 1024 * 1024
_MAX_WRITE_BYTES: Final = 64 * 1024
_FLUSH_S: Final = 1.0
_FIRST_KEYS: Final = ("tenant", "generation", "connection")


@attrs.frozen
class Telemetry:
    """The log and the metrics of one supervisor.

    An event is a short name, everything else a field: `log.info("agent_started", tenant="acme")`.
    `log.bind(...)` gives a log whose events all carry those fields.
    """

    log: FilteringBoundLogger
    metrics: Metrics


@contextlib.contextmanager
def open_telemetry(settings: LogSettings, *, stream: TextIO | None = None) -> Iterator[Telemetry]:
    """Logs to `stream`, by default stderr, as text if it is a terminal and as JSON otherwise.

    Leaving waits at most a second for the sink to take the last lines, and leaves the stream open.
    """
    sink = sys.stderr if stream is None else stream
    text = settings.format == "text" or (settings.format == "auto" and sink.isatty())
    render = _render_text if text else _render_json
    metrics = Metrics()
    processors: list[Processor] = [_add_time, _add_level, _add_traceback]

    def told_later(lines: int) -> str:
        event: Event = {"event": "log_lines_dropped", "lines": lines}
        for processor in processors:
            event = processor(None, "warning", event)
        return render(None, "warning", event)

    writer = _LineWriter(sink, told_later, metrics.log_lines_dropped.inc)
    try:
        yield Telemetry(_logger([*processors, render], settings.level, writer.write), metrics)
    finally:
        writer.close(_FLUSH_S)


def captured_telemetry() -> tuple[Telemetry, list[dict[str, Any]]]:
    """For tests: every event, debug included, is appended to the list as a dict with `event` and `level`."""
    events: list[dict[str, Any]] = []

    def capture(_logger: object, _method: str, event: Event) -> Any:
        events.append(dict(event))
        raise structlog.DropEvent

    return Telemetry(_logger([_add_level, capture], "debug", lambda line: None), Metrics()), events


async def measure_loop_lag(metrics: Metrics, *, every_s: float = 1.0) -> None:
    """Runs until cancelled: how much later than asked Trio's loop runs a task, seen once in `every_s`."""
    while True:
        due = trio.current_time() + every_s
        await trio.sleep_until(due)
        metrics.loop_lag_seconds.observe(trio.current_time() - due)


class Metrics:
    """Every metric, in a registry of its own. Labels take few values, whatever clients send."""

    content_type: Final = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"tenantry_{name}", told, labels, registry=registry)

        def gauge(name: str, told: str, *labels: str) -> Gauge:
            return Gauge(f"tenantry_{name}", told, labels, registry=registry)

        def seconds(name: str, told: str, *buckets: float) -> Histogram:
            return Histogram(f"tenantry_{name}_seconds", told, buckets=buckets, registry=registry)

        # fmt: off
        self.starts = counter("agent_starts", "Agents started, by outcome.", "status")
        self.start_seconds = seconds("agent_start", "From the spawn of an agent until it is ready.",
                                     .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30)
        self.connects = counter("connects", "Connects, by the rung that succeeded.", "rung")
        self.connect_seconds = seconds("connect", "From a client's upgrade to its answer.",
                                       .0005, .001, .0025, .005, .01, .05, .1, .5, 1, 5, 15, 60)
        self.connections = gauge("open_connections", "Client connections now spliced to an agent.")
        self.connections_total = counter("connections", "Client connections spliced to an agent so far.")
        self.closes = counter("closes", "Connections ended, by close code and who closed.", "code", "side")
        self.aborted_mid_frame = counter("aborted_mid_frame", "Connections cut inside a frame.")
        self.bytes = counter("transferred_bytes", "Bytes passed on, up to agents or down.", "direction")
        self.drains = counter("drains", "Drains of the whole supervisor begun.")
        self.drain_seconds = seconds("drain", "From the signal until the last tenant was drained.",
                                     .1, .25, .5, 1, 2.5, 5, 10, 30, 120)
        self.orphans_reaped = counter("orphans_reaped", "Processes adopted from agents, ended and reaped.")
        self.zombies = gauge("zombies", "Children of ours that have ended and are not reaped yet.")
        self.keeper_restarts = counter("keeper_restarts", "Times that the keeper died and was started again.")
        self.loop_lag_seconds = seconds("loop_lag", "How late the event loop ran a task that was due.",
                                        .0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1, 5)
        self.refused = counter("refused", "Connections and requests refused, by reason.", "reason")
        self.http_requests = counter("http_requests", "HTTP answers of our own.", "method", "status")
        self.tenants = gauge("tenants", "Tenants by state.", "state")
        self.agent_output_dropped = counter("agent_output_dropped_lines", "Lines of agents not logged.")
        self.log_lines_dropped = counter("log_lines_dropped", "Log lines that the sink did not take.")
        # fmt: on
        # The two that are counted at every read: their children are made once.
        self.bytes_up = self.bytes.labels("up")
        self.bytes_down = self.bytes.labels("down")

    def count_close(self, code: int, side: str) -> None:
        """Counts the end of a connection. A peer may send any number: what RFC 6455 and IANA do not know is `other`."""
        label = str(code) if 1000 <= code <= 1014 else f"{code // 1000}xxx" if 3000 <= code <= 4999 else "other"
        self.closes.labels(label, side).inc()

    def count_http(self, method: str, status: int) -> None:
        """Counts an HTTP answer; a method that nobody registered is `other`."""
        self.http_requests.labels(method if method in _METHODS else "other", str(status)).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format, of the type `content_type`."""
        return generate_latest(cast("CollectorRegistry", self))

    def collect(self) -> Iterator[Metric]:
        # The library adds a creation time to each series: three times the text, and nobody reads it.
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})


def _logger(processors: Sequence[Any], level: str, write: Callable[[str], None]) -> FilteringBoundLogger:
    logger = structlog.wrap_logger(
        _Sink(write),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return cast("FilteringBoundLogger", logger.bind())


class _Sink:
    """What structlog wraps: the method of each level takes the finished line."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = write


def _add_time(_logger: object, _method: str, event: Event) -> Event:
    event["time"] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return event


def _add_level(_logger: object, method: str, event: Event) -> Event:
    event["level"] = method
    return event


def _add_traceback(_logger: object, _method: str, event: Event) -> Event:
    return cast("Event", structlog.processors.format_exc_info(None, "", event))


def _render_json(_logger: object, _method: str, event: Event) -> str:
    fields = {key: event.pop(key) for key in ("time", "level", "event", *_FIRST_KEYS) if key in event}
    # ASCII only, so that no terminal or viewer is addressed by what an agent wrote.
    try:
        return json.dumps(fields | event, default=_told)
    except (TypeError, ValueError):
        return json.dumps({str(key): _told(value) for key, value in (fields | event).items()})


def _render_text(_logger: object, _method: str, event: Event) -> str:
    head = f"{event.pop('time')} {event.pop('level'):7} {_plain(event.pop('event'))}"
    traceback = event.pop("exception", None)
    first = {key: event.pop(key) for key in _FIRST_KEYS if key in event}
    line = " ".join([head, *(f"{_plain(key)}={_plain(value)}" for key, value in (first | event).items())])
    if traceback is None:
        return line
    return "\n".join([line, *(f"    {_printable(row)}" for row in str(traceback).splitlines())])


def _plain(value: object) -> str:
    text = _told(value)
    bare = text and text.isprintable() and not any(mark in text for mark in " \"'=")
    return text if bare else '"' + _printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _told(value: object) -> str:
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__} that cannot be told: {type(error).__name__}>"


class _LineWriter:
    """Writes lines from a thread of its own; `write` only queues."""

    # Why a thread: considered a non-blocking fd; chose the thread, as O_NONBLOCK belongs to the open file,
    # which stderr shares with the shell and with other programs, and a file on a slow disk ignores it.

    def __init__(self, stream: TextIO, told_later: Callable[[int], str], dropped: Callable[[int], None]) -> None:
        self._put = _raw_write(stream)
        self._told_later = told_later
        self._count_dropped = dropped
        self._lines: deque[bytes] = deque()
        self._queued_bytes = 0
        self._dropped = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tenantry log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        data = line.encode() + b"\n"
        with self._changed:
            if self._closing or self._queued_bytes + len(data) > _MAX_QUEUE_BYTES:
                self._drop(1)
            else:
                self._lines.append(data)
                self._queued_bytes += len(data)
                self._changed.notify()

    def close(self, timeout_s: float) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _drop(self, lines: int) -> None:
        self._dropped += lines
        self._count_dropped(lines)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._closing:
                    self._changed.wait()
                if not self._lines:
                    return
                batch = [self._told_later(self._dropped).encode() + b"\n"] if self._dropped else []
                told, self._dropped = self._dropped, 0
                size = 0
                while self._lines and size < _MAX_WRITE_BYTES:
                    size += len(self._lines[0])
                    batch.append(self._lines.popleft())
            try:
                self._put(b"".join(batch))
            except Exception:
                # Disk full, the reader gone: the lines count as dropped, and the next ones are tried again.
                with self._changed:
                    self._dropped += told
                    self._drop(len(batch) - (told > 0))
            finally:
                with self._changed:
                    self._queued_bytes -= size


def _raw_write(stream: TextIO) -> Callable[[bytes], None]:
    # Past the stream's buffer, where there is a file: a thread that is stuck in a write then holds no lock of
    # the interpreter's, on whose end it would fall.
    try:
        fd = stream.fileno()
    except (OSError, AttributeError):

        def write_text(data: bytes) -> None:
            stream.write(data.decode())
            stream.flush()

        return write_text

    def write_fd(data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                poll.poll()

    return write_fd
