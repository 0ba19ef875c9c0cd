"""WebSocket frame headers (RFC 6455, section 5.2), followed over a stream that passes by, and the Close frame.

Pure: no I/O, no clock. A `Follower` reads headers only; of payloads it sees nothing but the code in a Close.
It never changes a byte and never fails: a stream that it cannot follow is `lost`, and has no boundary any more.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import attrs

NO_CODE: Final = 1005
"""What `Follower.close_code` says of a Close without a code (RFC 6455, section 7.1.5). Never sent."""

Bytes: TypeAlias = bytes | bytearray | memoryview

_NEVER_SENT: Final = frozenset({1004, 1005, 1006, 1015})
_MAX_REASON_BYTES: Final = 123

_CLOSE: Final = 0x8
_MASK_BIT: Final = 0x80
_KEY_BYTES: Final = 4
# More than any length that a header can state.
_ENDLESS: Final = 1 << 128


def close_frame(code: int, reason: str = "") -> bytes:
    """An unmasked Close, as servers send it. A reason above 123 bytes of UTF-8 is cut between two characters.

    Raises:
        ValueError: `code` may not stand in a frame (RFC 6455, section 7.4: 1004, 1005, 1006, 1015, out of range).
    """
    if not 1000 <= code <= 4999 or code in _NEVER_SENT:
        raise ValueError(f"close code {code} may not be sent; use 1000-1003, 1007-1014 or 3000-4999")
    words = reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore").encode()
    return bytes((0x80 | _CLOSE, 2 + len(words))) + code.to_bytes(2, "big") + words


def close_answer(code: int) -> bytes:
    """The Close with which to answer one that had `code`: the same code, or none where it may not be sent."""
    try:
        return close_frame(code)
    except ValueError:
        return bytes((0x80 | _CLOSE, 0))


# Why so few fields: `feed` runs at every read of every connection, so what it looks at in the two common cases
# (a chunk inside a payload; whole small frames) is one number and one buffer that is not there. A lost stream, and
# one after its Close, are a payload without end.
@attrs.define(eq=False)
class Follower:
    """Where one direction of a WebSocket stands. `masked`: it is the client's direction."""

    masked: bool
    # The code in the Close, NO_CODE if it had none; None until one has wholly passed.
    close_code: int | None = None
    closed: bool = False
    # Broke the framing: nobody can tell where its frames end.
    lost: bool = False
    # Bytes still to come of the frame whose header was seen last.
    _left: int = 0
    # Whether that frame carries data (text, binary, continuation).
    _in_data: bool = False
    # The first bytes of a frame whose header, or whose Close, is not complete yet.
    _head: bytearray | None = None

    @property
    def at_boundary(self) -> bool:
        """Whether a frame may begin here: none is unfinished, and no Close has passed."""
        return self._left == 0 and self._head is None

    def feed(self, data: Bytes, n: int) -> int:
        """Follow the first `n` bytes of `data`. Returns how many data frames they begin or continue."""
        at = self._left
        if at >= n:
            self._left = at - n
            return 1 if n and self._in_data else 0
        touched = 1 if at and self._in_data else 0
        # The masking key is skipped together with the payload.
        mask, overhead = (_MASK_BIT, 2 + _KEY_BYTES) if self.masked else (0, 2)
        last = n - 1
        while at < n:
            if self._head is None and at < last:
                opcode = data[at] & 0x0F
                length = data[at + 1] ^ mask
                if length <= 125 and opcode != _CLOSE:
                    at += overhead + length
                    self._in_data = in_data = opcode < _CLOSE
                    touched += in_data
                    continue
            at = self._begin(data, at, n)
            if self._head is None:
                touched += self._in_data
        self._left = at - n
        return touched

    def feed_to_boundary(self, data: Bytes, n: int) -> int:
        """Follow to the first boundary, or to the end of a Close. Returns how many of the `n` bytes that took."""
        at = 0
        while at < n:
            # Inside a header a byte at a time: what its length means is `feed`'s to know.
            step = min(self._left, n - at) or 1
            self.feed(data[at : at + step], step)
            at += step
            if self.closed or self.at_boundary:
                break
        return at

    def _begin(self, data: Bytes, at: int, n: int) -> int:
        """Read a header of any kind, or a whole Close, from `at` on. Returns where its frame ends."""
        head = self._head
        if head is None:
            head = self._head = bytearray()
        while (missing := self._needed(head) - len(head)) > 0:
            if at >= n:
                return n
            piece = data[at : min(at + missing, n)]
            head += piece
            at += len(piece)
        self._head = None
        opcode, second = head[0] & 0x0F, head[1]
        length = second & 0x7F
        self._in_data = opcode < _CLOSE
        if length > 125:
            length = int.from_bytes(head[2:], "big")
        if (second >= _MASK_BIT) != self.masked or length >> 63 or (opcode >= _CLOSE and length > 125):
            self.lost = True
            self._in_data = False
            return n + _ENDLESS
        if opcode == _CLOSE:
            self.closed = True
            self.close_code = self._code(head)
            return n + _ENDLESS
        return at + length + (_KEY_BYTES if self.masked else 0)

    def _needed(self, head: bytearray) -> int:
        """How many bytes of a frame must be seen together, judged by those that are there."""
        if len(head) < 2:
            return 2
        opcode, second = head[0] & 0x0F, head[1]
        length = second & 0x7F
        if opcode == _CLOSE and length <= 125 and (second >= _MASK_BIT) == self.masked:
            return 2 + (_KEY_BYTES if self.masked else 0) + length
        return {126: 4, 127: 10}.get(length, 2)

    def _code(self, close: bytearray) -> int:
        payload = close[2 + (_KEY_BYTES if self.masked else 0) :]
        if len(payload) < 2:
            return NO_CODE
        if self.masked:
            payload = bytearray(byte ^ key for byte, key in zip(payload[:2], close[2:4], strict=True))
        return int.from_bytes(payload[:2], "big")
