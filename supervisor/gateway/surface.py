"""The HTTP surface as a table: every operation with its right, its query, its body and its answers.

The app is bound from this table and the OpenAPI document is rendered from it, so neither can tell what the
other does not do. Pure data.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

import attrs
import msgspec
from msgspec import Meta, Struct

from supervisor import errors
from supervisor.errors import SupervisorError
from supervisor.gateway import problems

TenantName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", max_length=63)]
Limit = Annotated[int, Meta(ge=1, le=1000, description="How many at most.")]
Scope = Literal["connect", "execute", "admin"]
Time = Annotated[datetime, Meta(tz=True)]


# ---- queries and bodies ----------------------------------------------------------------------------------


class TenantsQuery(Struct, forbid_unknown_fields=True, frozen=True):
    after: Annotated[
        str, Meta(pattern=r"^([a-z0-9][a-z0-9-]{0,62})?$", description="`next_after` of the page before.")
    ] = ""
    limit: Limit = 100


class EventsQuery(Struct, forbid_unknown_fields=True, frozen=True):
    after: Annotated[int, Meta(ge=0, le=2**53, description="The `seq` of the last event that is known.")] = 0
    limit: Limit = 100


class ReadyQuery(Struct, forbid_unknown_fields=True, frozen=True):
    verbose: Annotated[str, Meta(description="Present: details, for an admin of all tenants.")] | None = None


class Nothing(Struct, forbid_unknown_fields=True, frozen=True):
    """No body, or an empty object."""


class TenantBody(Struct, forbid_unknown_fields=True, frozen=True):
    settings: Annotated[dict[str, Any], Meta(description="Replaces what is kept with the tenant.")] | None = None


class RevokeBody(Struct, forbid_unknown_fields=True, frozen=True):
    before: Annotated[Time, Meta(description="Tokens issued until then are revoked; default: now.")] | None = None


class TokenBody(Struct, forbid_unknown_fields=True, frozen=True):
    scopes: Annotated[list[Scope], Meta(min_length=1, max_length=3)] = msgspec.field(
        default_factory=lambda: ["connect"]
    )
    ttl_s: Annotated[float, Meta(gt=0, le=1e10, description="Seconds until it expires; null: it does not.")] | None = (
        3600.0
    )
    subject: (
        Annotated[str, Meta(min_length=1, max_length=255, description="Who it is for; default: the caller.")] | None
    ) = None


# ---- answers ---------------------------------------------------------------------------------------------


class LastExit(Struct, forbid_unknown_fields=True, frozen=True):
    generation: int
    reason: Annotated[str, Meta(description="Why it ended: exited, reset, abandoned, sleep, delete or drain.")]
    returncode: Annotated[int, Meta(description="-N: killed by signal N.")] | None
    signal: int | None
    time: Time


class Tenant(Struct, forbid_unknown_fields=True, frozen=True):
    name: TenantName
    state: Literal["asleep", "starting", "running", "draining", "failed"]
    since: Annotated[Time, Meta(description="When the state began.")]
    generation: Annotated[int, Meta(ge=0, description="Counts the agent processes.")]
    pid: int | None
    restarts: Annotated[int, Meta(ge=0, description="Starts that followed an end that nobody asked for.")]
    last_exit: Annotated[LastExit, Meta(description="How the agent before ended.")] | None
    connections: Annotated[int, Meta(ge=0)]
    why_awake: list[str]
    sleeps_at: Annotated[Time, Meta(description="When it falls asleep if nothing happens.")] | None
    settings: Annotated[dict[str, Any], Meta(description="Kept for whoever uses the API; the supervisor reads none.")]


class TenantPage(Struct, forbid_unknown_fields=True, frozen=True):
    tenants: list[Tenant]
    next_after: Annotated[str, Meta(description="For the next page; null: this was the last.")] | None


class Event(Struct, forbid_unknown_fields=True, frozen=True):
    seq: Annotated[int, Meta(ge=1, description="Counts up within the tenant.")]
    type: str
    time: Time
    data: dict[str, Any]


class EventPage(Struct, forbid_unknown_fields=True, frozen=True):
    events: list[Event]
    next_after: Annotated[int, Meta(description="Ask again with it for what comes later.")]


class Ticket(Struct, forbid_unknown_fields=True, frozen=True):
    ticket: str
    expires_in_s: float
    path: Annotated[str, Meta(description="The path of the WebSocket, with the ticket in its query.")]


class Token(Struct, forbid_unknown_fields=True, frozen=True):
    token: str
    tenant: TenantName
    scopes: list[Scope]
    subject: str
    expires_at: Time | None


class Revoked(Struct, forbid_unknown_fields=True, frozen=True):
    tokens_valid_after: Time


class Alive(Struct, forbid_unknown_fields=True, frozen=True):
    status: Literal["alive"]


class Ready(Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    status: Literal["ready", "not_ready"]
    reasons: Annotated[list[str], Meta(description="Only with `verbose`.")] | msgspec.UnsetType = msgspec.UNSET
    draining: Annotated[bool, Meta(description="Only with `verbose`.")] | msgspec.UnsetType = msgspec.UNSET
    version: Annotated[str, Meta(description="Only with `verbose`.")] | msgspec.UnsetType = msgspec.UNSET


class Drain(Struct, forbid_unknown_fields=True, frozen=True):
    draining: Literal[True]


class Problem(Struct, frozen=True):
    """RFC 9457. `code` is the stable word for programs."""

    type: str
    title: str
    status: int
    detail: Annotated[str, Meta(description="What failed, for whom, and what to do.")]
    code: str
    retryable: Annotated[bool, Meta(description="The same request can succeed later by itself.")]
    retry_after_ms: int | None


# ---- the table -------------------------------------------------------------------------------------------

Problems = tuple[type[SupervisorError], ...]


@attrs.frozen(kw_only=True)
class Operation:
    """One method of one path. `name` is the handler's and the operationId.

    `scope` is what the token must have, for the tenant of the path, or for every tenant where the path has
    none; None needs no token. `answers` gives for each status a Struct, a media type, or None for no body.
    """

    name: str
    method: Literal["GET", "PUT", "POST", "DELETE"]
    path: str
    told: str
    tag: Literal["tenants", "access", "operation", "pages"]
    scope: Scope | None = None
    # A token counts and is not always needed.
    token_optional: bool = False
    query: type[Struct] | None = None
    body: type[Struct] | None = None
    answers: dict[int, type[Struct] | str | None]
    problems: Problems = ()

    @property
    def of_tenant(self) -> bool:
        return "{tenant}" in self.path


_STARTS: Final[Problems] = (
    errors.UnknownTenant,
    errors.Draining,
    errors.StoreError,
    errors.AgentStartFailed,
    errors.ConnectFailed,
)
_TENANT: Final = "/v1/tenants/{tenant}"

OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="list_tenants",
        method="GET",
        path="/v1/tenants",
        told="All tenants by name, a page at a time. Wakes none.",
        tag="tenants",
        scope="admin",
        query=TenantsQuery,
        answers={200: TenantPage},
    ),
    Operation(
        name="get_tenant",
        method="GET",
        path=_TENANT,
        told="A tenant's state. Does not wake it.",
        tag="tenants",
        scope="connect",
        answers={200: Tenant},
        problems=(errors.UnknownTenant,),
    ),
    Operation(
        name="put_tenant",
        method="PUT",
        path=_TENANT,
        told="Creates the tenant (201), or replaces its settings if some are given. Does not wake it.",
        tag="tenants",
        scope="admin",
        body=TenantBody,
        answers={200: Tenant, 201: Tenant},
        problems=(errors.Draining, errors.StoreError),
    ),
    Operation(
        name="delete_tenant",
        method="DELETE",
        path=_TENANT,
        told="Ends the tenant's agent and connections, and removes the tenant with its journal and workspace.",
        tag="tenants",
        scope="admin",
        answers={204: None},
        problems=(errors.UnknownTenant, errors.Draining, errors.StoreError),
    ),
    Operation(
        name="wake",
        method="POST",
        path=f"{_TENANT}/wake",
        told="Starts the tenant's agent unless it runs, and answers when it is ready. "
        "Creates the tenant where `tenants.auto_create` is on.",
        tag="tenants",
        scope="connect",
        body=Nothing,
        answers={200: Tenant},
        problems=_STARTS,
    ),
    Operation(
        name="sleep",
        method="POST",
        path=f"{_TENANT}/sleep",
        told="Puts the tenant to sleep: its connections get close code 1001, its agent SIGTERM. "
        "Answers when the agent has ended.",
        tag="tenants",
        scope="connect",
        body=Nothing,
        answers={200: Tenant},
        problems=(errors.UnknownTenant, errors.Draining, errors.StoreError),
    ),
    Operation(
        name="touch",
        method="POST",
        path=f"{_TENANT}/touch",
        told="Counts as work now, so that the time until sleep begins anew. Does not wake the tenant.",
        tag="tenants",
        scope="connect",
        body=Nothing,
        answers={200: Tenant},
        problems=(errors.UnknownTenant,),
    ),
    Operation(
        name="read_events",
        method="GET",
        path=f"{_TENANT}/events",
        told="The tenant's journal, oldest first, a page at a time. Does not wake it.",
        tag="tenants",
        scope="connect",
        query=EventsQuery,
        answers={200: EventPage},
        problems=(errors.UnknownTenant, errors.StoreError),
    ),
    Operation(
        name="connect",
        method="GET",
        path=f"{_TENANT}/connect",
        told="With `Upgrade: websocket`: a WebSocket to the tenant's agent, which sees the path `/`. Wakes the "
        "tenant. Close codes: 1001 put to sleep, 1008 the token is no longer valid, 1011 the agent failed, "
        "1012 restart, 1013 over capacity; any other is the agent's own.",
        tag="tenants",
        answers={101: None},
        problems=(problems.UpgradeRequired, *_STARTS, errors.OverCapacity),
    ),
    Operation(
        name="connect_path",
        method="GET",
        path=f"{_TENANT}/connect/{{path}}",
        told="As `connect`; the agent sees `/{path}`, which may be empty or have several segments.",
        tag="tenants",
        answers={101: None},
        problems=(problems.UpgradeRequired, *_STARTS, errors.OverCapacity),
    ),
    Operation(
        name="issue_ticket",
        method="POST",
        path=f"{_TENANT}/tickets",
        told="A ticket that opens one WebSocket to the tenant, soon: for browsers, which send no headers with it.",
        tag="access",
        scope="connect",
        body=Nothing,
        answers={201: Ticket},
        problems=(errors.OverCapacity,),
    ),
    Operation(
        name="issue_token",
        method="POST",
        path=f"{_TENANT}/tokens",
        told="A new token for this tenant. It is shown this once and stored nowhere.",
        tag="access",
        scope="admin",
        body=TokenBody,
        answers={201: Token},
    ),
    Operation(
        name="revoke",
        method="POST",
        path=f"{_TENANT}/revoke",
        told="Revokes the tenant's tokens issued until now, or until `before`; connections made with them get "
        "close code 1008. Tokens for every tenant are not the tenant's, and stay valid.",
        tag="access",
        scope="admin",
        body=RevokeBody,
        answers={200: Revoked},
        problems=(errors.UnknownTenant, errors.StoreError),
    ),
    Operation(
        name="drain",
        method="POST",
        path="/v1/drain",
        told="Begins the drain of the whole supervisor, which then exits: as SIGTERM does.",
        tag="operation",
        scope="admin",
        body=Nothing,
        answers={202: Drain},
    ),
    Operation(
        name="healthz",
        method="GET",
        path="/healthz",
        told="Answers while the supervisor is alive, and says nothing else.",
        tag="operation",
        answers={200: Alive},
    ),
    Operation(
        name="readyz",
        method="GET",
        path="/readyz",
        told="Whether new work is taken; else 503 with the reasons.",
        tag="operation",
        token_optional=True,
        query=ReadyQuery,
        # 503 has two forms: a problem, and with `verbose` the details.
        answers={200: Ready, 503: Ready},
        problems=(problems.NotReady,),
    ),
    Operation(
        name="metrics",
        method="GET",
        path="/metrics",
        told="Metrics as Prometheus' text. Needs a token for every tenant with scope admin, except where only "
        "this machine can ask: every bind is loopback or a unix socket, and neither `public_url` nor "
        "`allowed_hosts` nor `trusted_proxies` is set.",
        tag="operation",
        token_optional=True,
        answers={200: "text/plain"},
    ),
    Operation(
        name="openapi",
        method="GET",
        path="/openapi.json",
        told="This document.",
        tag="pages",
        answers={200: "application/json"},
    ),
    Operation(
        name="page",
        method="GET",
        path="/",
        told="A page that connects to a tenant's agent.",
        tag="pages",
        answers={200: "text/html"},
    ),
    Operation(
        name="docs",
        method="GET",
        path="/docs",
        told="This document as a page.",
        tag="pages",
        answers={200: "text/html"},
    ),
    Operation(
        name="static",
        method="GET",
        path="/static/{name}",
        told="What the pages are made of.",
        tag="pages",
        answers={200: "*/*"},
        problems=(errors.UnknownRoute,),
    ),
)
