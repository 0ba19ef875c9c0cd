"""Tenantry: every tenant gets an agent process of its own, in a sandbox, behind one address.

Importing this package imports nothing else: the public names are resolved at their first use (PEP 562), so that
PID 1 can block its signals before anything slow is loaded.
"""
