"""The verbs and their options. Each imports what it needs when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from supervisor.cli.server import Server
    from supervisor.configuration import Configuration

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
# What follows the tenant belongs to the command, its options included.
_COMMAND_CONTEXT = {**_CONTEXT, "allow_interspersed_args": False}


class _Duration(click.ParamType):  # type: ignore[type-arg]
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        from supervisor.notation import parse_duration

        if value is None or isinstance(value, float) or value == "never":
            return None if value == "never" else value
        try:
            return parse_duration(value)
        except (ValueError, TypeError):
            self.fail(f'{value!r} is not a duration such as "90s", "10min", "2h", "30d", or "never"', param, ctx)


def _without_dashes(_context: click.Context, _parameter: click.Parameter, argv: tuple[str, ...]) -> tuple[str, ...]:
    if argv[:1] == ("--",):
        argv = argv[1:]
    elif argv and argv[0].startswith("-"):
        raise click.UsageError(f"{argv[0]!r} is taken for a program: options of ours stand in front of the tenant")
    if not argv and _parameter.required:
        raise click.UsageError("what is to be run? Name a program after the tenant: `tenantry exec TENANT -- argv`")
    return argv


def _with_settings(*, bind: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options that settings are made of; the verb takes them as `overrides`, keys of the file."""

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, config: Path | None, **given: Any) -> Any:
            overrides = {key: given.pop(key) for key in ("bind", "state_dir") if key in given}
            overrides = {key: value for key, value in overrides.items() if value}
            return verb(*args, config=config, overrides=overrides, **given)

        run.__doc__, run.__name__ = verb.__doc__, verb.__name__
        run.__click_params__ = getattr(verb, "__click_params__", [])  # type: ignore[attr-defined]
        if bind:
            run = click.option(
                "--bind", multiple=True, metavar="ADDRESS", help='"host:port", "unix:/path" or "fd://3"; repeatable.'
            )(run)
        run = click.option("--state-dir", type=Path, metavar="DIR", help="Where the store and the secret are.")(run)
        return click.option("--config", type=Path, metavar="FILE", help="The TOML file. [env: TENANTRY_CONFIG]")(run)

    return decorate


def _with_server(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options by which a running server is found; the verb takes it as `server`."""

    def run(*args: Any, config: Path | None, overrides: Mapping[str, Any], url: str, token: str, **given: Any) -> Any:
        from supervisor.cli.server import find_server

        server = find_server(_load(config, overrides).settings, url=url, token=token)
        return verb(*args, server=server, **given)

    run.__doc__, run.__name__ = verb.__doc__, verb.__name__
    run.__click_params__ = getattr(verb, "__click_params__", [])  # type: ignore[attr-defined]
    told = "A token of the server. [env: TENANTRY_TOKEN; else made with the secret of the state directory]"
    run = click.option("--token", envvar="TENANTRY_TOKEN", metavar="TOKEN", help=told)(run)
    told = (
        'The server: "http://host:port", "https://host" or "unix:/path". [env: TENANTRY_URL; else the setting `bind`]'
    )
    run = click.option("--url", envvar="TENANTRY_URL", metavar="URL", help=told)(run)
    return _with_settings(bind=False)(run)


def _load(config: Path | None, overrides: Mapping[str, Any]) -> Configuration:
    from supervisor.configuration import load

    return load(file=config, environ=os.environ, overrides=overrides)


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="tenantry")
def tenantry() -> None:
    """Every tenant gets an agent process of its own, in a sandbox, behind one address."""


@tenantry.command(context_settings=_CONTEXT)
@_with_settings(bind=True)
@click.option("--init", is_flag=True, help="Be the init: reap orphans, forward signals. As PID 1 it is always so.")
@click.pass_obj
def serve(control: socket.socket | None, config: Path | None, overrides: Mapping[str, Any], init: bool) -> int:
    """Run the supervisor.

    SIGTERM, SIGINT or SIGHUP drains it, and it exits with 0. A second signal cuts the agents' grace short, a
    third forces the end. Exit status 70 if the drain is not done in time, 78 if the settings are wrong.
    """
    del init  # Taken by `__main__`, before anything was imported.
    settings = _load(config, overrides).settings
    from supervisor.cli.announcement import announce_server
    from supervisor.server import run_server

    return run_server(settings, control=control, announce=announce_server)


@tenantry.command(context_settings=_CONTEXT)
@_with_settings(bind=True)
def check(config: Path | None, overrides: Mapping[str, Any]) -> None:
    """Tell whether the settings are right.

    Exit status 78 and every fault if they are not. Nothing is started.
    """
    _load(config, overrides)
    click.echo("The settings are right.")


@tenantry.group(context_settings=_CONTEXT)
def config() -> None:
    """The settings."""


@config.command(context_settings=_CONTEXT)
@_with_settings(bind=True)
def show(config: Path | None, overrides: Mapping[str, Any]) -> None:
    """Show every value, and where it came from.

    As a TOML file that gives the same settings, but for the values of `agent.env`.
    """
    import json

    from supervisor.configuration import rows

    for key, value, source in rows(_load(config, overrides)):
        if value is None:
            line = f"# {key} is not set"
        elif isinstance(value, dict):
            line = (
                f"{key} = {{ {', '.join(f'{json.dumps(name)} = {json.dumps(text)}' for name, text in value.items())} }}"
            )
        else:
            line = f"{key} = {json.dumps(value, ensure_ascii=False)}"
        click.echo(f"{line:<48}  # {source}")


@tenantry.group(context_settings=_CONTEXT)
def token() -> None:
    """Tokens."""


@token.command(context_settings=_CONTEXT)
@click.argument("tenant", required=False)
@click.option("--admin", is_flag=True, help="For every tenant, with all rights, instead of for TENANT.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    metavar="SCOPE",
    help="connect, execute or admin; repeatable. [default: connect]",
)
@click.option(
    "--ttl", type=_Duration(), default="1h", help='How long it is valid: "10min", "30d", "never".', show_default=True
)
@click.option("--subject", default="cli", metavar="NAME", help="Who it is for; agents are told. [default: cli]")
@_with_settings(bind=False)
def create(
    tenant: str | None,
    config: Path | None,
    overrides: Mapping[str, Any],
    admin: bool,
    scopes: tuple[str, ...],
    ttl: float | None,
    subject: str,
) -> None:
    """Print a token, and nothing else.

    It is signed with the secret of the state directory, which is made if there is none. No server need run.
    """
    from supervisor.cli.server import make_token
    from supervisor.errors import Refused

    if admin == (tenant is not None):
        raise click.UsageError("name a TENANT, or give --admin for a token for every tenant")
    settings = _load(config, overrides).settings
    # One word with commas is as good as several options.
    asked = [word for scope in scopes for word in scope.split(",")] or ["admin" if admin else "connect"]
    try:
        made = make_token(settings, tenant=tenant, scopes=asked, ttl_s=ttl, subject=subject)
    except Refused as error:
        raise click.UsageError(str(error)) from error
    click.echo(made)


@tenantry.command(context_settings=_CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="A JSON array, as the API describes tenants.")
@_with_server
def tenants(server: Server, as_json: bool) -> None:
    """List the tenants. Wakes none."""
    import json

    from supervisor.cli.server import list_tenants

    found = list_tenants(server)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table: list[tuple[str, ...]] = [("TENANT", "STATE", "SINCE", "GENERATION", "CONNECTIONS", "WHY AWAKE")]
    for tenant in found:
        why = ", ".join(tenant.get("why_awake") or [])
        table.append((*(str(tenant.get(k, "")) for k in ("name", "state", "since", "generation", "connections")), why))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        click.echo("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


@tenantry.command(context_settings=_COMMAND_CONTEXT)
@click.argument("tenant")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, callback=_without_dashes)
@click.option("--raw", is_flag=True, help="No JSON-RPC: send each line as a message, print each message as a line.")
@click.option("--path", default="", help="The path at the agent, for --raw.", metavar="PATH")
@_with_server
def attach(tenant: str, argv: tuple[str, ...], server: Server, raw: bool, path: str) -> int:
    """Open a shell, or ARGV, for TENANT.

    The agent is started if it sleeps. With a terminal if stdin is one (Ctrl-] leaves), else stdin is the
    shell's as it stands. The exit status is that of the shell.
    """
    from supervisor.cli import session

    if raw:
        return session.run(session.talk, server, tenant, path)
    if path:
        raise click.UsageError("--path is for --raw: the bundled agent runs processes at / alone")
    return session.run(session.attach, server, tenant, argv)


@tenantry.command("exec", context_settings=_COMMAND_CONTEXT)
@click.argument("tenant")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, required=True, callback=_without_dashes)
@click.option("--cwd", default=".", metavar="DIR", help="Where in the workspace it runs.")
@_with_server
def execute(tenant: str, argv: tuple[str, ...], server: Server, cwd: str) -> int:
    """Run ARGV for TENANT.

    Stdin, stdout, stderr, signals and exit status are passed on. The agent is started if it sleeps. If this
    client goes, the command is ended.
    """
    from supervisor.cli import session

    return session.run(session.execute, server, tenant, argv, cwd)


@tenantry.command(context_settings=_CONTEXT)
@_with_server
def drain(server: Server) -> None:
    """Have the server drain and exit.

    As SIGTERM does; again, to cut the agents' grace short.
    """
    server.request("POST", "/v1/drain", {})
    click.echo(f"{server} drains, and exits when it is done.")
