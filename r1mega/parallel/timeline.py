"""A picture of when each rank does what: one row for each rank, one box for each action (SVG, no dependency)."""

from __future__ import annotations

from r1mega.parallel.schedule import Action, Task
from r1mega.parallel.simulator import Timeline

WIDTH, ROW, MARGIN, LEGEND = 1200, 26, 34, 46
"""Pixels."""
COLOURS = {"F": "#8fb8de", "B": "#9fce9a", "I": "#c9e4b4", "W": "#f2d38b"}
SECOND = {"F": "#4f83b6", "B": "#559a54", "I": "#8fc07a", "W": "#d9a43b"}
"""Of the second of a rank's stages."""
WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def svg(timeline: Timeline, title: str) -> str:
    """The picture; an X is a forward above a backward in one box. Numbers are micro-batches, where there is room."""
    schedule = timeline.schedule
    scale = (WIDTH - 2 * MARGIN) / timeline.makespan
    height = MARGIN + ROW * schedule.ranks + LEGEND
    first_of_rank = [schedule.rank_of.index(rank) for rank in range(schedule.ranks)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-size="14">{_escaped(title)}</text>',
    ]
    for rank, spans in enumerate(timeline.spans):
        top = MARGIN + ROW * rank
        parts.append(f'<text x="4" y="{top + 16}" font-size="10">{rank}</text>')
        for span in spans:
            left, width = MARGIN + span.start * scale, (span.end - span.start) * scale
            tasks = _tasks(span.action)
            for i, (kind, task) in enumerate(tasks):
                part = (ROW - 4) / len(tasks)
                colours = COLOURS if task.stage == first_of_rank[rank] else SECOND
                parts.append(
                    f'<rect x="{left:.2f}" y="{top + i * part:.1f}" width="{max(width - 0.4, 0.2):.2f}"'
                    f' height="{part:.1f}" fill="{colours[kind]}"><title>{_escaped(str(span.action))}: {span.start:g} to'
                    f" {span.end:g}</title></rect>"
                )
                if width > 6 * len(str(task.micro_batch)):
                    parts.append(
                        f'<text x="{left + width / 2:.2f}" y="{top + i * part + part / 2 + 3.5:.1f}"'
                        f' text-anchor="middle" font-size="{min(9.0, part):.0f}">{task.micro_batch}</text>'
                    )
    left, top = MARGIN, MARGIN + ROW * schedule.ranks + 14
    for kind, words in WORDS.items():
        for colours in (COLOURS, SECOND) if len(schedule.rank_of) > schedule.ranks else (COLOURS,):
            parts.append(f'<rect x="{left}" y="{top}" width="12" height="12" fill="{colours[kind]}"/>')
            left += 15
        parts.append(f'<text x="{left + 2}" y="{top + 10}" font-size="10">{words}</text>')
        left += 14 + 6 * len(words)
    parts.append(
        f'<text x="{left + 10}" y="{top + 10}" font-size="10">dark: the rank\'s second stage; one above the other: at once.'
        f" Makespan {timeline.makespan:g}, idle {100 * timeline.bubble:.1f} %</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _tasks(action: Action) -> list[tuple[str, Task]]:
    if action.kind == "X":
        assert action.backward is not None
        return [("F", action.task), ("B", action.backward)]
    return [(action.kind, action.task)]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
