"""The command line: exit codes, one line for a mistake, the traceback of a fault in the run's directory."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from r1mega import cli
from r1mega.config import ConfigError, RunConfig
from r1mega.stages import sft
from r1mega.stages.console import Console
from r1mega.stages.run_directory import RunDirectory

BASE = "configs/tiny/base.py"
Stage = Callable[[RunConfig, RunDirectory, Console], None]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def raises(error: BaseException, begun: bool = True) -> Stage:
    def stage(config: RunConfig, directory: RunDirectory, console: Console) -> None:
        if begun:
            directory.begin()
        raise error

    return stage


def run(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str) -> int:
    monkeypatch.setattr(sft, "run", stage)
    return cli.main(["run", BASE, f"dir={tmp_path / 'run'}", *more])


@pytest.mark.parametrize(
    "error, begun, code, log",
    [
        (ConfigError("mend\n this"), True, 2, False),
        (ValueError("mend this"), False, 2, False),
        (FileNotFoundError("mend this"), False, 2, False),
        (ValueError("mend this"), True, 2, True),
        (RuntimeError("mend\tthis"), True, 1, True),
        (OSError(28, "mend this"), True, 1, True),
        (AssertionError("mend this"), False, 1, True),
        (KeyboardInterrupt(), True, 130, False),
    ],
    ids=repr,
)
def test_every_end_has_its_code_and_one_line(
    error: BaseException, begun: bool, code: int, log: bool,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(raises(error, begun), monkeypatch, tmp_path) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("r1mega: ")
    assert ("interrupted" if code == 130 else "mend this") in line
    assert (tmp_path / "run/error.log").exists() == log
    if log:
        assert type(error).__name__ in line
        assert line.endswith(f"(details: {tmp_path / 'run/error.log'})")
        assert "Traceback" in (tmp_path / "run/error.log").read_text()


def test_a_long_message_is_cut_on_the_screen_and_whole_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raises(RuntimeError("word " * 1000)), monkeypatch, tmp_path) == 1
    assert len(capsys.readouterr().err) < 1000
    assert "word " * 1000 in (tmp_path / "run/error.log").read_text()


def test_the_error_log_of_an_earlier_attempt_does_not_outlive_a_success(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(raises(RuntimeError("first")), monkeypatch, tmp_path) == 1
    assert run(lambda config, directory, console: None, monkeypatch, tmp_path) == 0
    assert not (tmp_path / "run/error.log").exists()


def test_show_prints_every_setting_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", BASE, "--show", "sft.batch_size=7", f"dir={tmp_path / 'run'}"]) == 0
    shown = capsys.readouterr().out
    assert "sft.batch_size=7" in shown
    assert not (tmp_path / "run").exists()


def test_the_run_directory_follows_from_the_config_file() -> None:
    assert cli.run_directory(RunConfig(), "configs/tiny/r1_zero.py") == Path("runs/tiny/r1_zero")
    assert cli.run_directory(RunConfig(dir="there"), "configs/tiny/r1_zero.py") == Path("there")


@pytest.mark.parametrize("arguments", [[], ["walk"], ["run"], ["bench", "nothing"], ["report"]])
def test_an_unknown_command_is_a_user_s_mistake(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: r1mega" in capsys.readouterr().err


def test_a_report_on_nothing_is_a_user_s_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere" in line


@pytest.mark.parametrize("arguments", [["run", BASE, "--shwo"], ["report", "a", "b=1"]])
def test_an_unknown_argument_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err
