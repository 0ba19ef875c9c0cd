"""The few calls of the kernel that Python does not have: prctl and close_range.

Nothing here is process-wide state of the supervisor: only the keeper and its forks call it.
"""

from __future__ import annotations

import array
import ctypes
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38

# The same on every architecture that Linux 5.9 knows. Why not os.closerange: where CPython was built against an
# older glibc it closes one number after the other, a million of them if the limit on open files is high.
_SYS_CLOSE_RANGE: Final = 436
_LAST_FD: Final = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl
_prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint]
_syscall.restype = ctypes.c_long


def prctl(option: int, value: int) -> None:
    """Raises OSError with the option's number if the kernel refuses it."""
    if _prctl(option, value, 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}): {os.strerror(errno)}")


def set_name(name: str) -> None:
    """What ps and top show of this thread; 15 bytes of it."""
    text = array.array("b", name.encode() + b"\0")
    prctl(_PR_SET_NAME, text.buffer_info()[0])


def close_all_but(kept: Iterable[int]) -> None:
    """Closes every open file descriptor of this process that is not in `kept`."""
    first = 0
    for fd in sorted({*kept}):
        if first < fd:
            _close_range(first, fd - 1)
        first = fd + 1
    _close_range(first, _LAST_FD)


def _close_range(first: int, last: int) -> None:
    if _syscall(_SYS_CLOSE_RANGE, first, last, 0) == 0:
        return
    # A kernel before 5.9, or a filter around us.
    for name in os.listdir("/proc/self/fd"):
        if first <= int(name) <= last:
            try:
                os.close(int(name))
            except OSError:  # the listing's own descriptor
                continue
