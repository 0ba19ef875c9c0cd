"""JSON-RPC 2.0 to the bundled agent over one WebSocket, as its client: calls with answers, and notifications.

`run` receives for everybody. When it ends, whoever still waits for an answer is told why.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import attrs
import trio

from supervisor.cli import UNAVAILABLE, Failure
from supervisor.client import ConnectionClosed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from supervisor.client import WebSocket

_WHY = {
    1001: "the tenant was put to sleep",
    1008: "the token is no longer valid",
    1011: "the agent failed",
    1012: "the agent was restarted or the server is being stopped; the command was ended",
    1013: "the server is full",
}


class CallFailed(Exception):
    """The agent understood the call and answered with an error; `code` is its word for programs, if it has one."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


@attrs.define(eq=False)
class _Waiting:
    answered: trio.Event = attrs.field(factory=trio.Event)
    answer: dict[str, Any] | None = None


class RpcClient:
    """Calls from any task; notifications go, in order, to the function that `run` was given."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._ended: Failure | None = None

    async def call(self, method: str, **params: object) -> Any:
        """Returns the result. Raises CallFailed, or Failure if the connection ended first."""
        if self._ended is not None:
            raise self._ended
        number, waiting = next(self._ids), _Waiting()
        self._waiting[number] = waiting
        try:
            await self._send({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
            await waiting.answered.wait()
        finally:
            del self._waiting[number]
        if waiting.answer is None:
            assert self._ended is not None
            raise self._ended
        error = waiting.answer.get("error")
        if error is not None:
            data = error.get("data")
            raise CallFailed(str(error.get("message")), data.get("code") if isinstance(data, dict) else None)
        return waiting.answer.get("result")

    async def run(self, notified: Callable[[str, dict[str, Any]], Awaitable[bool]]) -> None:
        """Receives until `notified` says that this was all (True); if the connection ends first, raises Failure."""
        try:
            while True:
                message = json.loads(await self._websocket.receive())
                if message.get("method") is not None:
                    if await notified(message["method"], message.get("params") or {}):
                        return
                elif (waiting := self._waiting.get(message.get("id"))) is not None:
                    waiting.answer = message
                    waiting.answered.set()
        except ConnectionClosed as error:
            self._ended = ended(error)
        except (ValueError, AttributeError):
            self._ended = Failure("the agent does not speak JSON-RPC: try `tenantry attach --raw`", UNAVAILABLE)
        # Not after `notified` has said that this was all: an input that the process did not wait for has no answer,
        # and that is no failure.
        for waiting in self._waiting.values():
            waiting.answered.set()
        raise self._ended

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            await self._websocket.send(json.dumps(message))
        except ConnectionClosed:
            # Why it ended is what `run` receives.
            await trio.sleep_forever()


def ended(error: ConnectionClosed) -> Failure:
    """What the end of the connection means to who sits at the terminal."""
    why = _WHY.get(error.code, "the connection broke" if error.code == 1006 else "the agent closed the connection")
    return Failure(f"{why} (close code {error.code}{error.reason and ', '}{error.reason})", UNAVAILABLE)
