"""What a run does when something dies: which faults are tried again, from where, and how often.

Only faults of the machine are: a process that is gone, ranks that no longer meet. An exception that our code raised
(a gate, a bad value, a full disk) would come again and ends the run at once. A trainer that lost a rank starts again
from the newest complete checkpoint, and the steps after it are repeated bit for bit (with parallel.expert_replicas, to
rounding). Engines: engines.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from r1mega import cluster
from r1mega.stages.console import Console
from r1mega.stages.run_directory import RunDirectory
from r1mega.training import checkpoint
from r1mega.training.metrics import read_jsonl

TRAINER = "trainer"
"""The name of the ranks that begin again; other groups (reward models) do not."""
LIMIT = 3
"""Recoveries without anything gained in between."""


class GivenUp(RuntimeError):
    """The same part failed again and again; the message names it and its last reason."""


class Patience:
    """Counts recoveries since anything was gained."""

    def __init__(self) -> None:
        self.count = 0
        self._best: tuple[int, ...] = ()

    def recover(self, error: Exception, *reached: int) -> None:
        """One recovery more. Raises GivenUp when none of `reached` (steps, ...) has grown during LIMIT of them."""
        best = self._best or (-1,) * len(reached)
        if any(now > before for now, before in zip(reached, best, strict=True)):
            self.count = 0
        self._best = tuple(map(max, reached, best))
        if self.count == LIMIT:
            raise GivenUp(f"{error} (after {LIMIT} recoveries that gained nothing)") from error
        self.count += 1


async def with_restarts(
    attempt: Callable[[], Awaitable[None]], directory: RunDirectory, console: Console
) -> None:
    """Run `attempt`, which begins at the newest checkpoint, and run it again when the trainer dies or hangs.

    It leaves no trainer process behind, however it ends.
    """
    patience = Patience()
    while True:
        try:
            return await attempt()
        except (cluster.WorkerDied, cluster.CollectiveFailed) as error:
            if not cluster.origin(error).startswith(TRAINER):
                raise
            patience.recover(error, *_reached(directory))
            directory.remove_partial()
            directory.add_results(restarts=[*directory.results().get("restarts", []), str(error)])
            console.note(f"{error}; the trainer starts again")


def _reached(directory: RunDirectory) -> tuple[int, int]:
    """The last recorded step, and the newest checkpoint's."""
    metrics = directory.path / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.exists() else []
    saved = checkpoint.complete(directory.checkpoints)
    return rows[-1]["step"] if rows else 0, int(saved[-1].name.removeprefix("step-")) if saved else 0
