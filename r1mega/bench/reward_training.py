"""A tiny reward model trained from scratch on preference pairs: accuracy on held-out pairs, with its interval.

Pairs are hh-rlhf's (harmlessness) where the labelled sets are there, else those of a toy rule.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from r1mega.bench.reward_rows import Row

ROOT = Path(__file__).parents[2]
HH = "data/hh_rlhf/harmless-base_test.jsonl.gz"


def measure(shared: Path | None = None) -> list[Row]:
    """One row, after one training run of some minutes. Needs a checkout's configs/."""
    pairs = shared / HH if shared is not None else None
    real = pairs is not None and pairs.is_file()
    config = "configs/tiny/reward_model_text.py" if real else "configs/tiny/reward_model_helpful.py"
    with tempfile.TemporaryDirectory(prefix="r1mega-bench-") as folder:
        command = [sys.executable, "-m", "r1mega", "run", config, f"dir={folder}/run"]
        command += [f"data={pairs.resolve()}"] if real and pairs else []
        subprocess.run(command, cwd=ROOT, check=True)
        results = json.loads((Path(folder) / "run" / "results.json").read_text())
    source = "hh-rlhf harmlessness" if real else "generated pairs"
    heldout = results["after"]["heldout"]
    interval = f"95 % Wilson interval {heldout['low']:.3f} to {heldout['high']:.3f}"
    return [
        Row(
            "reward model, held-out pairs",
            heldout["accuracy"],
            "accuracy",
            f"interval above {results['chance']:g}",
            f"{interval}, n = {heldout['n']}, {source}",
        )
    ]
