"""The writer's promises: one fsync for all who wait, nobody told before it, nobody hurt by a neighbour."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from supervisor.errors import ConfigError, StoreError
from supervisor.store import OutcomeUnknown, database, journal, open_store, tenants, writer
from supervisor.store.database import open_database
from supervisor.store.journal import Entry
from supervisor.store.writer import GroupCommit


class Gate:
    """Holds the writer's thread inside a unit until it is opened: what waits meanwhile is one batch."""

    def __init__(self):
        self.reached = threading.Event()
        self.opened = threading.Event()

    def unit(self, connection):
        self.reached.set()
        assert self.opened.wait(20)
        return "gate"

    async def wait_reached(self):
        await trio.to_thread.run_sync(self.reached.wait)


@asynccontextmanager
async def open_writer():
    """The writer with its thread, over a database in memory: no disk is the point here."""
    engine = open_database(None)
    grouped = GroupCommit(engine, engine.dispose)
    try:
        await grouped.write(lambda connection: [tenants.put(connection, name, {}, 0.0) for name in "abc"])
        yield grouped
    finally:
        await grouped.aclose()


def append(name, **data):
    return lambda connection: journal.append(connection, name, [Entry("x", 0.0, data)])


async def numbers(grouped, name="a"):
    events = await grouped.write(lambda connection: journal.read(connection, name, 0, 10_000))
    return [(event.seq, event.data.get("n")) for event in events]


async def test_those_who_write_in_one_turn_share_one_transaction():
    async with open_writer() as grouped:
        before = grouped.transactions
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for number in range(200):
                    nursery.start_soon(grouped.write, append("a", n=number))
        assert grouped.transactions - before <= 2
        found = await numbers(grouped)
        assert [seq for seq, _ in found] == list(range(1, 202))
        assert {n for _, n in found} == {None, *range(200)}


async def test_those_who_wait_for_a_commit_share_the_next():
    async with open_writer() as grouped:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(grouped.write, gate.unit)
            await gate.wait_reached()
            before = grouped.transactions
            for number in range(100):
                nursery.start_soon(grouped.write, append("a", n=number))
            await trio.testing.wait_all_tasks_blocked()
            assert grouped.waiting == 101
            gate.opened.set()
        assert grouped.transactions == before + 2
        assert grouped.waiting == 0


async def test_a_batch_is_bounded(monkeypatch):
    monkeypatch.setattr(writer, "_MAX_BATCH", 10)
    async with open_writer() as grouped:
        before = grouped.transactions
        async with trio.open_nursery() as nursery:
            for number in range(95):
                nursery.start_soon(grouped.write, append("a", n=number))
        assert grouped.transactions - before == 10
        assert len(await numbers(grouped)) == 96


async def test_the_order_of_calls_is_the_order_of_writes():
    async with open_writer() as grouped:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(grouped.write, gate.unit)
            await gate.wait_reached()
            for number in range(30):
                nursery.start_soon(grouped.write, append("a", n=number))
                await trio.testing.wait_all_tasks_blocked()
            gate.opened.set()
        assert [n for _, n in await numbers(grouped)][1:] == list(range(30))


async def test_nobody_is_told_before_the_commit_is_done(tmp_path):
    async with open_store(tmp_path) as store:
        await store.put_tenant("a")
        committing, go_on, told = threading.Event(), threading.Event(), []

        def commit(_connection):
            committing.set()
            assert go_on.wait(20)

        async def append_one():
            told.append((await store.append_event("a", type="x", data={})).seq)

        event.listen(store._writer._engine, "commit", commit)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(append_one)
            await trio.to_thread.run_sync(committing.wait)
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(0.05)
            assert told == []
            assert [e.seq for e in await store.read_events("a")] == [1], "a reader saw what is not durable"
            go_on.set()
        assert told == [2]
        with sqlite3.connect(tmp_path / "tenantry.db") as other:
            assert other.execute("SELECT max(seq) FROM journal").fetchone() == (2,)
        other.close()


async def test_a_failing_unit_hurts_no_neighbour_and_each_gets_its_own_answer():
    async with open_writer() as grouped:
        gate, answers = Gate(), {}

        def wrong(connection):
            append("a", n="wrong")(connection)
            raise LookupError("mine alone")

        async def run(number, unit):
            try:
                answers[number] = (await grouped.write(unit))[0].data
            except LookupError as error:
                answers[number] = str(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(grouped.write, gate.unit)
            await gate.wait_reached()
            for number in range(20):
                nursery.start_soon(run, number, wrong if number in (3, 7) else append("a", n=number))
            await trio.testing.wait_all_tasks_blocked()
            gate.opened.set()
        good = set(range(20)) - {3, 7}
        assert answers == {n: {"n": n} for n in good} | {3: "mine alone", 7: "mine alone"}
        found = await numbers(grouped)
        assert [seq for seq, _ in found] == list(range(1, 20))
        assert {n for _, n in found} == {None, *good}


async def test_a_fault_that_only_the_commit_shows_hurts_no_neighbour():
    def orphan(connection):
        connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        connection.exec_driver_sql("INSERT INTO journal VALUES ('nobody', 1, 'x', 0.0, '{}')")

    async def fail(grouped):
        with pytest.raises(IntegrityError):
            await grouped.write(orphan)

    async with open_writer() as grouped:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(grouped.write, gate.unit)
            await gate.wait_reached()
            nursery.start_soon(grouped.write, append("a", n=0))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(fail, grouped)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(grouped.write, append("a", n=1))
            await trio.testing.wait_all_tasks_blocked()
            gate.opened.set()
        assert await numbers(grouped) == [(1, None), (2, 0), (3, 1)]
        assert await numbers(grouped, "nobody") == []


async def test_a_lock_held_by_another_program_is_waited_for_once_and_not_once_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    async with open_store(tmp_path) as store:
        await store.put_tenant("a")
        other = sqlite3.connect(tmp_path / "tenantry.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        refused = []

        async def write():
            try:
                await store.append_event("a", type="x", data={})
            except StoreError as error:
                refused.append(error)

        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(write)
        assert trio.current_time() - started < 1
        assert len(set(map(id, refused))) == 20, "one error object must not be raised in many tasks"
        assert all("locked" in str(error) for error in refused)
        assert len(await store.read_events("a")) == 1, "readers do not wait for writers"
        other.execute("ROLLBACK")
        other.close()
        assert (await store.append_event("a", type="x", data={})).seq == 2


async def test_a_lock_taken_between_the_two_runs_of_a_batch_is_waited_for_once(tmp_path):
    async with open_writer() as grouped:
        begins, failed, gate = [], [], Gate()

        def begin(connection):
            begins.append(connection)
            if len(begins) > 2:  # the gate's, the batch's, and then each by itself
                busy = sqlite3.OperationalError("database is locked")
                busy.sqlite_errorname = "SQLITE_BUSY"
                raise busy

        def wrong(connection):
            raise LookupError

        async def run(unit):
            with pytest.raises(StoreError, match="locked"):
                await grouped.write(unit)
            failed.append(unit)

        event.listen(grouped._engine, "begin", begin)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(grouped.write, gate.unit)
            await gate.wait_reached()
            for number in range(10):
                nursery.start_soon(run, wrong if number == 3 else append("a", n=number))
            await trio.testing.wait_all_tasks_blocked()
            gate.opened.set()
        event.remove(grouped._engine, "begin", begin)
        assert len(failed) == 10
        assert len(begins) == 3
        assert len(await numbers(grouped)) == 1


async def test_cancellation_withdraws_what_was_not_taken():
    async with open_writer() as grouped:
        gate, ran = Gate(), []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(grouped.write, gate.unit)
            await gate.wait_reached()
            with trio.move_on_after(0.01) as scope:
                await grouped.write(ran.append)
            assert scope.cancelled_caught
            assert grouped.waiting == 1
            gate.opened.set()
        await grouped.write(lambda _: None)
        assert ran == []


async def test_cancellation_of_what_was_taken_waits_for_its_answer():
    async with open_writer() as grouped:
        gate, answers = Gate(), []
        async with trio.open_nursery() as nursery:

            async def write():
                answers.append(await grouped.write(gate.unit))
                await trio.lowlevel.checkpoint()
                answers.append("not cancelled")

            nursery.start_soon(write)
            await gate.wait_reached()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.02)
                assert answers == []
            gate.opened.set()
        assert answers == ["gate"]


async def test_an_answer_that_does_not_come_is_reported_as_unknown(monkeypatch):
    monkeypatch.setattr(writer, "SHIELD_S", 0.05)
    async with open_writer() as grouped:
        gate = Gate()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gate.wait_reached)
                nursery.start_soon(cancel_once, gate, scope)
                with pytest.raises(OutcomeUnknown, match="unknown"):
                    await grouped.write(gate.unit)
                gate.opened.set()
        monkeypatch.undo()
        assert await grouped.write(lambda _: "goes on") == "goes on"


async def cancel_once(gate, scope):
    await gate.wait_reached()
    scope.cancel()


async def test_a_supervisor_that_is_cancelled_can_still_write_its_last_states(tmp_path, nothing_left):
    """The states of the drain are written while everything around is cancelled."""
    with trio.CancelScope() as scope:
        async with open_store(tmp_path) as store:
            await store.put_tenant("a")
            scope.cancel()
            with trio.move_on_after(5, shield=True):
                await store.append_event("a", type="last", data={})
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    async with open_store(tmp_path) as store:
        assert (await store.read_events("a"))[-1].type == "last"


async def test_leaving_writes_what_still_waits(tmp_path, monkeypatch, nothing_left):
    monkeypatch.setattr(writer, "_MAX_BATCH", 1)
    answers = []

    async def write(store, unit):
        answers.append(await store.write(unit))

    gate = Gate()
    async with trio.open_nursery() as nursery, open_store(tmp_path) as store:
        nursery.start_soon(write, store, gate.unit)
        await gate.wait_reached()
        for number in range(3):
            nursery.start_soon(write, store, lambda _, number=number: number)
        await trio.testing.wait_all_tasks_blocked()
        threading.Timer(0.02, gate.opened.set).start()
    assert answers[0] == "gate"
    assert sorted(answers[1:]) == [0, 1, 2]


async def test_leaving_with_the_last_waiter_withdrawn_does_not_hang(tmp_path, nothing_left):
    with trio.fail_after(3):
        async with trio.open_nursery() as nursery, open_store(tmp_path) as store:
            nursery.start_soon(store.put_tenant, "a")
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


async def test_a_hung_disk_lets_the_supervisor_leave_and_keeps_the_directory_locked(tmp_path, monkeypatch):
    """Two supervisors never write one database, even if the first could not be waited for."""
    monkeypatch.setattr(writer, "SHIELD_S", 0.05)
    gate = Gate()
    stores = []

    async def use_and_leave():
        async with open_store(tmp_path) as store:
            stores.append(store)
            with trio.move_on_after(0.01), pytest.raises(OutcomeUnknown):
                await store.write(gate.unit)

    with pytest.raises(StoreError, match="left behind"):
        await use_and_leave()
    with pytest.raises(ConfigError, match="in use"):
        async with open_store(tmp_path):
            pass
    gate.opened.set()
    await trio.to_thread.run_sync(stores[0]._writer._thread.join)
    monkeypatch.undo()
    async with open_store(tmp_path) as store:
        assert await store.list_tenants() == []


async def test_a_cancelled_read_leaves_at_once_and_its_connection_is_given_back(tmp_path, nothing_left):
    async with open_store(tmp_path) as store:
        await store.put_tenant("a")
        gate = Gate()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(store.read, gate.unit)
            await gate.wait_reached()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await store.append_event("a", type="x", data={})
        gate.opened.set()
        for _ in range(8):
            assert len(await store.read_events("a")) == 2


async def test_leaving_waits_for_a_read_that_was_left_to_its_thread(tmp_path, nothing_left):
    """Whoever closes last moves the log into the database, and a reader cannot."""
    gate = Gate()
    async with open_store(tmp_path) as store:
        await store.put_tenant("a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.read, gate.unit)
            await gate.wait_reached()
            nursery.cancel_scope.cancel()
        opening = threading.Timer(0.05, gate.opened.set)
        opening.start()
    assert gate.opened.is_set()
    assert not (tmp_path / "tenantry.db-wal").exists()
    opening.join()


# Interleavings: tasks with a few steps each, run side by side, some cancelled at some turn of the scheduler.

_step = st.one_of(
    st.tuples(st.sampled_from(["append", "begin", "state", "fail", "delete", "put"]), st.sampled_from("abc")),
)
_task = st.tuples(st.lists(_step, min_size=1, max_size=6), st.none() | st.integers(0, 12))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(_task, min_size=1, max_size=6))
def test_numbers_have_no_gap_whatever_fails_or_is_cancelled(plan):
    trio.run(_interleave, plan)


class _Fails(Exception):
    pass


async def _interleave(plan):
    acknowledged, attempted, identity = {}, set(), iter(range(10_000))

    async def one(grouped, kind, name):
        number = next(identity)
        attempted.add(number)

        def unit(connection):
            if kind == "delete":
                return tenants.delete(connection, name)
            if kind == "put":
                return tenants.put(connection, name, {"n": number}, 0.0)
            if kind == "begin":
                return tenants.begin_generation(connection, name, {"n": number}, 0.0)
            if kind == "state":
                record = tenants.get(connection, name)
                return record and tenants.record_state(
                    connection,
                    name,
                    generation=record.generation,
                    state="running",
                    entry=Entry("s", 0.0, {"n": number}),
                    last_exit=None,
                    restarted=False,
                )
            events = append(name, n=number)(connection)
            if kind == "fail":
                raise _Fails
            return events and events[0]

        try:
            answer = await grouped.write(unit)
        except _Fails:
            assert kind == "fail"
            attempted.remove(number)
        else:
            assert kind != "fail"
            if kind in ("append", "state") and answer is not None:
                acknowledged[name, answer.seq] = number

    async def task(grouped, steps, cancel_after):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                if cancel_after is not None:
                    nursery.start_soon(cancel_in, cancel_after, scope)
                for step in steps:
                    await one(grouped, *step)

    async def cancel_in(turns, scope):
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    with trio.fail_after(20):
        async with open_writer() as grouped:
            async with trio.open_nursery() as nursery:
                for steps, cancel_after in plan:
                    nursery.start_soon(task, grouped, steps, cancel_after)
            deleted = any(kind == "delete" for steps, _ in plan for kind, _ in steps)
            for name in "abc":
                record = await grouped.write(lambda connection, name=name: tenants.get(connection, name))
                found = dict(await numbers(grouped, name))
                if record is None:
                    assert found == {}
                    continue
                last = record.last_seq
                assert list(found) == list(range(last - len(found) + 1, last + 1))
                assert deleted or len(found) == last
                assert {n for n in found.values() if n is not None} <= attempted
                for (tenant, seq), number in acknowledged.items():
                    if tenant == name and (seq in found or not deleted):
                        assert found[seq] == number
