"""The HTTP surface: who may ask for what, and what bad requests get."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
import trio

from supervisor.errors import AgentStartFailed, IllegalTransition, StoreError
from supervisor.gateway import openapi, surface
from supervisor.gateway.surface import OPERATIONS
from supervisor.settings import AuthSettings, LimitSettings, Settings, TenantSettings
from tests.gateway.surface_kit import NOW, Reply, Surface

T = "/v1/tenants/acme"
OTHER = "/v1/tenants/other"


@pytest.fixture
def app() -> Surface:
    made = Surface()
    made.supervisor.add("acme", {"colour": "blue"})
    return made


def assert_problem(reply: Reply, status: int, code: str, *, retryable: bool = False) -> dict:
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    problem = msgspec.json.decode(reply.body, type=surface.Problem)
    assert (problem.status, problem.code, problem.retryable) == (status, code, retryable)
    assert problem.title
    assert problem.detail
    return reply.json()


# ---- tenants ---------------------------------------------------------------------------------------------


async def test_a_tenant_is_told_as_the_document_says(app):
    reply = await app.request("GET", T, token=app.token())
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store"
    told = msgspec.json.decode(reply.body, type=surface.Tenant)
    assert (told.name, told.state, told.settings) == ("acme", "asleep", {"colour": "blue"})
    assert reply.json()["since"].endswith("Z")


async def test_how_the_agent_ended_is_told_as_the_document_says(app):
    ended = {"generation": 3, "reason": "exited", "returncode": -9, "signal": 9, "time": NOW}
    app.supervisor.set("acme", state="failed", last_exit=ended)
    told = msgspec.json.decode((await app.request("GET", T, token=app.token())).body, type=surface.Tenant)
    assert (told.last_exit.signal, told.last_exit.time.timestamp()) == (9, NOW)


async def test_put_creates_a_tenant_once_and_then_replaces_its_settings(app):
    admin = app.token("new", "admin")
    made = await app.request("PUT", "/v1/tenants/new", token=admin)
    assert (made.status, made.headers["location"]) == (201, "/v1/tenants/new")
    again = await app.request("PUT", "/v1/tenants/new", token=admin, body={"settings": {"a": 1}})
    assert again.status == 200
    assert again.json()["settings"] == {"a": 1}
    assert app.supervisor.calls == [("put", "new", None), ("put", "new", {"a": 1})]


async def test_delete_removes_a_tenant(app):
    reply = await app.request("DELETE", T, token=app.token("acme", "admin"))
    assert (reply.status, reply.body) == (204, b"")
    assert_problem(await app.request("GET", T, token=app.token()), 404, "unknown_tenant")


async def test_wake_sleep_and_touch_are_passed_on_and_only_wake_creates(app):
    for action in ("wake", "sleep", "touch"):
        reply = await app.request("POST", f"{T}/{action}", token=app.token(), body={})
        assert reply.status == 200
        msgspec.json.decode(reply.body, type=surface.Tenant)
    assert app.supervisor.calls == [("wake", "acme", True), ("sleep", "acme"), ("touch", "acme")]
    for action in ("sleep", "touch"):
        assert_problem(await app.request("POST", f"{OTHER}/{action}", token=app.token("other")), 404, "unknown_tenant")
    assert (await app.request("POST", f"{OTHER}/wake", token=app.token("other"))).status == 200


async def test_without_auto_create_a_wake_creates_nothing():
    app = Surface(Settings(tenants=TenantSettings(auto_create=False)))
    assert_problem(await app.request("POST", f"{T}/wake", token=app.token()), 404, "unknown_tenant")
    assert app.supervisor.calls == [("wake", "acme", False)]


async def test_tenants_come_a_page_at_a_time(app):
    for name in ("b", "c", "d"):
        app.supervisor.add(name)
    admin, seen, after = app.token(None, "admin"), [], ""
    for _ in range(3):
        reply = await app.request("GET", f"/v1/tenants?limit=2&after={after}", token=admin)
        page = msgspec.json.decode(reply.body, type=surface.TenantPage)
        seen.append([tenant.name for tenant in page.tenants])
        after = page.next_after
        if after is None:
            break
    assert seen == [["acme", "b"], ["c", "d"], []]


async def test_the_journal_comes_a_page_at_a_time_and_wakes_nobody(app):
    for number in range(4):
        app.supervisor.store.append("acme", "test", number=number)
    reply = await app.request("GET", f"{T}/events?after=1&limit=2", token=app.token())
    page = msgspec.json.decode(reply.body, type=surface.EventPage)
    assert [(event.seq, event.data) for event in page.events] == [(2, {"number": 0}), (3, {"number": 1})]
    assert page.next_after == 3
    end = await app.request("GET", f"{T}/events?after=5", token=app.token())
    assert end.json() == {"events": [], "next_after": 5}
    assert_problem(await app.request("GET", f"{OTHER}/events", token=app.token("other")), 404, "unknown_tenant")
    assert {call[0] for call in app.supervisor.calls} == {"describe"}


# ---- rights ----------------------------------------------------------------------------------------------

OF_TENANT = [op for op in OPERATIONS if op.of_tenant and op.scope is not None]
names = [op.name for op in OF_TENANT]


@pytest.mark.parametrize("operation", OF_TENANT, ids=names)
async def test_without_a_token_nothing_of_a_tenant_is_told_or_done(app, operation):
    reply = await app.request(operation.method, operation.path.format(tenant="acme"))
    assert_problem(reply, 401, "not_authenticated")
    assert reply.headers["www-authenticate"].startswith("Bearer")
    assert app.supervisor.calls == []


@pytest.mark.parametrize("operation", OF_TENANT, ids=names)
async def test_a_foreign_token_gets_the_same_answer_whether_the_tenant_exists_or_not(app, operation):
    foreign = app.token("mine", "admin")
    replies = [
        await app.request(operation.method, operation.path.format(tenant=name), token=foreign)
        for name in ("acme", "nobody")
    ]
    for reply in replies:
        assert_problem(reply, 403, "not_allowed")
    assert replies[0].body.replace(b"acme", b"nobody") == replies[1].body
    assert app.supervisor.calls == []


@pytest.mark.parametrize("operation", OF_TENANT, ids=names)
async def test_a_scope_that_does_not_suffice_is_refused(app, operation):
    lesser = "execute" if operation.scope == "connect" else "connect"
    reply = await app.request(operation.method, operation.path.format(tenant="acme"), token=app.token("acme", lesser))
    assert_problem(reply, 403, "not_allowed")
    assert app.supervisor.calls == []


@pytest.mark.parametrize("operation", OF_TENANT, ids=names)
async def test_a_revoked_token_is_refused(app, operation):
    token = app.token("acme", "admin")
    app.supervisor.valid_after["acme"] = NOW + 1
    reply = await app.request(operation.method, operation.path.format(tenant="acme"), token=token)
    assert_problem(reply, 401, "not_authenticated")
    assert app.supervisor.calls == []


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/tenants"), ("POST", "/v1/drain")])
async def test_what_concerns_all_tenants_needs_an_admin_of_all(app, method, path):
    assert_problem(await app.request(method, path, token=app.token("acme", "admin")), 403, "not_allowed")
    assert_problem(await app.request(method, path), 401, "not_authenticated")
    assert app.supervisor.calls == []
    assert (await app.request(method, path, token=app.token(None, "admin"))).status in (200, 202)


async def test_an_expired_token_is_refused(app):
    token = app.token(ttl_s=10)
    app.now += 11
    problem = assert_problem(await app.request("GET", T, token=token), 401, "not_authenticated")
    assert "expired" in problem["detail"]


async def test_without_auth_no_token_is_asked_for():
    app = Surface(Settings(auth=AuthSettings(enabled=False)))
    assert (await app.request("PUT", T)).status == 201
    assert (await app.request("GET", "/v1/tenants")).status == 200
    foreign = {"origin": "http://localhost:3000"}
    assert_problem(await app.request("GET", T, headers=foreign), 403, "origin_not_allowed")


async def test_every_request_must_be_for_a_host_of_ours_and_from_no_foreign_page(app):
    app.supervisor.add("acme")
    for path in ("/", "/docs", "/healthz", "/static/page.js", "/nowhere", T, "/metrics", f"{T}/connect"):
        foreign = await app.request("GET", path, token=app.token(), headers={"host": "evil.example"})
        assert_problem(foreign, 421, "host_not_allowed")
        other = await app.request("GET", path, token=app.token(), headers={"origin": "https://evil.example"})
        assert_problem(other, 403, "origin_not_allowed")
        assert_problem(await app.request("GET", path, headers={"host": ""}), 400, "refused")
    assert app.supervisor.calls == []


# ---- access ----------------------------------------------------------------------------------------------


async def test_a_ticket_opens_the_websocket_that_its_path_names(app):
    reply = await app.request("POST", f"{T}/tickets", token=app.token())
    assert reply.status == 201
    told = msgspec.json.decode(reply.body, type=surface.Ticket)
    assert told.expires_in_s == 30
    path, _, query = told.path.partition("?")
    assert path == f"{T}/connect/"
    opened = app.authenticator.authenticate([], query, tenant="acme", upgrade=True)
    assert (opened.tenant, opened.scopes) == ("acme", {"connect"})


async def test_an_admin_issues_tokens_for_their_tenant(app):
    body = {"scopes": ["connect", "execute"], "ttl_s": 60, "subject": "ann"}
    reply = await app.request("POST", f"{T}/tokens", token=app.token("acme", "admin"), body=body)
    assert reply.status == 201
    told = msgspec.json.decode(reply.body, type=surface.Token)
    issued = app.authenticator.verify(told.token)
    assert (issued.tenant, issued.subject, issued.expires_at) == ("acme", "ann", NOW + 60)
    assert issued.scopes == {"connect", "execute"} == set(told.scopes)

    plain = await app.request("POST", f"{T}/tokens", token=app.token(None, "admin"))
    issued = app.authenticator.verify(plain.json()["token"])
    assert (issued.tenant, issued.scopes, issued.expires_at) == ("acme", {"connect"}, NOW + 3600)
    endless = await app.request("POST", f"{T}/tokens", token=app.token(None, "admin"), body={"ttl_s": None})
    assert endless.json()["expires_at"] is None


async def test_a_revocation_ends_the_tokens_issued_until_then(app):
    old, admin = app.token(), app.token(None, "admin")
    app.now += 5
    reply = await app.request("POST", f"{T}/revoke", token=admin)
    assert reply.status == 200
    assert msgspec.json.decode(reply.body, type=surface.Revoked).tokens_valid_after.timestamp() == NOW + 5
    assert_problem(await app.request("GET", T, token=old), 401, "not_authenticated")
    app.now += 1
    assert (await app.request("GET", T, token=app.token())).status == 200
    assert (await app.request("GET", T, token=admin)).status == 200


async def test_a_revocation_may_name_its_instant_unless_it_lies_ahead(app):
    admin = app.token(None, "admin")
    body = {"before": "2026-01-01T00:00:00Z"}
    reply = await app.request("POST", f"{T}/revoke", token=admin, body=body)
    assert reply.json() == {"tokens_valid_after": "2026-01-01T00:00:00.000Z"}
    for before in ("2100-01-01T00:00:00Z", "2026-01-01T00:00:00", "yesterday", 12):
        reply = await app.request("POST", f"{T}/revoke", token=admin, body={"before": before})
        assert_problem(reply, 400, "bad_body")


# ---- operation -------------------------------------------------------------------------------------------


async def test_health_needs_no_token_and_says_nothing(app):
    reply = await app.request("GET", "/healthz")
    assert (reply.status, reply.json()) == (200, {"status": "alive"})


async def test_readiness_is_503_with_the_reasons(app):
    ready = await app.request("GET", "/readyz")
    assert (ready.status, ready.json()) == (200, {"status": "ready"})
    app.supervisor.reasons = ["draining", "the disk is full"]
    problem = assert_problem(await app.request("GET", "/readyz"), 503, "not_ready", retryable=True)
    assert problem["detail"] == "draining; the disk is full"


async def test_details_of_readiness_are_for_an_admin(app):
    app.supervisor.reasons = ["draining"]
    app.supervisor.draining = True
    assert_problem(await app.request("GET", "/readyz?verbose"), 401, "not_authenticated")
    assert_problem(await app.request("GET", "/readyz?verbose=1", token=app.token()), 403, "not_allowed")
    reply = await app.request("GET", "/readyz?verbose", token=app.token(None, "admin"))
    assert reply.status == 503
    told = msgspec.json.decode(reply.body, type=surface.Ready)
    assert (told.status, told.reasons, told.draining) == ("not_ready", ["draining"], True)


async def test_metrics_are_open_only_where_nobody_else_can_ask(app):
    reply = await app.request("GET", "/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain")
    assert b"\ntenantry_" in reply.body
    assert app.supervisor.calls == [("measure",)]
    for settings, addresses in [
        (Settings(public_url="https://a.example"), ("127.0.0.1:1",)),
        (Settings(allowed_hosts=("a.example",)), ("0.0.0.0:1",)),
    ]:
        public = Surface(settings, addresses=addresses)
        assert_problem(await public.request("GET", "/metrics"), 401, "not_authenticated")
        assert_problem(await public.request("GET", "/metrics", token=public.token("acme", "admin")), 403, "not_allowed")
        assert (await public.request("GET", "/metrics", token=public.token(None, "admin"))).status == 200


async def test_drain_is_asked_for_and_answered_at_once(app):
    reply = await app.request("POST", "/v1/drain", token=app.token(None, "admin"))
    assert (reply.status, reply.json()) == (202, {"draining": True})
    assert app.supervisor.calls == [("drain",)]


# ---- bad requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/tenants/", "/v1/tenants/acme/", "/v1//tenants"])
async def test_an_unknown_path_is_a_problem(app, path):
    assert_problem(await app.request("GET", path), 404, "unknown_route")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/tenants", "GET, HEAD"),
        ("PATCH", T, "DELETE, GET, HEAD, PUT"),
        ("GET", f"{T}/wake", "POST"),
        ("OPTIONS", T, "DELETE, GET, HEAD, PUT"),
        ("POST", "/", "GET, HEAD"),
        ("TRACE", "/healthz", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_a_problem_that_names_the_right_ones(app, method, path, allowed):
    reply = await app.request(method, path, token=app.token(None, "admin"))
    assert_problem(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == allowed


@pytest.mark.parametrize("path", [f"{T}/connect", f"{T}/connect/", f"{T}/connect/a/b", f"{OTHER}/connect"])
async def test_connect_without_an_upgrade_is_426(app, path):
    reply = await app.request("GET", path)
    assert_problem(reply, 426, "upgrade_required")
    assert (reply.headers["upgrade"], reply.headers["connection"]) == ("websocket", "Upgrade")


@pytest.mark.parametrize("name", ["Acme", "-a", "a" * 64, "a.b", "a b", "ä"])
async def test_a_bad_name_is_refused(app, name):
    reply = await app.request("GET", f"/v1/tenants/{name}", token=app.token(None, "admin"))
    assert_problem(reply, 400, "bad_tenant_name")
    assert app.supervisor.calls == []


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff",
        b'{"settings": "\xff"}',
        b'{"settings": []}',
        b'{"setings": {}}',
        b'{"settings": {"a": NaN}}',
        b'{"settings": {"a": ' + b"[" * 100_000,
        b'{"settings": {"a": ' + b"9" * 20_000 + b"}}",
        b'{"settings": {}} {}',
    ],
)
async def test_a_bad_body_is_refused_and_changes_nothing(app, data):
    reply = await app.request("PUT", T, token=app.token("acme", "admin"), data=data)
    assert_problem(reply, 400, "bad_body")
    assert app.supervisor.calls == []


async def test_the_refusal_of_a_body_names_the_field(app):
    for body, named in [({"scopes": ["root"]}, "scopes"), ({"ttl": 5}, "ttl"), ({"ttl_s": 0}, "ttl_s")]:
        reply = await app.request("POST", f"{T}/tokens", token=app.token("acme", "admin"), body=body)
        assert named in assert_problem(reply, 400, "bad_body")["detail"]


async def test_the_refusal_of_an_unknown_field_names_those_that_are_known(app):
    reply = await app.request("POST", f"{T}/tokens", token=app.token(None, "admin"), body={"ttl": 60})
    assert assert_problem(reply, 400, "bad_body")["detail"].endswith("; known are: scopes, ttl_s, subject")
    reply = await app.request("GET", "/v1/tenants?page=1", token=app.token(None, "admin"))
    assert assert_problem(reply, 400, "bad_query")["detail"].endswith("; known are: after, limit")
    for body in ({"subject": "a\nb"}, {"ttl_s": 1e300}, {"scopes": []}):
        reply = await app.request("POST", f"{T}/tokens", token=app.token("acme", "admin"), body=body)
        assert reply.status == 400


async def test_an_action_takes_no_fields(app):
    assert_problem(await app.request("POST", f"{T}/wake", token=app.token(), body={"now": 1}), 400, "bad_body")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; a", "x"])
async def test_a_body_that_is_not_json_is_refused(app, kind):
    headers = {"content-type": kind}
    reply = await app.request("PUT", T, token=app.token("acme", "admin"), data=b"{}", headers=headers)
    assert_problem(reply, 415, "unsupported_media_type")


@pytest.mark.parametrize("headers", [{}, {"content-length": "4000"}])
async def test_a_body_that_is_too_large_is_refused(headers):
    app = Surface(Settings(limits=LimitSettings(max_body_bytes=1000)))
    data = json.dumps({"settings": {"a": "x" * 2000}}).encode()
    reply = await app.request("PUT", T, token=app.token("acme", "admin"), data=data, headers=headers)
    assert_problem(reply, 413, "body_too_large")
    assert app.supervisor.calls == []


async def test_a_body_that_does_not_come_is_given_up(app, autojump_clock):
    started = trio.current_time()
    never = trio.Event()
    reply = await app.request("PUT", T, token=app.token("acme", "admin"), data=b"{", more=never)
    assert_problem(reply, 408, "body_timeout", retryable=True)
    assert trio.current_time() - started == pytest.approx(60)


@pytest.mark.parametrize(
    "target",
    [
        f"{T}/events?afer=5",
        f"{T}/events?after=x",
        f"{T}/events?after=-1",
        f"{T}/events?after=1&after=2",
        f"{T}/events?limit=0",
        f"{T}/events?limit=1001",
        f"{T}/events?limit=%ff",
        f"{T}/events?" + "&".join(f"x{number}=" for number in range(200)),
        "/v1/tenants?after=Not-a-name",
        "/v1/tenants?limit=many",
    ],
)
async def test_a_bad_query_is_refused(app, target):
    assert_problem(await app.request("GET", target, token=app.token(None, "admin")), 400, "bad_query")


# ---- faults ----------------------------------------------------------------------------------------------


async def test_what_may_succeed_later_says_when(app):
    app.supervisor.fault = StoreError("the disk is full")
    reply = await app.request("GET", T, token=app.token())
    problem = assert_problem(reply, 503, "store_failed", retryable=True)
    assert (problem["detail"], problem["retry_after_ms"]) == ("the disk is full", 1000)
    assert reply.headers["retry-after"] == "1"
    error = AgentStartFailed("the agent's program does not exist")
    error.retry_after_s = 2.5
    app.supervisor.fault = error
    reply = await app.request("POST", f"{T}/wake", token=app.token())
    assert assert_problem(reply, 503, "agent_start_failed", retryable=True)["retry_after_ms"] == 2500
    assert reply.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("what nobody foresaw"), IllegalTransition("ready in asleep"), ExceptionGroup("two", [KeyError("k")])],
)
async def test_a_fault_of_ours_goes_to_the_log_and_not_to_the_client(app, fault):
    app.supervisor.fault = fault
    reply = await app.request("GET", f"{T}?x=secret", token=app.token())
    problem = assert_problem(reply, 500, "internal")
    assert str(fault) not in problem["detail"]
    [line] = [event for event in app.log if event["event"] == "request_failed"]
    assert line["level"] == "error"
    assert line["path"] == T
    assert line["exc_info"] is not None


async def test_no_token_reaches_the_log(app):
    token = app.token()
    app.supervisor.fault = RuntimeError("x")
    await app.request("GET", f"{T}?token={token}", token=token)
    app.supervisor.fault = None
    await app.request("POST", f"{T}/tickets?token={token}", token=token)
    assert app.log
    assert token not in repr(app.log)


async def test_two_apps_in_one_process_do_not_mix():
    one, two = Surface(), Surface(Settings(limits=LimitSettings(max_body_bytes=10)))
    one.supervisor.add("acme")
    assert (await one.request("GET", T, token=one.token())).status == 200
    assert (await two.request("GET", T, token=two.token())).status == 404
    body = {"settings": {"long": "enough"}}
    assert (await one.request("PUT", T, token=one.token("acme", "admin"), body=body)).status == 200
    assert (await two.request("PUT", T, token=two.token("acme", "admin"), body=body)).status == 413


@pytest.mark.parametrize("steps", range(12))
async def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind(app, steps):
    finished = False
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def leave() -> None:
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            nursery.start_soon(leave)
            await app.request("PUT", T, token=app.token("acme", "admin"), body={"settings": {}})
            finished = True
    assert finished or scope.cancelled_caught
    assert (await app.request("GET", T, token=app.token())).status == 200


# ---- the document and the pages --------------------------------------------------------------------------


def routes(app: Surface) -> set[tuple[str, str]]:
    return {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD"}
    }


async def test_the_document_has_every_route_and_no_other(app):
    reply = await app.request("GET", "/openapi.json")
    assert reply.status == 200
    document = reply.json()
    told = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    assert told == routes(app)


async def test_the_document_refers_to_nothing_that_it_does_not_have(app):
    text = (await app.request("GET", "/openapi.json")).body.decode()
    document = json.loads(text)
    assert document["openapi"].startswith("3.1")
    for name in set(re.findall(r'"\$ref":\s*"([^"]+)"', text)):
        place = document
        for part in name.removeprefix("#/").split("/"):
            place = place[part]
    names = [op["operationId"] for path in document["paths"].values() for op in path.values()]
    assert len(names) == len(set(names))
    for path, operations in document["paths"].items():
        for operation in operations.values():
            given = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert given == set(re.findall(r"{(\w+)}", path))
            assert operation["summary"]
            assert all(answer["description"] for answer in operation["responses"].values())


def assert_told(document: dict, operation: surface.Operation, reply: Reply) -> None:
    told = document["paths"][operation.path][operation.method.lower()]["responses"]
    assert str(reply.status) in told, (operation.name, reply.status)
    content = told[str(reply.status)].get("content", {})
    kind = reply.headers.get("content-type", "").partition(";")[0]
    assert (kind in content) or (not reply.body and not content), (operation.name, kind)
    if reply.status >= 400:
        assert content[kind]["schema"] == {"$ref": "#/components/schemas/Problem"}
        assert f"`{reply.json()['code']}`" in told[str(reply.status)]["description"]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
async def test_what_is_answered_is_in_the_document(app, operation):
    """Every status, media type and code that a request for the operation gets, good or bad."""
    document = openapi.document()
    target = operation.path.format(tenant="acme", path="x", name="nothing.css")
    admin = app.token(None, "admin")
    requests = [
        {"token": admin},
        {"token": None},
        {"token": "nonsense"},
        {"token": app.token("acme", "execute")},
        {"token": admin, "headers": {"host": "evil.example"}},
        {"token": admin, "headers": {"origin": "https://evil.example"}},
    ]
    if operation.body is not None:
        requests += [
            {"token": admin, "data": b"{"},
            {"token": admin, "data": b"{}", "headers": {"content-type": "text/plain"}},
            {"token": admin, "data": b" " * 2_000_000},
        ]
    for request in requests:
        app.supervisor.add("acme")
        assert_told(document, operation, await app.request(operation.method, target, **request))
    if operation.query is not None:
        assert_told(document, operation, await app.request("GET", f"{target}?unknown=1", token=admin))
    if operation.of_tenant and operation.scope is not None:
        bad = operation.path.format(tenant="Not-a-name")
        assert_told(document, operation, await app.request(operation.method, bad, token=admin))


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_a_page_takes_nothing_from_elsewhere_and_nothing_inline(app, path):
    reply = await app.request("GET", path)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    html = reply.body.decode()
    assert not re.search(r"\son\w+\s*=|\sstyle\s*=|<style|javascript:|<script(?![^>]*\ssrc=)", html)
    for name in re.findall(r'(?:src|href)="([^"#]*)"', html):
        if name:
            assert name.startswith("/"), name
            assert not name.startswith("//"), name
            assert (await app.request("GET", name)).status == 200, name


async def test_what_the_pages_are_made_of_names_no_other_host(app):
    from supervisor.gateway.pages import load_assets

    assets = load_assets()
    assert {"index.html", "docs.html"} < set(assets)
    for name, asset in assets.items():
        for found in re.findall(r"(?:https?|wss?):?//[^\s\"'`<>)]*", asset.body.decode()):
            assert found in ("http://www.w3.org/2000/svg",), (name, found)
        reply = await app.request("GET", f"/static/{name}")
        assert reply.status == 200
        assert reply.body == asset.body
        fresh = await app.request("GET", f"/static/{name}", headers={"if-none-match": f"W/{reply.headers['etag']}"})
        assert (fresh.status, fresh.body) == (304, b"")


@pytest.mark.parametrize("name", ["nothing", "../app.py", "..%2fapp.py", "%2e%2e/app.py", "app.py", ""])
async def test_no_other_file_is_served(app, name):
    assert_problem(await app.request("GET", f"/static/{name}"), 404, "unknown_route")
