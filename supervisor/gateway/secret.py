"""The secret that signs tokens: a file that only the supervisor reads, made at the first start."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from typing import TYPE_CHECKING, Final

from supervisor.errors import ConfigError
from supervisor.store.lock import make_state_dir, sync_directory

if TYPE_CHECKING:
    from pathlib import Path

    from supervisor.settings import Settings

MIN_SECRET_BYTES: Final = 32
_MAX_SECRET_BYTES: Final = 4096


def load_or_create_secret(state_dir: Path, settings: Settings) -> bytes:
    """The bytes that sign tokens: `auth.secret_file` if set, else `secret` in `state_dir`, made if missing.

    The bytes of the file are the secret as they are. Raises ConfigError, with the mend, if others may read
    the file, if it is no secret, or if it can be neither read nor made.
    """
    given = settings.auth.secret_file
    path = given or state_dir / "secret"
    try:
        if given is None and not path.exists():
            _create_secret(path)
        return _read_secret(path, forbidden=0o077 if given is None else 0o037)
    except FileNotFoundError:
        raise ConfigError(
            f"auth.secret_file {str(path)!r} does not exist: make it with "
            f"`head -c 32 /dev/urandom > {path} && chmod 600 {path}`, or leave the setting out"
        ) from None
    except OSError as error:
        raise ConfigError(f"the secret {str(path)!r} cannot be read or made: {error.strerror}") from error


def _create_secret(path: Path) -> None:
    """Appears whole and on the disk, or not at all; whoever comes second finds the first one's."""
    make_state_dir(path.parent)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o600)
            file.write(secrets.token_bytes(MIN_SECRET_BYTES))
            file.flush()
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
    sync_directory(path.parent)


def _read_secret(path: Path, *, forbidden: int) -> bytes:
    # Why a group may read a given file: Kubernetes mounts a secret as root's, for the pod's group.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"the secret {str(path)!r} is not a regular file")
        if status.st_mode & forbidden:
            raise ConfigError(
                f"the secret {str(path)!r} can be read or written by others (mode {status.st_mode & 0o777:04o}): "
                f"`chmod 600 {path}`; if others may have seen it, remove it, which revokes every token"
            )
        if status.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"the secret {str(path)!r} belongs to another user (uid {status.st_uid})")
        secret = os.read(fd, _MAX_SECRET_BYTES + 1)
    finally:
        os.close(fd)
    if not MIN_SECRET_BYTES <= len(secret) <= _MAX_SECRET_BYTES:
        raise ConfigError(
            f"the secret {str(path)!r} has {'more than ' * (len(secret) > _MAX_SECRET_BYTES)}"
            f"{min(len(secret), _MAX_SECRET_BYTES)} bytes; it needs {MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES}: "
            f"remove it, and make one with `head -c 32 /dev/urandom`"
        )
    return secret
