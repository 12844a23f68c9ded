"""check_mesh refuses layouts by the field's name, with the nearest legal choice."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch.distributed as dist
from tiny_models import DEEPSEEK_V3, LLAMA, QWEN2, process_group

from r1mega.config import ParallelConfig
from r1mega.parallel.mesh import check_mesh

MTP = {**DEEPSEEK_V3, "num_nextn_predict_layers": 1}


@pytest.mark.parametrize(
    ("parallel", "config"),
    [
        (ParallelConfig(), None),
        (ParallelConfig(tensor=4, data=2, expert=8), DEEPSEEK_V3),
        (ParallelConfig(tensor=2, expert=2), MTP),
        (ParallelConfig(tensor=2, expert_tensor=2), DEEPSEEK_V3),
        (ParallelConfig(tensor=2, data=3, sequence_parallel=False), QWEN2),
        (ParallelConfig(tensor=2), LLAMA),
        (ParallelConfig(pipeline=2, schedule="1f1b"), DEEPSEEK_V3),
        (ParallelConfig(pipeline=2, tensor=2, expert=2), {**MTP, "num_hidden_layers": 4}),
    ],
)
def test_possible_layouts_pass(parallel, config):
    check_mesh(parallel, config)


@pytest.mark.parametrize(
    ("parallel", "config", "match"),
    [
        (ParallelConfig(tensor=0), None, r"parallel\.tensor=0: every axis has at least one rank"),
        (
            ParallelConfig(pipeline=4),
            DEEPSEEK_V3,
            r"parallel\.pipeline=4 makes 8 stages \(2 in each rank\) of 3 layers; .* choice is parallel\.pipeline=2",
        ),
        (
            ParallelConfig(pipeline=6, schedule="1f1b"),
            DEEPSEEK_V3,
            r"parallel\.pipeline=6 makes 6 stages \(1 in each rank\) of 3 layers; .* choice is parallel\.pipeline=5",
        ),
        (
            ParallelConfig(pipeline=2, schedule="interleaved"),
            None,
            r'"interleaved" with parallel\.virtual_pipeline=1: .*virtual_pipeline=2',
        ),
        (ParallelConfig(virtual_pipeline=2), None, r"parallel\.virtual_pipeline=2: only a pipeline under"),
        (
            ParallelConfig(context=2, expert=4),
            DEEPSEEK_V3,
            r"expert=4 .* must divide parallel\.tensor \* parallel\.context \* parallel\.data = 2; .* is parallel\.expert=2",
        ),
        (
            ParallelConfig(tensor=3),
            DEEPSEEK_V3,
            r"parallel\.tensor=3 .* num_attention_heads=4; .* choice is parallel\.tensor=2",
        ),
        (
            ParallelConfig(tensor=4),
            QWEN2,
            r"parallel\.tensor=4 .* num_key_value_heads=2; .* choice is parallel\.tensor=2",
        ),
        (
            ParallelConfig(tensor=2),
            {**QWEN2, "vocab_size": 95},
            r"vocab_size=95; .* choice is parallel\.tensor=1",
        ),
        (
            ParallelConfig(data=3, expert=3),
            DEEPSEEK_V3,
            r"parallel\.expert=3 .* n_routed_experts=8; .* choice is parallel\.expert=1",
        ),
        (
            ParallelConfig(data=2, expert_replicas=2),
            DEEPSEEK_V3,
            r"parallel\.expert_replicas=2 with parallel\.expert=1.* choice is parallel\.expert_replicas=0",
        ),
        (
            ParallelConfig(data=2, expert=4),
            DEEPSEEK_V3,
            r"parallel\.expert=4 .* must divide .* = 2; .* choice is parallel\.expert=2",
        ),
        (
            ParallelConfig(data=2, expert_tensor=3),
            DEEPSEEK_V3,
            r"parallel\.expert_tensor=3: they must divide .* = 2; .* is parallel\.expert_tensor=2",
        ),
        (
            ParallelConfig(data=5, expert_tensor=5),
            DEEPSEEK_V3,
            r"expert_tensor=5 .* moe_intermediate_size=16; .* is parallel\.expert_tensor=1",
        ),
        (
            ParallelConfig(tensor=2, sequence_parallel=False),
            DEEPSEEK_V3,
            r"every tensor rank would route every token; .* is parallel\.sequence_parallel=true",
        ),
        (ParallelConfig(data=2, expert=2), QWEN2, r"parallel\.expert=2: the model \(qwen2\) has no experts"),
        (
            ParallelConfig(dispatcher="alltoall_fp8"),
            QWEN2,
            r"\(qwen2\) has no experts; .* choice is parallel\.dispatcher=alltoall$",
        ),
    ],
)
def test_impossible_layouts_are_refused_by_name(parallel, config, match):
    with pytest.raises(ValueError, match=match):
        check_mesh(parallel, config)


@pytest.mark.parametrize("field", ["tensor", "pipeline", "expert", "expert_tensor", "context", "data"])
def test_an_absurd_size_is_answered_soon(field):
    with pytest.raises(ValueError, match=rf"parallel\.{field}=-1000000: every axis"):
        check_mesh(ParallelConfig(**{field: -(10**6)}), MTP)
    if field not in ("context", "data"):
        with pytest.raises(
            ValueError, match=rf"parallel\.{field}=1000000\b.* choice is parallel\.{field}=\d"
        ):
            check_mesh(ParallelConfig(**{field: 10**6}), MTP)


def test_following_the_advice_leads_to_a_possible_layout():
    """Random layouts, mostly impossible, of random models: no advice is given twice."""
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        sizes = {"num_hidden_layers": rng.randint(1, 9), "vocab_size": rng.randint(80, 100)}
        model = {**rng.choice([QWEN2, LLAMA, DEEPSEEK_V3, MTP]), **sizes}
        axes = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context", "data")
        parallel = ParallelConfig(
            **{axis: rng.choice([0, 1, 1, 1, 2, 3, 4, 6]) for axis in axes},
            schedule=rng.choice(["1f1b", "interleaved", "dualpipev"]),
            sequence_parallel=rng.random() < 0.7,
        )
        seen = []
        while advice := refusal(parallel, model):
            refused += 1
            assert advice not in seen, f"{parallel} {model}: {advice} again, after {seen}"
            seen.append(advice)
            parallel = dataclasses.replace(parallel, **dict([advice]))
            assert len(seen) < 12
    assert refused > 400


def test_a_destroyed_mesh_leaves_no_process_group_behind():
    with process_group():
        from r1mega.parallel import mesh

        for _ in range(2):
            mesh.init_mesh(ParallelConfig())
            assert len(dist.distributed_c10d._world.pg_map) > 1
            mesh.destroy_mesh()
            assert len(dist.distributed_c10d._world.pg_map) == 1


def refusal(parallel, model):
    """(field, value) that the message advises; None where the layout is possible."""
    try:
        check_mesh(parallel, model)
    except ValueError as error:
        field, value = re.search(r"; the nearest legal choice is parallel\.(\w+)=(\w+)$", str(error)).groups()
        return field, {"true": True, "false": False}.get(value) if not value.isdigit() else int(value)
    return None
