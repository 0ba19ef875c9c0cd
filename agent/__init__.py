"""The bundled agent: runs in the sandbox and serves a tenant's WebSockets. Imports nothing of `supervisor`."""
