"""The state directory and its lock: one supervisor a directory, by the kernel's word.

The lock is an flock on `lock`, so it ends with its holder however that dies. The file stays; its content only
tells who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable: a file's own fsync does not."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_state_dir(path: Path) -> None:
    """Sees to it that the directory exists, with mode 0700 if it is ours to say.

    Why not chmod whatever is there: a volume may be shared by a group on purpose, and `state_dir = "/tmp"` must
    not close /tmp to everybody else. So it is tightened only where it was made here, or found empty and owned by
    us, as a fresh volume is. Whatever the directory's mode, the files of the store are 0600. Raises OSError.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        found = path.stat()
        with os.scandir(path) as entries:
            if found.st_uid == os.geteuid() and found.st_mode & 0o077 and next(entries, None) is None:
                path.chmod(0o700)
    else:
        sync_directory(path.parent)


@contextmanager
def directory_lock(state_dir: Path) -> Iterator[None]:
    """Holds the directory for this process. Raises ConfigError, with the holder's pid, if it is taken; OSError.

    Why flock and not a POSIX record lock: it belongs to the open file, so two supervisors in one process exclude
    each other too, and closing some other descriptor of the file does not drop it. What was forked without an
    exec inherits it (close-on-exec does not help there): the keeper is to be up before the store is opened.
    """
    fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
            holder = f"the process {pid}" if pid else "another process"
            raise ConfigError(
                f"state_dir {state_dir} is in use by {holder}: stop that supervisor, or set another state_dir"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)
