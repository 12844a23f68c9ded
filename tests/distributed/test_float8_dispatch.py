"""What `parallel.dispatcher=alltoall_fp8` computes is what "alltoall" computes of tokens rounded to fp8: bit for bit, in the
same layout, over optimizer steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from tiny_models import float8_by_rounding_first, free_port, process_group

from r1mega.bench.layouts import Layout, train
from r1mega.config import ParallelConfig

FLOAT8 = "alltoall_fp8"
PIPELINE = Layout("deep V3 MTP", ParallelConfig(data=2, expert=2, pipeline=2, dispatcher=FLOAT8))
REPLICAS = Layout(
    "V3 MTP",
    ParallelConfig(tensor=2, data=2, expert=4, expert_replicas=2, dispatcher=FLOAT8),
    recompute="full",
)
MIXED, REPLICATED = "dualpipev, forwards and backwards mixed", "tensor, replicas, recomputed"
JOBS = {MIXED: (PIPELINE, True), REPLICATED: (REPLICAS, None)}


def run(rank: int, port: int, directory: Path, job: str) -> None:
    layout, overlap = JOBS[job]
    with process_group(rank, layout.ranks, port):
        from r1mega.models import dispatch
        from r1mega.parallel import mesh

        place = mesh.init_mesh(layout.parallel, seed=1)
        own = train(layout, place, overlap)
        with float8_by_rounding_first(dispatch):
            expected = train(layout, place, overlap)
        torch.save((own, expected), directory / f"{rank}.pt")
        mesh.destroy_mesh()


@pytest.mark.distributed
@pytest.mark.parametrize("job", [MIXED, pytest.param(REPLICATED, marks=pytest.mark.slow)])
def test_fp8_dispatch_is_alltoall_of_rounded_tokens_bit_for_bit(job: str, tmp_path: Path) -> None:
    ranks = JOBS[job][0].ranks
    mp.spawn(run, (free_port(), tmp_path, job), nprocs=ranks)
    for rank in range(ranks):
        own, expected = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert own.losses == expected.losses
        assert own.norms == expected.norms
        for what in ("gradients", "weights", "logprobs"):
            found, wanted = getattr(own, what), getattr(expected, what)
            assert found.keys() == wanted.keys()
            different = [name for name in found if not torch.equal(found[name], wanted[name])]
            assert not different, what
