from __future__ import annotations

import io
import json
import os
import threading
import time

import pytest
import structlog
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock

from supervisor.settings import LogSettings
from supervisor.telemetry import Metrics, captured_telemetry, measure_loop_lag, open_telemetry


class Terminal(io.StringIO):
    def isatty(self):
        return True


def logged(call, *, log_format="json", level="info", stream=None):
    sink = stream or io.StringIO()
    with open_telemetry(LogSettings(format=log_format, level=level), stream=sink) as telemetry:
        call(telemetry.log)
    return sink.getvalue()


# ---- the lines ------------------------------------------------------------------------------------------------


def test_an_event_is_one_line_with_tenant_generation_and_connection_first():
    def call(log):
        log.bind(connection="c1", tenant="acme", generation=3).info("agent_started", pid=7)

    told = json.loads(logged(call))
    assert list(told) == ["time", "level", "event", "tenant", "generation", "connection", "pid"]
    assert (told["level"], told["event"], told["tenant"], told["generation"]) == ("info", "agent_started", "acme", 3)
    line = logged(call, log_format="text")
    assert line.endswith("Z info    agent_started tenant=acme generation=3 connection=c1 pid=7\n")


def test_text_goes_to_a_terminal_and_json_elsewhere():
    assert logged(lambda log: log.info("x"), log_format="auto", stream=Terminal()).endswith("info    x\n")
    assert json.loads(logged(lambda log: log.info("x"), log_format="auto"))["event"] == "x"
    assert json.loads(logged(lambda log: log.info("x"), log_format="json", stream=Terminal()))["event"] == "x"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_an_agent_says_cannot_begin_a_line_or_address_a_terminal(log_format):
    evil = '\x1b[2J\nlevel=error "quoted"\r\u2028\u202e\x00\ud800'
    told = logged(lambda log: log.info("agent_output", line=evil, **{"evil\nkey": 1}), log_format=log_format)
    assert told.count("\n") == 1
    assert told.isascii()
    assert told.rstrip("\n").isprintable()
    if log_format == "json":
        assert json.loads(told)["line"] == evil


def test_values_with_spaces_and_quotes_are_quoted_in_text():
    told = logged(
        lambda log: log.info("x", a="", b="a b", c='q"', d="back\\slash", e=None, f="grün"), log_format="text"
    )
    assert told.split("x ", 1)[1] == 'a="" b="a b" c="q\\"" d=back\\slash e=None f=grün\n'


def test_a_traceback_is_inside_the_line_in_json_and_below_it_in_text():
    def call(log):
        try:
            raise ExceptionGroup("both", [ValueError("first\nline"), KeyError("second")])
        except ExceptionGroup:
            log.exception("broken", tenant="acme")

    told = logged(call)
    assert told.count("\n") == 1
    assert "ValueError: first" in json.loads(told)["exception"]
    head, *rest = logged(call, log_format="text").splitlines()
    assert head.endswith("error   broken tenant=acme")
    assert all(line.startswith("    ") for line in rest)
    assert any("KeyError: 'second'" in line for line in rest)


def test_levels_below_the_set_one_are_left_out():
    def call(log):
        for level in ("debug", "info", "warning", "error"):
            getattr(log, level)(f"a_{level}")

    assert [json.loads(line)["event"] for line in logged(call, level="warning").splitlines()] == [
        "a_warning",
        "a_error",
    ]
    assert len(logged(call, level="debug").splitlines()) == 4


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_log_call_never_raises(log_format):
    class Untellable:
        def __str__(self):
            raise RuntimeError("no")

    circle = []
    circle.append(circle)

    def call(log):
        log.info("a", value=Untellable())
        log.info("b", value=circle)
        log.info("c", value={(1, 2): b"\xff"})
        log.info("d", exc_info=True)
        log.info("e", exc_info=ValueError("given"))

    told = logged(call, log_format=log_format).splitlines()
    assert "cannot be told: RuntimeError" in told[0]
    assert len([line for line in told if not line.startswith("    ")]) == 5


# ---- the sink -------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    yield read, stream
    os.close(read)
    stream.close()


def drain(fd, into):
    while data := os.read(fd, 65536):
        into.append(data)


def test_a_stuck_sink_blocks_nobody_and_what_was_dropped_is_told_first(pipe):
    """Lines written and lines dropped are all lines; the loss is told before the next line."""
    read, stream = pipe
    received = []
    with open_telemetry(LogSettings(), stream=stream) as telemetry:
        longest_s = 0.0
        for number in range(10_000):
            begun = time.perf_counter()
            telemetry.log.info("event", number=number, filler="x" * 1000)
            longest_s = max(longest_s, time.perf_counter() - begun)
        assert longest_s < 0.2
        dropped = telemetry.metrics.log_lines_dropped._value.get()
        assert dropped > 1000
        reader = threading.Thread(target=drain, args=(read, received))
        reader.start()
        # Now there is room again, and this line is told after the loss.
        while b"log_lines_dropped" not in b"".join(received):
            time.sleep(0.01)
        telemetry.log.info("last")
    stream.close()
    reader.join(5)
    events = [json.loads(line) for line in b"".join(received).splitlines()]
    told = [event["lines"] for event in events if event["event"] == "log_lines_dropped"]
    assert sum(told) == dropped
    numbers = [event["number"] for event in events if event["event"] == "event"]
    assert len(numbers) + dropped == 10_000
    assert numbers == sorted(numbers)
    assert events[-1]["event"] == "last"


@pytest.mark.slow
def test_closing_waits_for_a_stuck_sink_no_longer_than_a_second(pipe):
    _, stream = pipe
    begun = time.monotonic()
    with open_telemetry(LogSettings(), stream=stream) as telemetry:
        for _ in range(1000):
            telemetry.log.info("x" * 1000)
        begun = time.monotonic()
    assert 0.9 < time.monotonic() - begun < 1.9
    os.set_blocking(pipe[0], False)
    # What the thread still holds goes out once somebody reads; then it ends.
    while any(thread.name == "tenantry log" for thread in threading.enumerate()):
        try:
            os.read(pipe[0], 1 << 20)
        except BlockingIOError:
            time.sleep(0.01)


def test_a_non_blocking_sink_loses_nothing(pipe):
    read, stream = pipe
    os.set_blocking(stream.fileno(), False)
    received = []
    reader = threading.Thread(target=drain, args=(read, received))
    with open_telemetry(LogSettings(), stream=stream) as telemetry:
        for _ in range(500):
            telemetry.log.info("x" * 1000)
        time.sleep(0.05)
        reader.start()
    stream.close()
    reader.join(5)
    assert b"".join(received).count(b"\n") == 500
    assert telemetry.metrics.log_lines_dropped._value.get() == 0


def test_a_sink_that_fails_counts_the_lines_and_recovers():
    class Failing(io.StringIO):
        broken = True

        def write(self, text):
            if self.broken:
                raise OSError(28, "No space left on device")
            return super().write(text)

    sink = Failing()
    with open_telemetry(LogSettings(), stream=sink) as telemetry:
        until = time.monotonic() + 5
        for lost in (1, 2):
            telemetry.log.info("lost")
            while telemetry.metrics.log_lines_dropped._value.get() < lost and time.monotonic() < until:
                time.sleep(0.001)
        sink.broken = False
        telemetry.log.info("kept")
    first, second = map(json.loads, sink.getvalue().splitlines())
    assert (first["event"], first["lines"]) == ("log_lines_dropped", 2)
    assert second["event"] == "kept"


def test_the_last_lines_are_there_when_it_is_closed_and_no_thread_is_left():
    before = threading.active_count()
    told = logged(lambda log: [log.info("x") for _ in range(5000)])
    assert told.count("\n") == 5000
    assert threading.active_count() == before


def test_the_bound_is_of_what_waits_and_not_of_all_lines():
    sink = io.StringIO()
    with open_telemetry(LogSettings(), stream=sink) as telemetry:
        for round_number in range(1, 4):
            for _ in range(30):
                telemetry.log.info("x" * 100_000)
            until = time.monotonic() + 5
            while sink.tell() < round_number * 3_000_000 and time.monotonic() < until:
                time.sleep(0.001)
        assert telemetry.metrics.log_lines_dropped._value.get() == 0
    assert sink.getvalue().count("\n") == 90


def test_two_supervisors_in_one_process_do_not_mix_and_nothing_global_is_set():
    config = structlog.get_config()
    one, two = io.StringIO(), io.StringIO()
    with (
        open_telemetry(LogSettings(), stream=one) as first,
        open_telemetry(LogSettings(format="text", level="error"), stream=two) as second,
    ):
        first.log.info("one")
        second.log.error("two")
        second.log.info("left_out")
        first.metrics.drains.inc()
        assert b"tenantry_drains_total 1.0" in first.metrics.render()
        assert b"tenantry_drains_total 0.0" in second.metrics.render()
    assert json.loads(one.getvalue())["event"] == "one"
    assert two.getvalue().endswith("error   two\n")
    assert structlog.get_config() == config


def test_a_program_that_configures_structlog_does_not_change_ours():
    structlog.configure(processors=[lambda *_: pytest.fail("the program's own processors were used")])
    try:
        assert json.loads(logged(lambda log: log.bind(a=1).info("x")))["event"] == "x"
    finally:
        structlog.reset_defaults()


def test_captured_events_are_dicts():
    telemetry, events = captured_telemetry()
    telemetry.log.bind(tenant="acme").debug("seen", n=1)
    assert events == [{"event": "seen", "level": "debug", "tenant": "acme", "n": 1}]


# ---- metrics --------------------------------------------------------------------------------------------------


def test_metrics_are_named_with_their_units_and_parse():
    metrics = Metrics()
    metrics.starts.labels("ready").inc()
    metrics.connects.labels("0").inc()
    metrics.start_seconds.observe(0.1)
    metrics.bytes_up.inc(10)
    metrics.zombies.set_function(lambda: 3)
    metrics.tenants.labels("asleep").set(2)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert metrics.content_type.startswith("text/plain; version=0.0.4")
    for name, family in families.items():
        assert name.startswith("tenantry_")
        assert family.documentation.endswith(".")
        unit = name.rpartition("_")[2]
        assert family.type != "histogram" or unit == "seconds"
        assert not name.endswith("_created")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples["tenantry_agent_starts_total", "ready"] == 1
    assert samples["tenantry_transferred_bytes_total", "up"] == 10
    assert samples["tenantry_transferred_bytes_total", "down"] == 0
    assert samples["tenantry_zombies",] == 3
    assert samples["tenantry_tenants", "asleep"] == 2
    assert not [name for name, *_ in samples if name.endswith("_created")]


def test_labels_take_few_values_whatever_clients_send():
    metrics = Metrics()
    for code in range(65536):
        metrics.count_close(code, "agent")
    metrics.count_close(1012, "supervisor")
    for method in ("GET", "get", "X" * 100, "BREW"):
        metrics.count_http(method, 404)
    told = metrics.render().decode()
    assert 'tenantry_closes_total{code="3xxx",side="agent"} 1000.0' in told
    assert 'tenantry_closes_total{code="1012",side="supervisor"} 1.0' in told
    assert 'tenantry_http_requests_total{method="other",status="404"} 3.0' in told
    assert 'tenantry_closes_total{code="other",side="agent"}' in told
    assert len(told.splitlines()) < 250


async def test_a_loop_that_is_late_is_seen(mock_clock: MockClock):
    metrics = Metrics()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(measure_loop_lag, metrics)
        await trio.testing.wait_all_tasks_blocked()
        for jump in (1.0, 1.5, 1.0):
            mock_clock.jump(jump)
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    told = metrics.render().decode()
    assert "tenantry_loop_lag_seconds_count 3.0" in told
    assert "tenantry_loop_lag_seconds_sum 0.5" in told
