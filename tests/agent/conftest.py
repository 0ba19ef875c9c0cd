"""An agent's server in memory, for whoever asks for `serve`."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from agent.routes import echo
from agent.server import Server
from tests.agent.wire import Wire


class MemoryAgent:
    """A Server whose connections are memory streams."""

    def __init__(self, server, nursery):
        self.server = server
        self.nursery = nursery

    def stream(self):
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.server.serve_stream, theirs)
        return ours

    async def open(self, path="/echo", **options):
        return await Wire.open(self.stream(), path, **options)


@pytest.fixture
def serve(nursery):
    """`serve(path=handler, ...)` gives an agent in memory with these paths, and `/echo`."""

    def serve(**handlers):
        routes = {"/echo": echo, **{f"/{name}": handler for name, handler in handlers.items()}}
        return MemoryAgent(Server(routes.get), nursery)

    return serve
