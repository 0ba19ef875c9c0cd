"""What was acknowledged survives SIGKILL, whenever it comes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from supervisor.store import open_store

WRITER = """
import pathlib, sys, trio
from supervisor.store import open_store
async def write(store, name):
    while True:
        event = await store.append_event(name, type="x", data={"name": name})
        print(name, event.seq, flush=True)
async def main():
    async with open_store(pathlib.Path(sys.argv[1])) as store, trio.open_nursery() as nursery:
        for number in range(8):
            await store.put_tenant(f"t{number}")
            await store.begin_generation(f"t{number}", data={})
            nursery.start_soon(write, store, f"t{number}")
trio.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.3])
async def test_every_acknowledged_event_is_there_after_sigkill(tmp_path, after_s):
    with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline()]
        time.sleep(after_s)  # noqa: ASYNC251
        process.kill()
        lines += process.stdout.read().splitlines(keepends=True)
    assert process.returncode == -9
    acknowledged = {}
    for name, seq in (line.split() for line in lines if line.endswith("\n")):
        acknowledged[name] = int(seq)
    assert acknowledged
    assert (tmp_path / "tenantry.db-wal").stat().st_size > 0, "the log was left, and is what is recovered from"
    async with open_store(tmp_path) as store:
        for name, seq in acknowledged.items():
            record = await store.get_tenant(name)
            assert record.last_seq >= seq
            after, found = 0, []
            while page := await store.read_events(name, after=after):
                found += [event.seq for event in page]
                after = found[-1]
            assert found == list(range(1, record.last_seq + 1))
        assert set(await store.settle()) >= set(acknowledged)
