"""Tokens, tickets and the secret: what opens the door, and what does not."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
from urllib.parse import quote

import attrs
import jwt
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import BadTenantName, ConfigError, NotAllowed, NotAuthenticated, OverCapacity, Refused
from supervisor.gateway.auth import SCOPES, Authenticator, Principal, load_or_create_secret
from supervisor.settings import AuthSettings, Settings, TenantSettings
from supervisor.tenant.name import check_tenant_name

SECRET = b"a secret of forty-eight bytes, as HS384 would ask"
LOOPBACK = ("127.0.0.1:8000",)


class Clock:
    """A wall clock that stands still until it is set."""

    def __init__(self, now: float = 1_790_000_000.25) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def authenticator(clock=None, *, settings=None, addresses=LOOPBACK, secret=SECRET) -> Authenticator:
    return Authenticator(secret, settings=settings or Settings(), addresses=addresses, wall_clock=clock or Clock())


def bearer(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"localhost"), (b"authorization", b"Bearer " + token.encode())]


def forged(claims: dict, *, secret: bytes = SECRET, algorithm: str = "HS256") -> str:
    return jwt.encode(claims, secret, algorithm=algorithm)


def claims(**changes) -> dict:
    base = {
        "iss": "tenantry",
        "sub": "ann",
        "tenant": "acme",
        "scope": "connect",
        "iat": 1_790_000_000,
        "jti": "1",
    }
    return {key: value for key, value in (base | changes).items() if value is not ...}


# ---- tokens ----------------------------------------------------------------------------------------------


def test_a_token_says_who_it_is_for_and_until_when():
    clock = Clock()
    auth = authenticator(clock)
    token = auth.issue(tenant="acme", scopes=["connect", "execute"], ttl_s=60, subject="ann")
    principal = auth.verify(token)
    assert principal.tenant == "acme"
    assert principal.scopes == {"connect", "execute"}
    assert principal.subject == "ann"
    assert (principal.issued_at, principal.expires_at) == (clock.now, clock.now + 60)
    assert jwt.get_unverified_header(token)["alg"] == "HS256"
    other = auth.verify(auth.issue(tenant="acme", scopes=["connect"], ttl_s=60, subject="ann"))
    assert other.token_id != principal.token_id


def test_a_token_ends_at_its_expiry_and_not_before():
    clock = Clock()
    auth = authenticator(clock)
    token = auth.issue(tenant="acme", scopes=["connect"], ttl_s=60, subject="ann")
    clock.now += 59.999
    auth.verify(token)
    clock.now += 0.002
    with pytest.raises(NotAuthenticated, match="expired"):
        auth.verify(token)


def test_only_a_token_without_ttl_has_no_expiry():
    auth = authenticator()
    token = auth.issue(tenant=None, scopes=["admin"], ttl_s=None, subject="cli")
    assert auth.verify(token).expires_at is None
    assert "exp" not in jwt.decode(token, options={"verify_signature": False})
    for ttl_s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(Refused):
            auth.issue(tenant="acme", scopes=["connect"], ttl_s=ttl_s, subject="ann")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"scopes": []}, Refused),
        ({"scopes": ["root"]}, Refused),
        ({"tenant": None, "scopes": ["connect"]}, Refused),
        ({"tenant": "Acme"}, BadTenantName),
        ({"subject": ""}, Refused),
        ({"subject": "a\r\nTenantry-Tenant: b"}, Refused),
        ({"subject": "Żółw"}, Refused),
    ],
)
def test_a_token_that_could_not_be_used_is_not_issued(arguments, error):
    valid = {"tenant": "acme", "scopes": ["connect"], "ttl_s": 60.0, "subject": "ann"}
    with pytest.raises(error):
        authenticator().issue(**(valid | arguments))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x",
        "a.b.c",
        "..",
        "é.é.é",
        "\ud800",
        forged(claims(), secret=b"another secret of thirty-two bytes"),
        forged(claims(), algorithm="HS384"),
        jwt.encode(claims(), None, algorithm="none"),
        forged(claims(iss="somebody")),
        forged(claims(iss=...)),
        forged(claims(aud="elsewhere")),
        forged(claims(sub=...)),
        forged(claims(sub="a\nb")),
        forged(claims(jti=...)),
        forged(claims(iat=...)),
        forged(claims(iat="1790000000")),
        forged(claims(iat=True)),
        forged(claims(iat=float("nan"))),
        forged(claims(iat=1_790_000_100)),
        forged(claims(nbf=1_790_000_100)),
        forged(claims(nbf="later")),
        forged(claims(exp="never")),
        forged(claims(exp=float("inf"))),
        forged(claims(exp=1_789_999_999)),
        # Every tenant is said in so many words, and only of admins.
        forged(claims(tenant=..., scope="admin")),
        forged(claims(tenant=None)),
        forged(claims(tenant=["acme"])),
        forged(claims(tenant="Acme")),
        forged(claims(tenant="acme\n")),
        forged(claims(tenant="")),
        forged(claims(scope=...)),
        forged(claims(scope="")),
        forged(claims(scope="root")),
        forged(claims(scope=["connect"])),
        base64.urlsafe_b64encode(b"[" * 20_000).decode() + ".e30.AAAA",
        base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "x": "9" * 10_000}).encode()).decode() + ".e30.A",
    ],
)
def test_what_is_no_valid_token_of_ours_is_refused_and_not_repeated(token):
    with pytest.raises(NotAuthenticated) as caught:
        authenticator().verify(token)
    assert len(token) < 10 or token not in str(caught.value)
    assert caught.value.__cause__ is None


@given(st.text(max_size=40), st.integers(0, 400))
def test_a_token_with_anything_changed_in_it_is_refused(text, at):
    auth = authenticator()
    token = auth.issue(tenant="acme", scopes=["connect"], ttl_s=60, subject="ann")
    changed = token[:at] + text + token[at + len(text) :]
    # The last character of base64 carries bits that do not count.
    if changed[:-1] == token[:-1]:
        return
    with pytest.raises(NotAuthenticated):
        auth.verify(changed)


def test_tokens_made_elsewhere_with_the_secret_are_taken():
    principal = authenticator().verify(forged(claims(scope="connect other-system:read", iat=1_790_000_050)))
    assert principal.scopes == {"connect"}


@pytest.mark.parametrize("name", ["a", "0", "a-b", "a" * 63, "9-"])
def test_names_of_tenants(name):
    assert check_tenant_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "A", "a_b", "a.b", "a" * 64, "a\n", "é", "a/b", ".."])
def test_what_is_no_name_of_a_tenant(name):
    with pytest.raises(BadTenantName):
        check_tenant_name(name)


# ---- what a principal may do -----------------------------------------------------------------------------


def principal(tenant: str | None, *scopes: str) -> Principal:
    return Principal(subject="x", tenant=tenant, scopes=frozenset(scopes), issued_at=5.0, expires_at=None, token_id="1")


@pytest.mark.parametrize("scope", sorted(SCOPES))
@pytest.mark.parametrize("has", sorted(SCOPES))
@pytest.mark.parametrize("of", ["acme", None])
@pytest.mark.parametrize("to", ["acme", "other", None])
def test_a_scope_opens_what_it_says_for_its_own_tenant_and_admin_includes_the_others(scope, has, of, to):
    allowed = (has in (scope, "admin")) and (of is None or of == to)
    if allowed:
        principal(of, has).require(scope, to)
    else:
        with pytest.raises(NotAllowed):
            principal(of, has).require(scope, to)


def test_a_revocation_hits_what_was_issued_until_then_and_no_admin_of_all_tenants():
    clock = Clock()
    auth = authenticator(clock)
    before = auth.verify(auth.issue(tenant="acme", scopes=["admin"], ttl_s=None, subject="ann"))
    clock.now += 0.001
    revoked_at = clock.now
    at = auth.verify(auth.issue(tenant="acme", scopes=["connect"], ttl_s=None, subject="ann"))
    clock.now += 0.001
    after = auth.verify(auth.issue(tenant="acme", scopes=["connect"], ttl_s=None, subject="ann"))
    for token in (before, at):
        with pytest.raises(NotAuthenticated, match="revoked"):
            auth.check_not_revoked(token, revoked_at)
    auth.check_not_revoked(after, revoked_at)
    auth.check_not_revoked(before, 0.0)
    auth.check_not_revoked(principal(None, "admin"), revoked_at)


# ---- requests --------------------------------------------------------------------------------------------


def test_a_request_proves_itself_by_its_authorization_header():
    auth = authenticator()
    token = auth.issue(tenant="acme", scopes=["connect"], ttl_s=60, subject="ann")
    for scheme in ("Bearer", "bearer", "BEARER "):
        headers = [(b"Authorization", f"{scheme} {token}".encode())]
        assert auth.authenticate(headers, "", tenant="acme", upgrade=False).subject == "ann"


def test_an_upgrade_may_carry_its_token_in_the_query_or_as_a_subprotocol():
    auth = authenticator()
    token = auth.issue(tenant="acme", scopes=["connect"], ttl_s=60, subject="ann")
    ways = [
        (bearer(token), ""),
        ([], f"x=1&token={quote(token)}"),
        ([(b"sec-websocket-protocol", f"chat, tenantry.bearer.{token}".encode())], ""),
        # The same one twice contradicts nothing.
        (bearer(token), f"token={token}"),
    ]
    for headers, query in ways:
        assert auth.authenticate(headers, query, tenant="acme", upgrade=True).tenant == "acme"


def test_a_token_in_the_url_counts_for_no_other_request():
    auth = authenticator()
    token = auth.issue(tenant="acme", scopes=["connect"], ttl_s=60, subject="ann")
    with pytest.raises(NotAuthenticated, match="only for WebSockets"):
        auth.authenticate([], f"token={token}", tenant="acme", upgrade=False)
    with pytest.raises(NotAuthenticated):
        auth.authenticate(
            [(b"sec-websocket-protocol", f"tenantry.bearer.{token}".encode())],
            "",
            tenant="acme",
            upgrade=False,
        )


async def test_credentials_that_contradict_each_other_are_refused_and_the_ticket_stays():
    auth = authenticator()
    one = auth.issue(tenant="acme", scopes=["connect"], ttl_s=60, subject="ann")
    two = auth.issue(tenant="acme", scopes=["connect"], ttl_s=60, subject="bob")
    ticket, _ = auth.issue_ticket(auth.verify(one), "acme")
    for headers, query in [
        (bearer(one), f"token={two}"),
        ([*bearer(one), (b"authorization", b"Bearer " + two.encode())], ""),
        ([], f"token={one}&token={two}"),
        (bearer(one), f"ticket={ticket}"),
        ([], f"ticket={ticket}&ticket=other"),
        ([(b"sec-websocket-protocol", f"tenantry.bearer.{one}, tenantry.bearer.{two}".encode())], ""),
    ]:
        with pytest.raises(NotAuthenticated, match="two credentials"):
            auth.authenticate(headers, query, tenant="acme", upgrade=True)
    auth.authenticate([], f"ticket={ticket}", tenant="acme", upgrade=True)


@pytest.mark.parametrize("value", [b"", b"Bearer", b"Bearer ", b"Basic dXNlcjpwYXNz", b"\xff\xfe", b"token"])
def test_an_authorization_of_another_kind_is_refused(value):
    with pytest.raises(NotAuthenticated):
        authenticator().authenticate([(b"authorization", value)], "", tenant="acme", upgrade=True)


@pytest.mark.parametrize("query", ["", "token=", "ticket=", "&" * 200 + "a=1" * 3, "a=1&" * 200, "%ff=%zz", "\x00"])
async def test_a_request_without_a_credential_is_refused_whatever_its_query(query):
    with pytest.raises(NotAuthenticated):
        authenticator().authenticate([], query, tenant="acme", upgrade=True)


# ---- tickets ---------------------------------------------------------------------------------------------


async def test_a_ticket_opens_one_connection_to_its_tenant_with_no_scope_but_connect(autojump_clock):
    auth = authenticator()
    admin = auth.verify(auth.issue(tenant="acme", scopes=["admin"], ttl_s=60, subject="ann"))
    ticket, ttl_s = auth.issue_ticket(admin, "acme")
    assert ttl_s == 30
    await trio.sleep(29.9)
    opened = auth.authenticate([], f"ticket={ticket}", tenant="acme", upgrade=True)
    assert (opened.subject, opened.tenant, opened.scopes) == ("ann", "acme", {"connect"})
    assert (opened.issued_at, opened.expires_at) == (admin.issued_at, admin.expires_at)
    with pytest.raises(NotAuthenticated, match="used or expired"):
        auth.authenticate([], f"ticket={ticket}", tenant="acme", upgrade=True)


async def test_a_ticket_expires_unused(autojump_clock):
    auth = authenticator()
    ticket, _ = auth.issue_ticket(principal("acme", "connect"), "acme")
    await trio.sleep(30.01)
    with pytest.raises(NotAuthenticated):
        auth.authenticate([], f"ticket={ticket}", tenant="acme", upgrade=True)
    assert len(auth._tickets) == 0


async def test_a_ticket_is_worth_nothing_to_another_tenant_nor_outside_an_upgrade():
    auth = authenticator()
    ticket, _ = auth.issue_ticket(principal("acme", "connect"), "acme")
    with pytest.raises(NotAuthenticated):
        auth.authenticate([], f"ticket={ticket}", tenant="acme", upgrade=False)
    with pytest.raises(NotAllowed):
        auth.authenticate([], f"ticket={ticket}", tenant="other", upgrade=True)
    with pytest.raises(NotAuthenticated):
        auth.authenticate([], f"ticket={ticket}", tenant="acme", upgrade=True)


async def test_a_ticket_does_not_outlive_its_token_nor_a_revocation():
    clock = Clock()
    auth = authenticator(clock)
    token = auth.issue(tenant="acme", scopes=["connect"], ttl_s=10, subject="ann")
    ticket, _ = auth.issue_ticket(auth.verify(token), "acme")
    clock.now += 11
    with pytest.raises(NotAuthenticated, match="expired"):
        auth.authenticate([], f"ticket={ticket}", tenant="acme", upgrade=True)

    ticket, _ = auth.issue_ticket(principal(None, "admin"), "acme")
    opened = auth.authenticate([], f"ticket={ticket}", tenant="acme", upgrade=True)
    auth.check_not_revoked(opened, clock.now - 1)
    with pytest.raises(NotAuthenticated, match="revoked"):
        auth.check_not_revoked(opened, clock.now + 1)


async def test_nobody_gets_a_ticket_for_another_tenant():
    with pytest.raises(NotAllowed):
        authenticator().issue_ticket(principal("acme", "admin"), "other")
    with pytest.raises(NotAllowed):
        authenticator().issue_ticket(principal("acme", "execute"), "acme")


async def test_one_tenant_cannot_use_up_the_tickets_of_all(autojump_clock):
    auth = authenticator()
    for _ in range(1024):
        auth.issue_ticket(principal("acme", "connect"), "acme")
    with pytest.raises(OverCapacity):
        auth.issue_ticket(principal("acme", "connect"), "acme")
    auth.issue_ticket(principal("other", "connect"), "other")
    await trio.sleep(31)
    auth.issue_ticket(principal("acme", "connect"), "acme")
    assert len(auth._tickets) == 1


async def test_the_number_of_tickets_is_bounded_in_all(monkeypatch):
    monkeypatch.setattr("supervisor.gateway.tickets._MAX_TICKETS", 3)
    auth = authenticator()
    for name in "abc":
        auth.issue_ticket(principal(None, "admin"), name)
    with pytest.raises(OverCapacity):
        auth.issue_ticket(principal(None, "admin"), "d")


# ---- without auth ----------------------------------------------------------------------------------------

OPEN = Settings(auth=AuthSettings(enabled=False))


@pytest.mark.parametrize("addresses", [LOOPBACK, ("[::1]:8000", "localhost:80"), ("unix:/run/t.sock",)])
def test_without_auth_everybody_on_this_machine_is_all_powerful(addresses):
    auth = authenticator(settings=OPEN, addresses=addresses)
    everybody = auth.authenticate([], "", tenant="acme", upgrade=True)
    everybody.require("admin")
    everybody.require("execute", "acme")
    auth.check_not_revoked(everybody, 1e11)


@pytest.mark.parametrize("address", ["0.0.0.0:8000", "192.0.2.1:80", "[::]:8000", "example.org:80", "fd://3", ""])
def test_without_auth_nothing_but_loopback_is_allowed(address):
    with pytest.raises(ConfigError, match="auth"):
        authenticator(settings=attrs.evolve(OPEN, public_url="https://a.example"), addresses=(*LOOPBACK, address))


def test_a_token_creates_its_tenant_by_default_on_loopback_only():
    public = Settings(public_url="https://a.example")
    assert authenticator().may_create
    assert not authenticator(settings=public, addresses=("0.0.0.0:1",)).may_create
    always = attrs.evolve(public, tenants=TenantSettings(auto_create=True))
    assert authenticator(settings=always, addresses=("0.0.0.0:1",)).may_create
    never = Settings(tenants=TenantSettings(auto_create=False))
    assert not authenticator(settings=never).may_create


async def test_nothing_shows_a_token_or_the_secret():
    auth = authenticator()
    token = auth.issue(tenant="acme", scopes=["connect"], ttl_s=60, subject="ann")
    ticket, _ = auth.issue_ticket(auth.verify(token), "acme")
    shown = repr(auth) + repr(auth.verify(token)) + repr(auth._tickets)
    assert token not in shown
    assert ticket not in shown
    assert SECRET.decode() not in shown


# ---- the secret ------------------------------------------------------------------------------------------


def test_the_secret_is_made_once_and_only_its_owner_reads_it(tmp_path):
    state_dir = tmp_path / "new" / "state"
    old = os.umask(0)
    try:
        made = load_or_create_secret(state_dir, Settings())
    finally:
        os.umask(old)
    assert len(made) == 32
    assert load_or_create_secret(state_dir, Settings()) == made
    assert [path.name for path in state_dir.iterdir()] == ["secret"]
    assert stat.S_IMODE((state_dir / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o700
    assert load_or_create_secret(tmp_path / "other", Settings()) != made


def test_all_who_start_at_the_same_time_get_the_same_secret(tmp_path):
    found, ready = [], threading.Barrier(8)

    def load() -> None:
        ready.wait()
        found.append(load_or_create_secret(tmp_path, Settings()))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602])
def test_a_secret_that_others_can_read_is_refused_with_the_mend(tmp_path, mode):
    load_or_create_secret(tmp_path, Settings())
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_or_create_secret(tmp_path, Settings())


def test_a_given_secret_may_be_read_by_its_group_as_kubernetes_mounts_it(tmp_path):
    path = tmp_path / "given"
    path.write_bytes(b"x" * 40)
    settings = Settings(auth=AuthSettings(secret_file=path))
    path.chmod(0o440)
    assert load_or_create_secret(tmp_path, settings) == b"x" * 40
    for mode in (0o444, 0o660):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            load_or_create_secret(tmp_path, settings)


@pytest.mark.parametrize("size", [0, 31, 4097])
def test_a_secret_of_the_wrong_size_is_refused(tmp_path, size):
    path = tmp_path / "secret"
    path.write_bytes(b"x" * size)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="bytes"):
        load_or_create_secret(tmp_path, Settings())


def test_what_is_no_file_of_a_secret_is_refused_at_once(tmp_path):
    given = Settings(auth=AuthSettings(secret_file=tmp_path / "given"))
    with pytest.raises(ConfigError, match="does not exist"):
        load_or_create_secret(tmp_path, given)
    (tmp_path / "given").mkdir()
    with pytest.raises(ConfigError, match="regular file"):
        load_or_create_secret(tmp_path, given)
    os.mkfifo(tmp_path / "secret", 0o600)
    with pytest.raises(ConfigError, match="regular file"):
        load_or_create_secret(tmp_path, Settings())


def test_a_secret_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        load_or_create_secret(tmp_path, Settings())
    assert list(tmp_path.iterdir()) == []


def test_a_short_secret_is_refused():
    with pytest.raises(ConfigError):
        authenticator(secret=b"short")
