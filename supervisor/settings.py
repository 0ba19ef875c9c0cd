"""Every setting of a supervisor, with its default, its unit in its name, and its check.

The classes are frozen and passed explicitly. `supervisor.configuration` builds them from a TOML file and the
environment; a program that embeds the supervisor builds them by hand. In the file a duration is written
without its `_s` ("10s"), a size without its `_bytes` ("64KiB").
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import attrs
from attrs.validators import deep_iterable, ge, gt, in_, instance_of, max_len, min_len, optional


def _positive(default: float) -> float:
    return attrs.field(default=default, validator=gt(0.0))


def _positive_or_none(default: float | None) -> float | None:
    return attrs.field(default=default, validator=optional(gt(0.0)))


def _count(default: int) -> int:
    return attrs.field(default=default, validator=[instance_of(int), gt(0)])


@attrs.frozen(kw_only=True)
class AgentSettings:
    """What runs for a tenant, and how long it may take to end."""

    command: tuple[str, ...] = attrs.field(
        default=(sys.executable, "-I", "-m", "agent"), converter=tuple, validator=min_len(1)
    )
    # From SIGTERM until SIGKILL of the whole tree.
    grace_s: float = _positive(5.0)
    env: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class AuthSettings:
    """Who may come in; auth is on from the first run."""

    enabled: bool = True
    # None: `secret` in the state directory, made at the first start with mode 0600.
    secret_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    ticket_ttl_s: float = _positive(30.0)


@attrs.frozen(kw_only=True)
class TenantSettings:
    """How tenants come into being."""

    # A token for a tenant that does not exist yet creates it. None: only where `bind` is loopback.
    auto_create: bool | None = None


@attrs.frozen(kw_only=True)
class LimitSettings:
    """What one peer may cost. Everything above a limit gets a clear refusal."""

    connections: int = _count(16384)
    connections_per_tenant: int = _count(4096)
    connections_per_peer: int = _count(4096)
    head_timeout_s: float = _positive(10.0)
    max_head_bytes: int = _count(64 * 1024)
    body_timeout_s: float = _positive(60.0)
    body_min_rate_bytes: int = _count(1024)
    max_body_bytes: int = _count(1024 * 1024)
    # An HTTP answer that makes no progress for this long is given up.
    answer_stall_s: float = _positive(60.0)
    keep_alive_s: float = _positive(5.0)


@attrs.frozen(kw_only=True)
class SandboxSettings:
    """How an agent is confined. `process` is no security boundary: it keeps honest agents apart."""

    level: Literal["process"] = attrs.field(default="process", validator=in_(["process"]))
    # rlimits of the agent's process; 0 leaves the supervisor's own.
    open_files: int = attrs.field(default=4096, validator=ge(0))
    file_size_bytes: int = attrs.field(default=0, validator=ge(0))
    address_space_bytes: int = attrs.field(default=0, validator=ge(0))
    cpu_time_s: int = attrs.field(default=0, validator=ge(0))
    processes: int = attrs.field(default=0, validator=ge(0))
    # An agent's output goes to the log line by line; what is longer is cut, what is faster is counted.
    max_line_bytes: int = _count(8192)
    max_lines_per_second: int = _count(200)


@attrs.frozen(kw_only=True)
class TlsSettings:
    """A certificate chain and its key, PEM. Both or neither."""

    certificate: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    key: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))

    def __attrs_post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls.certificate and tls.key belong together: set both or neither")


@attrs.frozen(kw_only=True)
class LogSettings:
    """`auto` is text on a terminal and JSON otherwise."""

    format: Literal["auto", "text", "json"] = attrs.field(default="auto", validator=in_(["auto", "text", "json"]))
    level: Literal["debug", "info", "warning", "error"] = attrs.field(
        default="info", validator=in_(["debug", "info", "warning", "error"])
    )


@attrs.frozen(kw_only=True)
class Settings:
    """The whole of it. Times are seconds."""

    # "host:port", "unix:/path", or "fd://3" for an inherited listening socket. Several are allowed.
    bind: tuple[str, ...] = attrs.field(default=("127.0.0.1:8000",), validator=min_len(1))
    state_dir: Path = attrs.field(default=Path(".tenantry"), converter=Path)
    # Beyond loopback one of these is required, else Host cannot be checked.
    allowed_hosts: tuple[str, ...] = attrs.field(default=(), converter=tuple)
    public_url: str | None = None
    # Addresses or networks whose Forwarded and X-Forwarded-* headers count.
    trusted_proxies: tuple[str, ...] = attrs.field(default=(), converter=tuple)

    # The ladder (S3-05): at once, then after each of these.
    connect_retry_s: tuple[float, ...] = attrs.field(
        default=(1.0, 3.0, 8.0), converter=tuple, validator=[max_len(16), deep_iterable(ge(0))]
    )
    connect_timeout_s: float = _positive(10.0)
    start_timeout_s: float = _positive(30.0)
    stable_after_s: float = attrs.field(default=1.0, validator=ge(0))
    # Without work for this long a tenant is put to sleep; None keeps it awake.
    sleep_after_s: float | None = _positive_or_none(600.0)
    # False: an open connection is work. True: a connection counts only while data passes.
    sleep_with_connections: bool = False
    # From SIGTERM of the supervisor until its exit; the watchdog ends it after that with status 70.
    drain_grace_s: float = _positive(9.0)

    agent: AgentSettings = attrs.field(factory=AgentSettings)
    auth: AuthSettings = attrs.field(factory=AuthSettings)
    tenants: TenantSettings = attrs.field(factory=TenantSettings)
    limits: LimitSettings = attrs.field(factory=LimitSettings)
    sandbox: SandboxSettings = attrs.field(factory=SandboxSettings)
    tls: TlsSettings = attrs.field(factory=TlsSettings)
    log: LogSettings = attrs.field(factory=LogSettings)
