"""Host and Origin: a request that another site's page made, or that came by a rebound name, is refused."""

from __future__ import annotations

import pytest

from supervisor.errors import ConfigError, Refused
from supervisor.gateway.hosts import HostNotAllowed, OriginNotAllowed, host_check
from supervisor.settings import AuthSettings, Settings

LOCAL = host_check(Settings(), ["127.0.0.1:8000"])
PUBLIC = host_check(
    Settings(public_url="https://Agents.example.org/", allowed_hosts=("inner.example", "lab.example:8443")),
    ["0.0.0.0:8000"],
)


def head(host: str | None, origin: str | None = None) -> list[tuple[bytes, bytes]]:
    fields = [("host", host), ("Origin", origin)]
    return [(name.encode(), value.encode("latin-1")) for name, value in fields if value is not None]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.", "app.localhost:1", "127.0.0.1", "127.8.9.1:80", "[::1]:8000"],
)
def test_the_names_of_this_machine_are_always_ours(host):
    LOCAL.check(head(host))
    PUBLIC.check(head(host))


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "evil-localhost",
        "127.0.0.1.evil.example",
        "192.0.2.1",
        "[2001:db8::1]",
        "0x7f.1",
        "2130706433",
        "lab.example",
    ],
)
def test_a_rebound_name_is_refused_with_the_setting_that_would_allow_it(host):
    with pytest.raises(HostNotAllowed, match="allowed_hosts") as caught:
        LOCAL.check(head(host))
    assert caught.value.status == 421


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        "a b",
        "user@localhost",
        "localhost/evil",
        "localhost#",
        "localhost?",
        "local\\host",
        "[::1",
        ":80",
        "localhost:x",
        "localhost:99999",
        "hé",
        "<script>",
        "localhost%00",
        "%6cocalhost",
        "localhost,evil",
    ],
)
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(Refused):
        LOCAL.check(head(host))


def test_there_is_exactly_one_host():
    for headers in ([], [*head("localhost"), *head("localhost")]):
        with pytest.raises(Refused, match="exactly one"):
            LOCAL.check(headers)


def test_the_settings_allow_their_hosts_and_bound_to_all_addresses_each_of_them():
    for host in ("agents.example.org", "agents.example.org:444", "inner.example:1", "lab.example:8443"):
        PUBLIC.check(head(host))
    for host in ("192.0.2.1:8000", "[2001:db8::1]"):
        PUBLIC.check(head(host))
    for host in ("lab.example", "lab.example:8000", "sub.inner.example", "evil.example"):
        with pytest.raises(HostNotAllowed):
            PUBLIC.check(head(host))


def test_bound_to_one_address_only_this_one_is_ours():
    check = host_check(Settings(allowed_hosts=("a.example",)), ["192.0.2.1:80", "unix:/run/t.sock"])
    check.check(head("192.0.2.1"))
    with pytest.raises(HostNotAllowed):
        check.check(head("192.0.2.2"))


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("localhost:8000", "http://localhost:3000"),
        ("inner.example", "https://inner.example:5"),
        ("localhost", "https://agents.example.org"),
        ("localhost", "https://agents.example.org:443"),
    ],
)
def test_pages_of_our_own_hosts_are_let_in(host, origin):
    PUBLIC.check(head(host, origin))


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "https://evil.example",
        "https://agents.example.org.evil.example",
        "file://localhost",
        "chrome-extension://localhost",
        "https://user@localhost",
        "localhost",
        "http://",
        "http://evil@localhost",
    ],
)
def test_pages_of_other_sites_are_refused(origin):
    for check in (LOCAL, PUBLIC):
        with pytest.raises(OriginNotAllowed, match="allowed_hosts") as caught:
            check.check(head("localhost", origin))
        assert caught.value.status == 403


def test_two_origins_are_none():
    with pytest.raises(OriginNotAllowed):
        LOCAL.check([*head("localhost", "http://localhost"), *head(None, "http://localhost")])


def test_without_auth_another_program_s_page_on_this_machine_is_refused():
    check = host_check(Settings(auth=AuthSettings(enabled=False)), ["127.0.0.1:8000"])
    check.check(head("localhost:8000"))
    check.check(head("localhost:8000", "http://localhost:8000"))
    for origin in ("http://localhost:3000", "http://127.0.0.1:8000", "http://localhost"):
        with pytest.raises(OriginNotAllowed):
            check.check(head("localhost:8000", origin))


@pytest.mark.parametrize("address", ["0.0.0.0:8000", "[::]:8000", "192.0.2.1:80", "example.org:80"])
def test_beyond_loopback_the_hosts_must_be_set(address):
    with pytest.raises(ConfigError, match=r"public_url.*allowed_hosts"):
        host_check(Settings(), [address])
    assert not host_check(Settings(allowed_hosts=("a.example",)), [address]).loopback_only


@pytest.mark.parametrize("entry", ["", "https://a.example", "a.example/", "a b", "*", "*.a.example", "a:b", "::1"])
def test_an_allowed_host_that_is_none_is_refused(entry):
    with pytest.raises(ConfigError, match="allowed_hosts"):
        host_check(Settings(allowed_hosts=(entry,)), ["127.0.0.1:8000"])


@pytest.mark.parametrize("url", ["", "a.example", "ftp://a.example", "https://", "https://u@a.example", "wss://a"])
def test_a_public_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="public_url"):
        host_check(Settings(public_url=url), ["127.0.0.1:8000"])


def test_private_is_what_no_proxy_and_no_name_lets_others_reach():
    assert LOCAL.private
    assert host_check(Settings(), ["unix:/run/t.sock"]).private
    for settings in (
        Settings(public_url="https://a.example"),
        Settings(allowed_hosts=("a.example",)),
        Settings(trusted_proxies=("127.0.0.1",)),
    ):
        check = host_check(settings, ["127.0.0.1:8000"])
        assert check.loopback_only
        assert not check.private
    assert not PUBLIC.private
