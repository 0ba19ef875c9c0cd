"""For programs that embed or extend Tenantry: fixtures, agents in memory, and proof that nothing is left.

`plugin` has the pytest fixtures and `world` what they give, `launcher` runs `agents` and `faults` without a process,
`leftovers` names what outlived a test. docs/testing.md shows all of it in use. Importing this imports nothing else.
"""
