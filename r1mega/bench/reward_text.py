"""The text rewards in numbers: languages told apart, Chinese shares, the format table, chains per second."""

# ruff: noqa: RUF001  (look-alike characters are part of the data)

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from r1mega.bench.reward_rows import Row
from r1mega.rewards.choices import compare_choice
from r1mega.rewards.format import check_format
from r1mega.rewards.language import consistency, detect, language_shares
from r1mega.rewards.readability import readability
from r1mega.rewards.repetition import repetition

CHAIN_WORDS = 2000
SECONDS = 1.0
"""CPU seconds of each measurement of speed."""

SENTENCES = {
    "en": "Wait, let me check the second step again, because the sum of the first two terms is not 12 but 14. ",
    "zh": "等一下，让我再检查一遍第二步，因为前两项的和不是 12 而是 14，所以我们需要重新计算结果。",
    "de": "Moment, ich prüfe den zweiten Schritt noch einmal, denn die Summe der Terme ist nicht 12, sondern 14. ",
    "ja": "もう一度二番目の手順を確認します。最初の二つの項の和は 12 ではなく 14 なので、計算し直します。",
}

FORMAT_CASES: tuple[tuple[str, str], ...] = (
    ("<think>a</think><answer>b</answer>", "ok"),
    ("<think>a</think>\n<answer>b</answer>\n", "ok"),
    ("<think></think><answer>b</answer>", "ok"),
    ("<think>a", "unclosed_think"),
    ("<think>a</think>b", "missing_answer"),
    ("<think>a</think><answer>b", "unclosed_answer"),
    ("<think>a<think>b</think></think><answer>c</answer>", "nested"),
    ("<think>a</think><think>b</think><answer>c</answer>", "repeated_think"),
    ("<think>a</think><answer>b</answer><answer>c</answer>", "repeated_answer"),
    ("<answer>b</answer><think>a</think>", "wrong_order"),
    ("x<think>a</think><answer>b</answer>", "leading_text"),
    ("<think>a</think>x<answer>b</answer>", "between_text"),
    ("<think>a</think><answer>b</answer>x", "trailing_text"),
    ("<think>a</think><answer> </answer>", "empty_answer"),
    ("<Think>a</Think><answer>b</answer>", "missing_think"),
    ("<think >a</think><answer>b</answer>", "missing_think"),
)
CHOICE_CASES: tuple[tuple[str, str], ...] = (
    ("ANSWER: C", "equal"),
    ("(C)", "equal"),
    ("**C**", "equal"),
    ("\\boxed{\\text{C}}", "equal"),
    ("The answer is C.", "equal"),
    ("C or D", "unequal"),
    ("A, C", "unequal"),
    ("ANSWER: B", "unequal"),
    ("I cannot tell", "unparsable"),
)


@dataclass(frozen=True)
class LanguageGrade:
    accuracy: float
    number: int
    confusions: dict[str, int]
    """"zh->en" -> how often."""


def grade_language(path: str | Path) -> LanguageGrade:
    """`detect` on a jsonl file of {"text", "lang"}."""
    rows = _rows(path)
    wrong = Counter(
        f"{row['lang']}->{found}" for row in rows if (found := detect(row["text"])) != row["lang"]
    )
    return LanguageGrade(1.0 - wrong.total() / len(rows), len(rows), dict(wrong.most_common()))


def grade_mixed(path: str | Path, *, exact_chinese: bool = False) -> float:
    """Mean absolute error of the share of Chinese words on a jsonl file of {"text", "zh_word_share"}."""
    rows = _rows(path)
    errors = [
        abs(language_shares(row["text"], exact_chinese=exact_chinese).share("zh") - row["zh_word_share"])
        for row in rows
    ]
    return sum(errors) / len(errors)


def measure(shared: Path | None = None) -> list[Row]:
    """All rows; those that need labelled data are left out where `shared` (the folder above data/) is None."""
    good = sum(check_format(text) == verdict for text, verdict in FORMAT_CASES)
    chosen = sum(compare_choice("C", text) == verdict for text, verdict in CHOICE_CASES)
    rows = [
        Row("format table", good, f"of {len(FORMAT_CASES)}", f"{len(FORMAT_CASES)}"),
        Row("multiple choice table", chosen, f"of {len(CHOICE_CASES)}", f"{len(CHOICE_CASES)}"),
    ]
    return [*rows, *_labelled_rows(shared), *_speed_rows()]


def _labelled_rows(shared: Path | None) -> list[Row]:
    folder = shared / "data" / "language" if shared else None
    if folder is None or not folder.exists():
        return []
    rows = []
    for path in sorted(folder.glob("labelled_*.jsonl")):
        grade = grade_language(path)
        confusions = ", ".join(f"{pair} {number}" for pair, number in list(grade.confusions.items())[:5])
        rows.append(
            Row(
                "language accuracy",
                grade.accuracy,
                "",
                ">= 0.99",
                f"{grade.number} texts; wrong: {confusions or 'none'}",
            )
        )
    for path in sorted(folder.glob("mixed_*.jsonl")):
        for exact in (False, True):
            name = "Chinese share error, " + ("jieba" if exact else "characters / 1.6")
            rows.append(Row(name, grade_mixed(path, exact_chinese=exact), "", "<= 0.03", "mean absolute"))
    return rows


def _speed_rows() -> list[Row]:
    rows = []
    for language, sentence in SENTENCES.items():
        words = language_shares(sentence).total
        chain = sentence * round(CHAIN_WORDS / words)
        rate = _per_second(lambda chain=chain, language=language: consistency(chain, language))  # type: ignore[misc]
        rows.append(
            Row(f"language consistency, {language}", rate, "chains/CPU-s", "> 333", f"{CHAIN_WORDS} words")
        )
    english = SENTENCES["en"] * (CHAIN_WORDS // 19)
    rows.append(
        Row(
            "repetition", _per_second(lambda: repetition(english)), "chains/CPU-s", "", f"{CHAIN_WORDS} words"
        )
    )
    rows.append(
        Row(
            "readability",
            _per_second(lambda: readability(english)),
            "chains/CPU-s",
            "",
            f"{CHAIN_WORDS} words",
        )
    )
    return rows


def _per_second(run: Callable[[], object]) -> float:
    """Runs per CPU second: the best of ten parts of SECONDS."""
    run()
    best = 0.0
    for _ in range(10):
        start, runs = time.process_time(), 0
        while (spent := time.process_time() - start) < SECONDS / 10:
            run()
            runs += 1
        best = max(best, runs / spent)
    return best


def _rows(path: str | Path) -> list[dict]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]
