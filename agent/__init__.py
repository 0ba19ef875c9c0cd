"""The bundled agent: it runs in a tenant's sandbox and serves the tenant's WebSockets.

It keeps the contract of docs/agent-contract.md and imports nothing of `supervisor/`. Importing this package
imports nothing else, so that `__main__` can block its signals before anything slow is loaded.
"""
