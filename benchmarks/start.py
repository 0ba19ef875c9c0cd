"""Cold starts, and recovery from SIGKILL: the bundled agent started by nobody but the client, woken, and killed.

The three take turns. A kill comes once the agent has been ready for longer than `stable_after`: the ladder then
starts the next one at once.
"""

from __future__ import annotations

import statistics

import trio

from benchmarks.contestants import AGENTS, PATH, TENANT, open_supervisor

STABLE_S = 1.2
API = f"/v1/tenants/{TENANT}"


async def run(bench):
    rounds = 3 if bench.quick else 10
    command = AGENTS["bundled"]
    env = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": str(bench.directory), "TENANTRY_TENANT": TENANT}
    direct, cold, killed = [], [], []
    async with open_supervisor(bench.directory / "start", "bundled") as supervisor:
        target = supervisor.contestant().target
        # The first one of all also creates the tenant, and fills the file cache.
        await bench.client.ask("ready", target=target, timeout_s=60.0)
        bench.say("cold starts and kills")
        for _ in range(rounds):
            direct.append(
                await bench.client.ask(
                    "cold_direct", command=command, path="/echo", env=env | {"TENANTRY_GENERATION": "1"}
                )
            )
            await supervisor.request("POST", f"{API}/sleep")
            cold.append(await bench.client.ask("connects", target=target, count=1))
            await trio.sleep(STABLE_S)
            pid = (await supervisor.request("GET", API))["pid"]
            killed.append(await bench.client.ask("recover", target=target, pid=pid))
    cold_ms = [result["echo_s"][0] * 1e3 for result in cold]
    killed_ms = [result["echo_s"] * 1e3 for result in killed]
    direct_ms = [result["echo_s"] * 1e3 for result in direct]
    return {
        "direct": {
            "handshake_ms": statistics.median(result["handshake_s"] * 1e3 for result in direct),
            "echo_ms": statistics.median(direct_ms),
        },
        "cold": {
            "handshake_ms": statistics.median(result["handshake_s"][0] * 1e3 for result in cold),
            "echo_ms": statistics.median(cold_ms),
            "above_direct_ms": statistics.median(a - b for a, b in zip(cold_ms, direct_ms, strict=True)),
        },
        "killed": {
            "close_ms": statistics.median(result["close_s"] * 1e3 for result in killed),
            "echo_ms": statistics.median(killed_ms),
            "worst_ms": max(killed_ms),
            "of_cold": statistics.median(a / b for a, b in zip(killed_ms, cold_ms, strict=True)),
            "refused": sum(result["refused"] for result in killed),
            "codes": sorted({str(result["code"]) for result in killed}),
        },
        "rounds": {"direct": direct, "cold": cold, "killed": killed},
    }
