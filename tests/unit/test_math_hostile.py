"""What a hostile answer can do: nothing. No code of it runs, nothing hangs, and the next answer is right."""

# ruff: noqa: RUF001  (look-alike characters are part of the attack)

from __future__ import annotations

import base64
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest

from r1mega.rewards.math_answer import extract_answer, quick_compare
from r1mega.rewards.workers import WorkerPool

CANARY = Path(f"/tmp/r1mega-canary-{os.getpid()}")
RUN = f"open('{CANARY}','w')"
VERDICTS = {"unequal", "unparsable", "timeout", "too_long", "memory"}


class _Dropper:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


NUMBERS = [
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "10^{10^{10}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "(10^{10})^{(10^{10})}",
    "1000000!",
    "((10!)!)!",
    "3!!!!!!!!",
    "1e999999999",
    "1e-999999999",
    "1.5 × 10^{99999999999}",
    "5" * 3999,
    "0." + "3" * 3900,
    r"\frac{1}{10^{1000000}}",
    r"10^{-10^{10}}",
    r"\binom{1000000}{500000}",
    r"\binom{10^9}{5}",
    r"\sqrt[1000000]{2^{999999}}",
    r"\sqrt[0]{5}",
    r"\frac{0}{0}",
    r"\infty - \infty",
    "nan",
    "0^0",
    "1/0",
]
SHAPES = [
    "(" * 2000 + "5" + ")" * 2000,
    "(" * 2000,
    "{" * 2000,
    "[" * 1000 + "]" * 1000,
    r"\{" * 900 + r"\}" * 900,
    r"\frac" * 700,
    r"\frac{1}{" * 300 + "2" + "}" * 300,
    r"\sqrt{" * 300 + "2" + "}" * 300,
    r"\left(" * 300,
    r"\boxed{" * 500 + "5" + "}" * 400,
    "1+" * 1900 + "1",
    "-" * 3000 + "6",
    "x^" * 1000 + "x",
    "|" * 2000,
    "a,b," * 900,
    r"\pm 1 " * 500,
    r"\begin{pmatrix}" * 200,
    r"\begin{pmatrix}" + "&".join("1" * 900) + r"\end{pmatrix}",
    "$" * 3000,
    "\\" * 3000,
    "=" * 2000,
    "<" * 2000,
    r"\cup" * 800,
    "4 " * 1900,
    "6," * 1900 + "5",
    "1:" * 1500 + "1",
]
ALGEBRA = [
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{1000000000}",
    r"\int_0^{\infty} e^{-x^{x^x}} dx",
    r"\int \sin(\sin(\sin(\tan(x^x)))) dx",
    r"\sum_{k=1}^{\infty}\frac{1}{k^{k}}",
    r"\sum_{n=1}^{10^{12}} n!",
    r"\lim_{x\to 0} \sin(\sin(\sin(\sin(x))))^{1/x}",
    r"\prod_{n=1}^{10^9} n",
    "(x+1)^{100000}",
    "(x+y+z+1)^{300}-(x+y+z+1)^{300}",
    r"\log(\log(\log(\log(0))))",
    r"\sin(" * 30 + "x^{x}" + ")" * 30,
    r"\det\begin{pmatrix}" + r"\\".join("&".join(f"x^{{{i * j}}}" for j in range(9)) for i in range(9)) + r"\end{pmatrix}",
    r"x^{1000000}-1=0",
    r"\sqrt{1+\sqrt{2+\sqrt{3+\sqrt{4+\sqrt{5+\sqrt{6+x}}}}}}=x^{7}",
    r"e^{e^{e^{e^{10}}}}",
    r"\frac{d^{500}}{dx^{500}} x^{x^{x}}",
]  # fmt: skip
CODE = [
    f"__import__('os').system('touch {CANARY}')",
    f"$__import__('os').system('touch {CANARY}')$",
    rf"\boxed{{__import__('pathlib').Path('{CANARY}').touch()}}",
    f"exec({RUN!r})",
    f"eval({RUN!r})",
    f"1 if {RUN} else 2",
    f"[{RUN} for _ in (1,)]",
    f"(lambda: {RUN})()",
    f"x = {RUN}",
    rf"\operatorname{{{RUN}}}",
    rf"\text{{{RUN}}} + 1",
    r"\operatorname{__import__}(\text{os})",
    "().__class__.__bases__[0].__subclasses__()",
    "{0.__class__.__init__.__globals__}",
    "%s %d %n {0} {} {x!r}",
    f"f'{{{RUN}}}'",
    rf"\input{{/etc/passwd}} \write18{{touch {CANARY}}}",
    rf"\immediate\write18{{touch {CANARY}}}",
    rf"\directlua{{os.execute('touch {CANARY}')}}",
    r"\csname input\endcsname{/etc/shadow} \def\x{\x\x}\x",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"; touch {CANARY} #",
    base64.b64encode(pickle.dumps(_Dropper())).decode(),
    pickle.dumps(_Dropper(), 0).decode("latin-1"),
    "S.__class__.__mro__[-1]",
    f"Symbol('x').subs('x', \"{RUN}\")",
    f"sympify(\"{RUN}\")",
    '{"id": 1, "verdict": "equal"}',
]  # fmt: skip
CHARACTERS = [
    "\x00\x01\x02",
    "5\x00",
    "\ud800",
    "🎉" * 1000,
    "﷽" * 1300,
    "ﬁ½⅓¼" * 900,
    "e" + "\u0301" * 3000,
    "\u202e6\u202d",
    "\u200b" * 3000 + "6",
    "⁹" * 3000,
    "√" * 3000,
    "６" * 3000,
]
HOSTILE = NUMBERS + SHAPES + ALGEBRA + CODE + CHARACTERS
HARD = (r"\sqrt{8}+x", r"2\sqrt{2}+x")


def test_hostile_answers_neither_hang_nor_run_nor_spoil_the_next() -> None:
    assert len(HOSTILE) >= 100
    before = set(os.listdir("/"))  # the workers' directory
    with WorkerPool(2, cpu_seconds=0.25, memory_mib=1024) as pool:
        futures = []
        for text in HOSTILE:
            futures += [pool.submit("math", "5", text), pool.submit("math", *HARD)]
        verdicts = [future.result(timeout=240) for future in futures]
    assert not CANARY.exists()
    assert set(os.listdir("/")) == before
    spoiled = [text[:60] for text, verdict in zip(HOSTILE, verdicts[1::2]) if verdict != "equal"]
    assert not spoiled
    odd = [(text[:60], verdict) for text, verdict in zip(HOSTILE, verdicts[::2]) if verdict not in VERDICTS]
    assert not odd, Counter(verdicts[::2])
    assert "timeout" in verdicts


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_scoring_process_itself_never_takes_long_over_a_hostile_answer(text: str) -> None:
    """A linear pass over at most MAX_ANSWER characters: anything worse would end the test by its time limit."""
    assert quick_compare("5", text) in {None, "unequal", "unparsable", "too_long"}
    assert quick_compare(text, text) in {"equal", "unequal", "unparsable", "too_long", None}
    extract_answer(f"<think>x</think> {text} \\boxed{{{text}}} #### {text}", last_number=True)


def test_the_canary_sings_when_something_runs() -> None:
    """The proof above is worth something: the same texts do run where they are executed."""
    try:
        exec(CODE[0])
        assert CANARY.exists()
        CANARY.unlink()
        pickle.loads(base64.b64decode(base64.b64encode(pickle.dumps(_Dropper()))))
        assert CANARY.exists()
    finally:
        CANARY.unlink(missing_ok=True)


def test_a_million_characters_are_read_once_and_refused() -> None:
    texts = ["<answer>" + "9" * 10**6 + "</answer>", "<answer>" * 125_000, r"\boxed{" * 140_000, "#" * 10**6]
    texts += [r"\boxed{5}" * 100_000, "</think>" * 125_000, "-" * 10**6, "1," * 500_000]
    for text in texts:
        answer = extract_answer(text, last_number=True)
        assert answer is None or quick_compare("5", answer) in (
            "too_long",
            "equal",
            "unequal",
            "unparsable",
            None,
        )
