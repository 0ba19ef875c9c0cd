"""Builds the settings from a TOML file, the environment and the command line, in this order of strength.

Pure but for reading the file. Every value knows where it came from; what is unknown or wrong is told all at
once, each with its place, its value and what is expected. The options are read off the settings' classes, so
a new setting has its key, its variable and its check without a line here.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from supervisor.errors import ConfigError
from supervisor.notation import Kind, kind_of, show_duration
from supervisor.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_DASHES: Final = str.maketrans("._", "--")

# Of the agent's contract and of the client verbs: known, and no settings.
_OTHER_VARIABLES: Final = frozenset(
    f"TENANTRY_{name}"
    for name in ("CONFIG", "INIT", "TOKEN", "URL", "TENANT", "GENERATION", "WORKSPACE", "LISTEN", "LINK_FD")
)
# Kubernetes gives these to every pod beside a Service that is called "tenantry".
_OF_KUBERNETES: Final = re.compile(r"TENANTRY_(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)")


@attrs.frozen(kw_only=True)
class Option:
    """One setting: `agent.grace` in the file, TENANTRY_AGENT_GRACE in the environment, `agent.grace_s` in Settings."""

    key: str
    # None for a table, which one variable cannot hold.
    variable: str | None
    section: str
    field: attrs.Attribute[Any]
    kind: Kind
    default: object


@attrs.frozen
class Configuration:
    """Settings, and for each key where its value came from: "default", "file /path:key", "env NAME", "option --x"."""

    settings: Settings
    sources: Mapping[str, str]


def load(
    *, file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Configuration:
    """The settings of `overrides` over `environ` over the file over the defaults; `overrides` has keys of the file.

    Without `file` the one that TENANTRY_CONFIG names is read, if it names one. An empty variable counts as not
    set. Relative paths in the file are relative to its directory. Raises ConfigError with every fault.
    """
    faults: list[str] = []
    file = file or (Path(environ["TENANTRY_CONFIG"]) if environ.get("TENANTRY_CONFIG") else None)
    found: dict[str, tuple[str, Any]] = {}
    if file is not None:
        for key, source, value in _read(_from_file(file, faults), faults):
            found[key] = source, _from_directory(value, key, file.parent)
    given = [(key, f"option --{key.translate(_DASHES)}", value) for key, value in (overrides or {}).items()]
    for key, source, value in _read([*_from_environment(environ, faults), *given], faults):
        found[key] = source, _program_from(value, Path()) if key == "agent.command" else value
    settings = None if faults else _build({key: value for key, (_, value) in found.items()}, faults)
    if settings is not None:
        faults += _contradictions(settings)
    if settings is None or faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(faults[0] if len(faults) == 1 else f"{len(faults)} faults:{listed}")
    return Configuration(settings, {option.key: found.get(option.key, ("default",))[0] for option in options()})


@functools.cache
def options() -> tuple[Option, ...]:
    """Every option, in the order of the settings' classes."""
    return tuple(_options_of(Settings, ""))


def rows(configuration: Configuration) -> Iterator[tuple[str, object, str]]:
    """Every key with its value as the file has it and its source; None where the value is "not set".

    The values of `agent.env` may be secrets: they are not shown.
    """
    for option in options():
        owner = getattr(configuration.settings, option.section) if option.section else configuration.settings
        value = getattr(owner, option.field.name)
        if isinstance(value, dict):
            value = dict.fromkeys(value, "(not shown)")
        yield option.key, option.kind.show(value), configuration.sources[option.key]


def _read(items: Iterable[tuple[str, str, Any]], faults: list[str]) -> Iterator[tuple[str, str, Any]]:
    for key, source, value in items:
        option = _options_by_key().get(key)
        if option is None:
            faults.append(f"{source}: there is no such setting{_nearest(key, _options_by_key())}")
            continue
        try:
            parsed = option.kind.parse(value)
        except (ValueError, TypeError):
            shown = repr(value)[:200] if option.variable else "this"
            faults.append(f"{source}: {shown} is not {option.kind.expected}")
            continue
        try:
            if option.field.validator is not None:
                option.field.validator(None, option.field, parsed)
        except (ValueError, TypeError) as error:
            told = str(error).removeprefix(f"'{option.field.name}' ").replace(f"'{option.field.name}'", key)
            faults.append(f"{source}: {told}")
            continue
        yield key, source, parsed


# ---- where values come from ---------------------------------------------------------------------------------


def _from_file(file: Path, faults: list[str]) -> Iterator[tuple[str, str, object]]:
    try:
        with open(file, "rb") as opened:
            content = tomllib.load(opened)
    except OSError as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {file} is not TOML: {error}") from error
    sections = {option.section for option in options()} - {""}
    for name, value in content.items():
        if name in sections and not isinstance(value, dict):
            faults.append(f"file {file}:{name}: {value!r} is not a table; write [{name}] and its keys below it")
        elif name not in sections and isinstance(value, dict) and name not in _options_by_key():
            faults.append(f"file {file}:{name}: there is no such table{_nearest(name, sorted(sections))}")
        elif name not in sections:
            yield name, f"file {file}:{name}", value
        else:
            for key, inner in value.items():
                yield f"{name}.{key}", f"file {file}:{name}.{key}", inner


def _from_environment(environ: Mapping[str, str], faults: list[str]) -> Iterator[tuple[str, str, object]]:
    by_variable = {option.variable: option for option in options() if option.variable}
    for name, text in environ.items():
        if not name.startswith("TENANTRY_") or not text or name in _OTHER_VARIABLES or _of_kubernetes(name, text):
            continue
        option = by_variable.get(name)
        if option is None:
            faults.append(f"env {name}: there is no such setting{_nearest(name, [*by_variable, *_OTHER_VARIABLES])}")
            continue
        try:
            yield option.key, f"env {name}", option.kind.split(text)
        except ValueError:
            faults.append(f"env {name}: {text!r} is not {option.kind.expected}")


def _of_kubernetes(name: str, text: str) -> bool:
    return bool(_OF_KUBERNETES.fullmatch(name)) or (name == "TENANTRY_PORT" and "://" in text)


def _nearest(unknown: str, known: Iterable[str]) -> str:
    # By the whole key, or by its last part where the section is the wrong one.
    known = list(known)
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.7)
    near = near or [key for key in known if key.rpartition(".")[2] == unknown.rpartition(".")[2]][:1]
    near = near or difflib.get_close_matches(unknown, known, n=1, cutoff=0.4)
    return f"; the nearest is {near[0]}" if near else ""


def _from_directory(value: Any, key: str, directory: Path) -> Any:
    if isinstance(value, Path):
        return directory / value
    if key == "agent.command":
        return _program_from(value, directory)
    if key == "bind":
        return tuple(_unix_from_directory(bind, directory) for bind in value)
    return value


def _program_from(command: tuple[str, ...], directory: Path) -> tuple[str, ...]:
    # As a shell has it: with a slash it is a path. It is run in a tenant's workspace, so no relative one can stay.
    program, *arguments = command
    return (str((directory / program).absolute()) if "/" in program else program, *arguments)


def _unix_from_directory(bind: str, directory: Path) -> str:
    path = bind.removeprefix("unix:")
    return f"unix:{directory / path}" if bind.startswith("unix:") and path else bind


# ---- the whole ----------------------------------------------------------------------------------------------


def _build(values: Mapping[str, object], faults: list[str]) -> Settings | None:
    sections: dict[str, dict[str, object]] = {}
    for option in options():
        if option.key in values:
            sections.setdefault(option.section, {})[option.field.name] = values[option.key]
    built: dict[str, object] = {}
    for name, fields in sections.items():
        if name:
            try:
                built[name] = type(getattr(Settings(), name))(**fields)
            except (ValueError, TypeError) as error:
                faults.append(str(error))
    return None if faults else Settings(**sections.get("", {}), **built)  # type: ignore[arg-type]


def _contradictions(settings: Settings) -> Iterator[str]:
    """What no single setting shows."""
    from supervisor.drain import LINGER_S
    from supervisor.gateway.heads import trusted_networks
    from supervisor.gateway.hosts import host_check

    syntax = [fault for bind in settings.bind if (fault := _bind_fault(bind))]
    yield from syntax
    checks: list[Callable[[], object]] = [lambda: trusted_networks(settings.trusted_proxies)]
    if not syntax:
        # Of an inherited socket only the start knows the address.
        checks.append(lambda: host_check(settings, [bind for bind in settings.bind if not bind.startswith("fd://")]))
    if settings.tls.certificate is not None:
        from supervisor.gateway.listeners import tls_context

        checks.append(lambda: tls_context(settings.tls))
    for check in checks:
        try:
            check()
        except (ConfigError, ValueError) as error:
            yield str(error)
    if settings.agent.grace_s + LINGER_S > settings.drain_grace_s:
        yield (
            f"agent.grace ({show_duration(settings.agent.grace_s)}) and {LINGER_S:g}s for clients to answer do "
            f"not fit into drain_grace ({show_duration(settings.drain_grace_s)}): make drain_grace longer, or "
            "agent.grace shorter"
        )
    for name, value in settings.agent.env.items():
        if not name or "=" in name or "\0" in name + value:
            yield f"agent.env: {name!r} is no name of an environment variable, or its value holds a NUL"
        elif name.startswith(("TENANTRY_", "LISTEN_")):
            yield f"agent.env.{name}: the contract with agents keeps the names TENANTRY_* and LISTEN_* for itself"


def _bind_fault(bind: str) -> str:
    host, _, port = bind.rpartition(":")
    if bind.startswith("unix:"):
        good = len(bind) > len("unix:")
    elif bind.startswith("fd://"):
        good = bind.removeprefix("fd://").isdecimal()
    else:
        good = port.isascii() and port.isdecimal() and int(port) < 65536 and (":" not in host or host[:1] == "[")
    return "" if good else f'bind: {bind!r} is neither "host:port", "unix:/path" nor "fd://3"'


# ---- the options ----------------------------------------------------------------------------------------


@functools.cache
def _options_by_key() -> dict[str, Option]:
    return {option.key: option for option in options()}


def _options_of(cls: type, section: str) -> Iterator[Option]:
    hints = typing.get_type_hints(cls)
    for field in attrs.fields(cls):
        hint = hints[field.name]
        if attrs.has(hint):
            yield from _options_of(hint, field.name)
            continue
        name = field.name.removesuffix("_s").removesuffix("_bytes")
        key = f"{section}.{name}" if section else name
        default = field.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        yield Option(
            key=key,
            variable=None if typing.get_origin(hint) is dict else f"TENANTRY_{key.replace('.', '_').upper()}",
            section=section,
            field=field,
            kind=kind_of(key, field.name, hint),
            default=default,
        )
