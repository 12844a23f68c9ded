r"""Answers of logic puzzles: truth values, sets, orders, and assignments (grids, knights and knaves).

`compare_logic(reference, answer)` reads the reference's kind, then the answer as that kind. References are text or
JSON:
    true | false | unknown
    {a, b, c}                 JSON {"set": ["a", "b"]}               order-free
    a > b > c                 JSON {"order": ["a", "b", "c"]}        the first comes first
    house 1: red, cat; house 2: blue, dog                            the values of each, order-free
    Alice: knight; Bob: knave
                              JSON {"house 1": {"colour": "red"}} or {"Alice": "knight"}
Answers may be JSON, lists, Markdown tables (either way round) or plain sentences ("first X, then Y", "Alice is
a knight"), inside \boxed{} or after "answer:". An answer that leaves a part out, hedges or contradicts itself is
unequal; partial guesses earn nothing. The paper names logic tasks (Table 4) and no format; these are ours.
"""

# ruff: noqa: RUF001  (look-alike characters are part of the data)

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from r1mega.rewards.choices import unwrapped
from r1mega.rewards.math_extraction import all_boxed

MAX_TEXT = 4000
"""Characters; a longer answer is unparsable."""

Grid = dict[str, dict[str, str]]
"""Entity -> attribute -> value; attributes without a name are "#0", "#1", ... ."""


class Contradiction(ValueError):
    """The answer says two different things, or hedges."""


@dataclass(frozen=True)
class Reference:
    kind: str
    """truth | set | order | grid."""
    value: Any
    """str | frozenset[str] | tuple[str, ...] | Grid."""


def compare_logic(reference: str, answer: str) -> str:
    """equal | unequal | unparsable. ValueError for a reference in none of the forms above."""
    wanted = read_reference(reference)
    text = _committed(answer)
    if not text or len(text) > MAX_TEXT:
        return "unparsable"
    try:
        if wanted.kind == "grid":
            return _compare_grid(wanted.value, text)
        given = _READERS[wanted.kind](text)
    except Contradiction:
        return "unequal"
    if given is None:
        return "unparsable"
    return "equal" if given == wanted.value else "unequal"


def read_reference(reference: str) -> Reference:
    """What kind of answer the reference is; ValueError where it is none."""
    text = reference.strip()
    data = _json(text)
    if isinstance(data, dict) and set(data) == {"set"}:
        return Reference("set", frozenset(map(_name, data["set"])))
    if isinstance(data, dict) and set(data) == {"order"}:
        return Reference("order", tuple(map(_name, data["order"])))
    if _truth_or_none(text):
        return Reference("truth", _truth_or_none(text))
    if text.startswith("{") and text.endswith("}") and not data:
        return Reference("set", _set(text))
    grid = _grid(text)
    if grid:
        return Reference("grid", grid)
    order = _order(text)
    if order:
        return Reference("order", order)
    raise ValueError(
        f"logic reference {reference[:80]!r} is no truth value, set {{a, b}}, order a > b or assignment x: y; z: w"
    )


def _committed(answer: str) -> str:
    """After </think>: the last box, the last answer block, what follows the last "answer:", or all of it."""
    text = answer.rsplit("</think>", 1)[-1]
    if "<answer>" in text:
        text = text.rsplit("<answer>", 1)[1].split("</answer>", 1)[0]
    boxes = all_boxed(text[-2 * MAX_TEXT :])
    if boxes:
        text = boxes[-1]
    elif marks := list(_MARKER.finditer(text[-2 * MAX_TEXT :])):
        text = text[-2 * MAX_TEXT :][marks[-1].end() :]
    text = re.sub(r"```\w*", "", text).replace("\\{", "{").replace("\\}", "}").strip()
    return unwrapped(text.replace("\\\\", "\n")) if len(text) <= MAX_TEXT else text


_MARKER = re.compile(r"\b(?:answer|solution)(?: is)?[*_ ]*[:：]", re.IGNORECASE)


def _json(text: str) -> Any:
    """The JSON value a text is; None where it is none."""
    if not text.startswith(("{", "[")) or len(text) > MAX_TEXT:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _name(value: object) -> str:
    """One spelling of a name or value: lower case, no articles, punctuation or plural possessives."""
    text = " ".join(re.sub(r"[\"'“”‘’`*_#()\[\]{}]", " ", str(value)).casefold().split())
    text = re.sub(r"^(?:the|an|a) ", "", text.strip(" .,;:!"))
    return _SYNONYMS.get(text, text)


_SYNONYMS = {
    **dict.fromkeys(["truth-teller", "truthteller", "truth teller", "truthful", "knights"], "knight"),
    **dict.fromkeys(["liar", "liars", "knaves"], "knave"),
    **dict.fromkeys(["truth-tellers", "truthtellers", "truth tellers"], "knight"),
}

# ---------------------------------------------------------------- truth values

_TRUTH = {
    **dict.fromkeys(["true", "yes", "correct", "entailed", "entailment"], "true"),
    **dict.fromkeys(["false", "no", "incorrect", "contradiction", "contradicted", "refuted"], "false"),
    **dict.fromkeys(["unknown", "uncertain", "undetermined", "neutral", "undecidable"], "unknown"),
    **dict.fromkeys(["cannot be determined", "can't be determined", "not enough information"], "unknown"),
}
_TRUTH_WORD = re.compile(
    "|".join(rf"\b{re.escape(word)}\b" for word in sorted(_TRUTH, key=len, reverse=True))
)
_TRUTH_REST = re.compile(
    r"^(?:so|thus|therefore|hence|the|statement|conclusion|hypothesis|claim|answer|it|this|is|logically|,|:|\s)*$"
)


def _truth(text: str) -> str | None:
    text = " ".join(text.casefold().split()).strip(" .!")
    values = {_TRUTH[word] for word in _TRUTH_WORD.findall(text)}
    if len(values) > 1:
        raise Contradiction(text)
    rest = _TRUTH_WORD.sub("", text)
    return values.pop() if values and _TRUTH_REST.match(rest) else None


def _truth_or_none(text: str) -> str | None:
    return _TRUTH.get(text.casefold().strip(" ."))


# ---------------------------------------------------------------- sets and orders

_ITEM_BREAK = re.compile(r"[,;\n、]| and | & |, and ", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.):]|\(\d+\))\s+", re.MULTILINE)
_EMPTY_SET = frozenset({"none", "nobody", "no one", "empty set", "\\emptyset", "∅", ""})
_HEDGE = re.compile(r"\b(?:or|either|maybe|perhaps|possibly|probably)\b|\?", re.IGNORECASE)


def _set(text: str) -> frozenset[str] | None:
    data = _json(text)
    if isinstance(data, dict) and len(data) == 1:
        data = next(iter(data.values()))
    if isinstance(data, list):
        return frozenset(map(_name, data)) if not any(isinstance(x, (list, dict)) for x in data) else None
    if _HEDGE.search(text):
        raise Contradiction(text)
    if _name(text) in _EMPTY_SET:
        return frozenset()
    items = [_name(part) for part in _ITEM_BREAK.split(_BULLET.sub("\n", text))]
    return frozenset(item for item in items if item)


_RANK = re.compile(
    r"^\s*\(?(?:(?P<number>\d+)(?:st|nd|rd|th)?|(?P<word>first|second|third|fourth|fifth|sixth|seventh|eighth))"
    r"\s*(?:place)?\s*(?:[.):]|-|is|->)\s*(?P<own>\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_RANKS = {
    word: i
    for i, word in enumerate(["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"], 1)
}
_STEP = re.compile(
    r"[,;.]?\s*\b(?:then|next|followed by|after that|finally|and finally|and then|and last|lastly|last)\b[,:]?\s*",
    re.IGNORECASE,
)


def _order(text: str) -> tuple[str, ...] | None:
    """The items from first to last; None where no order is written down."""
    data = _json(text)
    if isinstance(data, dict) and len(data) == 1:
        data = next(iter(data.values()))
    if isinstance(data, list):
        return tuple(map(_name, data)) if not any(isinstance(x, (list, dict)) for x in data) else None
    if _HEDGE.search(text):
        raise Contradiction(text)
    ranked = list(
        _RANK.finditer(
            re.sub(r"[;,]\s+(?=\d+(?:st|nd|rd|th)?\s*[.):-]|second|third|fourth|fifth)", "\n", text)
        )
    )
    if len(ranked) > 1:
        return _by_rank(
            [(int(m["number"] or _RANKS[(m["word"] or "").lower()]), _name(m["own"])) for m in ranked]
        )
    arrows = re.sub(r"\\(?:to|rightarrow|succ)(?![a-z])|[→⟶]|->|=>", ">", text)
    arrows = re.sub(r"\\(?:prec)(?![a-z])", "<", arrows).replace("\\gt", ">").replace("\\lt", "<")
    if "<" in arrows and ">" in arrows:
        raise Contradiction(text)
    for sign in "><":
        if sign in arrows:
            items = tuple(map(_name, arrows.split(sign)))
            return items if sign == ">" else items[::-1]
    text = re.sub(r"^\s*first(?:ly)?\b[,:]?\s*", "", text, flags=re.IGNORECASE)
    parts = [_name(part) for part in _ITEM_BREAK.split(_STEP.sub(",", text))]
    parts = [part for part in parts if part]
    return tuple(parts) if len(parts) > 1 else None


def _by_rank(ranked: list[tuple[int, str]]) -> tuple[str, ...]:
    if sorted(rank for rank, _ in ranked) != list(range(1, len(ranked) + 1)):
        raise Contradiction(ranked)
    return tuple(own for _, own in sorted(ranked))


# ---------------------------------------------------------------- assignments


def _grid(text: str) -> Grid | None:
    """Entity -> attribute -> value from JSON, a Markdown table, "key: value" pieces or "X is a Y" sentences."""
    for read in (_json_grid, _table_grid, _line_grid, _sentence_grid):
        grid = read(text)
        if grid:
            return grid
    return None


def _json_grid(text: str) -> Grid | None:
    data = _json(text)
    if isinstance(data, dict) and len(data) == 1 and isinstance(next(iter(data.values())), (dict, list)):
        inner = next(iter(data.values()))
        data = inner if isinstance(inner, list) or any(isinstance(v, dict) for v in inner.values()) else data
    if isinstance(data, list) and data and all(isinstance(row, dict) and len(row) > 1 for row in data):
        rows = [list(row.items()) for row in data]
        return {_name(row[0][1]): {_name(key): _name(value) for key, value in row[1:]} for row in rows}
    if not isinstance(data, dict) or not data:
        return None
    grid: Grid = {}
    for entity, values in data.items():
        if isinstance(values, dict):
            grid[_name(entity)] = {_name(key): _name(value) for key, value in values.items()}
        elif isinstance(values, list):
            grid[_name(entity)] = {f"#{i}": _name(value) for i, value in enumerate(values)}
        else:
            grid[_name(entity)] = {"#0": _name(values)}
    return grid


def _table_grid(text: str) -> Grid | None:
    lines = [line.strip() for line in text.split("\n") if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    if len(rows) < 2 or any(len(row) != len(rows[0]) or len(row) < 2 for row in rows):
        return None
    header = [_name(cell) for cell in rows[0]]
    return _add(
        {}, [(_name(row[0]), key, _name(cell)) for row in rows[1:] for key, cell in zip(header[1:], row[1:])]
    )


_PIECE = re.compile(r"[;\n]")
_PAIR = re.compile(
    r"^\s*(?:[-*•]\s+|\d+[.)]\s+)?(?P<key>[^:=→\n]{1,60}?)\s*(?::|=|→|->|=>)\s*(?P<own>\S.*?)\s*$"
)


def _line_grid(text: str) -> Grid | None:
    """ "house 1: red, cat; house 2: blue, dog", a line or a semicolon between; values may be "colour: red" pairs."""
    pieces = [piece for piece in _PIECE.split(text) if piece.strip()]
    if len(pieces) == 1 and text.count(":") + text.count("=") > 1:
        pieces = text.split(",")
    pairs = [_PAIR.match(piece) for piece in pieces]
    if not pairs or not all(pairs):
        return None
    triples = []
    for pair in pairs:
        assert pair
        for index, value in enumerate(re.split(r",\s*|\s+and\s+", pair["own"].strip(" ."))):
            inner = re.match(r"^\s*([^:=]+?)\s*[:=]\s*(.+)$", value)
            key, own = (_name(inner[1]), inner[2]) if inner else (f"#{index}", value)
            triples.append((_name(pair["key"]), key, _checked(own)))
    return _add({}, triples)


_IS = re.compile(
    r"^(?P<who>.+?)\s+(?:is|are)\s+(?:both\s+|all\s+)?(?:an?\s+|the\s+)?(?P<what>[\w -]+)$", re.IGNORECASE
)


def _sentence_grid(text: str) -> Grid | None:
    """ "Alice and Bob are knights, and Carol is a knave."; None unless every sentence says so."""
    text = " ".join(
        re.sub(r"^(?:so|thus|therefore|hence|finally)\b,?\s*", "", text, flags=re.IGNORECASE).split()
    )
    pieces = re.split(
        r"[.;]\s*|,\s*(?:and\s+|while\s+|but\s+)?(?=[^,.;]* (?:is|are) )|\s+(?:and|while|but)\s+(?=(?:\S+ ){1,3}is )",
        text,
    )
    triples = []
    for piece in filter(None, map(str.strip, pieces)):
        match = _IS.match(piece)
        if not match:
            return None
        for who in re.split(r",\s*(?:and\s+)?|\s+and\s+", match["who"]):
            triples.append((_name(who), "#0", _checked(match["what"])))
    return _add({}, triples) if triples else None


def _checked(value: str) -> str:
    if _HEDGE.search(value) or re.match(r"not\b", value.strip(), re.IGNORECASE):
        raise Contradiction(value)
    return _name(value)


def _add(grid: Grid, triples: list[tuple[str, str, str]]) -> Grid:
    for entity, attribute, value in triples:
        if grid.setdefault(entity, {}).setdefault(attribute, value) != value:
            raise Contradiction((entity, attribute, value))
    return grid


def _compare_grid(wanted: Grid, text: str) -> str:
    given = _grid(text)
    if not given:
        return "unparsable"
    for table in (given, _transposed(given)):
        same = _aligned(wanted, table)
        if same is not None:
            return "equal" if _values(wanted, same) == _values(same, wanted) else "unequal"
    return "unequal"


def _transposed(grid: Grid) -> Grid:
    turned: Grid = {}
    for entity, row in grid.items():
        for attribute, value in row.items():
            turned.setdefault(attribute, {})[entity] = value
    return turned


def _aligned(wanted: Grid, given: Grid) -> Grid | None:
    """`given` under the entity names of `wanted`; None where they are not the same entities."""
    if len(given) == 1 and next(iter(given)) in ("all", "both", "everyone", "all of them"):
        return {entity: next(iter(given.values())) for entity in wanted}
    shared = set.intersection(*(set(re.findall(r"[^\W\d]+", entity)) for entity in wanted))
    names = {_core(entity, shared): entity for entity in wanted}
    found = {_core(entity, shared): row for entity, row in given.items()}
    if set(names) != set(found) or len(found) != len(given):
        return None
    return {names[core]: row for core, row in found.items()}


def _core(entity: str, shared: set[str]) -> str:
    """ "house 1" -> "1" where all entities are houses."""
    words = [word for word in re.findall(r"[^\W\d]+|\d+|[^\w\s]+", entity) if word not in shared]
    return " ".join(words) or entity


def _values(grid: Grid, other: Grid) -> dict[str, Any]:
    """Per entity its values, under their attributes where both sides name the same ones."""
    named = all(set(grid[e]) == set(other[e]) and not any(a.startswith("#") for a in grid[e]) for e in grid)
    if named:
        return {entity: dict(row) for entity, row in grid.items()}
    return {entity: sorted(row.values()) for entity, row in grid.items()}


_READERS: dict[str, Callable[[str], Any]] = {"truth": _truth, "set": _set, "order": _order}
