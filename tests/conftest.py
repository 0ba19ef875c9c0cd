"""What all tests share."""

from __future__ import annotations

# For the tests of the pytest plugin.
pytest_plugins = ["pytester"]
