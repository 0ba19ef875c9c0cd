"""Each agent of fixtures/ as a real process behind a real server: what its fault must lead to."""

from __future__ import annotations

import pytest
import trio

from supervisor.client import ConnectionClosed, ConnectionRejected

from .conftest import misbehave, open_house

pytestmark = pytest.mark.slow

# The ladder in small, so that four rungs take a third of a second.
QUICK = {"connect_retry_s": (0.05, 0.1, 0.15), "start_timeout_s": 0.7, "connect_timeout_s": 0.5, "stable_after_s": 0.3}


async def closed(websocket) -> ConnectionClosed:
    """Reads to the end."""
    with pytest.raises(ConnectionClosed) as caught, trio.fail_after(10):
        while True:
            await websocket.receive()
    return caught.value


async def refused(house) -> ConnectionRejected:
    with pytest.raises(ConnectionRejected) as caught, trio.fail_after(20):
        async with house.client():
            pass
    return caught.value


@pytest.mark.parametrize(
    ("fault", "words", "starts"),
    [
        (("never-accepts",), "no answer within", 4),
        (("never-answers",), "no answer within", 4),
        (("exits-at-start", 3), "exit status 3", 4),
        (("dies-at-the-upgrade", 5), "exit status 5", 4),
        (("refuses", 503), "answered 503", 1),
        (("speaks-garbage",), "not HTTP/1.1", 4),
        (("huge-head", 70000), "not HTTP/1.1", 4),
        (("endless-head",), "not HTTP/1.1", 4),
    ],
)
async def test_an_agent_that_cannot_be_connected_is_told_as_503_with_every_attempt(fault, words, starts):
    """S3-05, S3-07, S3-27: four attempts, a problem that names each, the tenant failed, and no process left of it."""
    async with open_house(misbehave(*fault), **QUICK) as house:
        answer = await refused(house)
        assert answer.status == 503
        headers = {name.lower(): value for name, value in answer.headers}
        assert headers["content-type"] == "application/problem+json"
        assert int(headers["retry-after"]) >= 1
        assert answer.body.decode().count(words) == 4, answer.body
        description = await house.describe()
        assert description["state"] == "failed"
        assert description["generation"] == starts
        assert description["pid"] is None


async def test_a_refusal_that_is_no_5xx_goes_to_the_client_as_it_is():
    """S3-08."""
    async with open_house(misbehave("refuses", 403)) as house:
        assert (await refused(house)).status == 403
        assert (await house.describe())["generation"] == 1


async def test_an_agent_that_first_answers_503_is_kept_and_asked_again():
    """S3-07."""
    async with open_house(misbehave("refuses-then-serves", 2, 503), **QUICK) as house:
        async with house.client() as websocket:
            await websocket.send("hi")
            assert await websocket.receive() == "hi"
        assert (await house.describe())["generation"] == 1


async def test_a_slow_start_is_waited_for():
    """S3-04."""
    async with open_house(misbehave("slow-start", 0.6)) as house, house.client() as websocket:
        await websocket.send("hi")
        assert await websocket.receive() == "hi"


async def test_an_answer_that_comes_byte_by_byte_is_an_answer():
    async with open_house(misbehave("answers-byte-by-byte", 0.002)) as house, house.client() as websocket:
        await websocket.send("hi")
        assert await websocket.receive() == "hi"


async def test_a_message_that_comes_with_the_head_arrives():
    async with open_house(misbehave("eager")) as house, house.client() as websocket:
        with trio.fail_after(5):
            assert await websocket.receive()


async def test_an_agent_that_dies_when_connected_closes_with_1012():
    """S3-14, S3-30."""
    async with open_house(misbehave("dies-when-connected")) as house:
        async with house.client() as websocket:
            assert (await closed(websocket)).code == 1012
        with trio.fail_after(5):
            while (description := await house.describe())["state"] != "asleep":
                await trio.sleep(0.01)
        assert description["last_exit"]["signal"] == 9
        assert description["restarts"] == 1


async def test_a_client_inside_a_frame_is_aborted_and_counted():
    async with open_house(misbehave("dies-inside-a-frame")) as house:
        async with house.client() as websocket:
            assert (await closed(websocket)).code == 1006
        with trio.fail_after(5):
            while not (lines := house.logged("connection_closed")):
                await trio.sleep(0.01)
        assert [line["aborted_mid_frame"] for line in lines] == [True]
        assert b"tenantry_aborted_mid_frame_total 1.0" in house.supervisor.telemetry.metrics.render()


async def test_the_tail_of_a_dying_agent_arrives_before_1012():
    """A naive pair of pumps delivered a tenth of it."""
    async with open_house(misbehave("sends-and-dies", 81920)) as house, house.client() as websocket:
        await websocket.send("go")
        tail = 0
        with trio.fail_after(5), pytest.raises(ConnectionClosed) as caught:
            while True:
                tail += len(await websocket.receive())
        assert tail == 81920
        assert caught.value.code == 1012


@pytest.mark.parametrize("fault", ["half-closes", "closes-without-close"])
async def test_an_agent_that_hangs_up_and_lives_closes_with_1011(fault):
    """S3-32: a closed transport is no ended process."""
    async with open_house(misbehave(fault)) as house:
        async with house.client() as websocket:
            assert (await closed(websocket)).code == 1011
        assert (await house.describe())["state"] == "running"


async def test_a_close_without_a_code_passes_as_it_is():
    async with open_house(misbehave("closes-without-a-code")) as house, house.client() as websocket:
        assert (await closed(websocket)).code == 1005


async def test_an_agent_that_lived_is_started_again_at_once():
    """The second manual check of the plan: a killed agent is back, within far less than 12 s."""
    async with open_house(misbehave("ready-then-dies", 0.4), stable_after_s=0.2) as house:
        for _ in range(3):
            async with house.client() as websocket:
                assert (await closed(websocket)).code == 1012
        assert (await house.describe())["restarts"] >= 2


async def test_a_hung_agent_is_replaced_though_it_ignores_sigterm():
    """S3-04, S3-09: stopped, so SIGKILL ends it; the rung after that serves."""
    async with open_house(misbehave("hangs"), **QUICK) as house:
        async with house.client() as first:
            await trio.sleep(0.4)
            async with house.client():
                assert (await house.describe())["generation"] == 2
            assert (await closed(first)).code == 1012


async def test_an_agent_that_ignores_sigterm_is_killed_after_its_grace_and_its_client_gets_1012():
    """S3-14, S3-24."""
    async with open_house(misbehave("ignores-sigterm")) as house, house.client() as websocket:
        await websocket.send("hi")
        await websocket.receive()
        began = trio.current_time()
        house.supervisor.request_drain()
        assert (await closed(websocket)).code == 1012
        assert 0.9 < trio.current_time() - began < 4


@pytest.mark.parametrize("fault", [("floods", 65536), ("stops-reading",)])
async def test_a_drain_is_not_held_up(fault):
    async with open_house(misbehave(*fault)) as house, house.client() as websocket:
        await trio.sleep(0.2)
        began = trio.current_time()
        house.supervisor.request_drain()
        assert (await closed(websocket)).code in (1006, 1012)
        assert trio.current_time() - began < 4


async def test_grandchildren_are_gone_with_their_agent():
    """All of the process tree, `setsid` and double forks included."""
    async with open_house(misbehave("forks-grandchildren")) as house:
        async with house.client() as websocket:
            await websocket.send("hi")
            await websocket.receive()
        await house.supervisor.sleep("acme")
        assert (await house.describe())["state"] == "asleep"


async def test_output_without_end_is_bounded_in_the_log_and_told():
    async with open_house(misbehave("floods-its-output", 100)) as house, house.client() as websocket:
        await websocket.send("hi")
        with trio.fail_after(10):
            assert await websocket.receive() == "hi"
        await trio.sleep(1.5)
        await websocket.send("still")
        with trio.fail_after(10):
            assert await websocket.receive() == "still"
        assert 0 < len(house.logged("agent_output")) < 1000
