"""What a tenant may be called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import BadTenantName
from supervisor.tenant.name import check_tenant_name


@pytest.mark.parametrize("name", ["a", "acme", "0", "a-b-", "x" * 63])
def test_lower_case_letters_digits_and_dashes_are_names(name):
    assert check_tenant_name(name) == name


@given(st.text(max_size=70))
def test_a_name_is_always_safe_as_a_directory(name):
    """S3-02, S3-15: one directory a tenant, named after it, so no name may lead anywhere else."""
    try:
        check_tenant_name(name)
    except BadTenantName:
        return
    assert name.isascii()
    assert 1 <= len(name) <= 63
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not name.startswith("-")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "A", "-a", "a\n", "x" * 64, "é", "a_b", "a.b"])
def test_nothing_else_is(name):
    with pytest.raises(BadTenantName, match="1 to 63 characters"):
        check_tenant_name(name)
