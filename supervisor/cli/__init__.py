"""The command line: it parses, asks the library or a running server, and turns the outcome into an exit status.

Nothing heavy is imported before a verb needs it, and nothing here ends the process.
"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

# sysexits(3), where it has a word for it.
USAGE: Final = 64
UNAVAILABLE: Final = 69
IO_ERROR: Final = 74
NOT_ALLOWED: Final = 77
CONFIGURATION: Final = 78
INTERRUPTED: Final = 130
OUTPUT_CLOSED: Final = 141
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Failure(Exception):
    """A verb could not do its work: `str()` is for the reader, `status` for the shell."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def main(argv: Sequence[str] | None = None, *, control: socket.socket | None = None) -> int:
    """Runs one verb and returns the exit status; `control` is the socket to an init that is our keeper.

    0 well done, 64 wrong use, 69 no server or agent, 70 not done in time, 74 output not written, 77 not allowed, 78
    wrong settings; `exec` and `attach` give the status of what they ran, or 128 and the signal that ended it.
    """
    import click

    from supervisor.cli.verbs import tenantry
    from supervisor.errors import ConfigError, SupervisorError

    try:
        status = tenantry.main(argv, prog_name="tenantry", standalone_mode=False, obj=control)
        sys.stdout.flush()
    except click.UsageError as error:
        error.show()
        return USAGE
    except click.ClickException as error:
        error.show()
        return 1
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except ConfigError as error:
        return _told(f"the settings are wrong: {error}", CONFIGURATION)
    except Failure as error:
        return _told(str(error), error.status)
    except SupervisorError as error:
        return _told(str(error), UNAVAILABLE if error.retryable else 1)
    except BrokenPipeError:
        return _without_output(OUTPUT_CLOSED)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        return _without_output(_told(f"the output cannot be written: {error.strerror}", IO_ERROR))
    except SystemExit as error:
        # Click's own way to say that the reader of stdout is gone.
        return OUTPUT_CLOSED if error.code == 1 else int(error.code or 0)
    return status if isinstance(status, int) else 0


def _told(message: str, status: int) -> int:
    print(f"tenantry: {message}", file=sys.stderr)
    return status


def _without_output(status: int) -> int:
    # Else the interpreter would flush what is left, and complain.
    import os

    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), sys.stdout.fileno())
    return status
