"""The verbs that need no server, and the exit statuses, through `main` as the console script calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from supervisor.cli import main
from supervisor.cli.announcement import announce, announce_server
from supervisor.configuration import load
from supervisor.errors import StoreError
from supervisor.gateway.auth import Authenticator, load_or_create_secret
from supervisor.settings import Settings


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("TENANTRY_CONFIG", "TENANTRY_URL", "TENANTRY_TOKEN", "TENANTRY_STATE_DIR", "TENANTRY_BIND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capsys):
    def run(*argv, control=None):
        status = main(list(argv), control=control)
        told = capsys.readouterr()
        return SimpleNamespace(status=status, out=told.out, err=told.err)

    return run


# ---- exit statuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["--help"], ["-h"], ["serve", "--help"], ["token", "create", "-h"], ["exec", "-h"], ["--version"]]
)
def test_help_is_no_error(argv, run):
    ran = run(*argv)
    assert ran.status == 0
    assert ran.out
    assert not ran.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Usage:"),
        (["nope"], "No such command 'nope'"),
        (["serve", "--nope"], "No such option"),
        (["serve", "extra"], "unexpected extra argument"),
        (["exec", "demo"], "Missing argument"),
        (["exec", "demo", "--"], "what is to be run?"),
        (["exec", "demo", "--cwd", "x", "--", "ls"], "'--cwd' is taken for a program: options of ours stand in front"),
        (["exec", "--nope", "demo", "ls"], "No such option"),
        (["token", "create"], "name a TENANT, or give --admin"),
        (["token", "create", "demo", "--admin"], "name a TENANT, or give --admin"),
        (["token", "create", "demo", "--ttl", "soon"], "'soon' is not a duration"),
        (["token", "create", "demo", "--ttl", "0"], "time to live"),
        (["token", "create", "demo", "--scope", "root"], "connect, execute"),
        (["token", "create", "Demo"], "a tenant's name"),
        (["attach", "--path", "x", "demo"], "--raw"),
    ],
)
def test_wrong_use_is_64_with_what_is_wrong(argv, words, run):
    ran = run(*argv)
    assert ran.status == 64
    assert words in ran.err
    assert not ran.out


@pytest.mark.parametrize("verb", ["serve", "check", "tenants", "drain"])
def test_wrong_settings_are_78_with_every_fault(verb, run, tmp_path):
    (tmp_path / "t.toml").write_text("conect_retry = []\n[agent]\ngrace = 'x'\n")
    ran = run(verb, "--config", "t.toml")
    assert ran.status == 78
    assert "the nearest is connect_retry" in ran.err
    assert "agent.grace" in ran.err


def test_a_configuration_file_that_is_missing_is_78(run):
    ran = run("check", "--config", "none.toml")
    assert ran.status == 78
    assert "none.toml cannot be read" in ran.err


def test_an_interrupt_is_130(run, monkeypatch):
    monkeypatch.setattr("supervisor.configuration.load", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("check").status == 130


def test_help_imports_nothing_heavy():
    """`tenantry --help` must not wait for Trio."""
    program = (
        "import sys\nfrom supervisor.cli import main\nstatus = main(['exec', '--help'])\n"
        "heavy = {'trio', 'quart', 'sqlalchemy', 'jwt', 'http.client'} & set(sys.modules)\n"
        "print(status, *heavy, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert ran.stderr == "0\n"


# ---- serve ----------------------------------------------------------------------------------------------------


def test_serve_runs_with_the_settings_and_returns_the_status(run, monkeypatch):
    seen = {}

    def run_server(settings, *, control, announce):
        seen.update(settings=settings, control=control)
        return 70

    monkeypatch.setattr("supervisor.server.run_server", run_server)
    control = object()
    ran = run("serve", "--bind", "127.0.0.1:1", "--bind", "unix:/x", "--state-dir", "s", "--init", control=control)
    assert ran.status == 70
    assert seen["settings"].bind == ("127.0.0.1:1", "unix:/x")
    assert str(seen["settings"].state_dir) == "s"
    assert seen["control"] is control


def test_an_error_of_the_library_is_told_in_its_words(run, monkeypatch):
    def run_server(*args, **kwargs):
        raise StoreError("the disk is full: make room")

    monkeypatch.setattr("supervisor.server.run_server", run_server)
    ran = run("serve")
    assert (ran.status, ran.err) == (69, "tenantry: the disk is full: make room\n")


def test_the_announcement_has_the_token_in_the_fragment_and_a_line_to_paste(capsys):
    announce(["unix:/run/t.sock", "http://127.0.0.1:8000"], "a.b-c_d")
    told = capsys.readouterr().out
    assert "http://127.0.0.1:8000/#token=a.b-c_d\n" in told
    assert "TENANTRY_URL=http://127.0.0.1:8000 TENANTRY_TOKEN=a.b-c_d " in told
    assert told.endswith("attach demo\n")
    announce(["unix:/run/my t.sock"], None)
    told = capsys.readouterr().out
    assert "TENANTRY_URL='unix:/run/my t.sock' " in told
    assert "token" not in told.lower()


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        (Settings(), True),
        (Settings(bind=("0.0.0.0:8000",), public_url="https://agents.example.org"), False),
    ],
)
def test_a_token_is_not_written_to_the_log_of_a_server_that_others_reach(settings, shown, capsys, tmp_path):
    secret = load_or_create_secret(tmp_path, settings)
    authenticator = Authenticator(secret, settings=settings, addresses=settings.bind)
    supervisor = SimpleNamespace(settings=settings, authenticator=authenticator)
    announce_server(SimpleNamespace(addresses=["http://127.0.0.1:8000"], supervisor=supervisor))
    told = capsys.readouterr().out
    assert ("#token=" in told) is shown
    assert ("TENANTRY_TOKEN" in told) is shown
    if shown:
        token = told.split("#token=")[1].split()[0]
        assert authenticator.verify(token).scopes == {"admin"}


def test_a_closed_stdout_is_no_reason_not_to_serve(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    announce(["http://127.0.0.1:8000"], None)


def test_the_announcement_is_one_write_since_the_log_goes_to_the_same_terminal(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    announce(["http://127.0.0.1:8000"], None)
    assert len(written) == 1
    assert written[0].endswith("attach demo\n")


@pytest.mark.slow
@pytest.mark.parametrize("verb", [["--help"], ["config", "show"], ["check"]])
def test_a_full_disk_below_stdout_is_told_and_is_74(verb):
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "supervisor", *verb], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (ran.returncode, ran.stderr) == (74, "tenantry: the output cannot be written: No space left on device\n")


# ---- check and config show ------------------------------------------------------------------------------------


def test_check_tells_that_the_settings_are_right(run):
    ran = run("check")
    assert (ran.status, ran.out) == (0, "The settings are right.\n")


def test_config_show_tells_every_value_with_its_source_and_is_a_file_itself(run, tmp_path, monkeypatch):
    (tmp_path / "t.toml").write_text("sleep_after = 'never'\nstate_dir = '/s'\n[agent]\ncommand = 'node x'\n")
    monkeypatch.setenv("TENANTRY_CONNECT_TIMEOUT", "3")
    ran = run("config", "show", "--config", "t.toml", "--bind", "127.0.0.1:5")
    assert ran.status == 0
    lines = {line.split(" = ")[0]: line for line in ran.out.splitlines()}
    assert lines["bind"].endswith("# option --bind")
    assert lines["sleep_after"].endswith("# file t.toml:sleep_after")
    assert lines["connect_timeout"].startswith('connect_timeout = "3s" ')
    assert lines["connect_timeout"].endswith("# env TENANTRY_CONNECT_TIMEOUT")
    assert lines["drain_grace"].endswith("# default")
    assert "# public_url is not set" in ran.out
    (tmp_path / "again.toml").write_text(ran.out)
    again = load(file=tmp_path / "again.toml", environ={}).settings
    assert again.bind == ("127.0.0.1:5",)
    assert again.sleep_after_s is None
    assert again.agent.command == ("node", "x")


def test_config_show_keeps_secrets(run, tmp_path):
    (tmp_path / "t.toml").write_text("[agent.env]\nAPI_KEY = 'hush'\n")
    ran = run("config", "show", "--config", "t.toml")
    assert "API_KEY" in ran.out
    assert "hush" not in ran.out


# ---- token create ---------------------------------------------------------------------------------------------


def verified(token, tmp_path):
    settings = Settings(state_dir=tmp_path / "s")
    secret = load_or_create_secret(settings.state_dir, settings)
    return Authenticator(secret, settings=settings, addresses=()).verify(token)


def test_token_create_prints_the_token_alone(run, tmp_path):
    ran = run("token", "create", "demo", "--state-dir", "s")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.count("\n") == 1
    principal = verified(ran.out.strip(), tmp_path)
    assert (principal.tenant, principal.scopes, principal.subject) == ("demo", {"connect"}, "cli")
    assert principal.expires_at - principal.issued_at == pytest.approx(3600)


def test_token_create_takes_scopes_a_time_to_live_and_a_subject(run, tmp_path):
    argv = [
        "token",
        "create",
        "demo",
        "--scope",
        "connect",
        "--scope",
        "execute,admin",
        "--ttl",
        "2h",
        "--subject",
        "ci",
    ]
    principal = verified(run(*argv, "--state-dir", "s").out.strip(), tmp_path)
    assert principal.scopes == {"connect", "execute", "admin"}
    assert principal.expires_at - principal.issued_at == pytest.approx(7200)
    assert principal.subject == "ci"
    never = verified(run("token", "create", "demo", "--ttl", "never", "--state-dir", "s").out.strip(), tmp_path)
    assert never.expires_at is None


def test_an_admins_token_is_for_every_tenant(run, tmp_path):
    principal = verified(run("token", "create", "--admin", "--state-dir", "s").out.strip(), tmp_path)
    assert (principal.tenant, principal.scopes) == (None, {"admin"})


def test_a_secret_that_others_can_read_signs_nothing(run, tmp_path):
    assert run("token", "create", "demo", "--state-dir", "s").status == 0
    (tmp_path / "s" / "secret").chmod(0o644)
    ran = run("token", "create", "demo", "--state-dir", "s")
    assert ran.status == 78
    assert "chmod 600" in ran.err
    assert not ran.out


# ---- where the server is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words", "status"),
    [
        (["--url", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1: Connection refused", 69),
        (["--url", "unix:/none.sock"], "no answer from unix:/none.sock", 69),
        (["--url", "ftp://x"], "'ftp://x' is not the address of a server", 78),
        (["--url", "http://u:p@x"], "is not the address", 78),
        (["--url", "http://x:port"], "is not the address", 78),
        (["--url", "http://x/path"], "is not the address", 78),
    ],
)
def test_a_server_that_is_not_there_is_told_with_what_to_do(argv, words, status, run):
    for verb in (["tenants"], ["drain"]):
        ran = run(*verb, *argv)
        assert (ran.status, ran.out) == (status, "")
        assert words in ran.err
        assert ran.err.startswith("tenantry: ")
    for verb in ("exec", "attach"):
        ran = run(verb, *argv, "demo", "true")
        assert ran.status == status
        assert words.removesuffix(": Connection refused") in ran.err
        assert "Errno" not in ran.err


def test_an_inherited_socket_alone_does_not_tell_where_the_server_is(run, monkeypatch):
    monkeypatch.setenv("TENANTRY_BIND", "fd://3")
    ran = run("tenants")
    assert ran.status == 78
    assert "--url or TENANTRY_URL" in ran.err


def test_output_of_json_is_json(run, monkeypatch):
    tenants = [
        {"name": "a", "state": "running", "since": "now", "generation": 1, "connections": 2, "why_awake": ["x", "y"]}
    ]
    monkeypatch.setattr("supervisor.cli.server.list_tenants", lambda server: tenants)
    assert json.loads(run("tenants", "--json").out) == tenants
    assert run("tenants").out.splitlines() == [
        "TENANT  STATE    SINCE  GENERATION  CONNECTIONS  WHY AWAKE",
        "a       running  now    1           2            x, y",
    ]
