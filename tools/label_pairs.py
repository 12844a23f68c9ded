"""Preference pairs as labelled responses: every chosen one safe, every rejected one unsafe.

    python tools/label_pairs.py PAIRS.jsonl[.gz] LABELS.jsonl

That is an assumption about the pairs and not always true (of two bad answers one is chosen all the same), so no
stage makes it by itself. Each row says where it came from: "source": {"id": ..., "side": "chosen" | "rejected"}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from r1mega.config import ConfigError
from r1mega.data.preferences import Unusable, read_pair
from r1mega.data.prompts import read_rows


def main(pairs: str, labels: Path) -> None:
    lines, left_out = [], 0
    for row in read_rows(pairs, "PAIRS"):
        try:
            pair = read_pair(row)
        except Unusable:
            left_out += 1
            continue
        for side, response in zip(("chosen", "rejected"), pair.responses, strict=True):
            source = {"id": pair.id, "side": side}
            line = {"prompt": pair.question, "response": response, "safe": side == "chosen", "source": source}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    temporary = labels.with_name(f".{labels.name}.{os.getpid()}")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, labels)
    print(f"wrote {len(lines):,} labelled responses to {labels}; {left_out} pairs could not be read")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(f"label_pairs: {error}")
