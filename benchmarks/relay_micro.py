"""Echo through the relay alone, without HTTP, auth or tenants: beside the same client straight to the agent, and nginx.

Four kinds of process: a fast echo agent on a unix socket, the gateway's splice in front of it, nginx in front of
it, and the client that measures. Ratios from one run are what counts; `make bench` measures the whole gateway.

    python benchmarks/relay_micro.py [--seconds 2] [--rounds 3] [--carriers direct,relay,pumps,nginx] [--idle 1000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NGINX = """
daemon off; worker_processes 1; {user} pid {dir}/nginx.pid; error_log {dir}/nginx.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://unix:{agent}; proxy_http_version 1.1; proxy_read_timeout 1h;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";
    }}
  }}
}}
"""


def picows_on_unix_sockets() -> None:
    """It sets TCP_NODELAY on whatever it gets, which a unix socket refuses; and it logs every pause in writing."""
    from asyncio.trsock import TransportSocket

    logging.getLogger("picows").setLevel(logging.ERROR)

    def forgiving(method):
        def call(self, *args):
            try:
                return method(self, *args)
            except OSError:
                return 1

        return call

    TransportSocket.setsockopt = forgiving(TransportSocket.setsockopt)
    TransportSocket.getsockopt = forgiving(TransportSocket.getsockopt)


async def agent(path: str) -> None:
    """An echo server in a fast library."""
    from picows import WSListener, WSMsgType, ws_create_server

    class Echo(WSListener):
        def on_ws_frame(self, transport, frame):
            if frame.msg_type == WSMsgType.CLOSE:
                transport.send_close(frame.get_close_code())
                transport.disconnect()
            else:
                transport.send(frame.msg_type, frame.get_payload_as_memoryview())

    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    server = await ws_create_server(lambda _: Echo(), sock=sock, backlog=4096, max_frame_size=1 << 26)
    print("ready", flush=True)
    await server.serve_forever()


async def gateway(path: str, carrier: str) -> None:
    """Passes the heads and splices: what the gateway does once a request is authenticated."""
    import trio

    from supervisor.gateway.relay import Relay
    from supervisor.gateway.splice import Splice
    from supervisor.tenant.traffic import Traffic

    traffic = Traffic()

    async def head(stream):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = await stream.receive_some(65536)
            if not piece:
                raise trio.BrokenResourceError
            data += piece
        head, _, rest = data.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n", rest

    async def ended():
        return 1011, "the agent ended"

    async def serve(client):
        upstream = await trio.open_unix_socket(path)
        request, to_agent = await head(client)
        await upstream.send_all(request)
        response, to_client = await head(upstream)
        await client.send_all(response)
        await Splice(
            client,
            upstream,
            relay=relay if carrier == "relay" else None,
            traffic=traffic,
            when_agent_ends=ended,
            to_agent=to_agent,
            to_client=to_client,
        ).run()

    async def boundary(client):
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            await serve(client)

    relay = Relay()
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=4096)
        print(listeners[0].socket.getsockname()[1], flush=True)
        await trio.serve_listeners(boundary, listeners)


async def echoes(address: str, size: int, connections: int, seconds: float) -> tuple[float, float, float]:
    """Echoes a second over all connections, and the p50 and p99 round trip in microseconds."""
    from picows import WSListener, WSMsgType, ws_connect

    payload = os.urandom(size)
    trips: list[float] = []
    now = time.perf_counter
    until = 0.0

    class Client(WSListener):
        def on_ws_connected(self, transport):
            self.transport = transport
            self.done = asyncio.get_running_loop().create_future()

        def send(self):
            self.at = now()
            self.transport.send(WSMsgType.BINARY, payload)

        def on_ws_frame(self, transport, frame):
            if frame.payload_size != size:
                raise ValueError("not what was sent")
            at = now()
            trips.append(at - self.at)
            if at < until:
                self.send()
            elif not self.done.done():
                self.done.set_result(None)

    kind, _, where = address.partition(":")

    def connect(_):
        sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
        sock.connect(where if kind == "unix" else ("127.0.0.1", int(where)))
        sock.setblocking(False)
        return sock

    clients = []
    for _ in range(connections):
        _, client = await ws_connect(Client, "ws://localhost/", socket_factory=connect, max_frame_size=1 << 26)
        clients.append(client)
    begun = now()
    until = begun + seconds
    for client in clients:
        client.send()
    await asyncio.gather(*(client.done for client in clients))
    took = now() - begun
    for client in clients:
        client.transport.send_close()
        client.transport.disconnect()
    trips.sort()
    return len(trips) / took, trips[len(trips) // 2] * 1e6, trips[len(trips) * 99 // 100] * 1e6


async def idle(address: str, connections: int) -> None:
    """Open connections that say nothing, and keep them until stdin ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (connections + 100,) * 2)
    port = int(address.partition(":")[2])
    socks = []
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        sock.recv(4096)
        socks.append(sock)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextlib.contextmanager
def child(*args: str):
    """This program again, as another process; gives its first line."""
    process = subprocess.Popen(
        [sys.executable, __file__, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.terminate()
        process.wait()
        process.stdout.close()


def rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise LookupError(pid)


def cpu_s(pid: int) -> float:
    """Of a process and of its children (nginx works in one)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return _own_cpu_s(pid) + sum(_own_cpu_s(int(child)) for child in children)


def _own_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--carriers", default="direct,nginx,relay,pumps")
    parser.add_argument("--sizes", default="64,4096,65536,1048576")
    parser.add_argument("--connections", default="1,16")
    parser.add_argument("--idle", type=int, default=0)
    args = parser.parse_args()
    names = args.carriers.split(",")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        path = f"{directory}/agent"
        stack.enter_context(child("agent", path))
        addresses = {"direct": f"unix:{path}"}
        pids = {}
        for name in ("relay", "pumps"):
            if name in names:
                process, port = stack.enter_context(child("gateway", path, name))
                addresses[name] = f"tcp:{port}"
                pids[name] = process.pid
        if "nginx" in names and (nginx := shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            config = Path(directory, "nginx.conf")
            # Its workers would leave root behind, and could not reach the agent's socket.
            user = "user root;" if os.geteuid() == 0 else ""
            config.write_text(NGINX.format(user=user, dir=directory, port=port, agent=path))
            process = subprocess.Popen([nginx, "-e", f"{directory}/nginx.log", "-c", str(config)])
            stack.callback(process.wait)
            stack.callback(process.send_signal, signal.SIGTERM)
            addresses["nginx"] = f"tcp:{port}"
            pids["nginx"] = process.pid
            time.sleep(0.5)
        names = [name for name in names if name in addresses]
        if args.idle:
            for name in set(names) & {"relay", "pumps"}:
                before = rss_bytes(pids[name])
                with child("idle", addresses[name], str(args.idle)):
                    time.sleep(1)
                    after, cpu = rss_bytes(pids[name]), cpu_s(pids[name])
                    time.sleep(5)
                    cpu = (cpu_s(pids[name]) - cpu) / 5
                    print(
                        f"{name}: {(after - before) / args.idle / 1024:.1f} kB a connection over {args.idle}, "
                        f"{100 * cpu:.2f} % of a core while idle"
                    )
        for size in map(int, args.sizes.split(",")):
            for connections in map(int, args.connections.split(",")):
                results = {name: [] for name in names}
                for _ in range(args.rounds):
                    for name in names:
                        before = cpu_s(pids[name]) if name in pids else 0
                        rate, p50, p99 = asyncio.run(echoes(addresses[name], size, connections, args.seconds))
                        cpu = (cpu_s(pids[name]) - before) / (rate * args.seconds) if name in pids else 0
                        results[name].append((rate, p50, p99, cpu * 1e6))
                row = {
                    name: [statistics.median(values) for values in zip(*rounds, strict=True)]
                    for name, rounds in results.items()
                }
                for name, (rate, p50, p99, cpu) in row.items():
                    ratios = " ".join(
                        f"{rate / row[other][0]:6.2f} of {other}" for other in ("direct", "nginx") if other in row
                    )
                    added = f"{p50 - row['direct'][1]:+8.0f} us" if "direct" in row else ""
                    print(
                        f"{size:8} B x{connections:<3} {name:7} {rate:9.0f}/s  p50 {p50:7.0f} us  p99 {p99:7.0f} us"
                        f"  cpu {cpu:6.1f} us  {added}  {ratios}",
                        flush=True,
                    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["agent", path]:
            picows_on_unix_sockets()
            asyncio.run(agent(path))
        case ["gateway", path, carrier]:
            import trio

            trio.run(gateway, path, carrier)
        case ["idle", address, number]:
            asyncio.run(idle(address, int(number)))
        case _:
            picows_on_unix_sockets()
            main()
