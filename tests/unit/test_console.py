"""What the console prints on a terminal and into a file."""

from __future__ import annotations

import io

from r1mega.stages.console import HEADER_EVERY, Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rows_stand_under_their_titles() -> None:
    stream = io.StringIO()
    table = Console(stream).table(("step", "accuracy", "time/step", "kl"))
    table.row(3, {"accuracy": 0.125, "time/step": 1.5}, of=10)
    title, row = stream.getvalue().splitlines()
    assert title.split() == ["step", "accuracy", "step", "s", "kl"]
    assert row.split() == ["3", "12.5%", "1.50", "-"]
    assert len(title) == len(row)


def test_the_header_comes_back() -> None:
    stream = io.StringIO()
    table = Console(stream).table(("step", "loss"))
    for step in range(HEADER_EVERY + 1):
        table.row(step, {"loss": 1.0}, of=100)
    assert sum("loss" in line for line in stream.getvalue().splitlines()) == 2


def test_a_file_gets_no_progress_line() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.progress("sampling", 3, 10)
    console.line("done")
    assert stream.getvalue() == "done\n"


def test_a_terminal_s_progress_line_is_wiped_before_the_next_line() -> None:
    stream = Terminal()
    console = Console(stream)
    console.progress("sampling", 5, 10)
    drawn = stream.getvalue()
    assert drawn.endswith(" 5/10")
    assert "\n" not in drawn
    console.line("done")
    assert stream.getvalue().removeprefix(drawn) == "\r" + " " * len(drawn) + "\rdone\n"


def test_progress_may_be_of_nothing() -> None:
    stream = Terminal()
    Console(stream).progress("sampling", 0, 0)
    assert stream.getvalue().endswith("0/0")
