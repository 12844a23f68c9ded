"""Language consistency: words in the target language / all words of the chain of thought (R1, section 2.3.2).

The paper gives the ratio alone; the rest is ours. Only prose counts (prose.py). A script that belongs to one
language decides by itself; Han characters are Japanese in a sentence with kana, else Chinese. Between
languages in Latin script latin.py decides, clause by clause, so that a German clause in an English chain shows.

Words are counted as a reader would: by spaces where the script has them, by characters per word where it has
none (CHARACTERS_PER_WORD), and Chinese exactly, by jieba, with `exact_chinese`.
"""

# ruff: noqa: RUF001  (look-alike characters are what this module is about)

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from r1mega.rewards.latin import (
    ALIASES,
    LATIN_LANGUAGES,
    MAX_CLAUSE_WORDS,
    UNDETERMINED,
    Clause,
    cld2,
    function_words_of,
    latin_words,
)
from r1mega.rewards.prose import prose

CONSISTENT = 0.95
"""From this share on the verdict is "consistent"; it does not change the value."""

CHARACTERS_PER_WORD = {"zh": 1.6, "ja": 2.0, "th": 4.5, "lo": 4.5, "km": 4.5, "my": 4.5, "bo": 4.5}
"""Scripts without spaces. 1.6 for Chinese is the rule of thumb that jieba agrees with; the others are ours."""

MIN_KANA = 0.1
"""Kana among kana and Han characters; from here on a clause is Japanese."""
SHORT_HAN = 8
"""Han characters of a kana-free clause (a heading) that may still be Japanese, if the text is."""


@dataclass(frozen=True)
class LanguageShares:
    words: dict[str, float]
    """Language (ISO 639-1, or UNDETERMINED) -> its words, most first. Chinese, Japanese and Thai are estimates."""

    @property
    def total(self) -> float:
        return sum(self.words.values())

    def share(self, language: str) -> float:
        """Of all words, in [0, 1]; 0.0 without words."""
        return self.words.get(language, 0.0) / self.total if self.total else 0.0


def consistency(chain: str, target: str, *, exact_chinese: bool = False) -> tuple[float, str]:
    """Share of the chain's words that are in the target language, and why.

    target: ISO 639-1 code, a region is ignored ("zh-Hant" is "zh"); see `detect` for that of a question.
    Verdicts: consistent (>= 0.95) | mixed | other_language (the target is not even the most frequent) |
    no_words (nothing but formulas, code, numbers: no language, worth 0.0) | no_target (target UNDETERMINED, 0.0).
    """
    target = language_code(target)
    if target == UNDETERMINED:
        return 0.0, "no_target"
    shares = language_shares(chain, exact_chinese=exact_chinese)
    if not shares.total:
        return 0.0, "no_words"
    value = shares.share(target)
    if value >= CONSISTENT:
        return value, "consistent"
    return value, "mixed" if next(iter(shares.words)) == target else "other_language"


def detect(text: str) -> str:
    """The main language of a question: the one with most words; UNDETERMINED where there are none.

    A text of code or formulas alone is judged by the words inside them.
    """
    words = language_shares(text).words or _count(text, exact_chinese=False)
    return next((language for language in words if language != UNDETERMINED), UNDETERMINED)


def language_shares(text: str, *, exact_chinese: bool = False) -> LanguageShares:
    """The words of each language in the prose of `text`. Linear in the text, deterministic, thread-safe."""
    return LanguageShares(_count(prose(text), exact_chinese=exact_chinese))


def language_code(name: str) -> str:
    """ "zh-Hant", "ZH_cn" -> "zh"; ValueError for a name that is no code we know."""
    code = re.split("[-_]", name.strip().lower())[0]
    code = ALIASES.get(code, code)
    if code not in KNOWN:
        raise ValueError(f"language {name!r} is not an ISO 639-1 code known here: {', '.join(sorted(KNOWN))}")
    return code


# ---------------------------------------------------------------- scripts

_LATIN = "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
_CYRILLIC = "\u0400-\u052f"
_GREEK = "\u0370-\u03ff\u1f00-\u1fff"
_MARKS = "\u0300-\u036f"
_LETTERS = _LATIN + _CYRILLIC + _GREEK
_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9f"
_THAI = "\u0e01-\u0e3a\u0e40-\u0e4e"

_OTHER_SCRIPTS = {
    "ko": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7af",
    "th": _THAI,
    "lo": "\u0e81-\u0edf",
    "my": "\u1000-\u109f",
    "km": "\u1780-\u17d3",
    "bo": "\u0f40-\u0fbc",
    "bn": "\u0980-\u09e3\u09f0-\u09ff",
    "pa": "\u0a01-\u0a65\u0a70-\u0a75",
    "gu": "\u0a81-\u0ae3",
    "or": "\u0b01-\u0b63",
    "ta": "\u0b82-\u0bd7",
    "te": "\u0c00-\u0c63",
    "kn": "\u0c80-\u0ce3",
    "ml": "\u0d00-\u0d63",
    "si": "\u0d81-\u0df3",
    "he": "\u0590-\u05f4",
    "ar": "\u0610-\u065f\u066e-\u06d3\u06d5-\u06ef\u06fa-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc",
    "hi": "\u0900-\u0963\u0971-\u097f",
    "am": "\u1200-\u137f",
    "hy": "\u0531-\u0587",
    "ka": "\u10a0-\u10ff",
}
"""Main language of each script that has no case or shares no look-alikes with Latin -> its characters."""

_RELATIVES = {
    "ru": ("uk", "bg", "sr", "mk", "be", "kk", "ky", "mn", "tg", "tt"),
    "ar": ("fa", "ur", "ps"),
    "hi": ("mr", "ne"),
    "he": ("yi",),
}
"""Main language of a script -> others written in it; which one a text is in is asked once, of all its words."""

KNOWN = frozenset(
    {UNDETERMINED, "zh", "ja", "el", "ru", *LATIN_LANGUAGES, *_OTHER_SCRIPTS}.union(*_RELATIVES.values())
)

_SENTENCE_END = re.compile(r"[.!?。！？｡\n\r\u2028\u2029\u0964\u0965]+")
_CLAUSE_END = re.compile(r"[,;:，、；：()（）\[\]\"“”„«»「」『』【】|…=]+| [-–—] |——|--")
_ASCII_WORD = re.compile(r"[A-Za-z]++(?:['-][A-Za-z]++)*+")
_WORD = re.compile(f"[{_LETTERS}{_MARKS}]++(?:['’-][{_LETTERS}{_MARKS}]++)*+")
_NOT_LATIN = re.compile(f"[{_CYRILLIC}{_GREEK}]")
_IS_LATIN = re.compile(f"[{_LATIN}]")
_IS_CYRILLIC = re.compile(f"[{_CYRILLIC}]")
_IS_GREEK = re.compile(f"[{_GREEK}]")
_BEYOND_LATIN = re.compile("[\u0370-\u1dff\u1f00-\u1fff\u2e80-\U0010ffff]")
_HAN_RUN = re.compile(f"[{_HAN}]+")
_KANA_RUN = re.compile(f"[{_KANA}]+")
_OTHER_RUN = re.compile(
    "|".join(f"(?P<{code}>[{characters}]+)" for code, characters in _OTHER_SCRIPTS.items())
)
_OTHER_ANY = re.compile(f"[{''.join(_OTHER_SCRIPTS.values())}]")
_CHINESE_ONLY = re.compile("[们你她吗呢吧么这這們嗎麼没沒说說哪很还给让从谢题问时对为]")
"""Common characters that Japanese does not write."""
_SCRIPT_RUN = re.compile(f"[{_HAN}{_KANA}{''.join(_OTHER_SCRIPTS.values())}]+")
_ACRONYM = re.compile(r"(?<![A-Za-z])[A-Z]{2,5}(?![A-Za-z])")
"""Neither English nor anything else in a sentence of another script: DVD, GPU."""


# ---------------------------------------------------------------- counting


@dataclass
class _Tally:
    """What one pass over the sentences collects; clauses are told apart when all are there."""

    words: Counter[str]
    clauses: list[Clause]
    """Words in Latin script."""
    by_script: dict[str, list[str]]
    """Main language of a script with relatives -> its words."""
    han: list[tuple[list[str], int, bool | None]]
    """Han runs of a clause, their characters, and whether it is Japanese (None: could be either)."""


def _count(text: str, *, exact_chinese: bool) -> dict[str, float]:
    tally = _Tally(Counter(), [], {}, [])
    for index, sentence in enumerate(_SENTENCE_END.split(text)):
        if sentence.isascii():
            _collect_latin(tally, index, sentence, _ASCII_WORD)
        elif not _BEYOND_LATIN.search(sentence):
            _collect_latin(tally, index, sentence, _WORD)
        else:
            _collect_scripts(tally, index, sentence)
    totals: defaultdict[str, float] = defaultdict(float)
    for main, words in tally.by_script.items():
        totals[_relative(main, words)] += len(words)
    for language, units in tally.words.items():
        totals[language] += units / CHARACTERS_PER_WORD.get(language, 1.0)
    for counted in (latin_words(tally.clauses), _han_words(tally, exact_chinese)):
        for language, number in counted.items():
            totals[language] += number
    return dict(sorted(((k, v) for k, v in totals.items() if v), key=lambda item: (-item[1], item[0])))


def _collect_latin(tally: _Tally, index: int, sentence: str, pattern: re.Pattern[str]) -> None:
    for clause in _CLAUSE_END.split(sentence):
        words = pattern.findall(clause)
        if words:
            for first in range(0, len(words), MAX_CLAUSE_WORDS):
                part = words[first : first + MAX_CLAUSE_WORDS]
                tally.clauses.append(Clause(index, part, function_words_of(part)))


def _collect_scripts(tally: _Tally, index: int, sentence: str) -> None:
    """One sentence with characters beyond Latin."""
    _collect_han(tally, sentence)
    if _OTHER_ANY.search(sentence):
        for match in _OTHER_RUN.finditer(sentence):
            code = match.lastgroup or ""
            if code in _RELATIVES:
                tally.by_script.setdefault(code, []).append(match[0])
            else:
                tally.words[code] += len(match[0]) if code in CHARACTERS_PER_WORD else 1
    if _NOT_LATIN.search(sentence):
        if not _IS_LATIN.search(sentence) and not _IS_GREEK.search(sentence):
            tally.by_script.setdefault("ru", []).extend(_WORD.findall(sentence))
            return
        sentence = _WORD.sub(lambda match: _collect_cased(tally, match[0]), _ACRONYM.sub(" ", sentence))
    if _SCRIPT_RUN.search(sentence):
        sentence = _SCRIPT_RUN.sub(",", _ACRONYM.sub(" ", sentence))
    if _IS_LATIN.search(sentence):
        _collect_latin(tally, index, sentence, _WORD)


def _collect_han(tally: _Tally, sentence: str) -> None:
    """Han characters and kana, by clauses where both stand in the sentence."""
    kana = sum(map(len, _KANA_RUN.findall(sentence)))
    if not kana:
        runs = _HAN_RUN.findall(sentence)
        if runs:
            han = sum(map(len, runs))
            chinese = han > SHORT_HAN or _CHINESE_ONLY.search(sentence)
            tally.han.append((runs, han, False if chinese else None))
        return
    tally.words["ja"] += kana
    before: bool | None = None
    for clause in _CLAUSE_END.split(sentence):
        runs = _HAN_RUN.findall(clause)
        han = sum(map(len, runs))
        kana = sum(map(len, _KANA_RUN.findall(clause)))
        if kana and kana >= MIN_KANA * (kana + han):
            before = True
        elif han > SHORT_HAN or _CHINESE_ONLY.search(clause):
            before = False
        if runs:
            tally.han.append((runs, han, before))


def _collect_cased(tally: _Tally, word: str) -> str:
    """Counts a Cyrillic, Greek or mixed word and removes it; a Latin one stays in the sentence."""
    scripts = [p for p in (_IS_LATIN, _IS_CYRILLIC, _IS_GREEK) if p.search(word)]
    if scripts == [_IS_LATIN]:
        return word
    if "-" in word:
        return " ".join(_collect_cased(tally, part) for part in word.split("-"))
    letters = sum(map(str.isalpha, word))
    if len(scripts) > 1:
        tally.words[UNDETERMINED] += letters >= 4
    elif scripts == [_IS_GREEK]:
        tally.words["el"] += letters >= 2
    elif scripts == [_IS_CYRILLIC]:
        tally.by_script.setdefault("ru", []).append(word)
    return " "


def _relative(main: str, words: list[str]) -> str:
    """Which of the languages of a script the words are in, asked of the first few hundred."""
    hint = main if main == "ru" else UNDETERMINED
    found, reliable = cld2(" ".join(words[:300]), hint)
    return found if reliable and found in _RELATIVES[main] else main


def _han_words(tally: _Tally, exact_chinese: bool) -> dict[str, float]:
    """Han characters as Japanese or Chinese words; what could be either goes with the rest of the text."""
    japanese = tally.words["ja"] + sum(han for _, han, is_japanese in tally.han if is_japanese)
    chinese = sum(han for _, han, is_japanese in tally.han if is_japanese is False)
    totals = {"ja": 0.0, "zh": 0.0}
    for runs, han, is_japanese in tally.han:
        if is_japanese or (is_japanese is None and japanese > chinese):
            totals["ja"] += han / CHARACTERS_PER_WORD["ja"]
        elif exact_chinese:
            totals["zh"] += sum(1 for run in runs for _ in _jieba().cut(run))
        else:
            totals["zh"] += han / CHARACTERS_PER_WORD["zh"]
    return totals


@functools.cache
def _jieba() -> Any:
    """A tokenizer of jieba's own dictionary, read without the cache file that jieba keeps in /tmp."""
    import jieba

    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer
