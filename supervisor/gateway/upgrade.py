"""One client's way to its agent: who it is, which tenant, the agent's own answer, and the bytes until a Close.

The client is answered only after the agent was: by the agent's head, or by a problem that says what to do. Bad input
starts nothing. What a client proved its right with does not go on to the agent.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from functools import partial
from typing import TYPE_CHECKING

import attrs
import h11
import trio

from supervisor.errors import OverCapacity, Refused, SupervisorError, UnknownRoute
from supervisor.gateway.heads import agent_head, problem_response
from supervisor.gateway.http import say_and_close
from supervisor.gateway.splice import Splice
from supervisor.tenant.name import check_tenant_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from supervisor.gateway.auth import Principal
    from supervisor.gateway.front import Upgrade
    from supervisor.supervisor import Supervisor
    from supervisor.telemetry import Telemetry
    from supervisor.tenant.connect import Connected
    from supervisor.tenant.tenant import Tenant

# What a client may send before it was answered; past that it is left in the kernel's buffer.
MAX_EAGER_BYTES = 64 * 1024


class _ClientLeft(Exception):
    """The client closed before it was answered: nobody is left to tell (S3-12)."""


def route(target: str) -> tuple[str, str]:
    """The tenant and the agent's own target of `/v1/tenants/{tenant}/connect[/{path}][?query]`.

    Raises UnknownRoute for every other path that asks for a WebSocket, Refused for an inner path of two slashes.
    """
    path, question, query = target.partition("?")
    match path.split("/", 5):
        case ["", "v1", "tenants", tenant, "connect", *rest]:
            inner = "/" + "".join(rest)
            if inner.startswith("//"):
                raise Refused("the agent's path begins with one slash: two would name a host to some readers")
            return tenant, inner + question + query
    raise UnknownRoute("WebSockets are at /v1/tenants/{tenant}/connect[/{path}]")


@attrs.define(eq=False)
class _Client:
    """What the tenant knows of a spliced connection."""

    splice: Splice
    generation: int
    issued_at: float
    expires_at: float | None

    def close(self, code: int, reason: str, *, within_s: float) -> None:
        self.splice.close(code, reason, within_s=within_s)


async def serve_upgrade(supervisor: Supervisor, upgrade: Upgrade) -> None:
    """Checks the client's right, and hands its socket to the tenant's nursery, or refuses it and closes.

    Returns as soon as the tenant has it: from then on the socket and its place in the caps are the tenant's.
    """
    try:
        tenant, principal, target = await _admit(supervisor, upgrade)
        connection = secrets.token_hex(6)
        head = agent_head(
            upgrade.request,
            target=target,
            add=[
                ("Tenantry-Tenant", tenant.name),
                ("Tenantry-Subject", principal.subject),
                ("Tenantry-Connection", connection),
            ],
            trusted=upgrade.trusted,
        )
        serve = partial(
            _serve_client,
            supervisor,
            tenant,
            principal,
            connection,
            head,
            upgrade.trailing,
            upgrade.stream,
            upgrade.lease.release,
        )
        tenant.start_client(serve)
        upgrade.taken = True
    except SupervisorError as error:
        supervisor.telemetry.metrics.refused.labels(reason=error.code).inc()
        supervisor.telemetry.log.info("upgrade_refused", reason=error.code, detail=str(error), peer=upgrade.peer)
        await refuse(upgrade.stream, error, supervisor.wall_clock())


async def _admit(supervisor: Supervisor, upgrade: Upgrade) -> tuple[Tenant, Principal, str]:
    """Everything that is checked before a tenant is touched; raises SupervisorError in the words for the client."""
    request, authenticator = upgrade.request, supervisor.authenticator
    authenticator.check_host_and_origin(request.headers)
    name, target = route(request.target.decode("ascii"))
    check_tenant_name(name)
    query = target.partition("?")[2]
    principal = authenticator.authenticate(request.headers, query, tenant=name, upgrade=True)
    principal.require("connect", name)
    authenticator.check_not_revoked(principal, await supervisor.tokens_valid_after(name))
    tenant = await supervisor.tenant(name, create=True)
    cap = supervisor.settings.limits.connections_per_tenant
    if tenant.connections >= cap:
        raise OverCapacity(f"tenant {name!r} has {cap} connections, which is its limit (limits.connections_per_tenant)")
    return tenant, principal, target


async def refuse(stream: trio.abc.Stream, error: SupervisorError, now: float) -> None:
    """Answers with the error as a problem (RFC 9457), bounded, so that no reset overtakes it. The caller closes."""
    response = problem_response(
        error.status,
        error.code,
        str(error),
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        extra_headers=error.headers,
        now=now,
    )
    await say_and_close(stream, response)


async def _serve_client(
    supervisor: Supervisor,
    tenant: Tenant,
    principal: Principal,
    connection: str,
    head: bytes,
    eager: bytes,
    stream: trio.abc.Stream,
    release: Callable[[], None],
) -> None:
    """The boundary of one connection, in the tenant's nursery: whatever fails here ends this client alone."""
    log = supervisor.telemetry.log.bind(tenant=tenant.name, connection=connection)
    try:
        client = await _open(supervisor, tenant, principal, head, eager, stream, log)
        if client is not None:
            with tenant.attached(client):
                await _run(client, supervisor.telemetry, log)
    except Exception:
        log.exception("connection_crashed")
    finally:
        release()
        await trio.aclose_forcefully(stream)


async def _open(
    supervisor: Supervisor,
    tenant: Tenant,
    principal: Principal,
    head: bytes,
    eager: bytes,
    stream: trio.abc.Stream,
    log: FilteringBoundLogger,
) -> _Client | None:
    """Connects to the agent and answers the client; None if that was the end of it."""
    metrics = supervisor.telemetry.metrics
    began = trio.current_time()
    try:
        connected, eager = await _connect(tenant, head, stream, eager)
    except _ClientLeft:
        log.info("client_left", reason="it closed before the agent had answered")
        return None
    except SupervisorError as error:
        metrics.refused.labels(reason=error.code).inc()
        log.warning("connect_refused", reason=error.code, detail=str(error))
        await refuse(stream, error, supervisor.wall_clock())
        return None
    metrics.connect_seconds.observe(trio.current_time() - began)
    answer, generation = connected.answer, connected.generation
    if answer.status != 101:
        log.info("upgrade_refused_by_agent", status=answer.status, generation=generation.number)
        with trio.move_on_after(supervisor.settings.limits.answer_stall_s):
            await _pass_refusal(connected, stream)
        return None
    try:
        with trio.fail_after(supervisor.settings.limits.answer_stall_s):
            await stream.send_all(answer.head)
    except BaseException as error:
        await trio.aclose_forcefully(connected.stream)
        if isinstance(error, (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)):
            log.info("client_left", reason="it closed, or did not read, as the agent answered")
            return None
        raise
    splice = Splice(
        stream,
        connected.stream,
        relay=supervisor.relay,
        traffic=generation.traffic,
        when_agent_ends=partial(tenant.close_code, generation),
        to_client=answer.rest,
        to_agent=eager,
    )
    log.info("connection_opened", generation=generation.number, subject=principal.subject)
    # A revocation is of a tenant's own tokens, not of an admin's.
    issued_at = principal.issued_at if principal.tenant is not None else math.inf
    return _Client(splice, generation.number, issued_at, principal.expires_at)


async def _run(client: _Client, telemetry: Telemetry, log: FilteringBoundLogger) -> None:
    began = trio.current_time()
    outcome = await client.splice.run()
    if outcome.aborted_mid_frame:
        telemetry.metrics.aborted_mid_frame.inc()
    telemetry.metrics.count_close(outcome.code or 1006, outcome.side.value)
    log.info(
        "connection_closed",
        generation=client.generation,
        code=outcome.code,
        side=outcome.side.value,
        aborted_mid_frame=outcome.aborted_mid_frame,
        seconds=round(trio.current_time() - began, 3),
    )


async def _connect(tenant: Tenant, head: bytes, client: trio.abc.Stream, eager: bytes) -> tuple[Connected, bytes]:
    """The agent's answer, and what the client has sent meanwhile. Raises _ClientLeft when it closes first."""
    received = bytearray(eager)
    left = False
    connected: Connected | None = None
    failure: SupervisorError | None = None

    async def watch() -> None:
        nonlocal left
        try:
            while len(received) < MAX_EAGER_BYTES:
                data = await client.receive_some(MAX_EAGER_BYTES - len(received))
                if not data:
                    break
                received.extend(data)
            else:
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        left = True
        nursery.cancel_scope.cancel(reason="the client left")

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                connected = await tenant.connect(head)
            except SupervisorError as error:
                failure = error
            nursery.cancel_scope.cancel(reason="the agent has answered")
        if left:
            raise _ClientLeft
    except BaseException:
        if connected is not None:
            await trio.aclose_forcefully(connected.stream)
        raise
    if failure is not None:
        raise failure
    assert connected is not None
    return connected, bytes(received)


async def _pass_refusal(connected: Connected, client: trio.abc.Stream) -> None:
    """The agent refused the upgrade: its answer goes to the client as it came, at once (S3-08)."""
    answer = connected.answer
    try:
        await client.send_all(answer.head)
        async with contextlib.aclosing(answer.body(connected.stream)) as body:
            async for data in body:
                await client.send_all(data)
        await say_and_close(client)
    except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
        pass  # one of the two has gone: what was sent is all there is
    finally:
        await trio.aclose_forcefully(connected.stream)
