"""How the client verbs find a server, prove who they are, and tell what it answers."""

from __future__ import annotations

import contextlib
import http.server
import json
import socketserver
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from supervisor.cli import Failure
from supervisor.cli.server import find_server, list_tenants, make_token
from supervisor.gateway.auth import Authenticator, load_or_create_secret
from supervisor.settings import AuthSettings, Settings, TlsSettings


@pytest.fixture
def settings(tmp_path):
    made = Settings(state_dir=tmp_path)
    load_or_create_secret(tmp_path, made)
    return made


def verified(token, settings):
    secret = load_or_create_secret(settings.state_dir, settings)
    return Authenticator(secret, settings=settings, addresses=()).verify(token)


@contextlib.contextmanager
def serving(answer, *, unix_path=None):
    """An HTTP server in a thread; `answer(request)` gives status and body, and `seen` are the requests."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = SimpleNamespace(method=self.command, path=self.path, headers=self.headers, body=body)
            seen.append(request)
            status, content = answer(request)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        do_POST = do_GET

        def log_message(self, *args):
            pass

        def address_string(self):
            return "client"

    kind = socketserver.TCPServer if unix_path is None else socketserver.UnixStreamServer
    with kind(("127.0.0.1", 0) if unix_path is None else str(unix_path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"unix:{unix_path}" if unix_path else "http://{}:{}".format(*server.server_address)
        try:
            yield url, seen
        finally:
            server.shutdown()
            thread.join()


def test_a_request_carries_the_token_and_gives_the_json(settings):
    with serving(lambda request: (200, {"ok": True})) as (url, seen):
        server = find_server(settings, url=url, token="mine")
        assert server.request("POST", "/v1/drain", {}) == {"ok": True}
    assert (seen[0].method, seen[0].path, seen[0].body) == ("POST", "/v1/drain", b"{}")
    assert seen[0].headers["Authorization"] == "Bearer mine"
    assert seen[0].headers["Content-Type"] == "application/json"


def test_a_unix_socket_is_as_good(settings, tmp_path):
    with serving(lambda request: (200, []), unix_path=tmp_path / "s") as (url, seen):
        server = find_server(settings, url=url, token=None)
        assert server.request("GET", "/x") == []
        assert str(server) == url
        assert server.connect_url("demo") == "ws://localhost/v1/tenants/demo/connect/"
    assert seen[0].headers["Host"] == "localhost"


def test_tenants_are_listed_page_by_page(settings):
    pages = {"": (["a", "b"], "b"), "b": (["c"], None)}

    def answer(request):
        names, after = pages[request.path.split("after=")[1].split("&")[0]]
        return 200, {"tenants": [{"name": name} for name in names], "next_after": after}

    with serving(answer) as (url, _):
        assert [t["name"] for t in list_tenants(find_server(settings, url=url, token="x"))] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("status", "content", "words", "exit_status"),
    [
        (401, {"detail": "a token is required"}, "a token is required (401). Give a token with --token", 77),
        (403, {"detail": "this needs a token for tenant 'b'"}, "this needs a token for tenant 'b' (403)", 77),
        (404, {"title": "Not Found"}, "Not Found (404)", 1),
        (503, {"detail": "the supervisor is being stopped"}, "is being stopped (503)", 69),
        (502, b"<html>\nBad gateway", "<html> (502)", 69),
        (500, b"", "Internal Server Error (500)", 69),
        (400, [1], "[1] (400)", 1),
        (200, b"<html>", "no JSON: is it Tenantry?", 69),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(status, content, words, exit_status, settings):
    with serving(lambda request: (status, content)) as (url, _), pytest.raises(Failure) as caught:
        find_server(settings, url=url, token="x").request("GET", "/v1/tenants?after=secret")
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.status == exit_status


# ---- the token ------------------------------------------------------------------------------------------------


def test_without_a_token_one_is_made_that_is_as_weak_as_it_can_be(settings):
    server = find_server(settings, url=None, token=None)
    admin = verified(server.token(None), settings)
    assert (admin.tenant, admin.scopes) == (None, {"admin"})
    assert admin.expires_at - admin.issued_at == pytest.approx(60)
    connect = verified(server.token("demo"), settings)
    assert (connect.tenant, connect.scopes) == ("demo", {"connect"})


@pytest.mark.parametrize(
    ("url", "made"),
    [
        (None, True),
        ("http://127.0.0.1:9", True),
        ("http://localhost:9", True),
        ("http://[::1]:9", True),
        ("unix:/x", True),
        ("https://agents.example.org", False),
        ("http://192.0.2.1:8000", False),
        ("http://127.0.0.1.example.org", False),
    ],
)
def test_a_token_that_this_machine_signed_goes_to_no_other_machine(url, made, settings):
    assert (find_server(settings, url=url, token=None).token(None) is not None) is made
    assert find_server(settings, url=url, token="given").token(None) == "given"


def test_without_a_secret_no_token_is_made_and_no_secret_either(tmp_path):
    server = find_server(Settings(state_dir=tmp_path / "none"), url=None, token=None)
    assert server.token(None) is None
    assert not (tmp_path / "none").exists()


def test_without_auth_no_token_is_made(settings):
    open_door = Settings(state_dir=settings.state_dir, auth=AuthSettings(enabled=False))
    assert find_server(open_door, url=None, token=None).token(None) is None


def test_the_token_is_in_no_repr(settings):
    token = make_token(settings, tenant="demo", scopes=["connect"], ttl_s=60, subject="x")
    assert token not in repr(find_server(settings, url=None, token=token))


# ---- the address ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bind", "url"),
    [
        (("127.0.0.1:8000",), "http://127.0.0.1:8000"),
        (("0.0.0.0:80",), "http://127.0.0.1:80"),
        (("*:80",), "http://127.0.0.1:80"),
        ((":80",), "http://127.0.0.1:80"),
        (("[::]:80",), "http://[::1]:80"),
        (("[::1]:80",), "http://[::1]:80"),
        (("fd://3", "127.0.0.1:0", "localhost:1"), "http://localhost:1"),
    ],
)
def test_the_settings_tell_where_the_server_is(bind, url, tmp_path):
    assert find_server(Settings(bind=bind, state_dir=tmp_path), url=None, token=None).url == url


def test_a_server_with_tls_is_asked_with_tls(tmp_path):
    tls = TlsSettings(certificate=tmp_path / "c", key=tmp_path / "k")
    server = find_server(Settings(tls=tls, state_dir=tmp_path), url=None, token=None)
    assert server.url == "https://127.0.0.1:8000"
    assert server.connect_url("a/b", "x").startswith("wss://127.0.0.1:8000/v1/tenants/a%2Fb/connect/x")


def test_a_bound_unix_socket_is_where_the_server_is(tmp_path):
    server = find_server(Settings(bind=("unix:/run/t.sock",), state_dir=tmp_path), url=None, token=None)
    assert server.unix_path == Path("/run/t.sock")
