"""Evaluation files in every format that a suite has are read for decontamination."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r1mega.config import ConfigError
from r1mega.data.evaluation_texts import read_evaluation
from r1mega.data.suites import SUITES

ASKED = "how many of the seven sleepy brown bears ate fresh honey on the hill today"
SOLVED = "count the bears on the hill then take away every bear that ate no honey today"
GPQA = f'Record ID,Question,Correct Answer,Incorrect Answer 1,Explanation\nr1,"{ASKED}?",two,one,"{SOLVED}"\n'
FILES: dict[str, str | dict[str, Any]] = {
    "aime2024": {"ID": "2024-I-1", "Problem": ASKED, "Solution": SOLVED, "Answer": 204},
    "math500": {"problem": ASKED, "solution": SOLVED, "answer": "2"},
    "gsm8k": {"question": ASKED, "answer": f"{SOLVED}\n#### 2"},
    "mgsm": f"{ASKED}\t2\n",
    "gpqa": GPQA,
    "mmlu": f'"{ASKED}",one,two,three,four,B\n',
    "mmlu_pro": {"question": ASKED, "options": ["one", "two"], "answer": "B"},
    "humaneval": {"task_id": "HumanEval/0", "prompt": ASKED, "canonical_solution": SOLVED, "test": "t"},
    "mbpp": {"task_id": 11, "text": ASKED, "code": SOLVED, "test_list": ["assert f()"]},
    "livecodebench": {"question_id": "1", "question_content": ASKED, "public_test_cases": "[]"},
    "ifeval": {"key": 1, "prompt": ASKED, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "chat": {"instruction": ASKED, "reference": SOLVED},
}
SUFFIXES = {"mgsm": "_de.tsv", "gpqa": ".csv", "mmlu": ".csv"}


def test_every_suite_with_a_file_is_here() -> None:
    named = {name for name, suite in SUITES.items() if suite.file and not name.startswith("mgsm_")}
    assert named == set(FILES)


@pytest.mark.parametrize("suite", FILES)
def test_a_planted_question_or_solution_of_any_suite_is_found(suite: str, tmp_path: Path) -> None:
    content = FILES[suite]
    file = tmp_path / f"{suite}{SUFFIXES.get(suite, '.jsonl')}"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    evaluation = read_evaluation([str(file)], "decontaminate")
    assert evaluation.found_in(f"Tell me: {ASKED.upper()}!") == str(file)
    assert bool(evaluation.found_in("innocent", f"<think>{SOLVED}</think>")) == (SOLVED in str(content))
    assert not evaluation.found_in("how many of the seven sleepy brown foxes ate fresh honey")


def test_a_row_without_a_question_is_named(tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    file.write_text('{"question": "why"}\n{"frage": "warum"}\n')
    with pytest.raises(ConfigError, match=r"eval.jsonl:2: no text in any .*columns are frage"):
        read_evaluation([str(file)], "decontaminate")
    for missing in ("nowhere.csv", "nowhere.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"decontaminate={missing}: no such file"):
            read_evaluation([missing], "decontaminate")
