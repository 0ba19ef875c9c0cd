"""Listening sockets: every form of an address, what is refused in words, and that no file or fd is left."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
import subprocess
from functools import partial

import pytest
import trio
import trio.testing

from supervisor.errors import ConfigError
from supervisor.gateway.listeners import open_listeners, tls_context
from supervisor.settings import TlsSettings
from tests.gateway.front_kit import PLAIN, UPGRADE, make_kit, read_all, read_until, request, serving


@pytest.fixture(autouse=True)
def _no_fd_left():
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


@contextlib.asynccontextmanager
async def opened(*binds, tls=None):
    listeners, addresses = await open_listeners(binds, tls=tls)
    try:
        yield listeners, addresses
    finally:
        for listener in listeners:
            listener.close()


@contextlib.asynccontextmanager
async def accepted_from(listener, connect):
    """One connection through the listener, and the peer that it names."""
    client = await connect()
    ((stream, peer),) = await listener.accept_some()
    async with client, stream:
        await client.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        yield stream, peer


async def test_a_tcp_address_with_any_port_is_told_as_it_is():
    async with opened("127.0.0.1:0") as ((listener,), (address,)):
        host, _, port = address.removeprefix("http://").rpartition(":")
        assert host == "127.0.0.1"
        async with accepted_from(listener, partial(trio.open_tcp_stream, host, int(port))) as (stream, peer):
            assert peer == "127.0.0.1"
            # Dead peers are found by the kernel: the accepted socket has it from its listener.
            assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert not os.get_inheritable(stream.socket.fileno())
        assert not os.get_inheritable(listener._socket.fileno())


async def test_an_ipv6_address_is_in_brackets():
    try:
        async with opened("[::1]:0") as ((listener,), (address,)):
            assert address.startswith("http://[::1]:")
            port = int(address.rpartition(":")[2])
            async with accepted_from(listener, partial(trio.open_tcp_stream, "::1", port)) as (_, peer):
                assert peer == "::1"
    except ConfigError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")


async def test_several_addresses_are_opened_in_order(tmp_path):
    async with opened("127.0.0.1:0", f"unix:{tmp_path}/s", "127.0.0.1:0") as (listeners, addresses):
        assert len(listeners) == 3
        assert addresses[1] == f"unix:{tmp_path}/s"
        assert addresses[0] != addresses[2]


@pytest.mark.parametrize(
    "bind",
    [
        "",
        "x",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:x",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "::1:80",
        "fd://",
        "fd://x",
        "fd://-1",
        "fd://9999",
        "unix:/nowhere/at/all/s",
        "999.1.1.1:80",
        "192.0.2.1:0",
    ],
)
async def test_an_address_that_cannot_be_is_an_error_that_names_it(bind):
    with pytest.raises(ConfigError) as error:
        await open_listeners([bind])
    assert bind in str(error.value)


async def test_an_address_in_use_says_so_and_closes_those_before_it(tmp_path):
    async with opened("127.0.0.1:0") as (_, (address,)):
        taken = address.removeprefix("http://")
        with pytest.raises(ConfigError, match=r"in use; end what listens there"):
            await open_listeners([f"unix:{tmp_path}/s", taken])
    assert list(tmp_path.iterdir()) == []


async def test_a_closed_listener_ends_its_accept():
    async with opened("127.0.0.1:0") as ((listener,), _), trio.open_nursery() as nursery:

        async def accept():
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept_some()

        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        listener.close()
        listener.close()


async def test_clients_that_wait_are_taken_together():
    async with opened("127.0.0.1:0") as ((listener,), (address,)):
        port = int(address.rpartition(":")[2])
        clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(10)]
        accepted = await listener.accept_some()
        assert len(accepted) == 10
        for stream in [*clients, *(stream for stream, _ in accepted)]:
            await stream.aclose()


async def test_a_client_that_has_left_before_it_was_taken_disturbs_nobody():
    async with opened("127.0.0.1:0") as ((listener,), (address,)):
        port = int(address.rpartition(":")[2])
        gone = await trio.open_tcp_stream("127.0.0.1", port)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await gone.aclose()
        client = await trio.open_tcp_stream("127.0.0.1", port)
        accepted = []
        while len(accepted) < 2:
            accepted += await listener.accept_some()
        for stream in (client, *(stream for stream, _ in accepted)):
            await stream.aclose()


# ---- unix sockets ----------------------------------------------------------------------------------------


async def test_a_unix_socket_has_its_mode_and_goes_with_its_listener(tmp_path):
    path = tmp_path / "s"
    old = os.umask(0)
    try:
        async with opened(f"unix:{path}") as ((listener,), (address,)):
            assert address == f"unix:{path}"
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            async with accepted_from(listener, partial(trio.open_unix_socket, path)) as (_, peer):
                assert peer == "unix"
    finally:
        os.umask(old)
    assert not path.exists()


async def test_a_stale_unix_socket_is_replaced_and_a_live_one_refused(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()
    assert path.exists()
    async with opened(f"unix:{path}"):
        with pytest.raises(ConfigError, match="another process listens there"):
            await open_listeners([f"unix:{path}"])
        assert path.exists()


async def test_a_live_unix_socket_with_a_full_backlog_is_live(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as client:
        busy.bind(str(path))
        busy.listen(0)
        client.connect(str(path))
        with pytest.raises(ConfigError, match="another process listens there"):
            await open_listeners([f"unix:{path}"])


async def test_a_file_that_is_no_socket_is_never_removed(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match="no socket"):
        await open_listeners([f"unix:{path}"])
    assert path.read_text() == "data"


async def test_a_socket_that_replaced_ours_is_left_alone(tmp_path):
    path = tmp_path / "s"
    async with opened(f"unix:{path}"):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.exists()


async def test_a_unix_path_may_be_longer_than_the_kernel_takes(tmp_path):
    """The kernel takes 107 bytes of a path."""
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    path = directory / "s"
    async with opened(f"unix:{path}") as ((listener,), _):
        near = os.open(directory, os.O_PATH)
        try:
            short = f"/proc/self/fd/{near}/s"
            async with accepted_from(listener, partial(trio.open_unix_socket, short)) as (_, peer):
                assert peer == "unix"
        finally:
            os.close(near)
        with pytest.raises(ConfigError, match="another process"):
            await open_listeners([f"unix:{path}"])
    assert not path.exists()


# ---- inherited fds ---------------------------------------------------------------------------------------


async def test_an_inherited_socket_is_adopted_and_no_longer_inheritable():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        fd = sock.detach()
    os.set_inheritable(fd, True)
    async with opened(f"fd://{fd}") as ((listener,), (address,)):
        assert address == f"http://127.0.0.1:{port}"
        assert not os.get_inheritable(fd)
        async with accepted_from(listener, partial(trio.open_tcp_stream, "127.0.0.1", port)) as (_, peer):
            assert peer == "127.0.0.1"


async def test_an_inherited_unix_socket_keeps_its_file(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        fd = sock.detach()
    async with opened(f"fd://{fd}") as ((listener,), (address,)):
        assert address == f"unix:{path}"
        async with accepted_from(listener, partial(trio.open_unix_socket, path)) as (_, peer):
            assert peer == "unix"
    assert path.exists()


async def test_an_inherited_fd_that_does_not_listen_is_refused_and_left_open():
    ours, theirs = socket.socketpair()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    read, write = os.pipe()
    try:
        for fd in (ours.fileno(), udp.fileno(), read):
            with pytest.raises(ConfigError, match=f"fd://{fd}"):
                await open_listeners([f"fd://{fd}"])
            os.fstat(fd)
    finally:
        for sock in (ours, theirs, udp):
            sock.close()
        os.close(read)
        os.close(write)


# ---- TLS -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-made certificate for 127.0.0.1, by the openssl program."""
    directory = tmp_path_factory.mktemp("tls")
    settings = TlsSettings(certificate=directory / "cert.pem", key=directory / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", settings.key, "-out", settings.certificate, "-days", "2", "-subj", "/CN=tenantry test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no openssl program")
    return settings


@contextlib.asynccontextmanager
async def tls_client(kit, certificate, *, alpn=("http/1.1",)):
    context = ssl.create_default_context(cafile=str(certificate.certificate))
    context.set_alpn_protocols(list(alpn))
    stream = trio.SSLStream(await kit.connect(), context, server_hostname="127.0.0.1", https_compatible=True)
    with trio.fail_after(5):
        try:
            await stream.do_handshake()
            yield stream
        finally:
            await trio.aclose_forcefully(stream)


async def test_tls_speaks_http_1_1_only(certificate):
    async with serving(make_kit(), tls=tls_context(certificate)) as kit:
        assert kit.address.startswith("https://127.0.0.1:")
        for alpn, agreed in [(("h2", "http/1.1"), "http/1.1"), (("h2",), None)]:
            async with tls_client(kit, certificate, alpn=alpn) as stream:
                assert stream.selected_alpn_protocol() == agreed
                await stream.send_all(PLAIN)
                assert (await read_until(stream, b"ok")).startswith(b"HTTP/1.1 200 ")
        assert {scope["scheme"] for scope in kit.app.scopes} == {"https"}


def test_a_certificate_that_cannot_be_used_is_an_error_that_names_it(tmp_path, certificate):
    assert tls_context(TlsSettings()) is None
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no PEM")
    for chain, key in [(garbage, certificate.key), (certificate.certificate, garbage), (tmp_path / "no", garbage)]:
        with pytest.raises(ConfigError, match=str(chain)):
            tls_context(TlsSettings(certificate=chain, key=key))


def test_an_encrypted_key_is_an_error_and_asks_nobody(tmp_path, certificate):
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "ec", "-in", certificate.key, "-aes256", "-passout", "pass:secret", "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    with pytest.raises(ConfigError, match="without a password"):
        tls_context(TlsSettings(certificate=certificate.certificate, key=encrypted))


async def test_an_upgrade_over_tls_is_handed_over_with_its_eager_bytes(certificate):
    async with serving(make_kit(), tls=tls_context(certificate)) as kit:
        async with tls_client(kit, certificate) as stream:
            await stream.send_all(PLAIN + UPGRADE + b"eager")
            assert (await read_until(stream, b"eager")).count(b"HTTP/1.1 ") == 2
            await stream.send_all(b"more")
            await read_until(stream, b"more")
        assert kit.upgrades.seen[0].scheme == "https"


async def test_a_refusal_over_tls_arrives_though_the_client_goes_on_sending(certificate):
    async with serving(make_kit(), tls=tls_context(certificate)) as kit:
        async with tls_client(kit, certificate) as stream:
            await stream.send_all(request(b"POST /body", b"Content-Length: 2000000"))
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"x" * 100_000)
            assert (await read_until(stream, b"}")).startswith(b"HTTP/1.1 413 ")
        async with tls_client(kit, certificate) as stream:
            await stream.send_all(request(b"GET /ok", b"Connection: close"))
            assert (await read_all(stream)).endswith(b"ok")  # and a clean end of the TLS stream
        # Nothing of it is left but the two tasks of the front and ours.
        await trio.sleep(0.05)
        assert not kit.front._http


@pytest.mark.slow
async def test_no_tls_handshake_is_waited_for_beyond_its_deadline(certificate):
    limits = {"head_timeout_s": 0.4}
    async with serving(make_kit(limits=limits), tls=tls_context(certificate)) as kit:
        for said in (b"", b"\x16\x03\x01", PLAIN, os.urandom(200)):
            stream = await kit.connect()
            async with stream:
                with trio.fail_after(10):
                    await stream.send_all(said)
                    await read_all(stream)
        assert kit.refused("tls_handshake_failed") == 4
        async with tls_client(kit, certificate) as stream:
            await stream.send_all(PLAIN)
            await read_until(stream, b"ok")
