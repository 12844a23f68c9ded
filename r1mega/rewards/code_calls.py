"""Assert tests over two jails: tests in one, the candidate in the other, and this relay of plain data between them.

The tests call stand-ins. Each call travels to the host, which gives it an unguessable id of its own and passes it to
the candidate's jail; the answer must repeat that id, once, and goes back to the tests as bytes that only the tester's
strict decoder reads (jailed/plain_data.py). The host itself never makes values of what a candidate wrote, only a
label of its first answer, and the candidate never sees the tests, the expected values or the channel on which the
verdict comes.

Changes that a candidate makes to its arguments are written back only for calls whose result the tests throw away
(`sort_in_place(a)`); otherwise it could empty a list from which the tests compute what they expect.
"""

from __future__ import annotations

import ast
import base64
import json
import marshal
import secrets
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from r1mega.rewards.code_asserts import Instrumented, instrument
from r1mega.rewards.code_spec import AssertTests
from r1mega.rewards.code_verdict import CodeVerdict
from r1mega.rewards.jailed.candidate import ID_BYTES
from r1mega.rewards.jailed.plain_data import MAX_BYTES, PlainDataError, decode, encode
from r1mega.rewards.sandbox import RunResult, Session

CHANNEL_FD = 3
RECEIVE_BYTES = 1 << 18
MAX_FRAME_BYTES = MAX_BYTES + 4096
DETAIL_CHARACTERS = 800
FOREVER = float("inf")
"""A session ends its program at the limits by itself, so no wait needs a deadline of ours."""
FIRST_ANSWER_BYTES = 64 << 10
"""Of an answer to "load"; an honest one is far shorter."""
BROKEN_TEST = {"NameError", "ImportError", "ModuleNotFoundError", "SyntaxError", "UnfitArgumentError"}
"""Errors of a test's own expression that say that the test is broken, not the answer."""


class EndedError(Exception):
    """The program in the jail has ended or closed its channel."""


class ForgeryError(Exception):
    """An answer nobody asked for."""


class Frames:
    """Frames of length and payload over a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.buffer = bytearray()

    def send(self, payload: bytes) -> None:
        try:
            self.session.send(len(payload).to_bytes(4, "big") + payload)
        except BrokenPipeError:
            raise EndedError from None

    def receive(self) -> bytes:
        length = int.from_bytes(self._take(4), "big")
        if length > MAX_FRAME_BYTES:
            raise ForgeryError(f"an answer of {length} bytes; at most {MAX_FRAME_BYTES} are passed on")
        return self._take(length)

    def _take(self, count: int) -> bytes:
        while len(self.buffer) < count:
            part = self.session.receive(RECEIVE_BYTES, FOREVER)
            if not part:
                raise EndedError
            self.buffer += part
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken


class Calls:
    """Questions to the candidate's jail, one at a time."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.answered = 0
        self.pending = b""

    def ask(self, body: bytes) -> None:
        self.pending = secrets.token_bytes(ID_BYTES)
        self.frames.send(self.pending + body)

    def answer(self) -> bytes:
        reply = self.frames.receive()
        if not secrets.compare_digest(reply[:ID_BYTES], self.pending):
            raise ForgeryError("an answer with an id that was not asked")
        self.pending = b""
        self.answered += 1
        return reply[ID_BYTES:]

    def check_silence(self) -> None:
        if self.frames.buffer:
            raise ForgeryError("more answers than questions")


@dataclass(frozen=True)
class Pair:
    """The two jails of one problem; whoever opened them closes them."""

    candidate: Session
    tester: Session


def run_asserts(pair: Pair, code: str, tests: AssertTests, *, first_only: bool) -> CodeVerdict:
    """The verdict on a candidate; "sandbox_fault" as soon as a jail fails.

    The test counts as passed when the tester says so with the nonce, every check ran, and none failed.
    """
    instrumented = instrument(tests.test)
    calls, tester = Calls(Frames(pair.candidate)), Frames(pair.tester)
    nonce = secrets.token_hex(16)
    names, classes = list(tests.entry_points), list(tests.classes)
    try:
        message = encode(["test", nonce, tests.setup, instrumented.source, names, classes, first_only])
    except PlainDataError as error:
        return CodeVerdict("unparsable_tests", 0, len(instrumented.sites), f"the tests are too long: {error}")
    try:
        load = encode(["load", tests.preamble, code, names, classes])
    except PlainDataError as error:
        return CodeVerdict("compile_error", 0, len(instrumented.sites), f"the program is too long: {error}")
    try:
        calls.ask(load)
        _send_tests(tester, pair, message)
        failed = _load_failure(calls.answer(), len(instrumented.sites))
        if failed is not None:
            return failed
        report = _relay(calls, tester, pair)
    except EndedError:
        return _candidate_ended(pair.candidate.finish(), len(instrumented.sites))
    except ForgeryError as error:
        return CodeVerdict("runtime_error", 0, len(instrumented.sites), f"forged answer: {error}")
    except TestsEndedError as error:
        return _tester_ended(error.result, len(instrumented.sites))
    return _judge(report, nonce, instrumented, calls.answered)


class TestsEndedError(Exception):
    """The tester's jail ended without a verdict."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(result.outcome)
        self.result = result


def _send_tests(tester: Frames, pair: Pair, message: bytes) -> None:
    try:
        tester.send(message)
    except EndedError:
        raise TestsEndedError(pair.tester.finish()) from None


def _relay(calls: Calls, tester: Frames, pair: Pair) -> bytes:
    """Carries calls and answers until the tester's verdict."""
    while True:
        try:
            frame = tester.receive()
        except EndedError:
            raise TestsEndedError(pair.tester.finish()) from None
        calls.check_silence()
        if frame[:1] == b"V":
            return frame[1:]
        calls.ask(frame[1:])
        answer = calls.answer()
        _send_tests(tester, pair, answer)


def _load_failure(reply: bytes, total: int) -> CodeVerdict | None:
    """None when the candidate's code ran and defined what is tested. The reply is the candidate's: only a label."""
    outcome, *words = _first_answer(reply)
    if outcome == "ok":
        return None
    if outcome == "compile":
        return CodeVerdict("compile_error", 0, total, _printable(words[0]))
    if outcome == "raise":
        kind = "memory" if "MemoryError" in words[:-1] else "runtime_error"
        return CodeVerdict(kind, 0, total, _printable(f"while loading: {words}"))
    return CodeVerdict("runtime_error", 0, total, "forged answer to the first request")


def _first_answer(reply: bytes) -> list[str]:
    """["ok"], ["compile", message], ["raise", base, ..., message], or ["forged"].

    Never `decode`: a few bytes of it may stand for ten thousand million numbers, or for an hour of arithmetic.
    """
    if len(reply) > FIRST_ANSWER_BYTES:
        return ["forged"]
    try:
        tree = json.loads(reply)
    except (ValueError, RecursionError):
        return ["forged"]
    match tree:
        case ["list", "ok", None]:
            return ["ok"]
        case ["list", "compile", str(message)]:
            return ["compile", message]
        case ["list", "raise", ["list", *bases], str(message)]:
            return ["raise", *(base for base in bases if isinstance(base, str)), message]
    return ["forged"]


def _printable(words: str) -> str:
    """Shortened, and without lone surrogates, which no log file takes."""
    return words[:DETAIL_CHARACTERS].encode("utf-8", "replace").decode()


def _candidate_ended(result: RunResult, total: int) -> CodeVerdict:
    words = result.stderr.decode(errors="replace").strip()[-300:]
    detail = f"the program ended before it answered: exit code {result.exit_code} {words}".strip()
    return CodeVerdict(OUTCOMES[result.outcome], 0, total, detail)


def _tester_ended(result: RunResult, total: int) -> CodeVerdict:
    """Ends of the tests themselves: over a limit, which a huge answer may cause, or by an exit of their own."""
    verdict = "unparsable_tests" if result.outcome == "exited" else OUTCOMES[result.outcome]
    words = result.stderr.decode(errors="replace").strip()[-300:]
    return CodeVerdict(
        verdict, 0, total, f"the tests ended without a verdict: {result.outcome} {words}".strip()
    )


OUTCOMES = {
    "exited": "runtime_error",
    "time": "time",
    "memory": "memory",
    "output": "output_limit",
    "fault": "sandbox_fault",
}
"""RunResult.outcome -> verdict of a program that ended before it should."""


def _judge(report: bytes, nonce: str, instrumented: Instrumented, answered: int) -> CodeVerdict:
    _, said, ran, failed, first = decode(report)
    assert said == nonce, "the tester's verdict carries another nonce"
    kinds = [site.kind for site in instrumented.sites]
    good = set(ran) - set(failed)
    if first is None:
        good |= {number for number, kind in enumerate(kinds) if kind == "never"}
    counted = good | set(failed) | {number for number, kind in enumerate(kinds) if kind != "sometimes"}
    total, passed = len(counted - {-1}), len(good)
    if first is None:
        missing = sorted(counted - good)
        if missing:
            line = instrumented.sites[missing[0]].line
            return CodeVerdict("wrong_answer", passed, total, f"never ran: {line}")
        return CodeVerdict("passed", passed, total)
    number, kind, name, message = first
    where = instrumented.sites[number].line if number >= 0 else "outside of the checks"
    detail = _printable(f"{where}: {name}: {message}")
    return CodeVerdict(_failure(kind, name, answered), passed, total, detail)


def _failure(kind: str, name: str, answered: int) -> str:
    """answered: questions that the candidate answered, the first of which was to load."""
    if kind == "raised":
        return "memory" if name == "MemoryError" else "runtime_error"
    broken = kind == "error" and (name in BROKEN_TEST or answered < 2)
    return "unparsable_tests" if broken else "wrong_answer"


# ---------------------------------------------------------------- the programs in the jails

JAILED = Path(__file__).parent / "jailed"


@cache
def jailed_program(name: str) -> str:
    """jailed/<name>.py with all that it needs of its neighbours, as source for a jail that has none of our modules.

    The source only loads code that was compiled here: the jail runs the same interpreter, and compiling anew in each
    would cost more than most tests.
    """
    body: list[ast.stmt] = []
    for part in ("plain_data", "channel", name):
        tree = ast.parse((JAILED / f"{part}.py").read_text(encoding="utf-8"))
        body += [node for node in tree.body if not _is_ours(node)]
    source = f"from __future__ import annotations\n{ast.unparse(ast.Module(body, []))}\nserve({CHANNEL_FD})\nos._exit(0)\n"
    compiled = marshal.dumps(compile(source, f"{name}.py", "exec", dont_inherit=True, optimize=2))
    return f"import base64, marshal\nexec(marshal.loads(base64.b64decode({base64.b64encode(compiled)!r})))\n"


def _is_ours(node: ast.stmt) -> bool:
    """An import that has no place in the one file: of our modules, or of __future__."""
    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    return module == "__future__" or module.startswith("r1mega.")
