"""Everything that can go wrong on purpose, on two axes: our caller misused us, or the other side failed.

Each error says what failed, for whom, and what to do. `code` is the stable word for programs (it is the
`code` of the problem details, RFC 9457); `retryable` says whether the same request can succeed later
without anybody changing anything.
"""

from __future__ import annotations

from typing import ClassVar


class SupervisorError(Exception):
    """The root of all errors that Tenantry raises on purpose."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None
    # Header fields that belong to the answer, such as WWW-Authenticate.
    headers: ClassVar[tuple[tuple[str, str], ...]] = ()


class ConfigError(SupervisorError):
    """A setting is unknown, malformed or contradicts another; the message names its key and the mend."""

    code = "configuration"


class IllegalTransition(SupervisorError):
    """A bug of ours: an event reached a state that has no answer to it. Names both."""

    code = "illegal_transition"


class Refused(SupervisorError):
    """The request is at fault; nothing was started or changed. Raised with the words for its sender."""

    code = "refused"
    status = 400


class BadTenantName(Refused):
    """Not `[a-z0-9][a-z0-9-]{0,62}`."""

    code = "bad_tenant_name"


class UnknownTenant(Refused):
    """No tenant of that name, and the request may not create it."""

    code = "unknown_tenant"
    status = 404


class UnknownRoute(Refused):
    """Nothing is served at that path."""

    code = "unknown_route"
    status = 404


class NotAuthenticated(Refused):
    """No token, or one that is malformed, expired or revoked."""

    code = "not_authenticated"
    status = 401
    headers = (("WWW-Authenticate", 'Bearer realm="tenantry"'),)


class NotAllowed(Refused):
    """The token is good, and it is not for this: another tenant, or a scope that it lacks."""

    code = "not_allowed"
    status = 403


class Unavailable(SupervisorError):
    """The supervisor cannot do it now; the same request may succeed later."""

    code = "unavailable"
    status = 503
    retryable = True
    retry_after_s: float | None = 1.0


class Draining(Unavailable):
    """The supervisor is being stopped and starts nothing new. Another instance, or this one after its restart."""

    code = "draining"


class OverCapacity(Unavailable):
    """A cap on connections is reached; the message names which."""

    code = "over_capacity"


class StoreError(Unavailable):
    """The store could not write or read: disk full, locked, or damaged. Nothing was half-written."""

    code = "store_failed"


class AgentError(SupervisorError):
    """The other side: a tenant's agent did not do what the contract asks."""

    code = "agent_failed"
    status = 503
    retryable = True
    retry_after_s: float | None = 1.0


class AgentStartFailed(AgentError):
    """The agent's program could not be executed, or its sandbox not be made; `errno` where the kernel gave one."""

    code = "agent_start_failed"

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class AgentUnreachable(AgentError):
    """A connection to the agent was refused, broken, or ended before an answer."""

    code = "agent_unreachable"


class AgentExited(AgentError):
    """The agent's process ended while somebody waited for its answer."""

    code = "agent_exited"


class AgentTimeout(AgentError):
    """The agent did not answer the upgrade within its deadline."""

    code = "agent_timeout"


class AgentProtocolError(AgentError):
    """The agent answered something that is no HTTP/1.1 response."""

    code = "agent_protocol_error"


class ConnectFailed(AgentError):
    """Every rung of the ladder failed; the message tells which attempt failed how (S3-05)."""

    code = "connect_failed"
