"""A client over TLS: its stream has no half close, so its Close, or our limit, must do what an end-of-file does."""

from __future__ import annotations

import ssl
import subprocess

import pytest
import trio

from supervisor.gateway.frames import close_frame
from supervisor.gateway.relay import Relay
from supervisor.gateway.splice import Outcome, Side, Splice
from supervisor.tenant.traffic import Traffic
from tests.gateway.splice_kit import (
    DIED_FRAME,
    client_close,
    died,
    frame,
    read_to_end,
    receive_exactly,
    settle,
    tcp_pair,
    unix_pair,
)

pytestmark = [pytest.mark.timeout(30)]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    try:
        subprocess.run(command, cwd=directory, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl program")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return ssl.create_default_context(cafile=str(directory / "cert.pem")), server


@pytest.fixture
async def tls(contexts, nursery):
    """The client's end, the agent's end, the splice and its outcome."""
    near, far = await tcp_pair()
    client = trio.SSLStream(near, contexts[0], server_hostname="localhost", https_compatible=True)
    client_inner = trio.SSLStream(far, contexts[1], server_side=True, https_compatible=True)
    async with trio.open_nursery() as handshakes:
        handshakes.start_soon(client.do_handshake)
        handshakes.start_soon(client_inner.do_handshake)
    agent, agent_inner = unix_pair()
    # A relay is offered, and cannot be used.
    splice = Splice(client_inner, agent_inner, relay=Relay(), traffic=Traffic(), when_agent_ends=died)
    outcomes: list[Outcome] = []

    async def run():
        outcomes.append(await splice.run())

    nursery.start_soon(run)
    yield client, agent, splice, outcomes
    await trio.aclose_forcefully(client)
    await trio.aclose_forcefully(agent)
    await trio.aclose_forcefully(client_inner)
    await trio.aclose_forcefully(agent_inner)


async def test_bytes_pass_over_tls(tls, mock_clock):
    client, agent, _, _ = tls
    up, down = frame(bytes(100_000), masked=True), frame(bytes(100_000))
    await client.send_all(up)
    assert await receive_exactly(agent, len(up)) == up
    await agent.send_all(down)
    assert await receive_exactly(client, len(down)) == down


async def test_a_client_that_answers_the_close_is_not_waited_for(tls, mock_clock):
    client, agent, _, outcomes = tls
    await agent.send_all(frame(b"last words"))
    await agent.aclose()
    said = frame(b"last words") + DIED_FRAME
    assert await receive_exactly(client, len(said)) == said
    await client.send_all(client_close(1011))
    assert await read_to_end(client) == (b"", "eof")
    await settle()
    assert outcomes == [Outcome(1011, Side.SUPERVISOR)]


async def test_a_client_that_does_not_answer_is_left_after_two_seconds(tls, mock_clock):
    client, _, splice, outcomes = tls
    splice.close(1012, "restart", within_s=1)
    assert await receive_exactly(client, len(close_frame(1012, "restart"))) == close_frame(1012, "restart")
    await settle()
    assert outcomes == []
    mock_clock.jump(2.1)
    assert await read_to_end(client) == (b"", "eof")
    await settle()
    assert outcomes == [Outcome(1012, Side.SUPERVISOR)]


async def test_a_client_that_leaves_without_a_word_ends_its_agent(tls, mock_clock):
    client, agent, _, outcomes = tls
    await trio.aclose_forcefully(client)
    assert await read_to_end(agent) == (b"", "eof")
    await agent.aclose()
    await settle()
    assert outcomes == [Outcome(None, Side.CLIENT)]
