"""`python -m benchmarks [--quick] [--only echo,connect,start,drain,idle]`: measures, prints one table, writes JSON.

Exit status 0 whatever the figures are: this is no test. 70 if something could not be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import attrs
import trio

from benchmarks import connect, echo, fleet, idle, report, start
from benchmarks.contestants import PROXIES, ROOT, Client, missing, open_client, versions
from benchmarks.processes import Failed, machine

PARTS = {"echo": echo.run, "connect": connect.run, "start": start.run, "drain": fleet.run, "idle": idle.run}
# A load average above this is work of others.
BUSY = 0.7
RESULTS = ROOT / "benchmarks" / "results"


@attrs.frozen
class Bench:
    """What a part needs."""

    client: Client
    directory: Path
    proxies: list[str]
    quick: bool

    def say(self, what):
        print(f"  {what}", file=sys.stderr, flush=True)

    @staticmethod
    def in_turn(stage, number):
        """All contestants, each round beginning with another one."""
        contestants = list(stage.values())
        first = number % len(contestants)
        return contestants[first:] + contestants[:first]


async def measure(parts, *, quick, directory):
    results = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), "versions": versions()}
    results["left_out"] = {name: why for name in PROXIES if (why := await missing(name))}
    proxies = [name for name in PROXIES if name not in results["left_out"]]
    results |= {"quick": quick, "contestants": ["direct", "tenantry", *proxies]}
    async with open_client(directory) as client:
        bench = Bench(client, directory, proxies, quick)
        for part in parts:
            results[part] = await PARTS[part](bench)
    return results


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="See docs/benchmarks.md.")
    parser.add_argument("--quick", action="store_true", help="about a minute: fewer rounds, sizes and tenants")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    options = parser.parse_args()
    parts = [part for part in options.only.split(",") if part]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as directory:
        try:
            results = trio.run(partial(measure, parts, quick=options.quick, directory=Path(directory)))
        except Failed as error:
            print(f"could not measure: {error}", file=sys.stderr)
            return 70
    results["took_s"] = time.monotonic() - began
    targets = list(report.targets(results))
    results["targets"] = [attrs.asdict(target) | {"reached": target.reached} for target in targets]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{results['at'].replace(':', '')}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(report.lines(results)))
    for name, why in results["left_out"].items():
        print(f"\n{report.NAMES[name]} is left out: {why}")
    if (load := results["machine"]["load_average"]) > BUSY:
        print(f"\nThe machine was busy (load average {load:.1f}) before the first measurement: the figures are rough.")
    print()
    print("\n".join(map(str, targets)))
    print(f"\n{file.relative_to(ROOT)}, {results['took_s']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
