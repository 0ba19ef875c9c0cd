"""Bytes inside JSON: as text where they are UTF-8, in base64 where they are not, and always told which.

Nothing is replaced and nothing is lost: what comes out of a process or a file can be had back to the byte.
"""

from __future__ import annotations

import binascii
from typing import Literal, TypeAlias

from agent.rpc import INVALID_PARAMS, RpcError

Encoding: TypeAlias = Literal["utf-8", "base64"]


def encode(data: bytes, wanted: Encoding = "utf-8") -> tuple[str, Encoding]:
    """The data as text if that is wanted and possible, else in base64; and which of them it is."""
    if wanted == "utf-8":
        try:
            return data.decode("utf-8"), "utf-8"
        except UnicodeDecodeError:
            pass
    return binascii.b2a_base64(data, newline=False).decode("ascii"), "base64"


def decode(data: str, encoding: Encoding) -> bytes:
    """The reverse. Raises RpcError (invalid params) if it is no base64."""
    if encoding == "utf-8":
        return data.encode("utf-8")
    try:
        return binascii.a2b_base64(data.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise RpcError(INVALID_PARAMS, f"data is no base64: {error}") from None


def whole_characters(data: bytes) -> int:
    """How many bytes of `data` end at the end of a character, if what follows can still complete the last one.

    At most three bytes are left over; what can never become UTF-8 is not held back.
    """
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0b1100_0000 == 0b1000_0000:
            continue
        length = 2 if byte & 0b1110_0000 == 0b1100_0000 else 3 if byte & 0b1111_0000 == 0b1110_0000 else 4
        if 0xC2 <= byte <= 0xF4 and back < length:
            return len(data) - back
        break
    return len(data)
