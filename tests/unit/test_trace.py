"""The Chrome trace of a step."""

from __future__ import annotations

import json
from pathlib import Path

from r1mega.stages.trace import Trace


def test_overlapping_spans_of_a_track_lie_in_lanes_of_their_own(tmp_path: Path) -> None:
    trace = Trace()
    trace.add("phases", "generate", 10.0, 12.0)
    trace.add("phases", "train", 12.0, 13.0)
    trace.add("scoring", "a", 10.5, 12.5)
    trace.add("scoring", "b", 11.0, 11.5)
    trace.add("scoring", "c", 11.5, 12.0)
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert [spans[name]["tid"] for name in ("generate", "train", "a", "b", "c")] == [0, 0, 0, 1, 1]
    assert (spans["a"]["ts"], spans["a"]["dur"]) == (0.5e6, 2e6)
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"phases", "scoring"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.json"]
