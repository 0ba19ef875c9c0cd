from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.gateway.frames import NO_CODE, Follower, close_answer, close_frame
from tests.gateway.splice_kit import frame

DATA_OPCODES = (0, 1, 2)

messages = st.tuples(
    st.sampled_from([0, 1, 2, 9, 10]), st.sampled_from([0, 1, 2, 124, 125, 126, 127, 300, 65535, 65536, 70000])
).map(lambda it: (it[0], min(it[1], 125)) if it[0] > 8 else it)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


def boundaries(frames: list[bytes]) -> set[int]:
    at, found = 0, {0}
    for one in frames:
        at += len(one)
        found.add(at)
    return found


def feed(follower: Follower, data: bytes) -> int:
    return follower.feed(data, len(data))


@given(st.lists(messages, max_size=6), st.booleans(), st.lists(st.integers(0, 1 << 20), max_size=8))
def test_a_boundary_is_where_a_frame_ends_however_the_stream_is_cut(kinds, masked, places):
    frames = [frame(bytes(n), opcode, masked=masked) for opcode, n in kinds]
    known = boundaries(frames)
    follower = Follower(masked)
    at = 0
    for piece in cut(b"".join(frames), places):
        feed(follower, piece)
        at += len(piece)
        assert follower.at_boundary == (at in known)
    assert not follower.lost
    assert not follower.closed


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [0, 1, 5, 125, 126, 127, 65535, 65536])
def test_every_cut_in_two_finds_the_same_boundaries(masked, size):
    one = frame(bytes(size), masked=masked)
    stream = one + frame(b"", 9, masked=masked) + one
    places = range(len(stream)) if len(stream) < 1000 else [*range(32), *range(len(one) - 16, len(one) + 32)]
    for place in places:
        follower = Follower(masked)
        touched = feed(follower, stream[:place])
        assert follower.at_boundary == (place in (0, len(one), len(one) + len(frame(b"", 9, masked=masked))))
        touched += feed(follower, stream[place:])
        assert follower.at_boundary
        assert touched >= 2


def test_a_stream_fed_byte_by_byte_stands_at_each_boundary():
    frames = [frame(b"x" * n) for n in (0, 3, 126)] + [frame(b"", 9), frame(b"p" * 125, 10)]
    follower, known = Follower(masked=False), boundaries(frames)
    for at, byte in enumerate(b"".join(frames), start=1):
        feed(follower, bytes([byte]))
        assert follower.at_boundary == (at in known)


def test_reserved_bits_and_opcodes_are_no_business_of_ours():
    follower = Follower(masked=False)
    for first in (0xC2, 0xF1, 0x83, 0x8B):
        feed(follower, bytes([first, 3]) + b"abc")
        assert follower.at_boundary


def test_data_frames_are_counted_and_pings_are_not():
    """S3-18: pings keep a connection, and are no work."""
    follower = Follower(masked=True)
    assert feed(follower, b"".join(frame(b"x", opcode, masked=True) for opcode in (0, 1, 2))) == 3
    assert feed(follower, frame(b"x", 9, masked=True) + frame(b"x", 10, masked=True)) == 0


def test_a_long_frame_counts_with_every_read():
    follower = Follower(masked=False)
    long = frame(bytes(100_000))
    assert [follower.feed(long[at : at + 1000], 1000) for at in range(0, 5000, 1000)] == [1] * 5
    # The end of one, and the start of the next.
    follower = Follower(masked=False)
    assert feed(follower, long[:-10]) == 1
    assert feed(follower, long[-10:] + frame(b"p", 9)) == 1
    ping = frame(b"p" * 125, 9)
    follower = Follower(masked=False)
    assert [feed(follower, ping[:1]), feed(follower, ping[1:50]), feed(follower, ping[50:])] == [0, 0, 0]


def test_nothing_read_is_nothing_touched():
    follower = Follower(masked=False)
    feed(follower, frame(b"xyz")[:3])
    assert follower.feed(b"", 0) == 0
    assert not follower.at_boundary


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("payload", "code"), [(b"\x03\xf4restart", 1012), (b"\x03\xe8", 1000), (b"", NO_CODE), (b"\x03", NO_CODE)]
)
def test_the_code_in_a_close_is_read_over_every_cut(masked, payload, code):
    stream = frame(b"data", masked=masked) + frame(payload, 8, masked=masked)
    for place in range(len(stream)):
        follower = Follower(masked)
        feed(follower, stream[:place])
        assert not follower.closed
        feed(follower, stream[place:])
        assert (follower.closed, follower.close_code) == (True, code)


def test_after_a_close_nothing_may_begin():
    follower = Follower(masked=False)
    feed(follower, close_frame(1000) + frame(b"x"))
    assert follower.closed
    assert not follower.at_boundary
    assert feed(follower, frame(b"x")) == 0
    assert not follower.at_boundary
    assert not follower.lost


@pytest.mark.parametrize(
    "violation",
    [
        b"\x82\x7f\x80" + bytes(7),  # a length with its highest bit set
        b"\x82\x80abcd",  # masked, from a server
        b"\x89\x7e\x00\x7e",  # a ping of more than 125 bytes
        b"\x88\x7e\x00\x7e",  # a close of more than 125 bytes
    ],
)
def test_a_stream_that_breaks_the_framing_is_lost_for_good(violation):
    for place in range(len(violation)):
        follower = Follower(masked=False)
        feed(follower, frame(b"x"))
        feed(follower, violation[:place])
        feed(follower, violation[place:] + frame(b"x"))
        feed(follower, frame(b"x"))
        assert follower.lost
        assert not follower.at_boundary
        assert not follower.closed


@given(st.binary(max_size=300), st.booleans(), st.lists(st.integers(0, 300), max_size=4))
def test_no_bytes_make_it_fail_and_cuts_change_nothing(data, masked, places):
    whole, pieces = Follower(masked), Follower(masked)
    feed(whole, data)
    for piece in cut(data, places):
        feed(pieces, piece)
    assert (whole.at_boundary, whole.closed, whole.close_code, whole.lost) == (
        pieces.at_boundary,
        pieces.closed,
        pieces.close_code,
        pieces.lost,
    )


@given(st.lists(messages, min_size=1, max_size=4), st.integers(0, 1 << 20), st.booleans())
def test_feed_to_boundary_stops_at_the_first_one(kinds, place, masked):
    frames = [frame(bytes(n), opcode, masked=masked) for opcode, n in kinds]
    stream = b"".join(frames)
    place %= len(stream)
    known = sorted(boundaries(frames))
    follower = Follower(masked)
    feed(follower, stream[:place])
    rest = stream[place:]
    taken = follower.feed_to_boundary(rest, len(rest))
    assert place + taken == min(at for at in known if at > place)
    assert follower.at_boundary


def test_feed_to_boundary_stops_after_a_close():
    follower = Follower(masked=False)
    feed(follower, b"\x88")
    rest = close_frame(1000)[1:] + b"more"
    assert follower.feed_to_boundary(rest, len(rest)) == 3
    assert follower.closed


def test_feed_to_boundary_takes_all_where_none_comes():
    follower = Follower(masked=False)
    feed(follower, frame(bytes(5000))[:100])
    assert follower.feed_to_boundary(bytes(1000), 1000) == 1000
    assert not follower.at_boundary


def test_a_close_frame_is_what_the_rfc_says():
    assert close_frame(1012, "restart") == b"\x88\x09\x03\xf4restart"
    assert close_frame(1000) == b"\x88\x02\x03\xe8"


def test_a_reason_is_cut_to_123_bytes_between_two_characters():
    made = close_frame(1012, "ä" * 100)
    assert made[1] == 2 + 122
    assert made[4:].decode() == "ä" * 61


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 5000])
def test_codes_that_may_not_be_sent_are_refused(code):
    with pytest.raises(ValueError, match=str(code)):
        close_frame(code)


def test_an_answer_repeats_the_code_where_that_may_be_sent():
    assert close_answer(1001) == close_frame(1001)
    assert close_answer(NO_CODE) == b"\x88\x00"
    assert close_answer(1006) == b"\x88\x00"
