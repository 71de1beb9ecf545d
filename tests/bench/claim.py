"""A claim of a method, and what makes it true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.bench.lookups import Lookup


@dataclass(frozen=True)
class Claim:
    """A claim, the name of the bench that measures it, the figure in its results, and what makes it true.

    goal: None for a figure that only describes.  better: on which side of the goal the figure must be.
    by: whether the whole interval must be there, or the value.
    """

    text: str
    bench: str
    lookup: Lookup
    unit: str = ""
    goal: float | None = None
    better: Literal["above", "below"] = "above"
    by: Literal["interval", "value"] = "interval"

    def verdict(self, value: float, low: float | None, high: float | None) -> str:
        """Whether a figure bears the claim out: "yes", "by the value alone", "no", or "–" for one without a goal."""
        if self.goal is None:
            return "–"
        sign = 1 if self.better == "above" else -1
        worst = low if self.better == "above" else high
        by_value = sign * (value - self.goal) >= 0 if self.by == "value" else sign * (value - self.goal) > 0
        by_interval = worst is not None and sign * (worst - self.goal) > 0
        if by_interval or (self.by == "value" and by_value):
            return "yes"
        return "by the value alone" if by_value else "no"
