"""Test code with a report at every check, so that a check that never ran is not passed.

A site is an `assert` or a unittest assertion (`self.assertEqual(...)`, `with self.assertRaises(...)`). Each becomes
    _check_.enter(3)
    try:
        assert f(1) == 2
    except BaseException as _error_:
        _check_.failed(3, _error_)
    else:
        _check_.passed(3)
and inside a `try` of the test's own, where exceptions have a meaning, enter, check, passed. A call whose result is
thrown away becomes a call in place: its changed arguments are written back (tester.py). Everything else of the test
stays as it is. The work is done here and not in the jail because candidates of a group share it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache

from r1mega.rewards.code_spec import CACHED_TESTS


@dataclass(frozen=True)
class Site:
    line: str
    """The check as written, shortened."""
    kind: str
    """always: must run and hold; sometimes (under a condition): must hold if it runs; never (`assert False`)."""


@dataclass(frozen=True)
class Instrumented:
    source: str
    sites: tuple[Site, ...]


@lru_cache(CACHED_TESTS)
def instrument(test: str) -> Instrumented:
    """SyntaxError where the test is no Python."""
    rewriter = _Rewriter()
    tree = ast.parse(test)
    tree.body = rewriter.block(tree.body)
    return Instrumented(ast.unparse(ast.fix_missing_locations(tree)), tuple(rewriter.sites))


LINE_CHARACTERS = 160
_CONDITIONAL = (ast.If, ast.ExceptHandler, ast.match_case)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class _Rewriter:
    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.conditional = False
        self.guarded = False
        """Inside the body of a `try` with handlers."""

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        return [new for statement in statements for new in self.statement(statement)]

    def statement(self, node: ast.stmt) -> list[ast.stmt]:
        if _is_check(node):
            return self.check(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            node.value.func = _call("_statement_", node.value.func)
            return [node]
        self.children(node)
        return [node]

    def children(self, node: ast.AST) -> None:
        """Rewrites every list of statements below, remembering what surrounds it."""
        outside = self.conditional, self.guarded
        if isinstance(node, _DEFINITIONS):
            self.guarded = False
        for field, value in ast.iter_fields(node):
            if not isinstance(value, list) or not value:
                continue
            inside = self.conditional, self.guarded
            self.conditional |= isinstance(node, _CONDITIONAL) or field == "orelse"
            self.guarded |= isinstance(node, ast.Try) and field == "body" and bool(node.handlers)
            if isinstance(value[0], ast.stmt):
                setattr(node, field, self.block(value))
            elif isinstance(value[0], (ast.ExceptHandler, ast.match_case)):
                for child in value:
                    self.children(child)
            self.conditional, self.guarded = inside
        self.conditional, self.guarded = outside

    def check(self, node: ast.stmt) -> list[ast.stmt]:
        site = len(self.sites)
        kind = "sometimes" if self.conditional else "always"
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant) and not node.test.value:
            kind = "never"
        line = ast.unparse(node)
        self.sites.append(Site(line[:LINE_CHARACTERS], kind))
        if isinstance(node, ast.With):
            self.children(node)
        enter, passed = _report("enter", site), _report("passed", site)
        if self.guarded:
            return [enter, node, passed]
        failed = _report("failed", site, "_error_")
        handler = ast.ExceptHandler(ast.Name("BaseException", ast.Load()), "_error_", [failed])
        return [enter, ast.Try([node], [handler], [passed], [])]


def _is_check(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Expr):
        return _is_assertion(node.value)
    return isinstance(node, ast.With) and any(_is_assertion(item.context_expr) for item in node.items)


def _is_assertion(node: ast.expr) -> bool:
    """self.assertSomething(...)"""
    function = node.func if isinstance(node, ast.Call) else None
    return (
        isinstance(function, ast.Attribute)
        and function.attr.startswith("assert")
        and isinstance(function.value, ast.Name)
        and function.value.id == "self"
    )


def _report(method: str, site: int, *names: str) -> ast.stmt:
    arguments: list[ast.expr] = [ast.Constant(site), *(ast.Name(name, ast.Load()) for name in names)]
    reporter = ast.Attribute(ast.Name("_check_", ast.Load()), method, ast.Load())
    return ast.Expr(ast.Call(reporter, arguments, []))


def _call(name: str, argument: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), [argument], [])
