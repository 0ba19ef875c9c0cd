"""The programs that are compared: an echo agent, reached directly, through Tenantry, and through three proxies.

All get the same agent program on the same kind of socket (a unix one), and listen for TCP on loopback. Each is one
process with one thread for its traffic. A proxy that is not on this machine is left out, and the table says why.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import attrs
import trio

from benchmarks.processes import Failed, children, cpu_s, read_lines, running

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benchmarks" / ".cache"
START_S = 60.0
TENANT = "bench"
CHP_VERSION = "5.3.0"
# Debian puts servers where an ordinary user's PATH does not look.
PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"

AGENTS = {
    "fast": [sys.executable, "-I", str(ROOT / "fixtures" / "fast_echo.py")],
    "bundled": [sys.executable, "-I", "-m", "agent"],
}

NGINX = """
daemon off; worker_processes 1; {user} pid {dir}/nginx.pid; error_log {dir}/nginx.log;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://unix:{agent}; proxy_http_version 1.1; proxy_read_timeout 1h;
      proxy_set_header Host $http_host; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";
    }}
  }}
}}
"""
HAPROXY = """
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  timeout tunnel 1h
frontend bench
  bind 127.0.0.1:{port} backlog 4096
  default_backend agent
backend agent
  server agent unix@{agent}
"""


@attrs.frozen
class Contestant:
    """A way to an echo: `target` is what the client takes."""

    name: str
    pid: int
    address: str
    path: str
    headers: dict[str, str] = attrs.field(factory=dict)

    @property
    def target(self):
        return [self.address, self.path, self.headers]

    def cpu_s(self):
        """Processor time so far of what is in the way; of the agent, if nothing is. nginx works in a child."""
        workers = children(self.pid) if self.name == "nginx" else []
        return sum(map(cpu_s, [self.pid, *workers]))


@attrs.define(eq=False)
class Client:
    """The measuring client's process."""

    process: trio.Process
    _received: bytes = b""

    async def ask(self, do, *, within_s=120.0, **job):
        """Has it do a job; returns what it answers. Raises Failed."""
        await self.process.stdin.send_all(json.dumps({"do": do, **job}).encode() + b"\n")
        with trio.move_on_after(within_s):
            while b"\n" not in self._received:
                data = await self.process.stdout.receive_some(1 << 20)
                if not data:
                    raise Failed(f"the client ended while it did {do!r}")
                self._received += data
        line, _, self._received = self._received.partition(b"\n")
        result = json.loads(line) if line else {"error": f"nothing within {within_s:g} s"}
        if "error" in result:
            raise Failed(f"{do} {job.get('target', '')}: {result['error']}")
        return result


@contextlib.asynccontextmanager
async def open_client(directory):
    command = [sys.executable, "-m", "benchmarks.client"]
    async with running(command, log=directory / "client.log", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Client(process)


@attrs.define(eq=False)
class Supervisor:
    """`tenantry serve` in a process of its own."""

    process: trio.Process
    port: int
    token: str

    def contestant(self, tenant=TENANT):
        headers = {"Authorization": f"Bearer {self.token}"}
        return Contestant(
            "tenantry", self.process.pid, f"tcp:{self.port}", f"/v1/tenants/{tenant}/connect/echo", headers
        )

    async def request(self, method, path):
        """Asks the API. Raises Failed with its words."""
        return await trio.to_thread.run_sync(self._request, method, path)

    def _request(self, method, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_S)
        try:
            connection.request(method, path, headers={"Authorization": f"Bearer {self.token}"})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise Failed(f"{method} {path}: {answer.status} {content.decode()}")
        return json.loads(content)


@contextlib.asynccontextmanager
async def open_supervisor(directory, agent):
    """The real program, with its defaults; the log goes to a file as JSON."""
    directory.mkdir()
    config = directory / "tenantry.toml"
    command = ", ".join(json.dumps(part) for part in AGENTS[agent])
    config.write_text(
        f'bind = "127.0.0.1:0"\nstate_dir = "state"\nsleep_after = "never"\n[agent]\ncommand = [{command}]\n'
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("TENANTRY_")}
    program = Path(sys.executable).with_name("tenantry")
    async with running(
        [program, "serve", "--config", config], log=directory / "log.json", env=env, stdout=subprocess.PIPE
    ) as process:
        lines = await read_lines(process, "Attach")
        words = dict(line.split(maxsplit=1) for line in lines if line)
        url, _, token = words["Open"].partition("/#token=")
        yield Supervisor(process, int(url.rpartition(":")[2]), token)


@contextlib.asynccontextmanager
async def open_agent(directory, agent):
    """The agent alone, as the contract lets any program start it: on a unix socket at a path."""
    path = directory / f"{agent}.sock"
    env = {"PATH": PATH, "LANG": "C.UTF-8", "TENANTRY_LISTEN": f"unix:{path}", "TENANTRY_WORKSPACE": str(directory)}
    env |= {"TENANTRY_TENANT": TENANT, "TENANTRY_GENERATION": "1", "HOME": str(directory)}
    async with running(AGENTS[agent], log=directory / "agent.log", env=env) as process:
        yield Contestant("direct", process.pid, f"unix:{path}", "/echo")


@contextlib.asynccontextmanager
async def open_proxy(name, directory, agent_address):
    agent = agent_address.removeprefix("unix:")
    port = _free_port()
    if name == "nginx":
        # Its workers would leave root behind, and could not reach the agent's socket.
        user = "user root;" if os.geteuid() == 0 else ""
        config = directory / "nginx.conf"
        config.write_text(NGINX.format(user=user, dir=directory, port=port, agent=agent))
        command = [_found("nginx"), "-e", directory / "nginx.log", "-c", config]
    elif name == "haproxy":
        config = directory / "haproxy.cfg"
        config.write_text(HAPROXY.format(port=port, agent=agent))
        command = [_found("haproxy"), "-db", "-f", config]
    else:
        command = [
            *(_found("node"), CACHE / "node_modules/configurable-http-proxy/bin/configurable-http-proxy"),
            *("--ip", "127.0.0.1", "--port", port, "--api-port", _free_port(), "--log-level", "error"),
            *("--default-target", f"http+unix://{quote(agent, safe='')}"),
        ]
    async with running(command, log=directory / f"{name}.log") as process:
        yield Contestant(name, process.pid, f"tcp:{port}", "/echo")


PROXIES = ("nginx", "haproxy", "chp")


async def missing(name):
    """Why a proxy cannot take part, or None. configurable-http-proxy is installed here, once, if npm can."""
    program = "node" if name == "chp" else name
    if _found(program) is None:
        return f"{program} is not installed"
    if name == "chp" and not (CACHE / "node_modules" / "configurable-http-proxy").is_dir():
        if shutil.which("npm") is None:
            return "npm is not installed"
        CACHE.mkdir(exist_ok=True)
        with trio.move_on_after(120.0):
            done = await trio.run_process(
                ["npm", "install", "--no-audit", "--no-fund", f"configurable-http-proxy@{CHP_VERSION}"],
                cwd=CACHE,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
            if done.returncode == 0:
                return None
            return f"npm install failed: {done.stderr.decode(errors='replace').strip()[-200:]}"
        return "npm install took longer than 120 s"
    return None


@contextlib.asynccontextmanager
async def open_stage(directory, client, agent, proxies):
    """One agent program behind everything, each contestant answering: a dict by name, "direct" first."""
    directory.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        direct = await stack.enter_async_context(open_agent(directory, agent))
        supervisor = await stack.enter_async_context(open_supervisor(directory / "tenantry", agent))
        contestants = [
            direct,
            supervisor.contestant(),
            *[await stack.enter_async_context(open_proxy(name, directory, direct.address)) for name in proxies],
        ]
        for contestant in contestants:
            await client.ask("ready", target=contestant.target, timeout_s=START_S)
        yield {contestant.name: contestant for contestant in contestants}, supervisor


def versions():
    def said(*command):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except OSError:
            return None
        return ((done.stdout or done.stderr).splitlines() or [""])[0]

    return {
        "python": sys.version.split()[0],
        "nginx": said(_found("nginx") or "nginx", "-v"),
        "haproxy": said(_found("haproxy") or "haproxy", "-v"),
        "chp": CHP_VERSION,
        "node": said("node", "-v"),
        "commit": said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }


def _found(program):
    return shutil.which(program, path=PATH)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
