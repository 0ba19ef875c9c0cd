"""The few calls of the kernel that Python does not have: prctl and close_range.

Nothing here is process-wide state of the supervisor: only the keeper and its forks call it.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_NAME: Final = 15
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38

# The same on every architecture that Linux 5.9 knows. Why not os.closerange: where CPython was built against an
# older glibc it closes one number after the other, a million of them if the limit on open files is high.
_SYS_CLOSE_RANGE: Final = 436
_LAST_FD: Final = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int | bytes) -> None:
    """Raises OSError with the option's number if the kernel refuses it."""
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    rest = (ctypes.c_ulong(0),) * 3
    if _libc.prctl(ctypes.c_int(option), argument, *rest) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}): {os.strerror(errno)}")


def close_all_but(kept: Iterable[int]) -> None:
    """Closes every open file descriptor of this process that is not in `kept`."""
    first = 0
    for fd in sorted({*kept}):
        if first < fd:
            _close_range(first, fd - 1)
        first = fd + 1
    _close_range(first, _LAST_FD)


def _close_range(first: int, last: int) -> None:
    if _libc.syscall(ctypes.c_long(_SYS_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0)) == 0:
        return
    # A kernel before 5.9, or a filter around us.
    for name in os.listdir("/proc/self/fd"):
        if first <= int(name) <= last:
            try:
                os.close(int(name))
            except OSError:  # the listing's own descriptor
                continue
