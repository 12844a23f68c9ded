"""Nominal time in a real run: the makespan of a schedule whatever the machine does meanwhile.

The real executor runs over real processes and messages. Each action adds its nominal duration to its rank's clock, each
message carries the sender's time, and whoever waits for it takes the later of its own time and the arrival. So the clocks
tell what simulator.py computes, from what was really executed and sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from r1mega.parallel.schedule import Action, Schedule
from r1mega.parallel.simulator import Durations, Span


class VirtualClock:
    """Of one rank."""

    def __init__(
        self, schedule: Schedule, durations: Durations, costs: Sequence[float] | None = None
    ) -> None:
        """costs: of each stage, relative to its even share of the model."""
        assert durations.prefetch, "receives are posted ahead"
        self._schedule, self._durations, self._costs = schedule, durations, costs
        self.now = 0.0
        self.sent_at = 0.0
        """When the results of the action under way leave."""
        self.spans: list[Span] = []
        self._start = 0.0

    def arrived(self, sent: float) -> None:
        """A message that the next action needs."""
        self._start = max(self._start, sent + self._durations.hop)

    def acts(self, action: Action) -> None:
        """All that the action needs is there."""
        start = max(self.now, self._start)
        self.now = start + self._durations.of(action, self._schedule, self._costs)
        self.sent_at = self.now - self._durations.after_sending(action, self._schedule, self._costs)
        self.spans.append(Span(start, self.now, action))
        self._start = 0.0
