"""The OpenAPI 3.1 document, rendered from the table of operations. Pure; the same table always gives the same."""

from __future__ import annotations

import http
import inspect
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import msgspec

from supervisor import errors
from supervisor.gateway import hosts, problems, surface

if TYPE_CHECKING:
    from collections.abc import Iterable

    from supervisor.errors import SupervisorError
    from supervisor.gateway.surface import Operation

_REF: Final = "#/components/schemas/{name}"
_PARAMETERS: Final = {
    "tenant": "The tenant's name.",
    "path": "What the agent sees as its path; dot segments are refused.",
    "name": "The file's name.",
}
_EVERYWHERE: Final = (errors.Refused, hosts.HostNotAllowed, hosts.OriginNotAllowed)
_WITH_TOKEN: Final = (errors.NotAuthenticated, errors.NotAllowed)
_WITH_BODY: Final = (
    problems.BadBody,
    problems.UnsupportedMediaType,
    problems.BodyTooLarge,
    problems.BodyTimeout,
)
_TAGS: Final = {
    "tenants": "Tenants and their agents.",
    "access": "Tokens and tickets.",
    "operation": "For whoever operates the supervisor.",
    "pages": "For people.",
}


def version() -> str:
    """The version of the installed distribution; "0" where there is none, as in a bare source tree."""
    try:
        return metadata.version("tenantry")
    except metadata.PackageNotFoundError:
        return "0"


def document(operations: Iterable[Operation] = surface.OPERATIONS) -> dict[str, Any]:
    """The whole document, as plain data."""
    operations = tuple(operations)
    structs: set[type[msgspec.Struct]] = {surface.Problem}
    for operation in operations:
        structs |= {answer for answer in operation.answers.values() if isinstance(answer, type)}
        if operation.body is not None:
            structs.add(operation.body)
    ordered = sorted(structs, key=lambda struct: struct.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tenantry",
            "version": version(),
            "summary": "Every tenant gets an agent process of its own, in a sandbox, behind one address.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": told} for name, told in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "A token for a tenant, or for every tenant, with its scopes. A WebSocket may carry "
                    "it as `?token=` or as the subprotocol `tenantry.bearer.<token>` too.",
                },
                "ticket": {
                    "type": "apiKey",
                    "in": "query",
                    "name": "ticket",
                    "description": "Opens one WebSocket to the tenant that it was issued for.",
                },
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    upgrade = 101 in operation.answers
    told: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.told.partition(". ")[0].rstrip("."),
        "description": operation.told + _right(operation),
        "parameters": [*_path_parameters(operation.path), *_query_parameters(operation.query)],
        "responses": _responses(operation, upgrade=upgrade),
    }
    if upgrade:
        told["security"] = [{"token": []}, {"ticket": []}]
    elif operation.token_optional:
        told["security"] = [{}, {"token": []}]
    else:
        told["security"] = [{"token": []}] if operation.scope else []
    if operation.body is not None:
        told["requestBody"] = {
            "required": False,
            "content": {"application/json": {"schema": {"$ref": _REF.format(name=operation.body.__name__)}}},
        }
    return told


def _right(operation: Operation) -> str:
    if 101 in operation.answers:
        return " Needs scope `connect` for the tenant."
    if operation.scope is None:
        return ""
    whose = "for the tenant" if operation.of_tenant else "for every tenant"
    return f" Needs scope `{operation.scope}` {whose}."


def _path_parameters(path: str) -> Iterable[dict[str, Any]]:
    for name, told in _PARAMETERS.items():
        if f"{{{name}}}" in path:
            schema = msgspec.json.schema(surface.TenantName) if name == "tenant" else {"type": "string"}
            yield {"name": name, "in": "path", "required": True, "description": told, "schema": schema}


def _query_parameters(query: type[msgspec.Struct] | None) -> Iterable[dict[str, Any]]:
    if query is None:
        return
    _, components = msgspec.json.schema_components([query], ref_template=_REF)
    for name, schema in components[query.__name__]["properties"].items():
        schema = dict(schema)
        described = {"description": schema.pop("description")} if "description" in schema else {}
        yield {"name": name, "in": "query", "required": False, **described, "schema": schema}


def _responses(operation: Operation, *, upgrade: bool) -> dict[str, Any]:
    told = _problem_answers(_problems_of(operation, upgrade=upgrade))
    for status, answer in operation.answers.items():
        content = told.get(str(status), {}).get("content", {})
        told[str(status)] = _answer(status, answer)
        if content:
            told[str(status)]["content"] |= content
    return dict(sorted(told.items()))


def _answer(status: int, answer: type[msgspec.Struct] | str | None) -> dict[str, Any]:
    told: dict[str, Any] = {"description": http.HTTPStatus(status).phrase}
    if isinstance(answer, str):
        told["content"] = {answer: {}}
    elif answer is not None:
        told["content"] = {"application/json": {"schema": {"$ref": _REF.format(name=answer.__name__)}}}
    return told


def _problems_of(operation: Operation, *, upgrade: bool) -> Iterable[type[SupervisorError]]:
    yield from _EVERYWHERE
    if operation.scope is not None or operation.token_optional or upgrade:
        yield from _WITH_TOKEN
        # A token can be revoked, which the store knows.
        yield errors.StoreError
    if operation.of_tenant:
        yield errors.BadTenantName
    if operation.query is not None:
        yield problems.BadQuery
    if operation.body is not None:
        yield from _WITH_BODY
    yield from operation.problems
    yield errors.SupervisorError


def _problem_answers(found: Iterable[type[SupervisorError]]) -> dict[str, Any]:
    by_status: dict[int, dict[str, str]] = {}
    for error in found:
        told = " ".join((inspect.getdoc(error) or "").split()).partition(". ")[0].rstrip(".")
        by_status.setdefault(error.status, {})[error.code] = told
    by_status[500] = {"internal": "A fault of the supervisor, told in its log"}
    return {
        str(status): {
            "description": "\n".join(f"* `{code}`: {told}" for code, told in codes.items()),
            "content": {problems.CONTENT_TYPE: {"schema": {"$ref": _REF.format(name="Problem")}}},
        }
        for status, codes in sorted(by_status.items())
    }
