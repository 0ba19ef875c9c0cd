"""1,000 idle connections over 20 tenants: what they weigh, and how they end when the supervisor is told to stop."""

from __future__ import annotations

import signal
import statistics
import time

import trio

from benchmarks.contestants import open_supervisor
from benchmarks.processes import House, pss_bytes

CONNECTIONS, TENANTS = 1000, 20
SETTLE_S = 1.0


async def run(bench):
    rounds = 1 if bench.quick else 3
    results = [await _round(bench, number) for number in range(rounds)]
    summary = {key: statistics.median(result[key] for result in results) for key in results[0]}
    worst = {"got_1012": min(result["got_1012"] for result in results)}
    worst["exit_status"] = max(result["exit_status"] for result in results)
    return summary | worst | {"rounds": results}


async def _round(bench, number):
    bench.say(f"{CONNECTIONS} connections over {TENANTS} tenants, round {number + 1}")
    tenants = [f"fleet-{number}" for number in range(TENANTS)]
    async with open_supervisor(bench.directory / f"fleet-{number}", "bundled") as supervisor:
        targets = [supervisor.contestant(tenant).target for tenant in tenants]
        # What is loaded or allocated at a first connection is no connection's own.
        await bench.client.ask("hold", targets=targets)
        await bench.client.ask("release")
        await trio.sleep(SETTLE_S)
        house = House.of(supervisor.process.pid)
        before = pss_bytes(house.supervisor)
        agents_before = [pss_bytes(agent) for agent in house.agents]
        began = time.monotonic()
        await bench.client.ask("hold", targets=targets * (CONNECTIONS // TENANTS))
        opened_s = time.monotonic() - began
        await trio.sleep(SETTLE_S)
        after = pss_bytes(house.supervisor)
        result = {
            "connection_bytes": (after - before) / CONNECTIONS,
            "supervisor_bytes": before,
            "keeper_bytes": pss_bytes(house.keeper),
            "shim_bytes": statistics.median(pss_bytes(shim) for shim in house.shims),
            "agent_bytes": statistics.median(agents_before),
            "agent_connection_bytes": (sum(pss_bytes(agent) for agent in house.agents) - sum(agents_before))
            / CONNECTIONS,
            "opened_s": opened_s,
        }
        told_at = time.monotonic()
        supervisor.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(30.0):
            await supervisor.process.wait()
        exited_at = time.monotonic()
        ends = (await bench.client.ask("closings", timeout_s=5.0))["ends"]
    closed = [closed_at - told_at for code, closed_at, _ in ends if code == 1012]
    return result | {
        "got_1012": len(closed),
        "first_1012_s": min(closed, default=0.0),
        "last_1012_s": max(closed, default=0.0),
        "exit_s": exited_at - told_at,
        "exit_status": supervisor.process.returncode if supervisor.process.returncode is not None else -1,
    }
