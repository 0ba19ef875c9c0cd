"""When a tenant is put to sleep."""

from __future__ import annotations

import math

from supervisor.tenant.idle import Idleness


def idle(sleep_after_s=600.0, with_connections=False, at=1000.0):
    idleness = Idleness(sleep_after_s, with_connections)
    idleness.worked(at)
    return idleness


def test_without_work_it_sleeps_after_sleep_after():
    """S3-20: ten minutes by default, from the last work."""
    assert idle().sleeps_at(connections=0, callers=0) == 1600.0


def test_an_open_connection_is_work_and_is_named():
    """S3-18, S3-20: losing work is worse than being awake."""
    idleness = idle()
    assert idleness.sleeps_at(connections=2, callers=0) is None
    assert idleness.why_awake(connections=2, callers=0, now=1000.0) == ["2 open connections"]


def test_with_sleep_with_connections_only_data_is_work():
    """S3-18: pings renew nothing."""
    idleness = idle(with_connections=True)
    assert idleness.sleeps_at(connections=2, callers=0) == 1600.0
    idleness.saw_data(0, 1300.0)
    assert idleness.sleeps_at(connections=2, callers=0) == 1600.0
    idleness.saw_data(1, 1300.0)
    assert idleness.sleeps_at(connections=2, callers=0) == 1900.0
    assert idleness.recheck_s(connections=2) == 60.0


def test_never_is_never():
    """S3-22: and it is a setting, so it outlives a restart."""
    idleness = idle(sleep_after_s=None)
    assert idleness.sleeps_at(connections=0, callers=0) is None
    assert idleness.why_awake(connections=0, callers=0, now=0.0) == ["sleep_after is never"]


def test_work_begins_the_window_anew_and_an_older_instant_does_not():
    """S3-21: every use renews, whatever value is set."""
    idleness = idle()
    idleness.worked(1200.0)
    idleness.worked(1100.0)
    assert idleness.sleeps_at(connections=0, callers=0) == 1800.0


def test_processor_use_above_one_percent_in_the_last_minute_defers_sleep_and_says_so():
    idleness = idle()
    sleeps_at = idleness.sleeps_at(connections=0, callers=0)
    assert idleness.next_look(sleeps_at) == 1540.0
    assert not idleness.looked(1540.0, 5.0)
    assert idleness.next_look(sleeps_at) == 1600.0
    assert not idleness.looked(1600.0, 5.0 + 1.2)  # 2 % of a minute
    assert idleness.sleeps_at(connections=0, callers=0) == 1660.0
    assert idleness.why_awake(connections=0, callers=0, now=1600.0) == ["processor use 2% in the last minute"]
    assert idleness.looked(1660.0, 6.2 + 0.5)


def test_an_idle_processor_lets_it_sleep_at_the_deadline():
    idleness = idle(sleep_after_s=10.0)
    assert idleness.next_look(1010.0) == 1000.0
    assert not idleness.looked(1000.0, 1.0)
    assert idleness.looked(1010.0, 1.05)
    assert idleness.recheck_s(connections=1) == math.inf
