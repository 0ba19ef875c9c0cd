"""What has passed between an agent and its clients: plain counters, raised by whoever moves the bytes."""

from __future__ import annotations

import attrs


@attrs.define(eq=False)
class Traffic:
    """One a generation, shared by its connections. `up` is towards the agent.

    `data_frames` grows with every read that holds a part of a data frame, and not with pings, pongs and Closes:
    it is what tells work from keeping alive (S3-18).
    """

    up_bytes: int = 0
    down_bytes: int = 0
    data_frames: int = 0
