"""One step as a Chrome trace (chrome://tracing, Perfetto): what ran when, and what hid behind what."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Event:
    track: str
    name: str
    began: float
    ended: float
    """Seconds of time.monotonic()."""


class Trace:
    """Collects spans; those of one track that overlap are written into lanes below one another."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, track: str, name: str, began: float, ended: float) -> None:
        self.events.append(Event(track, name, began, ended))

    def clear(self) -> None:
        self.events.clear()

    def write(self, path: Path) -> None:
        """Trace Event Format, complete events ("ph": "X"), microseconds since the first event."""
        start = min((event.began for event in self.events), default=0.0)
        tracks = list(dict.fromkeys(event.track for event in self.events))
        lines: list[dict] = [
            {"ph": "M", "name": "process_name", "pid": number, "args": {"name": track}}
            for number, track in enumerate(tracks)
        ]
        for number, track in enumerate(tracks):
            free_from: list[float] = []
            for event in sorted((e for e in self.events if e.track == track), key=lambda e: e.began):
                lane = _lane(free_from, event)
                lines.append(
                    {
                        "ph": "X",
                        "name": event.name,
                        "pid": number,
                        "tid": lane,
                        "ts": round((event.began - start) * 1e6, 1),
                        "dur": round((event.ended - event.began) * 1e6, 1),
                    }
                )
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"traceEvents": lines, "displayTimeUnit": "ms"}), encoding="utf-8")
        os.replace(temporary, path)


def _lane(free_from: list[float], event: Event) -> int:
    """The first lane that is free when the event begins; it is taken until the event ends."""
    for lane, free in enumerate(free_from):
        if free <= event.began:
            free_from[lane] = event.ended
            return lane
    free_from.append(event.ended)
    return len(free_from) - 1
