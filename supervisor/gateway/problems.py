"""What goes wrong in a request, as a problem (RFC 9457): the errors of the HTTP surface, and their one rendering.

A fault of ours is told without its words, which are for the log. Pure.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import werkzeug.exceptions as http

from supervisor.errors import Refused, SupervisorError, Unavailable, UnknownRoute
from supervisor.gateway.heads import problem_body

if TYPE_CHECKING:
    from collections.abc import Iterable

CONTENT_TYPE: Final = "application/problem+json"


class BadQuery(Refused):
    """A value of the query is unknown, malformed, out of range or given twice; the detail names it."""

    code = "bad_query"


class BadBody(Refused):
    """The body is not JSON, or not the JSON asked for; the detail names the field."""

    code = "bad_body"


class UnsupportedMediaType(Refused):
    """A body that is not `application/json`."""

    code = "unsupported_media_type"
    status = 415


class BodyTooLarge(Refused):
    """The body is longer than `limits.max_body_bytes`."""

    code = "body_too_large"
    status = 413


class BodyTimeout(Refused):
    """The body did not come in time; a new connection may do better."""

    code = "body_timeout"
    status = 408
    retryable = True


class MethodNotAllowed(Refused):
    """The path is served, with other methods; Allow names them."""

    code = "method_not_allowed"
    status = 405


class UpgradeRequired(Refused):
    """The path is a WebSocket's."""

    code = "upgrade_required"
    status = 426
    headers = (("Upgrade", "websocket"), ("Connection", "Upgrade"))


class NotReady(Unavailable):
    """The supervisor does not take work now; the detail gives the reasons."""

    code = "not_ready"


def as_problem(error: Exception) -> SupervisorError:
    """The error in our own words; what nobody foresaw is a plain SupervisorError, status 500."""
    match error:
        case SupervisorError() if error.status != 500:
            return error
        case http.MethodNotAllowed():
            return MethodNotAllowed(f"this path is served with {_methods(error)}")
        case http.RequestEntityTooLarge():
            return BodyTooLarge("the body is longer than `limits.max_body_bytes`")
        case http.RequestTimeout():
            return BodyTimeout("the body did not come within `limits.body_timeout`")
        case http.NotFound():
            return UnknownRoute("nothing is served at this path; /docs tells what is")
        case http.HTTPException() if error.code is not None and 400 <= error.code < 500:
            return Refused(f"the request is refused: {error.name}")
        case _:
            return SupervisorError("the supervisor failed to answer; its log tells why")


def render(error: SupervisorError) -> tuple[bytes, list[tuple[str, str]]]:
    """Body and header fields of the answer whose status is `error.status`."""
    fields = [("Content-Type", CONTENT_TYPE), *error.headers]
    if error.retry_after_s is not None:
        fields.append(("Retry-After", str(math.ceil(error.retry_after_s))))
    body = problem_body(
        error.status, error.code, str(error), retryable=error.retryable, retry_after_s=error.retry_after_s
    )
    return body, fields


def allow(error: Exception) -> Iterable[tuple[str, str]]:
    """The Allow field that a 405 must have (RFC 9110 section 15.5.6); nothing for other errors."""
    return [("Allow", _methods(error))] if isinstance(error, http.MethodNotAllowed) else []


def _methods(error: http.MethodNotAllowed) -> str:
    return ", ".join(sorted(error.valid_methods or ()))
