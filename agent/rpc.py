"""JSON-RPC 2.0 as pure functions: a message in, a call or an error out; results and notifications encoded.

No Trio and no I/O. Parameters are given by name. Batches are refused (-32600): messages on one WebSocket are
cheap, and a batch would hold back every answer for its slowest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import msgspec
from msgspec import UNSET

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
# The call was understood and could not be done; `data.code` says why, in a word.
FAILED = -32000

Id: TypeAlias = str | int | float | None


class RpcError(Exception):
    """An error response. `request_id` is None where it could not be read."""

    def __init__(self, number: int, message: str, *, code: str | None = None, request_id: Id = None) -> None:
        super().__init__(message)
        self.number = number
        self.message = message
        self.code = code
        self.request_id = request_id


class Failed(RpcError):
    """A method could not do what was asked: `code` for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(FAILED, message, code=code)


class Params(msgspec.Struct, forbid_unknown_fields=True):
    """The base of every method's parameters; a field that is not known is an error."""


class Call(msgspec.Struct, frozen=True):
    """A request, or a notification if it has no `id` (then it gets no answer, not even an error)."""

    jsonrpc: str
    method: str
    id: Id | msgspec.UnsetType = UNSET
    params: msgspec.Raw = msgspec.Raw(b"{}")


class _JustId(msgspec.Struct, frozen=True):
    id: Id = None


@attrs.frozen
class Method:
    """One method: the type of its parameters, and what runs.

    `run` is called in the order of arrival and never blocks: it returns the result, or, as a function without
    arguments to await, what will have it.
    """

    params: type[Params]
    run: Callable[[Any], Any]


_call = msgspec.json.Decoder(Call)
_id = msgspec.json.Decoder(_JustId)
_encoder = msgspec.json.Encoder()


def parse(message: str | bytes) -> Call:
    """Reads one message. Raises RpcError with the number that the specification gives (section 5.1)."""
    try:
        call = _call.decode(message)
    except msgspec.ValidationError as error:
        if message.lstrip()[:1] in ("[", b"["):
            raise RpcError(
                INVALID_REQUEST, "batches are not served; send each request as a message of its own"
            ) from None
        raise RpcError(INVALID_REQUEST, f"no JSON-RPC 2.0 request: {error}", request_id=_id_of(message)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RpcError(PARSE_ERROR, f"no JSON: {error}") from None
    if call.jsonrpc != "2.0":
        raise RpcError(INVALID_REQUEST, 'jsonrpc must be "2.0"', request_id=_id_of(message))
    return call


def _id_of(message: str | bytes) -> Id:
    # Behind what was wrong with it first, the message may be no JSON at all.
    try:
        return _id.decode(message).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def call_method(methods: Mapping[str, Method], call: Call) -> Any:
    """Runs the call's method; returns what `Method.run` returns. Raises RpcError."""
    method = methods.get(call.method)
    if method is None:
        raise RpcError(METHOD_NOT_FOUND, f"there is no method {call.method!r}")
    try:
        params = msgspec.json.decode(call.params, type=method.params)
    except msgspec.ValidationError as error:
        raise RpcError(INVALID_PARAMS, f"{call.method}: {error}") from None
    return method.run(params)


def encode_result(request_id: Id, result: Any) -> str:
    return _encoder.encode({"jsonrpc": "2.0", "id": request_id, "result": result}).decode()


def encode_error(request_id: Id, error: RpcError) -> str:
    body: dict[str, Any] = {"code": error.number, "message": error.message}
    if error.code is not None:
        body["data"] = {"code": error.code}
    return _encoder.encode({"jsonrpc": "2.0", "id": request_id, "error": body}).decode()


def encode_notification(method: str, params: Mapping[str, Any]) -> str:
    return _encoder.encode({"jsonrpc": "2.0", "method": method, "params": params}).decode()
