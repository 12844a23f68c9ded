"""Every layout computes what one process computes: `r1mega bench layouts` with bounds on what it measures.

Weights in layouts (weight sync, checkpoints, export) are in test_weight_sync_layouts.py and test_checkpoint_layouts.py.
"""

from __future__ import annotations

from dataclasses import fields

import pytest

from r1mega.bench.layouts import LAYOUTS, Difference, Layout, measure
from r1mega.config import ParallelConfig
from r1mega.parallel.mesh import check_mesh

LOSS, NORM, GRADIENT = 1e-6, 1e-6, 1e-5
WEIGHTS, LOGPROBS = 1e-6, 1e-5
BFLOAT16 = 1.5
"""Times the error of one process in bfloat16."""
SAMPLED = {
    name: LAYOUTS[name]
    for name in (
        "1 recompute=full, V3 MTP",
        "TP2 EP2, V3 MTP",
        "TP2 ETP2, V3",
        "TP2 without sequence_parallel, Llama",
        "EP2 replicas, V3 MTP",
        "ETP2, V3 MTP",
        "DP2 ZeRO-1, V3 MTP",
        "CP2, Llama",
        "PP2 1f1b, Qwen2",
        "PP2 zb1p, V3",
        "PP2 interleaved, V3 MTP",
        "PP2 zb-v, Qwen2",
        "PP2 dualpipev, V3 MTP",
        "PP2 dualpipev recompute=full, V3 MTP",
        "TP2, V3 MTP bfloat16",
        "PP2 dualpipev, V3 MTP bfloat16",
        "CP2 EP2 replay, V3 MTP",
        "EP4 replicas allgather, V3 MTP",
        "TP2 PP2 EP2, V3 MTP",
        "PP2 CP2 EP2, V3 MTP",
        "PP2 DP2 EP2 ZeRO-1, V3",
        "PP4 dualpipev, deep V3 MTP",
    )
}
REST = {name: layout for name, layout in LAYOUTS.items() if name not in SAMPLED}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Difference]:
    return measure(SAMPLED, tmp_path_factory.mktemp("sampled"))


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Difference]:
    return measure(REST, tmp_path_factory.mktemp("rest"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", SAMPLED)
def test_a_layout_computes_what_one_process_computes(name: str, sampled: dict[str, Difference]) -> None:
    check(LAYOUTS[name], sampled[name])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", REST)
def test_every_layout_computes_what_one_process_computes(name: str, rest: dict[str, Difference]) -> None:
    check(LAYOUTS[name], rest[name])


def check(layout: Layout, found: Difference) -> None:
    if layout.dtype == "bfloat16":
        assert found.bfloat16_ratio is not None
        assert found.bfloat16_ratio < BFLOAT16
        return
    assert found.gradient < GRADIENT, found.gradient_name
    assert found.loss < LOSS
    assert found.norm < NORM
    assert found.weights < WEIGHTS
    assert found.logprobs < LOGPROBS
    in_order = layout.parallel.schedule != "searched" and layout.recompute != "selective"
    if layout.parallel.pipeline == layout.ranks and in_order:
        assert [name for name in found.changed if "embed_tokens" not in name] == [], "not bit-identical"


@pytest.mark.parametrize("table", [SAMPLED, LAYOUTS])
def test_the_layouts_cover_every_axis(table: dict[str, Layout]) -> None:
    for layout in table.values():
        check_mesh(layout.parallel, None)
    for field in fields(ParallelConfig):
        used = {getattr(layout.parallel, field.name) for layout in table.values()}
        assert field.name == "tokens_per_chunk" or len(used) > 1, field.name
    assert {layout.parallel.dispatcher for layout in table.values()} == {"alltoall", "allgather"}
    assert {layout.dtype for layout in table.values()} == {"float32", "bfloat16"}
    assert {layout.replay for layout in table.values()} == {True, False}
