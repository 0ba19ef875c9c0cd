"""From the connect to the answered handshake and to the first echo, for an agent that runs: by every way."""

from __future__ import annotations

import statistics

from benchmarks.contestants import AGENTS, open_stage


async def run(bench):
    rounds, count = (3, 20) if bench.quick else (10, 30)
    measured = {}
    for agent in AGENTS:
        async with open_stage(bench.directory / f"connect-{agent}", bench.client, agent, bench.proxies) as (stage, _):
            bench.say(f"connect, {agent} agent")
            by = {name: [] for name in stage}
            for number in range(rounds):
                for contestant in bench.in_turn(stage, number):
                    by[contestant.name].append(
                        await bench.client.ask("connects", target=contestant.target, count=count)
                    )
            measured[agent] = _summary(by)
    return measured


def _summary(by):
    summary = {}
    for name, results in by.items():
        summary[name] = {}
        for key in ("handshake", "echo"):
            p50s = [statistics.median(result[f"{key}_s"]) * 1e3 for result in results]
            direct = [statistics.median(result[f"{key}_s"]) * 1e3 for result in by["direct"]]
            summary[name][f"{key}_ms"] = statistics.median(p50s)
            summary[name][f"{key}_above_direct_ms"] = statistics.median(
                a - b for a, b in zip(p50s, direct, strict=True)
            )
    return summary
