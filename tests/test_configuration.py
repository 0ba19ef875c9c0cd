from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.configuration import load, options, rows
from supervisor.errors import ConfigError
from supervisor.notation import parse_duration, show_duration
from supervisor.settings import Settings


@pytest.fixture
def configure(tmp_path):
    def configure(text="", environ=None, **overrides):
        file = tmp_path / "tenantry.toml"
        file.write_text(text)
        return load(file=file, environ=environ or {}, overrides=overrides)

    configure.file = tmp_path / "tenantry.toml"
    return configure


def faults(call):
    with pytest.raises(ConfigError) as caught:
        call()
    lines = str(caught.value).splitlines()
    return lines if len(lines) == 1 else [line.strip() for line in lines[1:]]


def test_without_anything_the_settings_are_the_defaults():
    loaded = load(file=None, environ={"HOME": "/root"})
    assert loaded.settings == Settings()
    assert set(loaded.sources.values()) == {"default"}


def test_a_file_sets_every_kind_of_value(configure):
    settings = configure("""
        bind = ["127.0.0.1:1", "unix:/run/t.sock", "fd://3"]
        connect_retry = ["500ms", 2, "3s"]
        sleep_after = "never"
        drain_grace = "1min"
        [agent]
        command = ["node", "agent.js"]
        grace = "7.5s"
        env = { LANG = "C.UTF-8" }
        [auth]
        enabled = false
        secret_file = "/etc/secret"
        [tenants]
        auto_create = false
        [limits]
        head_timeout = 3
        max_head = "32KiB"
        max_body = 4096
        [sandbox]
        cpu_time = "2h"
        [log]
        format = "json"
    """).settings
    assert settings.bind == ("127.0.0.1:1", "unix:/run/t.sock", "fd://3")
    assert settings.connect_retry_s == (0.5, 2.0, 3.0)
    assert settings.sleep_after_s is None
    assert settings.drain_grace_s == 60
    assert settings.agent.command == ("node", "agent.js")
    assert settings.agent.grace_s == 7.5
    assert settings.agent.env == {"LANG": "C.UTF-8"}
    assert settings.auth.enabled is False
    assert settings.auth.secret_file == Path("/etc/secret")
    assert settings.tenants.auto_create is False
    assert settings.limits.head_timeout_s == 3
    assert settings.limits.max_head_bytes == 32768
    assert settings.limits.max_body_bytes == 4096
    assert settings.sandbox.cpu_time_s == 7200
    assert settings.log.format == "json"


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(configure):
    loaded = configure(
        'bind = "127.0.0.1:1"\nstate_dir = "/file"\nconnect_timeout = "1s"\n',
        {"TENANTRY_BIND": "127.0.0.1:2", "TENANTRY_STATE_DIR": "/env"},
        bind="127.0.0.1:3",
    )
    assert loaded.settings.bind == ("127.0.0.1:3",)
    assert loaded.settings.state_dir == Path("/env")
    assert loaded.settings.connect_timeout_s == 1
    assert loaded.sources["bind"] == "option --bind"
    assert loaded.sources["state_dir"] == "env TENANTRY_STATE_DIR"
    assert loaded.sources["connect_timeout"] == f"file {configure.file}:connect_timeout"
    assert loaded.sources["agent.grace"] == "default"
    assert loaded.sources.keys() == {option.key for option in options()}


def test_every_setting_but_tables_has_a_variable(configure):
    values = {
        "TENANTRY_BIND": "127.0.0.1:1, unix:/x",
        "TENANTRY_CONNECT_RETRY": "1s,500ms",
        "TENANTRY_SLEEP_AFTER": "never",
        "TENANTRY_SLEEP_WITH_CONNECTIONS": "TRUE",
        "TENANTRY_AGENT_COMMAND": "node 'my agent.js' --x",
        "TENANTRY_AGENT_GRACE": "2",
        "TENANTRY_TENANTS_AUTO_CREATE": "auto",
        "TENANTRY_LIMITS_CONNECTIONS": "10",
        "TENANTRY_LIMITS_MAX_BODY": "1MiB",
        "TENANTRY_LOG_LEVEL": "debug",
    }
    settings = load(file=None, environ=values).settings
    assert settings.bind == ("127.0.0.1:1", "unix:/x")
    assert settings.connect_retry_s == (1, 0.5)
    assert settings.sleep_after_s is None
    assert settings.sleep_with_connections is True
    assert settings.agent.command == ("node", "my agent.js", "--x")
    assert settings.agent.grace_s == 2
    assert settings.tenants.auto_create is None
    assert settings.limits.connections == 10
    assert settings.limits.max_body_bytes == 1 << 20
    assert settings.log.level == "debug"
    assert [option.key for option in options() if option.variable is None] == ["agent.env"]


def test_the_variable_names_the_file_and_the_argument_wins(configure):
    configure.file.write_text("connect_timeout = 3")
    environ = {"TENANTRY_CONFIG": str(configure.file)}
    assert load(file=None, environ=environ).settings.connect_timeout_s == 3
    other = configure.file.with_name("other.toml")
    other.write_text("connect_timeout = 4")
    assert load(file=other, environ=environ).settings.connect_timeout_s == 4


def test_relative_paths_are_relative_to_the_file_and_only_there(configure):
    directory = configure.file.parent
    settings = configure('state_dir = "state"\nbind = ["unix:s.sock"]\n[auth]\nsecret_file = "/abs"').settings
    assert settings.state_dir == directory / "state"
    assert settings.bind == (f"unix:{directory}/s.sock",)
    assert settings.auth.secret_file == Path("/abs")
    assert configure("", {"TENANTRY_STATE_DIR": "state"}).settings.state_dir == Path("state")


def test_a_program_that_is_named_by_a_path_is_found_from_any_workspace(configure):
    directory = configure.file.parent
    settings = configure('[agent]\ncommand = [".venv/bin/python", "-m", "./x"]').settings
    assert settings.agent.command == (f"{directory}/.venv/bin/python", "-m", "./x")
    assert configure('[agent]\ncommand = "/bin/x ."').settings.agent.command == ("/bin/x", ".")
    in_environ = configure("", {"TENANTRY_AGENT_COMMAND": "bin/agent x"}).settings
    assert in_environ.agent.command == (str(Path.cwd() / "bin/agent"), "x")


def test_every_fault_is_told_at_once_with_its_place_its_value_and_what_is_expected(configure):
    told = faults(
        lambda: configure(
            'drain_grace = "5 parsecs"\n[limits]\nconnections = 0\nmax_head = "64KB"\n[log]\nlevel = "loud"\n',
            {"TENANTRY_AUTH_ENABLED": "maybe", "TENANTRY_SANDBOX_PROCESSES": "1.5"},
            start_timeout="soon",
        )
    )
    place = f"file {configure.file}"
    assert told == [
        f"{place}:drain_grace: '5 parsecs' is not a duration: a number of seconds, or such as "
        '"500ms", "10s", "10min", "2h"',
        f"{place}:limits.connections: must be > 0: 0",
        f"""{place}:limits.max_head: '64KB' is not a size: a number of bytes, or such as "64KiB", "1MiB\"""",
        f"{place}:log.level: 'loud' is not one of debug, info, warning, error",
        "env TENANTRY_AUTH_ENABLED: 'maybe' is not true or false",
        "env TENANTRY_SANDBOX_PROCESSES: '1.5' is not a whole number",
        "option --start-timeout: 'soon' is not a duration: a number of seconds, or such as "
        '"500ms", "10s", "10min", "2h"',
    ]


@pytest.mark.parametrize(
    ("text", "environ", "words"),
    [
        ("conect_retry = [1]", {}, "conect_retry: there is no such setting; the nearest is connect_retry"),
        ("connect_retry_s = [1]", {}, "the nearest is connect_retry"),
        ("[agent]\ngrase = 1", {}, "agent.grase: there is no such setting; the nearest is agent.grace"),
        ("[limits]\ngrace = 1", {}, "the nearest is agent.grace"),
        ("head_timeout = 1", {}, "the nearest is limits.head_timeout"),
        ("[aggent]\ngrace = 1", {}, "aggent: there is no such table; the nearest is agent"),
        ("[agnt]\ncommand = []", {}, "agnt: there is no such table; the nearest is agent"),
        ("zzzzqqqq = 1", {}, "zzzzqqqq: there is no such setting"),
        ("", {"TENANTRY_BIN": "x"}, "env TENANTRY_BIN: there is no such setting; the nearest is TENANTRY_BIND"),
        ("", {"TENANTRY_TOKENS": "x"}, "the nearest is TENANTRY_TOKEN"),
        ("", {"TENANTRY_PORT": "8000"}, "env TENANTRY_PORT: there is no such setting"),
        ("", {"TENANTRY_AGENT_ENV": "A=b"}, "env TENANTRY_AGENT_ENV: there is no such setting"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest_known_name(text, environ, words, configure):
    [told] = faults(lambda: configure(text, environ))
    assert words in told


def test_names_of_the_agents_contract_and_of_the_client_are_no_settings():
    names = ["TOKEN", "URL", "TENANT", "GENERATION", "WORKSPACE", "LISTEN", "LINK_FD"]
    assert load(file=None, environ={f"TENANTRY_{name}": "x" for name in names}).settings == Settings()
    assert not {f"TENANTRY_{name}" for name in names} & {option.variable for option in options()}


def test_what_kubernetes_says_of_a_service_called_tenantry_is_let_by():
    environ = {
        "TENANTRY_SERVICE_HOST": "10.0.0.1",
        "TENANTRY_SERVICE_PORT": "8000",
        "TENANTRY_SERVICE_PORT_HTTP": "8000",
        "TENANTRY_PORT": "tcp://10.0.0.1:8000",
        "TENANTRY_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "TENANTRY_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert load(file=None, environ=environ).settings == Settings()


def test_an_empty_variable_is_not_set():
    assert load(file=None, environ={"TENANTRY_BIND": "", "TENANTRY_WHAT": ""}).sources["bind"] == "default"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[agent]\ngrace = '8s'", "agent.grace (8s) and 2s for clients to answer do not fit into drain_grace (9s)"),
        ("bind = '0.0.0.0:8000'", "bind '0.0.0.0:8000' can be reached from other machines"),
        ("bind = '[::]:8000'", "can be reached from other machines"),
        ("bind = '192.0.2.1:1'\npublic_url = 'https://x'\n[auth]\nenabled = false", "auth.enabled = false"),
        ("public_url = 'x'", "public_url is 'x'"),
        ("allowed_hosts = ['a/b']", "allowed_hosts has 'a/b'"),
        ("trusted_proxies = ['300.1.1.1']", "300.1.1.1"),
        ("bind = '127.0.0.1'", "bind: '127.0.0.1' is neither"),
        ("bind = ['127.0.0.1:99999']", "is neither"),
        ("bind = ['::1:80']", "is neither"),
        ("bind = ['unix:']", "is neither"),
        ("bind = ['fd://x']", "is neither"),
        ("bind = []", "Length of bind must be >= 1"),
        ("[tls]\ncertificate = 'c.pem'", "tls.certificate and tls.key belong together"),
        ("[tls]\ncertificate = 'c.pem'\nkey = 'k.pem'", "c.pem"),
        ("[agent.env]\nTENANTRY_TENANT = 'x'", "agent.env.TENANTRY_TENANT"),
        ("[agent.env]\n'A=B' = 'x'", "'A=B' is no name"),
        ("[agent.env]\nKEY = 3", "agent.env: this is not a table of strings"),
        ("agent = 3", "agent: 3 is not a table; write [agent]"),
        ("[agent]\ncommand = []", "agent.command: [] is not a list of strings"),
        ('[agent]\ncommand = "a \'b"', "is not a list of strings"),
        ("connect_retry = [-1]", "connect_retry"),
        ("stable_after = -1", "stable_after: must be >= 0"),
        ("connect_timeout = inf", "connect_timeout: inf is not a duration"),
        ("connect_timeout = true", "connect_timeout: True is not a duration"),
        ("connect_timeout = 1979-05-27", "is not a duration"),
        ("sleep_with_connections = 1", "sleep_with_connections: 1 is not true or false"),
        ("[limits]\nconnections = true", "is not a whole number"),
        ("[sandbox]\ncpu_time = '1500ms'", "sandbox.cpu_time: '1500ms' is not a duration"),
        ("state_dir = ''", "state_dir: '' is not a path"),
        ("x", "is not TOML"),
    ],
)
def test_what_contradicts_itself_or_is_malformed_is_refused(text, words, configure):
    [told] = faults(lambda: configure(text))
    assert words in told


def test_values_of_the_agents_environment_are_in_no_error(configure):
    [told] = faults(lambda: configure("[agent.env]\nTENANTRY_X = 'hush'"))
    [other] = faults(lambda: configure("[agent.env]\nA = 'hush'\nB = 3"))
    assert "hush" not in told + other


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = ", None])
def test_a_file_that_cannot_be_read_is_told_by_its_name(content, tmp_path):
    file = tmp_path / "t.toml"
    if content is not None:
        file.write_bytes(content)
    [told] = faults(lambda: load(file=file, environ={}))
    assert str(file) in told


@pytest.mark.slow
def test_a_certificate_and_its_key_are_tried(configure):
    directory = configure.file.parent
    names = ["one", "two"]
    for name in names:
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost "
            f"-keyout {name}.key -out {name}.pem".split(),
            cwd=directory,
            check=True,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    assert configure("[tls]\ncertificate = 'one.pem'\nkey = 'one.key'").settings.tls.key == directory / "one.key"
    [told] = faults(lambda: configure("[tls]\ncertificate = 'one.pem'\nkey = 'two.key'"))
    assert "belong together" in told


# ---- what is shown can be set --------------------------------------------------------------------------------


def as_toml(shown):
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value, _ in shown if value not in (None, {}))


def test_what_is_shown_is_a_file_that_gives_the_same_settings(configure):
    first = configure(
        "state_dir = '/var/lib/t'\nsleep_after = 'never'\nconnect_retry = ['1500ms']\nbind = 'unix:/x'\n"
        "[limits]\nmax_body = 1000\n[tenants]\nauto_create = true\n[sandbox]\ncpu_time = 90"
    )
    again = configure(as_toml(rows(first)))
    assert again.settings == first.settings


def test_values_of_the_agents_environment_are_not_shown(configure):
    shown = {key: value for key, value, _ in rows(configure("[agent.env]\nKEY = 'hush'"))}
    assert shown["agent.env"] == {"KEY": "(not shown)"}


@given(st.integers(min_value=0, max_value=10**12))
def test_a_duration_that_is_shown_reads_as_itself(milliseconds):
    assert parse_duration(show_duration(milliseconds / 1000)) == milliseconds / 1000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("100ms", 0.1), ("10s", 10), ("1.5s", 1.5), ("10min", 600), ("10m", 600), ("2h", 7200), ("7", 7)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "value", ["", "s", "-1s", "1 s s", "1e3s", "\u0661s", "1s\n", "inf", math.nan, None, True, [1]]
)
def test_what_is_no_duration(value):
    with pytest.raises((ValueError, TypeError)):
        parse_duration(value)


# ---- the reference -------------------------------------------------------------------------------------------

REFERENCE = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_the_reference_tells_every_setting_with_its_variable_and_default():
    """docs/configuration.md is true: each row is one setting of `settings.py`, in its order."""
    told = re.findall(r"^\| `([^`]+)` \| (?:`(TENANTRY_\w+)`|-) \| (?:`([^|]+)`|(-)) \|", REFERENCE.read_text(), re.M)
    shown = {key: value for key, value, _ in rows(load(file=None, environ={}))}
    shown["agent.command"] = ["python", "-I", "-m", "agent"]

    def written(value):
        return json.dumps(value) if value is not None else ""

    assert [(key, variable, default) for key, variable, default, _ in told] == [
        (option.key, option.variable or "", written(shown[option.key])) for option in options()
    ]


def test_every_class_of_settings_is_reached():
    reached = {option.field for option in options()}
    nested = [getattr(Settings(), field.name) for field in attrs.fields(Settings)]
    own = [field for field in attrs.fields(Settings) if not attrs.has(type(getattr(Settings(), field.name)))]
    inner = [field for value in nested if attrs.has(type(value)) for field in attrs.fields(type(value))]
    assert reached == {*own, *inner}
