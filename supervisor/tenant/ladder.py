"""The connect retry as arithmetic: at once, then after each delay; one a tenant, shared by all its callers.

It counts failed attempts and says from which instant the next one may be made. It goes back to the first rung
only when told so: by the tenant, once a generation was ready for `stable_after` (S3-05, S3-06). Pure: the time is
an argument.
"""

from __future__ import annotations

import math

import attrs


@attrs.define(eq=False)
class Ladder:
    """`delays` in seconds; there is one attempt more than there are delays."""

    delays: tuple[float, ...]
    not_before: float = -math.inf
    failures: list[str] = attrs.field(factory=list)

    @property
    def rung(self) -> int:
        """How many attempts have failed: 0 is the attempt at once."""
        return len(self.failures)

    @property
    def exhausted(self) -> bool:
        return self.rung > len(self.delays)

    def fail(self, words: str, now: float) -> None:
        """The attempt on the present rung failed; `words` say how, for whoever is told in the end."""
        self.failures.append(words)
        self.not_before = -math.inf if self.exhausted else now + self.delays[self.rung - 1]

    def reset(self) -> None:
        self.failures.clear()
        self.not_before = -math.inf

    def story(self) -> str:
        """Which attempt failed how: `attempt 1: exit status 3; attempt 2, after 1 s: …`."""
        waits = ["", *(f", after {delay:g} s" for delay in self.delays)]
        return "; ".join(
            f"attempt {n}{wait}: {words}" for n, (wait, words) in enumerate(zip(waits, self.failures, strict=False), 1)
        )
