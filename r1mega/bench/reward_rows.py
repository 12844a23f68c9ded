"""One line of the table that `r1mega bench rewards` prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    name: str
    value: float
    unit: str
    goal: str = ""
    """What the number should be, in words: ">= 150"; empty where there is no goal."""
    note: str = ""
    """Conditions, data, or what stands beside it."""
