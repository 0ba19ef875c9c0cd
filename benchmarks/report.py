"""The one table, and the targets with their figures. Pure: from the results as they are in the JSON file."""

from __future__ import annotations

import attrs

NAMES = {
    "direct": "direct",
    "tenantry": "tenantry",
    "nginx": "nginx",
    "haproxy": "haproxy",
    "chp": "configurable-http-proxy",
}
WIDTH = 24
FIRST = 38
SIZE = {64: "64 B", 4096: "4 kB", 65536: "64 kB", 1 << 20: "1 MB"}


@attrs.frozen
class Target:
    """One figure that is to be reached: `at_least` or `at_most` its bound."""

    what: str
    figure: float
    bound: float
    at_least: bool
    unit: str = ""

    @property
    def reached(self):
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    def __str__(self):
        word, sign = ("reached" if self.reached else "MISSED "), (">=" if self.at_least else "<=")
        return f"{word}  {self.what}: {self.figure:.4g}{self.unit} ({sign} {self.bound:g}{self.unit})"


def lines(results):
    """The table, in lines."""
    names = results["contestants"]
    yield _line("", [NAMES[name] for name in names])
    for case in results.get("echo", []):
        yield ""
        yield f"echo, {case['agent']} agent, {SIZE[case['size']]} x {case['connections']}"
        by = case["by"]
        yield _line("  echoes a second (of direct)", [_rate(by[name]) for name in names])
        yield _line("  p50 us (above direct)", [_p50(by[name]) for name in names])
        yield _line("  p99 us", [f"{by[name]['p99_us']:,.0f}" for name in names])
        yield _line("  processor us an echo (agent's own)", [f"{by[name]['cpu_us']:,.1f}" for name in names])
    for agent, by in results.get("connect", {}).items():
        yield ""
        yield f"connect to a running agent, {agent}, p50"
        for key in ("handshake", "echo"):
            words = "handshake answered" if key == "handshake" else "first echo"
            cells = [f"{by[name][f'{key}_ms']:.2f} ({by[name][f'{key}_above_direct_ms']:+.2f})" for name in names]
            yield _line(f"  {words}, ms (above direct)", cells)
    if start := results.get("start"):
        direct, cold, killed = start["direct"], start["cold"], start["killed"]
        yield ""
        yield "start of a bundled agent, p50"
        cells = [f"{direct['handshake_ms']:.0f}", f"{cold['handshake_ms']:.0f}"]
        yield _line("  asleep: handshake answered, ms", cells)
        cells = [f"{direct['echo_ms']:.0f}", f"{cold['echo_ms']:.0f} ({cold['above_direct_ms']:+.0f})"]
        yield _line("  asleep: first echo, ms", cells)
        yield _line("  kill -9: client closed, ms", ["", f"{killed['close_ms']:.1f} ({', '.join(killed['codes'])})"])
        cells = ["", f"{killed['echo_ms']:.0f} ({killed['of_cold']:.2f} of cold)"]
        yield _line("  kill -9: next echo, ms", cells)
    if drain := results.get("drain"):
        yield ""
        yield "1,000 connections over 20 tenants"
        yield _line("  drain: got 1012", ["", f"{drain['got_1012']:.0f}"])
        yield _line("  drain: first 1012, s", ["", f"{drain['first_1012_s']:.2f}"])
        yield _line("  drain: last 1012, s", ["", f"{drain['last_1012_s']:.2f}"])
        yield _line("  drain: exit, s", ["", f"{drain['exit_s']:.2f} (status {drain['exit_status']:.0f})"])
        yield _line("  PSS a connection, kB", ["", _kb(drain["connection_bytes"])])
        yield _line("  PSS supervisor before, MB", ["", _mb(drain["supervisor_bytes"])])
        yield _line("  PSS keeper, one shim, MB", ["", f"{_mb(drain['keeper_bytes'])}, {_mb(drain['shim_bytes'])}"])
        yield _line("  PSS an agent, MB", ["", _mb(drain["agent_bytes"])])
        yield _line("  PSS agents a connection, kB", ["", _kb(drain["agent_connection_bytes"])])
    if idle := results.get("idle"):
        yield ""
        yield f"{idle['tenants']} tenants awake and idle, {idle['seconds']:.0f} s"
        yield _line("  supervisor, % of a core", ["", _percent(idle["supervisor_cores"])])
        yield _line("  keeper and shims, % of a core", ["", _percent(idle["keeper_and_shims_cores"])])
        yield _line("  agents' own, % of a core", [_percent(idle["agents_cores"])])
        yield _line("  PSS supervisor, MB", ["", _mb(idle["supervisor_bytes"])])
        yield _line("  PSS keeper, one shim, MB", ["", f"{_mb(idle['keeper_bytes'])}, {_mb(idle['shim_bytes'])}"])
        yield _line("  PSS an agent, MB", [_mb(idle["agent_bytes"])])
        yield _line("  to start them all, s", ["", f"{idle['started_s']:.1f}"])


def targets(results):
    """What the founding issue asks for, as far as it was measured."""
    for case in results.get("echo", []):
        yield from _echo_targets(case)
    for agent, by in results.get("connect", {}).items():
        ours = by["tenantry"]
        yield Target(
            f"connect, {agent} agent, running: echo above direct", ours["echo_above_direct_ms"], 2.0, False, " ms"
        )
    if start := results.get("start"):
        yield Target("kill -9 to the next echo, of a cold start", start["killed"]["of_cold"], 1.5, False)
    if drain := results.get("drain"):
        yield Target("drain: connections that got 1012", drain["got_1012"], 1000, True)
        yield Target("drain: SIGTERM to exit", drain["exit_s"], 2.0, False, " s")
        yield Target(
            "supervisor's memory a spliced idle connection", drain["connection_bytes"] / 1e3, 40.0, False, " kB"
        )
    if idle := results.get("idle"):
        used = idle["supervisor_cores"] + idle["keeper_and_shims_cores"]
        yield Target(f"{idle['tenants']} tenants awake and idle", used * 100, 1.0, False, " % of a core")


def _echo_targets(case):
    agent, size, connections, ours = case["agent"], case["size"], case["connections"], case["by"]["tenantry"]
    what = f"echo, {agent} agent, {SIZE[size]} x {connections}"
    if connections == 16 and agent == "fast" and size != 4096 and "rate_of_nginx" in ours:
        yield Target(f"{what}: of nginx's rate", ours["rate_of_nginx"], 0.5 if size == 64 else 1.0, True)
    if connections == 16 and agent == "bundled":
        yield Target(f"{what}: of the direct rate", ours["rate_of_direct"], 0.85, True)
    if connections == 1 and size in (64, 65536):
        bound = 60.0 if size == 64 else 120.0
        yield Target(f"{what}: added p50", ours["p50_above_direct_us"], bound, False, " us")


def _line(first, cells):
    return (f"{first:{FIRST}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)).rstrip()


def _rate(figures):
    return f"{figures['rate']:,.0f} ({figures['rate_of_direct']:.2f})"


def _p50(figures):
    return f"{figures['p50_us']:,.0f} ({figures['p50_above_direct_us']:+,.0f})"


def _kb(size):
    return f"{size / 1e3:.1f}"


def _mb(size):
    return f"{size / 1e6:.1f}"


def _percent(cores):
    return f"{cores * 100:.2f}"
