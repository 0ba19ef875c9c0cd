"""The HTTP surface: requests judged by the table of operations, answered in JSON or as a problem (RFC 9457).

Everything that starts or changes something is the supervisor's; here is who may ask, for what, and how it is
told. WebSockets never come here: the front takes them. An app holds no global state.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import parse_qsl, quote

import attrs
import msgspec
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.routing import BaseConverter

from supervisor.errors import UnknownRoute
from supervisor.gateway import openapi, pages, problems, surface
from supervisor.tenant.description import rfc3339
from supervisor.tenant.name import check_tenant_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from supervisor.gateway.auth import Authenticator, Principal
    from supervisor.gateway.surface import Operation
    from supervisor.settings import Settings
    from supervisor.store import Event
    from supervisor.telemetry import Telemetry

    Description = dict[str, Any]

_JSON: Final = ("Content-Type", "application/json")
_NO_STORE: Final = ("Cache-Control", "no-store")


class Journal(Protocol):
    """What is asked of the store."""

    async def read_events(self, name: str, *, after: int = ..., limit: int = ...) -> list[Event]: ...


class SupervisorDoor(Protocol):
    """What is asked of the supervisor. Descriptions are those of `GET /v1/tenants/{tenant}`."""

    @property
    def settings(self) -> Settings: ...
    @property
    def store(self) -> Journal: ...
    @property
    def draining(self) -> bool: ...
    def not_ready(self) -> list[str]: ...
    def request_drain(self) -> None: ...
    async def measure(self) -> None: ...
    async def tokens_valid_after(self, name: str) -> float: ...
    async def list_tenants(self, after: str, limit: int) -> list[Description]: ...
    async def describe(self, name: str) -> Description: ...
    async def put_tenant(self, name: str, settings: dict[str, Any] | None) -> tuple[Description, bool]: ...
    async def delete_tenant(self, name: str) -> None: ...
    async def wake(self, name: str, create: bool) -> Description: ...
    async def sleep(self, name: str) -> Description: ...
    async def touch(self, name: str) -> Description: ...
    async def revoke(self, name: str, before: float) -> Description: ...


@attrs.frozen
class Call:
    """A request that was judged: its right, its query and its body are good."""

    principal: Principal | None = None
    tenant: str = ""
    name: str = ""
    query: Any = None
    body: Any = None


@attrs.frozen
class Answer:
    """`body` is JSON unless it is bytes."""

    body: object
    status: int = 200
    headers: Sequence[tuple[str, str]] = (_NO_STORE,)


class _AnyPath(BaseConverter):
    """The rest of the path, which may be empty."""

    regex = ".*?"
    part_isolating = False


def create_app(supervisor: SupervisorDoor, authenticator: Authenticator, telemetry: Telemetry) -> QuartTrio:
    """The ASGI app. Nothing runs in the background and there is no lifespan to wait for."""
    app = QuartTrio(__name__, static_folder=None, template_folder=None)
    limits = supervisor.settings.limits
    app.config.update(
        MAX_CONTENT_LENGTH=limits.max_body_bytes,
        BODY_TIMEOUT=limits.body_timeout_s,
        # A slow reader that reads is no fault: the connection cuts what makes no progress.
        RESPONSE_TIMEOUT=None,
        PROVIDE_AUTOMATIC_OPTIONS=False,
    )
    app.url_map.converters["anypath"] = _AnyPath
    app.url_map.merge_slashes = False

    # These are async so that Quart does not run them in threads.
    async def check_host() -> None:
        authenticator.check_host_and_origin(request.scope["headers"])

    async def answer_error(error: Exception) -> Response:
        problem = problems.as_problem(error)
        if problem.status == 500:
            # The path and never the query, in which a token may be.
            telemetry.log.error("request_failed", method=request.method, path=request.path, exc_info=error)
        body, headers = problems.render(problem)
        return _respond(Answer(body, problem.status, [*headers, *problems.allow(error), _NO_STORE]))

    app.before_request(check_host)
    app.register_error_handler(Exception, answer_error)
    handlers = _Handlers(supervisor, authenticator, telemetry)
    for operation in surface.OPERATIONS:
        handler: Callable[[Call], Awaitable[Answer]] = getattr(handlers, operation.name)
        app.add_url_rule(
            operation.path.replace("{path}", "<anypath:path>").replace("{", "<").replace("}", ">"),
            endpoint=operation.name,
            view_func=partial(_serve, operation, handler, authenticator, supervisor),
            methods=[operation.method],
        )
    return app


async def _serve(
    operation: Operation,
    handler: Callable[[Call], Awaitable[Answer]],
    authenticator: Authenticator,
    supervisor: SupervisorDoor,
    **path: str,
) -> Response:
    call = Call(tenant=path.get("tenant", ""), name=path.get("name", ""))
    if operation.scope is not None:
        principal = authenticate(authenticator, call.tenant or None)
        if operation.of_tenant:
            check_tenant_name(call.tenant)
        principal.require(operation.scope, call.tenant or None)
        await check_not_revoked(authenticator, supervisor, principal)
        call = attrs.evolve(call, principal=principal)
    if operation.query is not None:
        call = attrs.evolve(call, query=_query(operation.query))
    if operation.body is not None:
        call = attrs.evolve(call, body=await _body(operation.body))
    return _respond(await handler(call))


def authenticate(authenticator: Authenticator, tenant: str | None) -> Principal:
    query = request.scope["query_string"].decode("latin-1")
    return authenticator.authenticate(request.scope["headers"], query, tenant=tenant, upgrade=False)


async def check_not_revoked(authenticator: Authenticator, supervisor: SupervisorDoor, principal: Principal) -> None:
    if principal.tenant is not None:
        authenticator.check_not_revoked(principal, await supervisor.tokens_valid_after(principal.tenant))


def _query(wanted: type[msgspec.Struct]) -> msgspec.Struct:
    try:
        pairs = parse_qsl(
            request.scope["query_string"].decode("latin-1"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=100,
        )
        values = dict(pairs)
        if len(values) < len(pairs):
            raise problems.BadQuery("a value of the query is given twice")
        return msgspec.convert(values, wanted, strict=False)
    except ValueError as error:
        # ValidationError is one.
        raise problems.BadQuery(f"the query is not what is asked for here: {error}{_known(wanted)}") from None


def _known(wanted: type[msgspec.Struct]) -> str:
    return f"; known are: {', '.join(wanted.__struct_fields__)}" if wanted.__struct_fields__ else "; none is known"


async def _body(wanted: type[msgspec.Struct]) -> msgspec.Struct:
    data = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    if not data:
        return wanted()
    # A form of another site's page cannot send this type without asking first.
    if request.mimetype != "application/json":
        raise problems.UnsupportedMediaType("a body is sent with `Content-Type: application/json`")
    try:
        return msgspec.json.decode(data, type=wanted)
    except msgspec.ValidationError as error:
        raise problems.BadBody(f"the body is not what is asked for here: {error}{_known(wanted)}") from None
    except (msgspec.DecodeError, ValueError):
        raise problems.BadBody("the body is not JSON in UTF-8") from None
    except RecursionError:
        raise problems.BadBody("the body is nested too deeply") from None


def _respond(answer: Answer) -> Response:
    body, headers = answer.body, list(answer.headers)
    if not isinstance(body, bytes):
        body = msgspec.json.encode(body)
        headers.append(_JSON)
    response = Response(body, answer.status)
    del response.headers["Content-Type"]
    for name, value in (*pages.SAFE_HEADERS, *headers):
        response.headers[name] = value
    return response


class _Handlers:
    """One method for each operation of the table."""

    def __init__(self, supervisor: SupervisorDoor, authenticator: Authenticator, telemetry: Telemetry) -> None:
        self._supervisor = supervisor
        self._authenticator = authenticator
        self._metrics = telemetry.metrics
        self._assets = pages.load_assets()
        self._document = msgspec.json.encode(openapi.document())

    # ---- tenants -----------------------------------------------------------------------------------------

    async def list_tenants(self, call: Call) -> Answer:
        found = await self._supervisor.list_tenants(call.query.after, call.query.limit)
        more = len(found) == call.query.limit
        return Answer({"tenants": found, "next_after": found[-1]["name"] if more else None})

    async def get_tenant(self, call: Call) -> Answer:
        return Answer(await self._supervisor.describe(call.tenant))

    async def put_tenant(self, call: Call) -> Answer:
        described, created = await self._supervisor.put_tenant(call.tenant, call.body.settings)
        if not created:
            return Answer(described)
        return Answer(described, 201, [_NO_STORE, ("Location", f"/v1/tenants/{call.tenant}")])

    async def delete_tenant(self, call: Call) -> Answer:
        await self._supervisor.delete_tenant(call.tenant)
        return Answer(b"", 204)

    async def wake(self, call: Call) -> Answer:
        return Answer(await self._supervisor.wake(call.tenant, create=self._authenticator.may_create))

    async def sleep(self, call: Call) -> Answer:
        return Answer(await self._supervisor.sleep(call.tenant))

    async def touch(self, call: Call) -> Answer:
        return Answer(await self._supervisor.touch(call.tenant))

    async def read_events(self, call: Call) -> Answer:
        await self._supervisor.describe(call.tenant)
        events = await self._supervisor.store.read_events(call.tenant, after=call.query.after, limit=call.query.limit)
        told = [
            {"seq": event.seq, "type": event.type, "time": rfc3339(event.time), "data": dict(event.data)}
            for event in events
        ]
        return Answer({"events": told, "next_after": events[-1].seq if events else call.query.after})

    async def connect(self, call: Call) -> Answer:
        raise problems.UpgradeRequired("this path is a WebSocket's: send `Upgrade: websocket`")

    connect_path = connect

    # ---- access ------------------------------------------------------------------------------------------

    async def issue_ticket(self, call: Call) -> Answer:
        assert call.principal is not None
        ticket, ttl_s = self._authenticator.issue_ticket(call.principal, call.tenant)
        path = f"/v1/tenants/{call.tenant}/connect/?ticket={quote(ticket)}"
        return Answer({"ticket": ticket, "expires_in_s": ttl_s, "path": path}, 201)

    async def issue_token(self, call: Call) -> Answer:
        assert call.principal is not None
        token = self._authenticator.issue(
            tenant=call.tenant,
            scopes=call.body.scopes,
            ttl_s=call.body.ttl_s,
            subject=call.body.subject or call.principal.subject,
        )
        issued = self._authenticator.verify(token)
        told = {
            "token": token,
            "tenant": issued.tenant,
            "scopes": sorted(issued.scopes),
            "subject": issued.subject,
            "expires_at": None if issued.expires_at is None else rfc3339(issued.expires_at),
        }
        return Answer(told, 201)

    async def revoke(self, call: Call) -> Answer:
        now = self._authenticator.now()
        before = now if call.body.before is None else call.body.before.timestamp()
        if before > now:
            raise problems.BadBody("`before` lies in the future: tokens that are not issued cannot be revoked")
        await self._supervisor.revoke(call.tenant, before)
        return Answer({"tokens_valid_after": rfc3339(await self._supervisor.tokens_valid_after(call.tenant))})

    # ---- operation ---------------------------------------------------------------------------------------

    async def drain(self, call: Call) -> Answer:
        self._supervisor.request_drain()
        return Answer({"draining": True}, 202)

    async def healthz(self, call: Call) -> Answer:
        return Answer({"status": "alive"})

    async def readyz(self, call: Call) -> Answer:
        reasons = self._supervisor.not_ready()
        status = 503 if reasons else 200
        if call.query.verbose is not None:
            await self._require_admin()
            told = {
                "status": "not_ready" if reasons else "ready",
                "reasons": reasons,
                "draining": self._supervisor.draining,
                "version": openapi.version(),
            }
            return Answer(told, status)
        if reasons:
            raise problems.NotReady("; ".join(reasons))
        return Answer({"status": "ready"})

    async def metrics(self, call: Call) -> Answer:
        if not self._authenticator.private:
            await self._require_admin()
        await self._supervisor.measure()
        return Answer(self._metrics.render(), headers=[_NO_STORE, ("Content-Type", self._metrics.content_type)])

    async def _require_admin(self) -> None:
        principal = authenticate(self._authenticator, None)
        principal.require("admin")
        await check_not_revoked(self._authenticator, self._supervisor, principal)

    # ---- pages -------------------------------------------------------------------------------------------

    async def openapi(self, call: Call) -> Answer:
        return Answer(self._document, headers=[_NO_STORE, _JSON])

    async def page(self, call: Call) -> Answer:
        return self._asset("index.html")

    async def docs(self, call: Call) -> Answer:
        return self._asset("docs.html")

    async def static(self, call: Call) -> Answer:
        return self._asset(call.name)

    def _asset(self, name: str) -> Answer:
        asset = self._assets.get(name)
        if asset is None:
            raise UnknownRoute("the pages have no file of that name")
        if asset.etag in request.headers.get("If-None-Match", ""):
            return Answer(b"", 304, asset.headers)
        return Answer(asset.body, headers=asset.headers)
