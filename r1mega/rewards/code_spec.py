"""The tests of a programming problem, as the text in `Prompt.answer`, and conversions of public data sets to it.

A JSON object of one of these forms:
- {"stdin": [text, ...], "stdout": [text, ...]}, with "language" ("python" or "c++") and "tolerance" (numeric tokens
  may differ by that much, absolutely or relatively; without it they are compared as text);
- {"asserts": ["assert f(1) == 2", ...]} or {"test": text}, with "entry_point" (a name or several; without it the
  names that the tests use and nobody defines), "classes" (those that the tests construct objects of), "setup" (code
  the tests need, which the candidate never sees) and "preamble" (code that stands before the candidate's);
- {"inputs": [...], "outputs": [...]}, as APPS and LiveCodeBench have it: with "fn_name" each input is the list of
  arguments, or one JSON text per line; without it, standard input and output.
"""

from __future__ import annotations

import ast
import builtins
import json
import symtable
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from r1mega.config import ConfigError
from r1mega.rewards.code_answer import LANGUAGES
from r1mega.rewards.jailed.plain_data import MAX_BYTES

CACHED_TESTS = 256
"""Parsed specifications that are kept: a group's candidates share one."""


@dataclass(frozen=True)
class StdinTests:
    language: str
    cases: tuple[tuple[str, str], ...]
    """(standard input, expected standard output)."""
    tolerance: float | None = None


@dataclass(frozen=True)
class AssertTests:
    test: str
    entry_points: tuple[str, ...]
    """Names of the candidate's that the tests may call; HumanEval's check(candidate) gets the first."""
    setup: str = ""
    preamble: str = ""
    classes: tuple[str, ...] = ()
    language: str = "python"


@lru_cache(CACHED_TESTS)
def parse_tests(text: str) -> StdinTests | AssertTests:
    """ConfigError names what is wrong."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"tests of a program: not JSON ({error}): {text[:60]!r}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"tests of a program: a JSON object is needed, not {text[:60]!r}")
    for key, (parse, known) in _FORMS.items():
        if key in fields:
            unknown = sorted(set(fields) - known)
            if unknown:
                raise ConfigError(f"tests of a program: {unknown[0]!r} is not known beside {key!r}")
            return _fit(_parsed(parse, fields))
    raise ConfigError(f"tests of a program: none of {', '.join(_FORMS)} in {sorted(fields)}")


def _parsed(parse: Any, fields: Mapping[str, Any]) -> StdinTests | AssertTests:
    try:
        tests: StdinTests | AssertTests = parse(fields)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(f"tests of a program: they cannot be compiled ({error})") from None
    return tests


def _fit(tests: StdinTests | AssertTests) -> StdinTests | AssertTests:
    """ConfigError for what cannot be sent to a jail: text that is no UTF-8, or too much of it."""
    if isinstance(tests, StdinTests):
        texts = [text for case in tests.cases for text in case]
    else:
        texts = [tests.setup, tests.preamble, tests.test]
        size = sum(len(json.dumps(text)) for text in texts)
        if size > MAX_BYTES:
            raise ConfigError(f"tests of a program: {size} bytes of code; make it {MAX_BYTES} or less")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            bad = text[error.start]
            raise ConfigError(
                f"tests of a program: {bad!r} after {text[: error.start][-30:]!r} is no UTF-8; remove it"
            ) from None
    return tests


def _stdin_tests(fields: Mapping[str, Any], inputs: str = "stdin", outputs: str = "stdout") -> StdinTests:
    language = _text(fields, "language", "python")
    if language not in LANGUAGES:
        raise ConfigError(f"tests of a program: language {language!r}; known are {', '.join(LANGUAGES)}")
    tolerance = fields.get("tolerance")
    if tolerance is not None and not (type(tolerance) in (int, float) and 0 < tolerance < 1):
        raise ConfigError(f"tests of a program: tolerance {tolerance!r}; a number between 0 and 1 is needed")
    pairs = zip(_texts(fields, inputs), _texts(fields, outputs), strict=_same_length(fields, inputs, outputs))
    return StdinTests(language, tuple(pairs), tolerance)


def _assert_tests(fields: Mapping[str, Any]) -> AssertTests:
    _python_only(fields)
    test = "\n".join(_texts(fields, "asserts")) if "asserts" in fields else _text(fields, "test")
    setup, preamble = _text(fields, "setup", ""), _text(fields, "preamble", "")
    for name, source in (
        ("asserts" if "asserts" in fields else "test", test),
        ("setup", setup),
        ("preamble", preamble),
    ):
        _check_syntax(name, source)
    classes = _names(fields, "classes")
    free = free_names(setup + "\n" + test)
    names = _names(fields, "entry_point") or tuple(
        name for name in free if name not in classes and name not in sys.stdlib_module_names
    )
    if not (names or classes):
        raise ConfigError(
            "tests of a program: they call nothing that the candidate defines; name an entry_point"
        )
    modules = [name for name in free if name in sys.stdlib_module_names and name not in (*names, *classes)]
    imports = "".join(f"import {name}\n" for name in modules)
    return AssertTests(test, names, imports + setup, preamble, classes)


def _call_tests(fields: Mapping[str, Any]) -> StdinTests | AssertTests:
    function = fields.get("fn_name")
    if not function:
        return _stdin_tests(fields, "inputs", "outputs")
    _python_only(fields)
    if not (isinstance(function, str) and function.isidentifier()):
        raise ConfigError(f"tests of a program: fn_name {function!r} is no name")
    _same_length(fields, "inputs", "outputs")
    expected = [_output(value) for value in fields["outputs"]]
    wrapped = all(isinstance(value, list) and len(value) == 1 for value in expected)
    lines = [
        f"assert _same({function}(*{_arguments(value)!r}), {output!r}, {wrapped})"
        for value, output in zip(fields["inputs"], expected, strict=True)
    ]
    preamble = _text(fields, "preamble", "")
    _check_syntax("preamble", preamble)
    return AssertTests("\n".join(lines), (function,), _SAME, preamble)


_SAME = """
def _lists(value):
    if isinstance(value, (list, tuple)):
        return [_lists(part) for part in value]
    if isinstance(value, dict):
        return {key: _lists(part) for key, part in value.items()}
    return value

def _same(value, expected, wrapped):
    value = _lists(value)
    return value == expected or (wrapped and value == expected[0])
"""
"""JSON knows no tuples; APPS wraps some expected values in a list of one."""

_FORMS: dict[str, tuple[Any, set[str]]] = {
    "stdin": (_stdin_tests, {"stdin", "stdout", "language", "tolerance"}),
    "asserts": (_assert_tests, {"asserts", "setup", "preamble", "entry_point", "classes", "language"}),
    "test": (_assert_tests, {"test", "setup", "preamble", "entry_point", "classes", "language"}),
    "inputs": (_call_tests, {"inputs", "outputs", "fn_name", "language", "tolerance", "preamble"}),
}


def _text(fields: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = fields.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"tests of a program: {key} must be text, not {str(value)[:60]!r}")
    return value


def _texts(fields: Mapping[str, Any], key: str) -> list[str]:
    values = fields.get(key)
    if not (isinstance(values, list) and values and all(isinstance(value, str) for value in values)):
        raise ConfigError(f"tests of a program: {key} must be a list of texts with at least one")
    return values


def _same_length(fields: Mapping[str, Any], inputs: str, outputs: str) -> bool:
    counts = [len(fields[key]) if isinstance(fields.get(key), list) else 0 for key in (inputs, outputs)]
    if counts[0] != counts[1] or not counts[0]:
        raise ConfigError(
            f"tests of a program: {counts[0]} {inputs} and {counts[1]} {outputs}; as many are needed, and one at least"
        )
    return True


def _names(fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = fields.get(key, [])
    names = tuple(values) if isinstance(values, list) else (values,)
    for name in names:
        if not (isinstance(name, str) and name.isidentifier()):
            raise ConfigError(f"tests of a program: {key} {name!r} is no name")
    return names


def _python_only(fields: Mapping[str, Any]) -> None:
    if fields.get("language", "python") != "python":
        raise ConfigError(
            f"tests of a program: language {fields['language']!r} has stdin and stdout tests only"
        )


def _check_syntax(key: str, source: str) -> None:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"tests of a program: {key} is no Python: {error}") from None


def _arguments(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        try:
            return [json.loads(line) for line in value.splitlines() if line.strip()]
        except ValueError as error:
            raise ConfigError(
                f"tests of a program: input {value[:60]!r} is not JSON lines ({error})"
            ) from None
    raise ConfigError(
        f"tests of a program: input {str(value)[:60]!r} is neither a list of arguments nor text"
    )


def _output(value: Any) -> Any:
    """LiveCodeBench writes the expected value as JSON text; other text stands for itself."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def free_names(source: str) -> list[str]:
    """Global names that Python source uses, does not bind, and that are no builtins; in order of the alphabet."""
    used: set[str] = set()
    bound: set[str] = set()

    def visit(table: symtable.SymbolTable) -> None:
        for symbol in table.get_symbols():
            if table.get_type() == "module" and (symbol.is_assigned() or symbol.is_imported()):
                bound.add(symbol.get_name())
            elif symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global()):
                used.add(symbol.get_name())
            elif symbol.is_declared_global() and symbol.is_assigned():
                bound.add(symbol.get_name())
        for child in table.get_children():
            visit(child)

    visit(symtable.symtable(source, "tests.py", "exec"))
    return sorted(name for name in used - bound if not hasattr(builtins, name) and not name.startswith("__"))


# ---------------------------------------------------------------- public data sets


def humaneval_tests(row: Mapping[str, Any]) -> str:
    """A row of HumanEval. What stands in the prompt above the function (imports, helpers) is preamble and setup.

    So the tests use the prompt's own helpers, not what a candidate calls by the same name.
    """
    above = _above(row["prompt"], row["entry_point"])
    return json.dumps(
        {"test": row["test"], "entry_point": row["entry_point"], "setup": above, "preamble": above}
    )


def _above(prompt: str, entry_point: str) -> str:
    tree = ast.parse(prompt)
    first = next(node.lineno for node in tree.body if getattr(node, "name", "") == entry_point)
    return "".join(prompt.splitlines(keepends=True)[: first - 1])


def mbpp_tests(row: Mapping[str, Any]) -> str:
    """A row of MBPP. What the reference solution defines and the tests use is what a candidate must define.

    That may be called like a builtin (row 126 defines `sum`).
    """
    setup, asserts = row["test_setup_code"], row["test_list"]
    used = {
        node.id for node in ast.walk(ast.parse("\n".join([setup, *asserts]))) if isinstance(node, ast.Name)
    }
    defined = [node for node in ast.parse(row["code"]).body if getattr(node, "name", "") in used]
    classes = [node.name for node in defined if isinstance(node, ast.ClassDef)]
    names = [node.name for node in defined if isinstance(node, ast.FunctionDef)]
    return json.dumps({"asserts": asserts, "setup": setup, "entry_point": names, "classes": classes})


def livecodebench_tests(cases: Sequence[Mapping[str, str]], fn_name: str = "") -> str:
    """LiveCodeBench's list of {"input", "output", "testtype"}; fn_name is in its metadata for functional tests."""
    return json.dumps(
        {
            "inputs": [case["input"] for case in cases],
            "outputs": [case["output"] for case in cases],
            "fn_name": fn_name,
        }
    )
