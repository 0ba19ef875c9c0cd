"""Throughput and round trips: the same client, agent and messages, by every way; in rounds, so that noise hits all."""

from __future__ import annotations

import statistics

from benchmarks.contestants import AGENTS, open_stage

SIZES = (64, 4096, 65536, 1 << 20)
CONNECTIONS = (1, 16)


async def run(bench):
    rounds, seconds = (3, 0.2) if bench.quick else (7, 0.3)
    sizes = (64, 65536) if bench.quick else SIZES
    measured = []
    for agent in AGENTS:
        async with open_stage(bench.directory / f"echo-{agent}", bench.client, agent, bench.proxies) as (stage, _):
            for size in sizes:
                for connections in CONNECTIONS:
                    bench.say(f"echo, {agent} agent, {size} B x {connections}")
                    by = {name: [] for name in stage}
                    for number in range(rounds):
                        for contestant in bench.in_turn(stage, number):
                            before = contestant.cpu_s()
                            result = await bench.client.ask(
                                "echo", target=contestant.target, size=size, connections=connections, seconds=seconds
                            )
                            result["cpu_s"] = contestant.cpu_s() - before
                            by[contestant.name].append(result)
                    measured.append(
                        {"agent": agent, "size": size, "connections": connections, "by": _summary(by)},
                    )
    return measured


def _summary(by):
    """The medians over the rounds; ratios and differences are taken inside each round, and then their median."""
    summary = {}
    for name, results in by.items():
        summary[name] = {
            key: statistics.median(result[key] for result in results) for key in ("rate", "p50_us", "p99_us")
        }
        for other in ("direct", "nginx"):
            if other in by:
                pairs = list(zip(results, by[other], strict=True))
                summary[name][f"rate_of_{other}"] = statistics.median(a["rate"] / b["rate"] for a, b in pairs)
                summary[name][f"p50_above_{other}_us"] = statistics.median(a["p50_us"] - b["p50_us"] for a, b in pairs)
        # Over all rounds, since the kernel counts in steps of 10 ms. It hardly depends on what else the machine does.
        summary[name]["cpu_us"] = sum(r["cpu_s"] for r in results) / sum(r["all_echoes"] for r in results) * 1e6
        summary[name]["rounds"] = results
    return summary
