"""200 tenants awake without work: processor time of the supervisor with its keeper and shims, and of the agents."""

from __future__ import annotations

import statistics
import time

import trio

from benchmarks.contestants import open_supervisor
from benchmarks.processes import House, cpu_s, pss_bytes

TENANTS = 200
# Starts under way at one moment.
STARTING = 4
SETTLE_S = 2.0


async def run(bench):
    tenants, seconds = (20, 8.0) if bench.quick else (TENANTS, 20.0)
    bench.say(f"{tenants} tenants awake and idle")
    async with open_supervisor(bench.directory / "idle", "bundled") as supervisor:
        began = time.monotonic()
        await _wake(supervisor, [f"idle-{number}" for number in range(tenants)])
        started_s = time.monotonic() - began
        await trio.sleep(SETTLE_S)
        house = House.of(supervisor.process.pid)
        before, began = _cpu(house), time.monotonic()
        await trio.sleep(seconds)
        after, took_s = _cpu(house), time.monotonic() - began
        return {
            "tenants": tenants,
            "seconds": took_s,
            "started_s": started_s,
            **{f"{who}_cores": (after[who] - before[who]) / took_s for who in after},
            "supervisor_bytes": pss_bytes(house.supervisor),
            "keeper_bytes": pss_bytes(house.keeper),
            "shim_bytes": statistics.median(pss_bytes(shim) for shim in house.shims),
            "agent_bytes": statistics.median(pss_bytes(agent) for agent in house.agents),
        }


async def _wake(supervisor, tenants):
    async def some(names):
        for name in names:
            with trio.fail_after(60.0):
                await supervisor.request("PUT", f"/v1/tenants/{name}")
                await supervisor.request("POST", f"/v1/tenants/{name}/wake")

    async with trio.open_nursery() as nursery:
        for first in range(STARTING):
            nursery.start_soon(some, tenants[first::STARTING])


def _cpu(house):
    return {
        "supervisor": cpu_s(house.supervisor),
        "keeper_and_shims": sum(cpu_s(pid) for pid in (house.keeper, *house.shims)),
        "agents": sum(cpu_s(pid) for pid in house.agents),
    }
