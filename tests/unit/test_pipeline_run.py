"""Pipelines of small real programs, run as users run them: nothing twice, killed anywhere, bad input in one line.

Every program appends its stage's name to `log`, outside the pipeline's folder, as it starts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PIPELINE = '''
from r1mega.stages.command import CommandStage
from r1mega.stages.graph import Pipeline, Stage

def program(name, text, makes="hf", **paths):
    return CommandStage(argv=("sh", "-c", f"echo {name} >> log; " + text), makes=(makes,), paths=paths)

pipeline = Pipeline(dir="run", stages=(
    Stage("base", program("base", "mkdir {out}/hf; cp source {out}/hf/weights", source="source")),
    Stage("rows", program("rows", "head -n 1 {model}/weights > {out}/data.jsonl", "data.jsonl"),
          {"paths.model": "base/hf"}),
    Stage("dev", program("dev", "mkdir {out}/hf; cat {rows} {model}/weights > {out}/hf/weights"),
          {"paths.model": "base/hf", "paths.rows": "rows/data.jsonl"}),
    Stage("copy", program("copy", "test ! -e wait || sleep 100; mkdir {out}/hf; cp {rows} {out}/hf"),
          {"paths.rows": "rows/data.jsonl"}),
))
'''  # fmt: skip
ALL = ["base", "rows", "dev", "copy"]


@dataclass
class Finished:
    code: int
    out: str
    err: str


class Project:
    """A pipeline's file, its source data and its run directory."""

    def __init__(self, folder: Path):
        self.folder, self.run_dir = folder, folder / "run"
        self.file = folder / "mine/pipeline.py"

    def write(self) -> Project:
        self.file.parent.mkdir()
        self.file.write_text(PIPELINE)
        (self.folder / "source").write_text("one\ntwo\n")
        return self

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [sys.executable, "-m", "r1mega", "pipeline", str(self.folder / "mine"), *arguments],
            cwd=self.folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *arguments: str) -> Finished:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=200)
        return Finished(process.returncode, out, err)

    def ran(self) -> list[str]:
        """Stages whose programs started since the last call."""
        log = self.folder / "log"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    def records(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "pipeline.json").read_text())["stages"]

    def edit(self, old: str, new: str) -> None:
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))

    def content(self, path: str) -> str:
        return (self.run_dir / path).read_text()

    def refused(self, *arguments: str) -> str:
        """The one line that refuses; nothing ran."""
        end = self.run(*arguments)
        assert (end.code, self.ran()) == (2, []), end
        (line,) = end.err.splitlines()
        return line


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return Project(tmp_path).write()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("finished")).write()
    end = project.run()
    assert (end.code, end.err, project.ran()) == (0, "", ALL)
    return project


@pytest.fixture
def done(finished: Project, tmp_path: Path) -> Project:
    """A copy of a finished pipeline: its paths are relative to where it is run."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    return Project(tmp_path)


def until(condition: Callable[[], object], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_finished_pipeline_runs_nothing_and_records_what_it_cost(done: Project) -> None:
    assert (done.content("dev/hf/weights"), done.content("copy/hf/data.jsonl")) == (
        "one\none\ntwo\n",
        "one\n",
    )
    record = done.records()["dev"]
    assert record["status"] == "finished"
    assert record["attempts"] == 1
    assert record["wall_seconds"] >= record["cpu_seconds"] * 0.1 > 0
    assert record["outputs"]["hf"]
    assert record["inputs"]["rows/data.jsonl"] == done.records()["rows"]["outputs"]["data.jsonl"]
    end = done.run()
    assert (end.code, done.ran(), end.out.count("finished, unchanged")) == (0, [], 4)


def test_what_follows_runs_again_only_if_the_outputs_changed(done: Project) -> None:
    (done.folder / "source").write_text("one\n3\n")  # the first line, and so `rows`, comes out the same
    plan = done.run("--dry-run")
    words = [line.split("]")[1].split(maxsplit=3)[2:] for line in plan.out.splitlines()]
    assert words == [
        ["again", "input source"],
        ["maybe", "if base/hf comes out differently"],
        ["maybe", "if base/hf, rows/data.jsonl comes out differently"],
        ["maybe", "if rows/data.jsonl comes out differently"],
    ]
    assert done.ran() == []
    assert done.run().code == 0
    assert done.ran() == ["base", "rows", "dev"]
    assert done.content("dev/hf/weights") == "one\none\n3\n"
    assert done.content("dev.replaced-1/hf/weights") == "one\none\ntwo\n"


def test_a_changed_config_runs_its_stage_again_and_keeps_the_old_work(done: Project) -> None:
    done.edit("cat {rows}", "cat {rows} {rows}")
    plan = done.run("--dry-run")
    assert "dev   again     config: argv" in plan.out
    assert not (done.run_dir / "dev.replaced-1").exists()
    assert done.run().code == 0
    assert done.ran() == ["dev"]
    assert done.content("dev/hf/weights") == "one\none\none\ntwo\n"
    assert done.content("dev.replaced-1/hf/weights") == "one\none\ntwo\n"


def test_a_changed_code_version_runs_again_unless_told_not_to(done: Project) -> None:
    state = json.loads((done.run_dir / "pipeline.json").read_text())
    for record in state["stages"].values():
        record["code"] = "of another day"
    (done.run_dir / "pipeline.json").write_text(json.dumps(state))
    assert done.run("--dry-run", "--ignore-code").out.count("finished, unchanged") == 4
    plan = done.run("--dry-run", "--only", "base")
    assert plan.out.strip().endswith("again     code")


def test_from_runs_a_stage_and_what_depends_on_it_even_over_a_kill(done: Project) -> None:
    (done.folder / "wait").touch()
    process = done.start("--from", "rows")
    until(lambda: "copy" in (done.folder / "log").read_text() if (done.folder / "log").exists() else False)
    process.kill()
    process.communicate()
    assert done.ran() == ["rows", "dev", "copy"]
    (done.folder / "wait").unlink()
    assert done.run().code == 0  # without --from: what it began is continued
    assert done.ran() == ["copy"]
    assert (done.run_dir / "copy.replaced-1").is_dir()
    assert not (done.run_dir / "copy.replaced-2").exists()


def test_only_runs_one_stage(fresh: Project) -> None:
    assert "stage dev needs base/hf, and base is not finished" in fresh.refused("--only", "dev")
    assert (fresh.run("--only", "base").code, fresh.ran()) == (0, ["base"])
    assert (fresh.run("--only", "base", "--from", "base").code, fresh.ran()) == (0, ["base"])
    assert (fresh.run().code, fresh.ran()) == (0, ALL[1:])
    fresh.edit("cp source", "cp -p source")
    end = fresh.run("--only", "rows")
    assert (end.code, fresh.ran()) == (0, [])
    assert "rows takes the base that is there; base: config: argv" in end.out


def test_killed_anywhere_it_continues_and_no_finished_stage_runs_again(fresh: Project) -> None:
    """SIGKILL as each program starts, as soon as each result is there, and in the middle of a long stage."""
    finished: set[str] = set()
    log = fresh.folder / "log"
    for name in ALL:
        results = fresh.run_dir / name / "results.json"
        for seen in (lambda name=name: log.exists() and name in log.read_text(), results.exists):
            process = fresh.start()
            until(seen)
            process.kill()
            process.communicate()
            started = set(fresh.ran())
            assert not started & finished
            finished |= {stage for stage in ALL if (fresh.run_dir / stage / "results.json").exists()}
    end = fresh.run()
    assert end.code == 0, end
    assert not set(fresh.ran()) & finished
    assert fresh.content("dev/hf/weights") == "one\none\ntwo\n"
    assert all(record["status"] == "finished" for record in fresh.records().values())
    assert not list(fresh.run_dir.glob("*.replaced-*"))


def test_an_interrupt_ends_the_stage_too_and_exits_with_130(fresh: Project) -> None:
    (fresh.folder / "wait").touch()
    process = fresh.start()
    until(lambda: (fresh.folder / "log").exists() and "copy" in (fresh.folder / "log").read_text())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "r1mega: interrupted; the same command continues from the last checkpoint\n"
    assert fresh.records()["copy"]["status"] == "running"
    (fresh.folder / "wait").unlink()
    fresh.ran()
    assert (fresh.run().code, fresh.ran()) == (0, ["copy"])
    assert fresh.records()["copy"]["attempts"] == 2


def test_a_second_pipeline_in_the_same_folder_is_refused(fresh: Project) -> None:
    (fresh.folder / "wait").touch()
    process = fresh.start()
    until(lambda: (fresh.folder / "log").exists() and "copy" in (fresh.folder / "log").read_text())
    fresh.ran()
    assert f"another pipeline is using this directory (process {process.pid})" in fresh.refused()
    process.terminate()
    process.communicate()


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("exit 3", 1, "stage rows: RuntimeError: sh ended with exit code 3"),
        ("true", 2, "stage rows: sh ended well and made no data.jsonl in {out}: mend argv or makes"),
        ("kill -9 $PPID; exec sleep 100", 1, "stage rows: killed by SIGKILL"),
    ],
)
def test_a_stage_that_fails_stops_the_pipeline_with_its_name(
    fresh: Project, text: str, code: int, words: str
) -> None:
    fresh.edit(
        "head -n 1 {model}/weights > {out}/data.jsonl",
        f"{text} {{out}}" if text == "true" else f"{text}; {{out}}",
    )
    end = fresh.run()
    (line,) = end.err.splitlines()
    assert (end.code, fresh.ran()) == (code, ["base", "rows"])
    assert line.startswith(f"r1mega: {words}"), line
    assert fresh.records()["rows"]["status"] == "failed"
    assert "rows  continue  failed before" in fresh.run("--dry-run").out


def test_a_stage_refused_before_it_began_leaves_nothing_to_move_aside(fresh: Project) -> None:
    fresh.edit('"sh", "-c", f"echo {name}', '"sh" if name == "base" else "no-such", "-c", f"echo {name}')
    end = fresh.run()
    assert (end.code, fresh.ran()) == (2, ["base"])
    assert end.err.startswith("r1mega: stage rows: ")
    fresh.file.write_text(PIPELINE)
    assert "rows  run       failed before it began" in fresh.run("--dry-run").out
    assert (fresh.run().code, fresh.ran()) == (0, ALL[1:])
    assert not list(fresh.run_dir.glob("*.replaced-*"))


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_path_that_is_not_there_is_told_before_the_first_stage(
    fresh: Project, options: tuple[str, ...]
) -> None:
    line = fresh.refused("dev.paths.more=not/here", *options)
    assert "stage dev: paths.more=not/here: no such file or folder" in line
    assert f"paths begin at the working directory, here {fresh.folder}: start where" in line
    assert "or set dev.paths.more=PATH" in line
    assert not fresh.run_dir.exists()


def test_what_a_finished_stage_has_read_may_be_gone_until_it_runs_again(done: Project) -> None:
    (done.folder / "source").unlink()
    assert (done.run().code, done.ran()) == (0, [])
    assert "stage base: paths.source=source: no such file" in done.refused("--from", "base")


def test_an_input_that_was_replaced_or_lost_is_named(done: Project) -> None:
    weights = done.run_dir / "base/hf/weights"
    weights.write_text("of another model\n")
    line = done.refused()
    assert "stage rows: its input run/base/hf is not what base made" in line
    assert (
        "put it back, make it anew with --from base, or say that it is yours with rows.paths.model=PATH"
        in line
    )
    weights.unlink()
    (done.run_dir / "base/hf").rmdir()
    assert (
        "base/hf is missing, though base is finished: put it back, or make it anew with --from base"
        in done.refused()
    )
    assert (done.run("--from", "base").code, done.ran()) == (0, ALL)


def test_an_input_may_be_any_path(done: Project) -> None:
    (done.folder / "own").mkdir()
    (done.folder / "own/weights").write_text("mine\n")
    assert done.run(f"dev.paths.model={done.folder}/own").code == 0
    assert done.ran() == ["dev"]
    assert done.content("dev/hf/weights") == "one\nmine\n"


def test_a_folder_of_other_work_is_refused(fresh: Project) -> None:
    (fresh.run_dir / "rows").mkdir(parents=True)
    (fresh.run_dir / "rows/results.json").write_text('{"finished": true}')
    end = fresh.run()
    assert (end.code, fresh.ran()) == (2, ["base"])
    assert end.err.startswith("r1mega: run/rows holds work that this pipeline did not make")


def test_a_directory_of_another_pipeline_is_refused(done: Project) -> None:
    (done.folder / "mine").rename(done.folder / "other")
    (done.folder / "mine").symlink_to("other")
    line = done.refused()
    assert "belongs to the pipeline 'mine', not 'other': choose another with dir=PATH" in line


def test_a_folder_that_was_moved_is_still_finished(done: Project) -> None:
    done.run_dir.rename(done.folder / "elsewhere")
    end = done.run(f"dir={done.folder}/elsewhere")
    assert (end.code, done.ran()) == (0, [])


@pytest.mark.parametrize("option", ["--from", "--only"])
def test_an_unknown_stage_is_told_its_neighbour(fresh: Project, option: str) -> None:
    assert "no stage 'row'; did you mean 'rows'? the stages are base, rows, dev, copy" in fresh.refused(
        option, "row"
    )
    assert not fresh.run_dir.exists()


def test_a_daemon_s_cpu_time_counts_and_its_end_is_awaited(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    program = (
        "import sys; from r1mega.stages import child\n"
        f"ended = child.run(['sh', '-c', 'setsid {sys.executable} -c \"$0\" & exit 0', {burn!r}])\n"
        "print(ended.cpu_seconds, ended.leftovers)"
    )
    end = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, leftovers = end.stdout.split()
    assert float(seconds) >= 0.3
    assert leftovers == "False"


def test_stderr_passes_through_but_for_the_command_s_own_line() -> None:
    program = (
        "import sys; from r1mega.stages import child\n"
        "ended = child.run(['sh', '-c', 'printf \"bar 1\\\\rbar 2\\\\nr1mega: wrong\\\\n\" >&2; exit 2'])\n"
        "print(ended.code, ended.words)"
    )
    end = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    assert end.stderr == b"bar 1\rbar 2\n"
    assert end.stdout == b"2 wrong\n"


def test_the_cpu_time_of_a_child_that_its_parent_ignores_counts() -> None:
    """As Ray ignores its workers' ends: the kernel then charges nobody."""
    burn = "import time\nwhile time.process_time() < 1.0: pass"
    ignoring = (
        "import signal, subprocess, sys\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        f"subprocess.run([sys.executable, '-c', {burn!r}])"
    )
    program = (
        "import sys; from r1mega.stages import child\nchild.LOOK_SECONDS = 0.05\n"
        f"print(child.run([sys.executable, '-c', {ignoring!r}]).cpu_seconds)"
    )
    end = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(end.stdout) >= 0.5
