"""The folder of an evaluation: samples appended row by row, what they were made with, the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, ModelConfig, RunConfig
from r1mega.stages.evaluation_plan import Job, Plan
from r1mega.stages.evaluation_sources import Request
from r1mega.stages.lock import lock
from r1mega.stages.run_directory import checksum, lineage, write_json

Row = dict[str, Any]


class EvaluationFolder:
    """Context manager: holds the folder's lock; rows are appended whole, and a torn last one is dropped."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> EvaluationFolder:
        (self.path / "generations").mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path, "another evaluation is using this folder; choose another with --dir")
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def begin(self, plan: Plan) -> None:
        """Record what the samples depend on. ConfigError where the folder's samples were made or graded with something
        else, or with something that the folder does not tell (it was begun before that was recorded)."""
        file = self.path / "evaluation.json"
        stored = json.loads(file.read_text()) if file.exists() else {}
        for job in plan.jobs:
            old = stored.get(job.name)
            if old is not None and old != job.settings and self.rows(job):
                names = [name for name in job.settings if old.get(name) != job.settings[name]] or sorted(old)
                raise ConfigError(
                    f"{self.path} holds samples of {job.name} with {names[0]}="
                    f"{old.get(names[0], '(not recorded)')}, now {job.settings.get(names[0])}: "
                    "choose another folder with --dir, or remove this one"
                )
        write_json(file, stored | {job.name: job.settings for job in plan.jobs})
        record = lineage(RunConfig(model=ModelConfig(path=plan.config.model)))
        inputs = {
            name: checksum(path) for name, path in plan.inputs.items() if name != "model" and path.is_file()
        }
        write_json(self.path / "lineage.json", record | {"inputs": record["inputs"] | inputs})

    def _file(self, job: Job) -> Path:
        return self.path / "generations" / f"{job.name}.jsonl"

    def rows(self, job: Job) -> dict[tuple[str, int], Row]:
        """(question id, index) -> row, of those that the job asks for."""
        file = self._file(job)
        if not file.exists():
            return {}
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        rows = [json.loads(line) for line in whole.splitlines()]
        return {(row["id"], row["index"]): row for row in rows if row["index"] < job.k.get(row["id"], 0)}

    def missing(self, job: Job) -> list[Request]:
        there = self.rows(job)
        return [request for request in job.requests if (request.question.id, request.index) not in there]

    @contextmanager
    def appending(self, job: Job) -> Iterator[Callable[[Row], None]]:
        """A function that writes a row; whatever a killed process left of its last one is cut off first."""
        with open(self._file(job), "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

            def append(row: Row) -> None:
                file.write(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")
                file.flush()

            yield append

    def tokens(self) -> int:
        """Of all samples that are there, whatever suite; a file of others' generations has none."""
        counted = 0
        for file in (self.path / "generations").glob("*.jsonl"):
            with file.open("rb") as lines:
                counted += sum(json.loads(line).get("tokens") or 0 for line in lines if line.endswith(b"\n"))
        return counted

    def results(self) -> dict[str, Any]:
        file = self.path / "results.json"
        return json.loads(file.read_text())["suites"] if file.exists() else {}
