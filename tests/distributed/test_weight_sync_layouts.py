"""Random models in random layouts hold, hand out, send, import, export and reload exactly one process's weights.

Every case is drawn from a seed: sizes that the axes divide and otherwise odd, and a layout of four ranks. One process
writes the model as a Hugging Face directory and as a sharded checkpoint; the four ranks read both. A receiver outside
takes what weight sync broadcasts, bucket by bucket, and compares its checksums, as a vLLM worker does.
"""

from __future__ import annotations

import math
import pickle
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tiny_models import DEEPSEEK_V3, LLAMA, QWEN2, free_port, process_group

from r1mega.config import ModelConfig, ParallelConfig
from r1mega.parallel.mesh import check_mesh, num_stages
from r1mega.platforms import CPU
from r1mega.rollout import weight_sync

pytestmark = pytest.mark.distributed
RANKS = 4
SAMPLED, ALL = (5, 9, 20, 23, 25, 36), tuple(range(40))
SCHEDULES = ("1f1b", "zb1p", "interleaved", "zb-v", "dualpipev", "searched")
VERSION = 7


@dataclass(frozen=True)
class Case:
    model: dict[str, Any]
    parallel: ParallelConfig
    dtype: str
    bucket_bytes: int


def draw(seed: int) -> Case:
    rng = random.Random(seed)
    axes = dict.fromkeys(("tensor", "context", "pipeline", "data"), 1)
    for _ in range(2):
        axes[rng.choice(list(axes))] *= 2
    processes = RANKS // axes["pipeline"]
    has_experts = rng.random() < 0.8
    if has_experts:
        axes["expert"] = rng.choice([n for n in (1, 2, 4) if processes % n == 0])
        axes["expert_tensor"] = rng.choice([n for n in (1, 2, 4) if processes % (n * axes["expert"]) == 0])
    schedule = rng.choice(SCHEDULES)
    chunks = rng.choice([2, 3]) if schedule == "interleaved" and axes["pipeline"] > 1 else 1
    parallel = ParallelConfig(
        **axes, schedule=schedule, virtual_pipeline=chunks, distributed_optimizer=rng.random() < 0.5
    )
    tensor, stages = parallel.tensor, num_stages(parallel)
    sizes = {
        "vocab_size": tensor * rng.randint(20, 40),
        "hidden_size": tensor * rng.randint(5, 12),
        "intermediate_size": tensor * rng.randint(3, 20),
        "num_hidden_layers": rng.randint(max(1, stages - 2), stages + 2),
        "num_attention_heads": tensor * rng.randint(1, 3),
    }
    if not has_experts:
        groups = tensor * rng.randint(1, 2)
        heads = {"num_key_value_heads": groups, "num_attention_heads": groups * rng.randint(1, 3)}
        shape = {**rng.choice([QWEN2, LLAMA]), **sizes, **heads, "head_dim": 2 * rng.randint(1, 5)}
        shape["tie_word_embeddings"] = rng.random() < 0.5
        return Case(shape, parallel, rng.choice(["float32", "bfloat16"]), rng.choice([1, 3000, 1 << 20]))
    groups = rng.choice([1, 2])
    experts = math.lcm(axes["expert"], groups) * rng.randint(1, 3)
    shape = {
        **DEEPSEEK_V3,
        **sizes,
        "moe_intermediate_size": math.lcm(tensor, axes["expert_tensor"]) * rng.randint(1, 7),
        "n_shared_experts": rng.randint(0, 2),
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": rng.randint(0, 2),
        "q_lora_rank": rng.choice([None, 7]),
        "kv_lora_rank": rng.randint(3, 9),
        "v_head_dim": rng.randint(3, 9),
        "num_nextn_predict_layers": rng.randint(0, 1),
    }
    return Case(shape, parallel, rng.choice(["float32", "bfloat16"]), rng.choice([1, 3000, 1 << 20]))


def sharded_state(stages: list[Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {f"model{i}": stage.sharded_state_dict(metadata=metadata) for i, stage in enumerate(stages)}


def named(stages: list[Any]) -> dict[str, torch.Tensor]:
    from r1mega.models.hf_weights import named_hf_tensors

    return {name: tensor.clone() for name, tensor in named_hf_tensors(stages)}


def one_process(_rank: int, seeds: Sequence[int], directory: Path, port: int) -> None:
    with process_group(0, 1, port):
        from megatron.core import dist_checkpointing

        from r1mega.models.hf_weights import export_hf, tensors_of
        from r1mega.models.language_model import build_model
        from r1mega.parallel import mesh

        for seed in seeds:
            case = draw(seed)
            mesh.init_mesh(ParallelConfig(), seed=1)
            options = ModelConfig(dtype=case.dtype, init="random")
            model = build_model(case.model, options, ParallelConfig(), seed=0)
            generator = torch.Generator().manual_seed(seed)
            for row in model.weight_table:  # norms and the correction bias too
                tensors_of(model)[row.parameter].normal_(generator=generator)
            torch.save(named([model]), directory / f"{seed} expected")
            export_hf(model, directory / f"{seed} source", directory / "no tokenizer")
            (directory / f"{seed} sharded").mkdir()
            dist_checkpointing.save(sharded_state([model]), str(directory / f"{seed} sharded"))
            mesh.destroy_mesh()


def four_processes(rank: int, seeds: Sequence[int], directory: Path, port: int) -> None:
    with process_group(rank, RANKS, port):
        from megatron.core import dist_checkpointing

        from r1mega.models.hf_weights import export_hf, import_hf
        from r1mega.models.language_model import build_model
        from r1mega.parallel import mesh
        from r1mega.training.pipelined_model import PipelinedModel

        for seed in seeds:
            case = draw(seed)
            place = mesh.init_mesh(case.parallel, seed=1)
            options = ModelConfig(dtype=case.dtype)

            def build(part: Any, case: Case = case, options: ModelConfig = options) -> Any:
                return build_model(case.model, options, case.parallel, seed=0, part=part)

            model = PipelinedModel(build, case.model, options, case.parallel, place)
            state = dist_checkpointing.load(sharded_state(model.stages), str(directory / f"{seed} sharded"))
            for i, stage in enumerate(model.stages):
                stage.load_state_dict(state[f"model{i}"])
            found = {"resharded": named(model.stages)}
            for stage in model.stages:
                import_hf(stage, directory / f"{seed} source")
            found["imported"] = named(model.stages)
            export_hf(
                model.stages, directory / f"{seed} export", directory / f"{seed} source", max_shard_bytes=9000
            )
            send(case, model.stages, directory / f"{seed} address")
            torch.save(found, directory / f"{seed} found {rank}")
            mesh.destroy_mesh()


def send(case: Case, stages: list[Any], address: Path) -> None:
    """The trainer's half of a weight sync; rank 0 leaves its address for the receiver."""
    from r1mega.models.hf_weights import named_hf_tensors

    metadata = weight_sync.weight_metadata(
        named_hf_tensors(stages),
        num_hidden_layers=case.model["num_hidden_layers"],
        draft=bool(case.model.get("num_nextn_predict_layers")),
        bucket_bytes=case.bucket_bytes,
    )
    if torch.distributed.get_rank() > 0:
        weight_sync.drain(named_hf_tensors(stages))
        return
    sender = weight_sync.WeightSender(CPU, metadata, 1, port=free_port(), timeout_seconds=60)
    partial = address.with_suffix(".partial")
    partial.write_bytes(pickle.dumps((sender.address, metadata)))
    partial.rename(address)
    sender.connect()
    sender.send(named_hf_tensors(stages), VERSION)
    sender.close()


def receive(address: Path, alive: Any) -> dict[str, torch.Tensor]:
    """What a vLLM worker gets; `alive` raises when the trainer has died."""
    while not address.exists():
        alive()
        time.sleep(0.02)
    (host, port), metadata = pickle.loads(address.read_bytes())
    store = weight_sync.open_store(host, port, 60, is_master=False)
    group = CPU.join_group(store, 1, 2, 60)
    arrived = {}
    for bucket in metadata.target_buckets + metadata.draft_buckets:
        bytes_N, header = torch.empty(bucket.num_bytes, dtype=torch.uint8), torch.empty(4, dtype=torch.int64)
        for tensor in (bytes_N, header):
            weight_sync.broadcast(group, tensor).wait()
        assert header.tolist() == [VERSION, bucket.index, *weight_sync.checksums(bytes_N).tolist()]
        arrived.update({info.name: view.clone() for info, view in bucket.views(bytes_N)})
    return arrived


def run(seeds: Sequence[int], directory: Path) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(seed, what the receiver got) as the trainer goes through the cases."""
    mp.spawn(one_process, (seeds, directory, free_port()), nprocs=1)
    context = mp.spawn(four_processes, (seeds, directory, free_port()), nprocs=RANKS, join=False)
    for seed in seeds:
        yield seed, receive(directory / f"{seed} address", lambda: context.join(timeout=0))
    while not context.join():
        pass


def compare(seed: int, arrived: dict[str, torch.Tensor], directory: Path) -> None:
    from safetensors.torch import load_file

    case = draw(seed)
    expected = torch.load(directory / f"{seed} expected")
    ranks = [torch.load(directory / f"{seed} found {rank}") for rank in range(RANKS)]
    for how in ("resharded", "imported"):
        for rank in ranks:
            assert_equal(rank[how], expected, f"{how}, {case}")
            assert list(rank[how]) == list(ranks[0][how]), f"ranks disagree on the order: {case}"
            if case.parallel.expert == 1:
                assert list(rank[how]) == list(expected), f"another order: {case}"
    assert_equal(arrived, expected, f"sent, {case}")
    source, export = (
        {
            name: tensor
            for file in (directory / f"{seed} {folder}").glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in ("source", "export")
    )
    assert_equal(export, source, f"exported, {case}")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, f"{name}: {what}"
        assert torch.equal(found[name], tensor), f"{name}: {what}"


def check(seeds: Sequence[int], directory: Path) -> None:
    arrived = dict(run(seeds, directory))
    for seed in seeds:
        compare(seed, arrived[seed], directory)
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []


def test_weights_are_those_of_one_process_in_random_layouts(tmp_path: Path) -> None:
    check(SAMPLED, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_weights_are_those_of_one_process_in_many_random_layouts(tmp_path: Path) -> None:
    check(ALL, tmp_path)


@pytest.mark.parametrize("seed", ALL)
def test_drawn_layouts_are_possible(seed: int) -> None:
    case = draw(seed)
    check_mesh(case.parallel, case.model)


@pytest.mark.parametrize("seeds", [SAMPLED, ALL])
def test_the_draws_use_every_axis(seeds: Sequence[int]) -> None:
    cases = [draw(seed) for seed in seeds]
    axes = [field.name for field in fields(ParallelConfig) if field.type == "int"]
    for axis in set(axes) - {"tokens_per_chunk", "expert_replicas"}:  # replicas are no weights of their own
        assert any(getattr(case.parallel, axis) > 1 for case in cases), axis
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert {bool(case.model.get("num_nextn_predict_layers")) for case in cases} == {False, True}
