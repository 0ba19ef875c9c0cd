"""The whole server: many at once, the three manual checks, bad input, the drain."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import trio

from supervisor.client import ConnectionClosed, ConnectionRejected
from supervisor.settings import LimitSettings

from .conftest import BUNDLED, ECHO, open_house

pytestmark = pytest.mark.slow

UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


async def until(condition, seconds=10.0):
    with trio.fail_after(seconds):
        while not await condition():
            await trio.sleep(0.01)


async def test_500_upgrades_side_by_side_to_a_sleeping_tenant_share_one_spawn():
    """S3-10."""
    async with open_house() as house:
        served = 0

        async def one():
            nonlocal served
            async with house.client() as websocket:
                await websocket.send("hi")
                assert await websocket.receive() == "hi"
                served += 1

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(500):
                    nursery.start_soon(one)
        assert served == 500
        assert (await house.describe())["generation"] == 1


async def test_a_killed_agent_is_back_at_once_for_a_client_that_reconnects():
    """S3-05, S3-30: the plan's second manual check; its bound is 12 s."""
    async with open_house(BUNDLED, stable_after_s=0.1) as house:
        async with house.client(path="/echo") as websocket:
            await websocket.send("before")
            assert await websocket.receive() == "before"
            await trio.sleep(0.2)
            os.kill((await house.describe())["pid"], signal.SIGKILL)
            with pytest.raises(ConnectionClosed) as caught, trio.fail_after(5):
                await websocket.receive()
            assert caught.value.code == 1012
        began = time.monotonic()
        async with house.client(path="/echo") as websocket:
            await websocket.send("after")
            assert await websocket.receive() == "after"
        assert time.monotonic() - began < 12
        assert (await house.describe())["generation"] == 2


async def test_sigterm_closes_every_connection_with_1012_and_later_ones_get_503():
    """S3-14: the plan's third manual check, over several tenants."""
    async with open_house(BUNDLED) as house:
        codes = []
        started = trio.Event()

        async def one(number, task_status):
            async with house.client(f"tenant-{number % 4}", "/echo") as websocket:
                await websocket.send("x")
                await websocket.receive()
                task_status.started()
                with pytest.raises(ConnectionClosed) as caught:
                    await websocket.receive()
                codes.append(caught.value.code)

        async with trio.open_nursery() as nursery:
            for number in range(40):
                await nursery.start(lambda task_status, number=number: one(number, task_status))
            started.set()
            house.supervisor.request_drain()
            with pytest.raises(ConnectionRejected) as refused:
                async with house.client("tenant-0"):
                    pass
            assert refused.value.status == 503
            answer = await house.request("GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 503")
        assert codes == [1012] * 40


@pytest.mark.parametrize(
    ("name", "head", "status"),
    [
        ("no token", "GET /v1/tenants/acme/connect HTTP/1.1\r\nHost: localhost\r\n" + UPGRADE, 401),
        (
            "a wrong token",
            "GET /v1/tenants/acme/connect HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x.y.z\r\n" + UPGRADE,
            401,
        ),
        ("a foreign token", "GET /v1/tenants/other/connect HTTP/1.1\r\nHost: localhost\r\n{auth}" + UPGRADE, 403),
        ("a foreign host", "GET /v1/tenants/acme/connect HTTP/1.1\r\nHost: evil.example\r\n{auth}" + UPGRADE, 421),
        (
            "a foreign origin",
            "GET /v1/tenants/acme/connect HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\n{auth}"
            + UPGRADE,
            403,
        ),
        ("no tenant's name", "GET /v1/tenants/A%20B/connect HTTP/1.1\r\nHost: localhost\r\n{auth}" + UPGRADE, 400),
        ("dot segments", "GET /v1/tenants/acme/connect/../x HTTP/1.1\r\nHost: localhost\r\n{auth}" + UPGRADE, 400),
        ("encoded dots", "GET /v1/tenants/acme/connect/%2e%2e/x HTTP/1.1\r\nHost: localhost\r\n{auth}" + UPGRADE, 400),
        (
            "a body",
            "GET /v1/tenants/acme/connect HTTP/1.1\r\nHost: localhost\r\n{auth}Content-Length: 2\r\n" + UPGRADE,
            400,
        ),
        ("an unknown path", "GET /v2/acme HTTP/1.1\r\nHost: localhost\r\n{auth}" + UPGRADE, 404),
    ],
)
async def test_bad_input_gets_a_clear_4xx_and_starts_nothing(name, head, status):
    """S3-01: nothing is started or changed by a request that is at fault."""
    async with open_house() as house:
        head = head.format(auth=f"Authorization: Bearer {house.token()}\r\n") + "\r\n"
        with trio.fail_after(10):
            answer = await house.request(head)
        assert answer.startswith(f"HTTP/1.1 {status}".encode()), answer
        assert b"application/problem+json" in answer
        assert not house.logged("agent_started")
        assert await house.supervisor.list_tenants() == []


async def test_the_agent_sees_a_clean_head_and_who_connected():
    """What the client proved its right with does not go on."""
    async with open_house() as house:
        token = house.token()
        headers = [
            ("Authorization", f"Bearer {token}"),
            ("Cookie", "session=secret"),
            ("Tenantry-Subject", "root"),
            ("X-Forwarded-For", "1.2.3.4"),
            ("X-Custom", "kept"),
        ]
        async with house.client(path="/head?a=1&token=" + token, headers=headers) as websocket:
            seen = json.loads(await websocket.receive())
    assert seen["target"] == "/head?a=1"
    headers = {name.lower(): value for name, value in seen["headers"]}
    assert not headers.keys() & {"authorization", "cookie", "x-forwarded-for"}
    assert headers["x-custom"] == "kept"
    assert headers["tenantry-tenant"] == "acme"
    assert headers["tenantry-subject"] == "tests"
    assert headers["tenantry-connection"]
    assert token not in str(seen)


async def test_the_token_is_in_no_log_and_in_no_environment_of_an_agent():
    async with open_house() as house:
        token = house.token()
        async with house.client(path="/environment?token=" + token, headers=[]) as websocket:
            environment = str(await websocket.receive())
        assert token not in environment
        assert token not in repr(house.events)


async def test_a_ticket_opens_one_websocket_and_no_second():
    """Browsers cannot send a header with a WebSocket: a ticket in the address is good once."""
    async with open_house() as house:
        authenticator = house.supervisor.authenticator
        principal = authenticator.verify(house.token())
        ticket, _ = authenticator.issue_ticket(principal, "acme")
        async with house.client(path=f"/?ticket={ticket}", headers=[]) as websocket:
            await websocket.send("hi")
            assert await websocket.receive() == "hi"
        with pytest.raises(ConnectionRejected) as refused:
            async with house.client(path=f"/?ticket={ticket}", headers=[]):
                pass
        assert refused.value.status == 401


async def test_a_connection_ends_with_1008_when_its_token_does():
    async with open_house() as house:
        headers = [("Authorization", f"Bearer {house.token(ttl_s=1.2)}")]
        async with house.client(headers=headers) as websocket:
            with pytest.raises(ConnectionClosed) as caught, trio.fail_after(5):
                await websocket.receive()
            assert caught.value.code == 1008


async def test_revocation_ends_connections_and_refuses_the_old_token():
    async with open_house() as house:
        headers = [("Authorization", f"Bearer {house.token()}")]
        async with house.client(headers=headers) as websocket:
            await house.supervisor.revoke("acme", time.time() + 1)
            with pytest.raises(ConnectionClosed) as caught, trio.fail_after(5):
                await websocket.receive()
            assert caught.value.code == 1008
        with pytest.raises(ConnectionRejected) as refused:
            async with house.client(headers=headers):
                pass
        assert refused.value.status == 401


async def test_over_the_cap_of_a_tenant_is_503():
    async with open_house(limits=LimitSettings(connections_per_tenant=2)) as house:
        async with house.client(), house.client():
            with pytest.raises(ConnectionRejected) as refused:
                async with house.client():
                    pass
            assert refused.value.status == 503
            assert b"connections_per_tenant" in refused.value.body
        async with house.client() as websocket:
            await websocket.send("again")
            assert await websocket.receive() == "again"


async def test_deleting_a_tenant_ends_its_agent_and_removes_its_files():
    async with open_house() as house:
        async with house.client() as websocket:
            home = Path(house.settings.state_dir) / "tenants" / "acme"
            assert home.is_dir()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(house.supervisor.delete_tenant, "acme")
                with pytest.raises(ConnectionClosed) as caught, trio.fail_after(5):
                    await websocket.receive()
            assert caught.value.code == 1001
        assert not home.exists()
        assert await house.supervisor.list_tenants() == []


async def test_the_workspace_and_the_generation_outlive_the_supervisor(tmp_path):
    """S3-09: what is the tenant's stays; what is a process's does not."""
    async with open_house(BUNDLED, state_dir=tmp_path) as house:
        await house.supervisor.wake("acme", create=True)
        (tmp_path / "tenants" / "acme" / "workspace" / "note").write_text("kept")
    async with open_house(BUNDLED, state_dir=tmp_path) as house:
        assert (await house.describe())["state"] == "asleep"
        await house.supervisor.wake("acme")
        assert (await house.describe())["generation"] == 2
        assert (tmp_path / "tenants" / "acme" / "workspace" / "note").read_text() == "kept"


async def test_the_node_agent_keeps_the_same_contract():
    """The contract is not Python's."""
    node = next((Path(d) / "node" for d in os.environ["PATH"].split(":") if (Path(d) / "node").exists()), None)
    if node is None:
        pytest.skip("no node on this machine")
    agent = str(Path(__file__).resolve().parents[2] / "fixtures" / "agent.mjs")
    async with open_house((str(node), agent)) as house, house.client() as websocket:
        await websocket.send("hi")
        assert await websocket.receive() == "hi"
        house.supervisor.request_drain()
        with pytest.raises(ConnectionClosed) as caught, trio.fail_after(5):
            await websocket.receive()
        assert caught.value.code == 1012


async def test_two_supervisors_in_one_process_do_not_meet():
    async with open_house() as one, open_house() as other:
        await one.supervisor.wake("acme", create=True)
        assert await other.supervisor.list_tenants() == []
        await other.supervisor.wake("acme", create=True)
        assert (await one.describe())["pid"] != (await other.describe())["pid"]


@pytest.mark.parametrize("command", [ECHO, (sys.executable, "-c", "raise SystemExit(9)"), ("/no/such/agent",)])
async def test_after_a_drain_nothing_can_be_woken(command):
    async with open_house(command, connect_retry_s=(0.01,)) as house:
        house.supervisor.request_drain()
        with pytest.raises(Exception, match="being stopped"):
            await house.supervisor.wake("acme", create=True)


async def test_a_program_that_does_not_exist_is_named():
    async with open_house(("/no/such/agent",), connect_retry_s=(0.01,)) as house:
        with pytest.raises(ConnectionRejected) as refused:
            async with house.client():
                pass
        assert refused.value.status == 503
        assert b"/no/such/agent" in refused.value.body


async def test_a_tree_that_is_hard_to_remove_is_removed_with_its_tenant():
    """Deep, without modes, and with a link out of it."""
    async with open_house() as house:
        await house.supervisor.wake("acme", create=True)
        home = Path(house.settings.state_dir) / "tenants" / "acme"
        outside = Path(house.settings.state_dir) / "outside"
        outside.write_text("kept")
        top = os.open(home / "workspace", os.O_RDONLY)
        os.symlink(outside, "link", dir_fd=top)
        for _ in range(1500):
            os.mkdir("d", dir_fd=top)
            below = os.open("d", os.O_RDONLY, dir_fd=top)
            os.close(top)
            top = below
        os.close(top)
        (home / "workspace" / "d").chmod(0)
        await house.supervisor.delete_tenant("acme")
        assert not home.exists()
        assert outside.read_text() == "kept"


async def test_a_delete_does_not_undo_a_revocation():
    async with open_house() as house:
        token = house.token()
        await house.supervisor.wake("acme", create=True)
        await house.supervisor.revoke("acme", time.time() + 1)
        await house.supervisor.delete_tenant("acme")
        with pytest.raises(ConnectionRejected) as refused:
            async with house.client(headers=[("Authorization", f"Bearer {token}")]):
                pass
        assert refused.value.status == 401
        assert await house.supervisor.list_tenants() == []
