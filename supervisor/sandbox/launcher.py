"""Where an agent runs: the interface that every launcher implements, and what the tenant knows of a process.

A launcher owns the whole process tree of an agent from `run` to its return. It guarantees that nothing of
the tree is alive when `run` returns, however it ends, and it never starts a second agent in a workspace
whose former tree is not empty.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import trio


@attrs.frozen(kw_only=True)
class AgentSpec:
    """What to run, for whom. `env` is what the settings add; the launcher adds the contract's own names."""

    tenant: str
    generation: int
    command: tuple[str, ...]
    env: Mapping[str, str] = attrs.field(factory=dict)
    # The tenant's own directory; the agent's workspace, its lock and nothing of others lie in it.
    home: Path


@attrs.frozen
class ExitStatus:
    """How a process ended: `returncode` as `subprocess` has it, so a death by signal N is -N."""

    returncode: int

    @property
    def signal(self) -> int | None:
        return -self.returncode if self.returncode < 0 else None

    def __str__(self) -> str:
        if self.returncode >= 0:
            return f"exit status {self.returncode}"
        try:
            return f"killed by {signal.Signals(-self.returncode).name}"
        except ValueError:
            return f"killed by signal {-self.returncode}"


class AgentProcess(Protocol):
    """A started agent. Valid until the `run` that made it returns; after that its methods do nothing."""

    @property
    def pid(self) -> int | None:
        """The main process's pid as the supervisor sees it; None where there is no process (in memory)."""

    @property
    def exit_status(self) -> ExitStatus | None:
        """None while the main process lives, by the kernel's word (S3-04)."""

    async def connect(self) -> trio.abc.Stream:
        """Opens one new connection to the agent's listening socket.

        A full backlog is waited for, never a failure. Raises AgentUnreachable if the agent no longer
        listens. Cancellation closes the half-made connection.
        """

    async def wait_exited(self) -> ExitStatus:
        """Returns once the main process has ended. Any number of tasks may wait."""

    def terminate(self) -> None:
        """SIGTERM to the main process alone (systemd's KillMode=mixed). Does nothing once it has ended."""

    def kill(self) -> None:
        """SIGKILL to the whole tree; `run` then returns as soon as the tree is empty."""

    async def cpu_seconds(self) -> float:
        """Processor time used so far by the whole tree, in seconds."""


class Launcher(Protocol):
    """One way to run agents, such as the plain process launcher."""

    async def run(self, spec: AgentSpec, *, task_status: trio.TaskStatus[AgentProcess] = ...) -> None:
        """Starts the agent, calls `task_status.started(process)` once its program runs, and owns its tree.

        Returns when the tree is empty: by itself after the main process exited (the rest of the tree is
        killed then), or after `kill`. Cancellation kills the tree and waits, shielded, until it is empty.
        Raises AgentStartFailed before `started` if the program cannot be executed or the sandbox not be made.
        """
