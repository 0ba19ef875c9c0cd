"""A WebSocket client that does exactly what a test says, over any Trio stream: bytes and frames, nothing by itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import struct

import trio

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


def head(path="/echo", *, extra=(), host="agent"):
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        *extra,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def frame(opcode, payload=b"", *, fin=True, mask=b"\x01\x02\x03\x04"):
    first = opcode | (0x80 if fin else 0)
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65536:
        length = b"\xfe" + struct.pack("!H", size)
    else:
        length = b"\xff" + struct.pack("!Q", size)
    repeated = (mask * (size // 4 + 1))[:size]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")
    return bytes([first]) + length + mask + masked


def close_frame(code=1000, reason=b""):
    return frame(CLOSE, struct.pack("!H", code) + reason)


class Wire:
    def __init__(self, stream):
        self.stream = stream
        self.status = None
        self.headers = {}
        self.body = b""
        self._buffer = b""
        self._ids = 0
        self.notifications = []

    @classmethod
    async def open(cls, stream, path="/echo", **options):
        """The client after its handshake; `status` says what the answer was."""
        wire = cls(stream)
        await stream.send_all(head(path, **options))
        await wire.read_answer()
        return wire

    async def read_answer(self):
        while b"\r\n\r\n" not in self._buffer:
            assert await self._more(), f"no answer, only {self._buffer!r}"
        answer, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        status, *lines = answer.decode().split("\r\n")
        self.status = int(status.split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if self.status != 101:
            self.body = await self._exactly(int(self.headers.get("content-length", 0)))

    async def _more(self):
        data = await self.stream.receive_some(65536)
        self._buffer += data
        return bool(data)

    async def _exactly(self, count):
        while len(self._buffer) < count:
            if not await self._more():
                raise EOFError(f"the stream ended with {self._buffer!r}")
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def send(self, opcode, payload=b"", **options):
        await self.stream.send_all(frame(opcode, payload, **options))

    async def frame(self):
        """(opcode, payload) of the next frame. Raises EOFError at the end of the stream."""
        first, length = await self._exactly(2)
        assert first & 0x80, "the agent sent a fragment"
        if length == 126:
            (length,) = struct.unpack("!H", await self._exactly(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", await self._exactly(8))
        return first & 0x0F, await self._exactly(length)

    async def closed_with(self):
        """(code, reason) of the Close that comes next, which is answered; then the stream must end."""
        opcode, payload = await self.frame()
        assert opcode == CLOSE, (opcode, payload[:200])
        with contextlib.suppress(trio.BrokenResourceError):
            await self.stream.send_all(frame(CLOSE, payload[:2]))
        await self.ends()
        return struct.unpack("!H", payload[:2])[0], payload[2:].decode()

    async def ends(self):
        assert self._buffer == b""
        with contextlib.suppress(trio.BrokenResourceError):
            assert await self.stream.receive_some(1) == b""

    # JSON-RPC

    async def message(self):
        """The next text message, as JSON; pings are answered."""
        while True:
            opcode, payload = await self.frame()
            if opcode == PING:
                await self.send(PONG, payload)
                continue
            assert opcode == TEXT, (opcode, payload[:200])
            return json.loads(payload)

    async def ask(self, method, **params):
        """Sends a request; its id."""
        self._ids += 1
        request = {"jsonrpc": "2.0", "id": self._ids, "method": method, "params": params}
        await self.send(TEXT, json.dumps(request).encode())
        return self._ids

    async def answer(self, request_id):
        """The response to that request; notifications that come before are kept in `notifications`."""
        while True:
            message = await self.message()
            if "id" in message:
                assert message["id"] == request_id, message
                return message
            self.notifications.append(message)

    async def call(self, method, **params):
        answer = await self.answer(await self.ask(method, **params))
        assert "result" in answer, answer
        return answer["result"]

    async def error(self, method, **params):
        answer = await self.answer(await self.ask(method, **params))
        assert "error" in answer, answer
        return answer["error"]

    async def notification(self):
        return self.notifications.pop(0) if self.notifications else await self.message()

    async def until_exit(self, process):
        """(the whole output by stream, the parameters of process.exit) of that process."""
        output = {"stdout": b"", "stderr": b""}
        while True:
            message = await self.notification()
            params = message["params"]
            assert params["id"] == process, message
            if message["method"] == "process.exit":
                return output, params
            data = params["data"]
            output[params["stream"]] += (
                data.encode() if params["encoding"] == "utf-8" else base64.b64decode(data, validate=True)
            )
