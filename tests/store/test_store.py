"""What the store promises about tenants and their journal, on the disk and in memory alike."""

from __future__ import annotations

import threading

import pytest
import trio

from supervisor.errors import Refused, StoreError, UnknownTenant
from supervisor.store import Event, open_memory_store, open_store


async def types(store, name):
    return [event.type for event in await store.read_events(name)]


async def test_a_put_creates_the_tenant_with_its_first_event(store):
    record, created = await store.put_tenant("acme", {"colour": "red"})
    assert created
    assert (record.settings, record.generation, record.state) == ({"colour": "red"}, 0, "asleep")
    assert (record.last_seq, record.created_at, record.since, record.restarts) == (1, 1000.0, 1000.0, 0)
    assert (record.last_exit, record.tokens_valid_after) == (None, 0.0)
    assert await store.get_tenant("acme") == record
    assert await store.read_events("acme") == [Event(tenant="acme", seq=1, type="tenant.created", time=1000.0, data={})]


async def test_a_put_without_settings_keeps_them(store):
    await store.put_tenant("acme", {"colour": "red"})
    record, created = await store.put_tenant("acme")
    assert not created
    assert record.settings == {"colour": "red"}
    assert await types(store, "acme") == ["tenant.created"]


async def test_equal_settings_change_nothing(store):
    await store.put_tenant("acme", {"a": 1, "b": [1, 2]})
    await store.put_tenant("acme", {"b": (1, 2), "a": 1})
    assert await types(store, "acme") == ["tenant.created"]


async def test_changed_settings_are_an_event_that_names_keys_and_no_values(store):
    await store.put_tenant("acme", {"same": 0, "old": "secret-1", "kept": "secret-2"})
    record, created = await store.put_tenant("acme", {"same": 0, "new": None, "kept": "secret-3"})
    assert not created
    assert record.settings == {"same": 0, "new": None, "kept": "secret-3"}
    last = (await store.read_events("acme"))[-1]
    assert (last.type, last.data, last.seq) == ("tenant.updated", {"changed": ["kept", "new", "old"]}, 2)
    assert record.last_seq == 2


async def test_tenants_are_listed_by_name_in_pages(store):
    for name in ("c", "a", "b", "0"):
        await store.put_tenant(name)
    first = await store.list_tenants(limit=3)
    assert [record.name for record in first] == ["0", "a", "b"]
    assert [record.name for record in await store.list_tenants(after="b", limit=3)] == ["c"]
    assert await store.list_tenants(after="c") == []


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_page_is_bounded(store, limit):
    with pytest.raises(Refused, match="1 to 1000"):
        await store.list_tenants(limit=limit)
    with pytest.raises(Refused, match="1 to 1000"):
        await store.read_events("acme", limit=limit)


async def test_events_are_read_in_pages_after_a_number(store):
    await store.put_tenant("acme")
    for number in range(9):
        await store.append_event("acme", type="n", data={"number": number})
    page = await store.read_events("acme", after=1, limit=4)
    assert [event.seq for event in page] == [2, 3, 4, 5]
    assert [event.seq for event in await store.read_events("acme", after=5)] == [6, 7, 8, 9, 10]
    assert await store.read_events("acme", after=10) == []
    assert await store.read_events("nobody") == []


async def test_an_event_returned_equals_the_event_read(store):
    await store.put_tenant("acme")
    data = {"text": 'é\x00"\\', "list": (1, 2), "deep": {"none": None}, "big": 2**60, "float": 0.1}
    event = await store.append_event("acme", type="x", data=data)
    assert await store.read_events("acme", after=1) == [event]
    assert event.data == {**data, "list": [1, 2]}


async def test_what_json_cannot_hold_fails_at_the_caller_and_writes_nothing(store):
    await store.put_tenant("acme")
    for data in ({"x": object()}, {"x": "\ud800"}):
        with pytest.raises((TypeError, UnicodeEncodeError)):
            await store.append_event("acme", type="x", data=data)
        with pytest.raises((TypeError, UnicodeEncodeError)):
            await store.begin_generation("acme", data=data)
    assert await types(store, "acme") == ["tenant.created"]


async def test_a_generation_begins_with_its_state_and_event(store):
    """S3-11: the generation is stored before anything of it exists."""
    await store.put_tenant("acme")
    assert await store.begin_generation("acme", data={"reason": "connect"}) == 1
    assert await store.begin_generation("acme", data={}) == 2
    record = await store.get_tenant("acme")
    assert (record.generation, record.state, record.last_seq) == (2, "starting", 3)
    events = await store.read_events("acme", after=1)
    assert [(event.type, event.data) for event in events] == [
        ("tenant.starting", {"reason": "connect", "generation": 1}),
        ("tenant.starting", {"generation": 2}),
    ]
    assert record.since == events[-1].time


async def test_a_state_is_stored_with_its_event(store):
    await store.put_tenant("acme")
    await store.begin_generation("acme", data={})
    event = await store.record_state("acme", generation=1, state="running", event="tenant.running", data={"pid": 7})
    assert (event.seq, event.type, event.data) == (3, "tenant.running", {"pid": 7})
    record = await store.get_tenant("acme")
    assert (record.state, record.since, record.last_seq) == ("running", event.time, 3)
    assert await store.read_events("acme", after=2) == [event]


async def test_the_last_exit_stays_until_the_next(store):
    await store.put_tenant("acme")
    await store.begin_generation("acme", data={})
    down = {"state": "failed", "event": "tenant.failed", "data": {}}
    await store.record_state("acme", generation=1, last_exit={"signal": 9}, restarted=True, **down)
    await store.record_state("acme", generation=1, **down)
    record = await store.get_tenant("acme")
    assert (record.last_exit, record.restarts) == ({"signal": 9}, 1)
    await store.begin_generation("acme", data={})
    record = await store.get_tenant("acme")
    assert (record.last_exit, record.restarts) == ({"signal": 9}, 1)
    await store.record_state("acme", generation=2, last_exit={"status": 0}, restarted=True, **down)
    record = await store.get_tenant("acme")
    assert (record.last_exit, record.restarts) == ({"status": 0}, 2)


@pytest.mark.parametrize("generation", [0, 1, 3])
async def test_another_generation_changes_nothing(store, generation):
    """S3-11: what an older generation still has to say is inert."""
    await store.put_tenant("acme")
    await store.begin_generation("acme", data={})
    await store.begin_generation("acme", data={})
    before = await store.get_tenant("acme")
    said = await store.record_state(
        "acme", generation=generation, state="failed", event="x", data={}, last_exit={"status": 1}, restarted=True
    )
    assert said is None
    assert await store.get_tenant("acme") == before
    assert len(await store.read_events("acme")) == before.last_seq == 3


async def test_an_unknown_tenant_is_refused_and_costs_nobody_a_rollback(store):
    for call in (
        lambda: store.begin_generation("nobody", data={}),
        lambda: store.record_state("nobody", generation=1, state="running", event="x", data={}),
        lambda: store.append_event("nobody", type="x", data={}),
        lambda: store.revoke_tokens("nobody", before=5.0),
    ):
        before = store.statistics()
        with pytest.raises(UnknownTenant, match="nobody"):
            await call()
        assert store.statistics().units == before.units + 1
    assert await store.get_tenant("nobody") is None
    assert await store.delete_tenant("nobody") is False


async def test_a_revocation_never_goes_back(store):
    await store.put_tenant("acme")
    assert (await store.revoke_tokens("acme", before=50.5)).tokens_valid_after == 50.5
    assert (await store.revoke_tokens("acme", before=20.0)).tokens_valid_after == 50.5
    record = await store.revoke_tokens("acme", before=60.0)
    assert record == await store.get_tenant("acme")
    assert record.tokens_valid_after == 60.0


async def test_a_delete_takes_the_journal_with_it_and_nothing_of_others(store):
    for name in ("acme", "acme-2"):
        await store.put_tenant(name)
        await store.append_event(name, type="x", data={})
    assert await store.delete_tenant("acme") is True
    assert await store.get_tenant("acme") is None
    assert await store.read_events("acme") == []
    assert len(await store.read_events("acme-2")) == 2
    assert await store.delete_tenant("acme") is False


async def test_a_name_made_anew_is_not_mistaken_for_the_former_tenant(store):
    """The fence, a reader's cursor and a revoked token hold over a delete."""
    for round_ in (1, 2):
        await store.put_tenant("acme", {"round": round_})
        generation = await store.begin_generation("acme", data={})
        assert generation == round_
        await store.revoke_tokens("acme", before=10.0 * round_)
        await store.delete_tenant("acme")
    record, created = await store.put_tenant("acme")
    assert created
    assert (record.settings, record.state, record.restarts, record.last_exit) == ({}, "asleep", 0, None)
    assert (record.generation, record.last_seq, record.tokens_valid_after) == (2, 5, 20.0)
    assert [event.seq for event in await store.read_events("acme", after=4)] == [5]
    await store.begin_generation("acme", data={})
    late = {"state": "failed", "event": "x", "data": {}}
    assert await store.record_state("acme", generation=2, **late) is None


async def test_settle_puts_to_sleep_who_was_busy_and_says_so(store):
    """S3-28: a stored "running" is no truth about a process after an unclean end."""
    states = ["starting", "running", "draining", "failed", "asleep"]
    for state in states:
        await store.put_tenant(state)
        await store.begin_generation(state, data={})
        await store.record_state(state, generation=1, state=state, event="x", data={})
    assert await store.settle() == ["draining", "running", "starting"]
    for state in states:
        record = await store.get_tenant(state)
        last = (await store.read_events(state))[-1]
        assert last.seq == record.last_seq
        if state in ("failed", "asleep"):
            assert (record.state, last.type) == (state, "x")
        else:
            assert (record.state, record.since) == ("asleep", last.time)
            assert last.type == "tenant.recovered"
            assert last.data == {"reason": "supervisor_restarted", "former_state": state, "generation": 1}
    assert await store.settle() == []


async def test_a_read_cannot_write(store):
    await store.put_tenant("acme")
    with pytest.raises(StoreError, match="cannot be written"):
        await store.read(lambda connection: connection.exec_driver_sql("DELETE FROM journal"))
    assert await types(store, "acme") == ["tenant.created"]
    await store.append_event("acme", type="x", data={})


async def test_a_unit_is_undone_if_it_raises(store):
    await store.put_tenant("acme")

    def unit(connection):
        connection.exec_driver_sql("UPDATE tenants SET state = 'wrong'")
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await store.write(unit)
    assert (await store.get_tenant("acme")).state == "asleep"


async def test_a_closed_store_says_so(tmp_path):
    async with open_memory_store() as memory, open_store(tmp_path) as file:
        pass
    for store in (memory, file):
        with pytest.raises(StoreError, match="closed"):
            await store.put_tenant("acme")
        with pytest.raises(StoreError, match="closed"):
            await store.get_tenant("acme")


async def test_every_call_is_a_checkpoint(store):
    await store.put_tenant("acme")
    for call in (store.get_tenant, store.put_tenant, store.delete_tenant):
        with trio.CancelScope() as scope:
            scope.cancel()
            await call("acme")
        assert scope.cancelled_caught
    assert await types(store, "acme") == ["tenant.created"]


async def test_in_memory_no_thread_runs_and_no_virtual_time_passes(autojump_clock):
    """PITFALL of mock clocks: a thread at work looks like idleness, and every deadline would fire at once."""
    threads = threading.active_count()
    async with open_memory_store() as store, trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 3600)
        with trio.fail_after(0.001):
            await store.put_tenant("acme")
            for number in range(20):
                await store.append_event("acme", type="x", data={"number": number})
            assert len(await store.read_events("acme")) == 21
        assert trio.current_time() < 0.001
        nursery.cancel_scope.cancel()
    assert threading.active_count() == threads


async def test_two_stores_in_one_process_share_nothing(tmp_path):
    async with open_store(tmp_path / "a") as a, open_store(tmp_path / "b") as b, open_memory_store() as c:
        await a.put_tenant("acme")
        assert await b.list_tenants() == await c.list_tenants() == []


async def test_an_error_of_the_callers_block_comes_out_as_it_is(tmp_path):
    with pytest.raises(LookupError):
        async with open_store(tmp_path):
            raise LookupError


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.004, 0.016])
async def test_an_opening_that_is_cancelled_leaves_nothing(tmp_path, nothing_left, after_s):
    with trio.move_on_after(after_s) as scope:
        async with open_store(tmp_path):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    async with open_store(tmp_path) as store:
        await store.put_tenant("acme")


async def test_what_was_written_is_there_after_a_restart(tmp_path, nothing_left):
    async with open_store(tmp_path) as store:
        await store.put_tenant("acme", {"a": 1})
        await store.begin_generation("acme", data={})
        before = await store.get_tenant("acme"), await store.read_events("acme")
    async with open_store(tmp_path) as store:
        assert (await store.get_tenant("acme"), await store.read_events("acme")) == before
        assert await store.begin_generation("acme", data={}) == 2
