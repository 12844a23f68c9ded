"""Is a chain of thought fit to be read? Reasons to drop it, or a reward of 0.

The paper drops chains with mixed languages, long paragraphs and code blocks when it collects the 800K samples (R1,
supplement B.3.3), and unreadable or repetitive ones for the cold start (B.3.2); it gives no thresholds, so
those below are ours.
"""

from __future__ import annotations

import re

from r1mega.rewards.language import UNDETERMINED, language_code, language_shares
from r1mega.rewards.repetition import repetition

MAX_PARAGRAPH_WORDS = 400
"""Of a line; two pages without a break."""
MIN_LANGUAGE_SHARE = 0.9
"""Words in the main (or wanted) language; names and terms of other languages fit into the rest."""
MIN_WORDS = 10
"""With fewer words one name is no mixture."""

_CODE = re.compile(r"^[ \t>]*+(?:```|~~~)|\\begin\{(?:lstlisting|verbatim|minted)\}|<code>", re.MULTILINE)


def unreadable(chain: str, language: str = "") -> list[str]:
    """Why the chain should be dropped; empty when it is readable.

    language: the one it should be in (of the question, say); "" for whatever it is mostly in.
    Reasons, in this order: no_words | wrong_language (another one than wanted) | mixed_language | code_block |
    long_paragraph | looping_tail | repeated_ngrams.
    """
    reasons = [reason for reason in (_language_reason(chain, language),) if reason]
    if _CODE.search(chain):
        reasons.append("code_block")
    if _longest_paragraph(chain) > MAX_PARAGRAPH_WORDS:
        reasons.append("long_paragraph")
    _, verdict = repetition(chain)
    return reasons if verdict == "ok" else [*reasons, verdict]


def readability(chain: str, language: str = "") -> tuple[float, str]:
    """1.0 and "readable", or 0.0 and the first reason against it."""
    reasons = unreadable(chain, language)
    return (0.0, reasons[0]) if reasons else (1.0, "readable")


def _language_reason(chain: str, language: str) -> str:
    shares = language_shares(chain)
    if not shares.total:
        return "no_words"
    main = next(iter(shares.words))
    if language and language_code(language) not in (main, UNDETERMINED):
        return "wrong_language"
    mixed = shares.total >= MIN_WORDS and shares.share(main) < MIN_LANGUAGE_SHARE
    return "mixed_language" if mixed else ""


_SPACED_WORD = re.compile(r"[^\s\u3040-\u30ff\u3400-\u9fff]++")
_UNSPACED = re.compile("[\u3041-\u30ff\u3400-\u9fff]")


def _longest_paragraph(chain: str) -> float:
    """Words of the longest line; 1.6 Han characters or kana are a word."""
    longest = 0.0
    for line in chain.split("\n"):
        if len(line) > MAX_PARAGRAPH_WORDS:
            words = len(_SPACED_WORD.findall(line)) + len(_UNSPACED.findall(line)) / 1.6
            longest = max(longest, words)
    return longest
