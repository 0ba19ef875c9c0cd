"""Mirrors the packages: tests/<package>/test_<module>.py. A package, so that tests/agent hides no `agent`."""
