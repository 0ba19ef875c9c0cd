"""How values are written: durations as "10s", sizes as "64KiB", lists, words; both ways, so what is shown can be set.

Pure. A notation belongs to the type of an attribute and to the unit in its name (`_s`, `_bytes`).
"""

from __future__ import annotations

import math
import re
import shlex
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS_BYTES: Final = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
_WORDS: Final = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@attrs.frozen(kw_only=True)
class Kind:
    """How the values of a type are written."""

    expected: str
    # From the file's or a program's value; raises ValueError or TypeError.
    parse: Callable[[Any], Any]
    # From a variable's text, into what `parse` takes.
    split: Callable[[str], object] = str
    # Into the file's value again.
    show: Callable[[Any], object] = str


def kind_of(key: str, name: str, hint: Any) -> Kind:
    """The notation of the setting `key`, whose attribute is `name` with type `hint`."""
    if isinstance(hint, types.UnionType):
        [inner] = [part for part in typing.get_args(hint) if part is not type(None)]
        return _optional(kind_of(key, name, inner), {float: "never", bool: "auto"}.get(inner))
    if typing.get_origin(hint) is typing.Literal:
        return _choice(typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return Kind(expected="a table of strings", parse=_table, show=dict)
    if key == "agent.command":
        return Kind(expected="a list of strings, or one string as a shell has it", parse=_command, show=list)
    if typing.get_origin(hint) is tuple:
        return _list_of(kind_of(key, name, typing.get_args(hint)[0]))
    if name.endswith("_s"):
        whole = hint is int
        return _DURATION if not whole else attrs.evolve(_DURATION, parse=lambda value: _whole(parse_duration(value)))
    if name.endswith("_bytes"):
        return Kind(expected='a size: a number of bytes, or such as "64KiB", "1MiB"', parse=_size, show=_show_size)
    return _PLAIN[hint]


def _optional(kind: Kind, word: str | None) -> Kind:
    return Kind(
        expected=f'{kind.expected}, or "{word}"' if word else kind.expected,
        parse=lambda value: None if word and value == word else kind.parse(value),
        split=lambda text: text if text == word else kind.split(text),
        show=lambda value: word if value is None else kind.show(value),
    )


def _list_of(kind: Kind) -> Kind:
    def parse(value: object) -> tuple[Any, ...]:
        return tuple(kind.parse(item) for item in (value if isinstance(value, list | tuple) else [value]))

    return Kind(
        expected=f"a list; each of it {kind.expected}",
        parse=parse,
        split=lambda text: [kind.split(item.strip()) for item in text.split(",")],
        show=lambda values: [kind.show(value) for value in values],
    )


def _choice(words: tuple[str, ...]) -> Kind:
    def parse(value: object) -> str:
        if value not in words:
            raise ValueError(value)
        return value

    return Kind(expected=f"one of {', '.join(words)}", parse=parse)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(value)
    return value


def _table(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in (*value, *value.values())):
        raise TypeError(value)
    return dict(value)


def _command(value: object) -> tuple[str, ...]:
    words = shlex.split(value) if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not words[0]:
        raise TypeError(value)
    return tuple(word if isinstance(word, str) else _text(word) for word in words)


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    return value


def _whole(seconds: float) -> int:
    if seconds != int(seconds):
        raise ValueError(seconds)
    return int(seconds)


def parse_duration(value: object) -> float:
    """Seconds, of "500ms", "10s", "10min", "2h", "1d", or of a number. Raises ValueError or TypeError."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ms|s|min|m|h|d)?", value, re.ASCII)
        if match is None:
            raise ValueError(value)
        # Divided, so that "100ms" is the 0.1 that a program would write.
        number = float(match[1])
        return number / 1000 if match[2] == "ms" else number * _UNITS_S[match[2] or "s"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(value)
    return float(value)


def show_duration(seconds: float) -> str:
    """What `parse_duration` takes for exactly these seconds, in the greatest unit that is whole."""
    for unit in ("h", "min", "s") if seconds else ("s",):
        if seconds % _UNITS_S[unit] == 0:
            return f"{seconds / _UNITS_S[unit]:.0f}{unit}"
    return f"{seconds * 1000:.0f}ms" if parse_duration(f"{seconds * 1000:.0f}ms") == seconds else f"{seconds!r}s"


def _size(value: object) -> int:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+) ?(\w*)", value, re.ASCII)
        if match is None or match[2] not in _UNITS_BYTES:
            raise ValueError(value)
        return int(match[1]) * _UNITS_BYTES[match[2]]
    return _number(value)


def _show_size(size: int) -> object:
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % _UNITS_BYTES[unit] == 0:
            return f"{size // _UNITS_BYTES[unit]}{unit}"
    return size


def _split_boolean(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise ValueError(text)
    return _WORDS[text.lower()]


_DURATION: Final = Kind(
    expected='a duration: a number of seconds, or such as "500ms", "10s", "10min", "2h"',
    parse=parse_duration,
    show=show_duration,
)
_PLAIN: Final[dict[Any, Kind]] = {
    bool: Kind(expected="true or false", parse=_boolean, split=_split_boolean, show=bool),
    int: Kind(expected="a whole number", parse=_number, split=int, show=int),
    str: Kind(expected="a string", parse=_text),
    Path: Kind(expected="a path", parse=lambda value: value if isinstance(value, Path) else Path(_text(value))),
}
