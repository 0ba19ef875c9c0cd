from __future__ import annotations

import pytest

from tests.sandbox.kit import open_tester


@pytest.fixture
async def tester(tmp_path):
    async with open_tester(tmp_path) as tester:
        yield tester
