"""Draws the README's picture from a run: python tools/draw_learning_curve.py runs/tiny/r1_zero docs/learning_curve.svg"""

from __future__ import annotations

import sys
from pathlib import Path

from r1mega.report import learning_curve_svg
from r1mega.training.metrics import read_jsonl


def main(run_dir: str, out: str) -> None:
    metrics = read_jsonl(Path(run_dir) / "metrics.jsonl")
    Path(out).write_text(
        learning_curve_svg(metrics, title="R1-Zero on two CPU cores: accuracy and format by step")
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
