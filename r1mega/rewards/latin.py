"""Which language each clause in Latin script is in.

Function words decide where they lead clearly (function_words.py); the compact language detector (CLD2, through
pycld2, its tables inside the package) breaks ties and knows the languages without a list; a clause too short
or too doubtful to tell is of its neighbours' language. Of the words of school problems in English, German, French
and Spanish 0.98 and more go to the right language.
"""

# ruff: noqa: RUF001  (look-alike characters are what this module is about)

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass

import pycld2

from r1mega.rewards.function_words import FUNCTION_WORDS, LISTED

UNDETERMINED = "und"
"""Words of no language we know, words that mix scripts included (Latin spelt with Cyrillic look-alikes)."""

MIN_CLAUSE_WORDS = 3
MIN_CLAUSE_LETTERS = 12
"""A shorter clause takes the language of its neighbours."""
LONG_CLAUSE_WORDS = 6
"""A clause of so many words is believed even where no other one speaks its language."""
MAX_CLAUSE_WORDS = 40
"""Text without punctuation is cut into clauses of this length."""
CLEAR_LEAD = 2
"""Function words by which a language must lead to be believed without CLD2,"""
CLEAR_SHARE = 0.25
"""and their share of the clause. CLD2's word weighs as much, but at least one and a half function words."""
LISTED_SHARE = 0.35
"""Function words among all words from which on a text is surely of one of the languages that have a list."""
MIN_SHARE = 0.05
"""Of the words of clauses that could be told; a rarer language needs long clauses to be believed."""
_LATIN_CODES = (
    "en de fr es sw pt it nl sv da no fi is pl cs sk hu ro hr sl sq tr az uz id ms tl vi et lv lt ca eu gl "
    "af cy ga mt eo la so ha yo ig zu xh"
)
LATIN_LANGUAGES = frozenset(_LATIN_CODES.split())
ALIASES = {"iw": "he", "nb": "no", "nn": "no", "in": "id", "bs": "hr", "fil": "tl"}
_ONE_LETTER_WORDS = {
    "en": "aAI",
    "fr": "aAàÀyYô",
    "es": "aAeEoOuUyY",
    "pt": "aAeEoOàÀéÉ",
    "it": "aAeEiIoOèÈ",
    "sv": "iIåÅ",
    "da": "iI",
    "no": "iIåÅ",
    "pl": "aAiIoOuUwWzZ",
    "cs": "aAiIkKoOsSuUvVzZ",
}
"""All other single letters are variables."""


@dataclass
class Clause:
    sentence: int
    words: list[str]
    votes: dict[str, int]
    """Language -> function words of it."""


def latin_words(clauses: list[Clause]) -> dict[str, float]:
    """Language -> words, each clause given to one language."""
    hint = _main_language(clauses)
    labels = [_clause_label(clause, hint) for clause in clauses]
    heard: Counter[str] = Counter()
    for label, clause in zip(labels, clauses):
        if label and len(clause.words) >= MIN_CLAUSE_WORDS:
            heard[label] += len(clause.words)
    main = heard.most_common(1)[0][0] if heard else hint
    needed = MIN_SHARE * heard.total()
    believed = [
        label if label and (len(clause.words) >= LONG_CLAUSE_WORDS or 0 < heard[label] >= needed) else None
        for label, clause in zip(labels, clauses)
    ]
    totals: defaultdict[str, float] = defaultdict(float)
    for index, clause in enumerate(clauses):
        language = believed[index] or _inherited(clauses, believed, index) or main
        totals[language] += _num_words(clause.words, language)
    return totals


def _num_words(words: list[str], language: str) -> int:
    """All but the variables: single letters that are no words of the language, or stand alone."""
    short = [word for word in words if len(word) == 1]
    if not short or len(short) == len(words):
        return len(words) - len(short)
    letters = _ONE_LETTER_WORDS.get(language, "")
    return len(words) - len(short) + sum([word in letters for word in short])


def _main_language(clauses: list[Clause]) -> str:
    """The language of most function words, unless they are few and CLD2 knows one that has no list of them."""
    votes: Counter[str] = Counter()
    for clause in clauses:
        for language, number in clause.votes.items():
            votes[language] += number
    best = votes.most_common(2)
    words = [word for clause in clauses for word in clause.words]
    clear = bool(best) and (len(best) == 1 or best[0][1] > best[1][1])
    if clear and best[0][1] >= LISTED_SHARE * len(words):
        return best[0][0]
    found, reliable = cld2(" ".join(words[:300]))
    if clear and (not reliable or found in LISTED or found not in LATIN_LANGUAGES):
        return best[0][0]
    return found if found in LATIN_LANGUAGES else UNDETERMINED


def _clause_label(clause: Clause, hint: str) -> str | None:
    """The language of a clause; None where it is too short or too doubtful.

    A clear lead in function words decides ("wait" alone is one); else CLD2, inclined to the text's main
    language, has votes, too: twice as many where that language has no list of function words.
    """
    words, votes = clause.words, clause.votes
    share = CLEAR_SHARE if hint in LISTED else 2 * CLEAR_SHARE
    ranked = sorted(votes.values(), reverse=True)
    lead = ranked[0] - (ranked[1] if len(ranked) > 1 else 0) if ranked else 0
    if lead == len(words) or (lead >= CLEAR_LEAD and lead >= share * len(words)):
        return max(votes, key=votes.__getitem__)
    text = " ".join(words)
    if len(words) < MIN_CLAUSE_WORDS or len(text) < MIN_CLAUSE_LETTERS:
        return None
    language, reliable = cld2(text, hint)
    if language not in LATIN_LANGUAGES:
        return UNDETERMINED if reliable and not votes and len(words) >= LONG_CLAUSE_WORDS else None
    both = {**votes, language: votes.get(language, 0) + max(1.5, share * len(words))}
    best = max(both, key=both.__getitem__)
    return best if reliable or best != language else None


def function_words_of(words: list[str]) -> dict[str, int]:
    votes: dict[str, int] = {}
    for word in " ".join(words).lower().replace("'", " ").replace("’", " ").split():
        for language in FUNCTION_WORDS.get(word, ()):
            votes[language] = votes.get(language, 0) + 1
    return votes


def _inherited(clauses: list[Clause], believed: list[str | None], index: int) -> str | None:
    """The language of the clause before or after in the same sentence, or of both around it."""
    before = believed[index - 1] if index else None
    after = believed[index + 1] if index + 1 < len(clauses) else None
    if before and clauses[index - 1].sentence == clauses[index].sentence:
        return before
    if after and clauses[index + 1].sentence == clauses[index].sentence:
        return after
    return before if before == after else None


def cld2(text: str, hint: str = UNDETERMINED) -> tuple[str, bool]:
    """(language, reliable) of a text of letters and spaces; ("und", False) where CLD2 has no idea."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    hints = {} if hint == UNDETERMINED else {"hintLanguage": hint}
    reliable, _, details = pycld2.detect(text, isPlainText=True, bestEffort=True, **hints)
    code = details[0][1].split("-")[0]
    code = ALIASES.get(code, code)
    return (UNDETERMINED, False) if code == "un" else (code, reliable)
