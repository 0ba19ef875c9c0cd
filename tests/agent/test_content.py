"""Bytes in JSON come back to the byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import content, rpc


@given(st.binary(max_size=200), st.sampled_from(["utf-8", "base64"]))
def test_bytes_come_back_whatever_they_are(data, wanted):
    text, encoding = content.encode(data, wanted)
    assert content.decode(text, encoding) == data


def test_text_stays_readable_and_the_rest_is_told():
    assert content.encode("é".encode()) == ("é", "utf-8")
    assert content.encode(b"\xff") == ("/w==", "base64")
    assert content.encode(b"a", "base64") == ("YQ==", "base64")


@pytest.mark.parametrize("data", ["a", "é", "YQ", "YQ==!", "Y Q=="])
def test_what_is_no_base64_is_refused(data):
    with pytest.raises(rpc.RpcError) as caught:
        content.decode(data, "base64")
    assert caught.value.number == rpc.INVALID_PARAMS


@given(st.text(max_size=20), st.integers(0, 80))
def test_text_cut_anywhere_never_splits_a_character(text, at):
    data = text.encode()
    first = data[:at]
    cut = content.whole_characters(first)
    assert len(first) - cut <= 3
    first[:cut].decode()
    (first[cut:] + data[at:]).decode()


@pytest.mark.parametrize("data", [b"\xff", b"a\x80", b"\xc0", b"\xf8", b"\x80\x80\x80\x80", "€".encode()])
def test_what_cannot_become_text_is_not_held_back(data):
    assert content.whole_characters(data) == len(data)
