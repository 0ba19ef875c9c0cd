"""Whether a tenant has work, why, and when it will be put to sleep: pure, over facts that the tenant gives.

An open connection is work unless `sleep_with_connections` is set, where only data frames are; pings never are
(S3-18). What the agent does by itself shows as processor time: above 1 % of the last minute defers sleep.
"""

from __future__ import annotations

import math

import attrs

BUSY_FRACTION = 0.01
CPU_WINDOW_S = 60.0


@attrs.define(eq=False)
class Idleness:
    """What is known of a generation's work. Instants are the Trio clock's, in seconds."""

    sleep_after_s: float | None
    sleep_with_connections: bool
    last_work_at: float = 0.0
    # Set when the processor was found busy at the deadline: look again then.
    deferred_until: float = 0.0
    busy_fraction: float = 0.0
    _cpu_mark: tuple[float, float] | None = None
    _data_frames: int = 0

    def worked(self, now: float) -> None:
        """Somebody connected, left, sent data or asked for more time."""
        if now > self.last_work_at:
            self.last_work_at = now
            self._cpu_mark = None

    def saw_data(self, data_frames: int, now: float) -> None:
        """Takes the generation's count of data frames: where connections are no work, these are."""
        if data_frames != self._data_frames:
            self._data_frames = data_frames
            if self.sleep_with_connections:
                self.worked(now)

    def why_awake(self, *, connections: int, callers: int, now: float) -> list[str]:
        """The reasons why the tenant is not put to sleep now; with none it sleeps at `sleeps_at`."""
        reasons = []
        if callers:
            reasons.append(f"{callers} waiting to connect")
        if connections and not self.sleep_with_connections:
            reasons.append(f"{connections} open connection{'s' if connections > 1 else ''}")
        if self.sleep_after_s is None:
            reasons.append("sleep_after is never")
        if now < self.deferred_until:
            reasons.append(f"processor use {self.busy_fraction:.0%} in the last minute")
        return reasons

    def sleeps_at(self, *, connections: int, callers: int) -> float | None:
        """The instant at which it will be put to sleep if nothing happens; None while there is work."""
        if callers or self.sleep_after_s is None or (connections and not self.sleep_with_connections):
            return None
        return max(self.last_work_at + self.sleep_after_s, self.deferred_until)

    def next_look(self, sleeps_at: float) -> float:
        """When to read the processor time next: a window before the deadline, then at it."""
        if self._cpu_mark is not None:
            return sleeps_at
        assert self.sleep_after_s is not None
        return max(self.last_work_at, sleeps_at - min(CPU_WINDOW_S, self.sleep_after_s))

    def recheck_s(self, *, connections: int) -> float:
        """How long the count of data frames may stay unread: data is counted where it passes, and timed here."""
        counted = self.sleep_with_connections and connections and self.sleep_after_s is not None
        return self.sleep_after_s / 10 if counted and self.sleep_after_s is not None else math.inf

    def looked(self, now: float, cpu_seconds: float) -> bool:
        """Takes a reading of the tree's processor time; True if the tenant may be put to sleep now."""
        mark, self._cpu_mark = self._cpu_mark, (now, cpu_seconds)
        if mark is None:
            return False
        began, used = mark
        window = now - began
        self.busy_fraction = (cpu_seconds - used) / window if window > 0 else 0.0
        if self.busy_fraction > BUSY_FRACTION:
            self.deferred_until = now + CPU_WINDOW_S
        return self.busy_fraction <= BUSY_FRACTION
