"""Every layout beside one process: three optimizer steps of the same tiny models, compared number by number.

The loss, the gradient of every parameter under its Hugging Face name, the gradient's norm, the weights that the steps
made and the log-probs they give. Stages hold whole layers and micro-batches are added in their order, so gradients are
bit-identical where only a pipeline divides the model; the embedding's are not where its uses are added in another order.

In bfloat16 the yardstick is one process in bfloat16: a layout is as far from one process in float32 as that is.
"""

from __future__ import annotations

import pickle
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from r1mega.config import ModelConfig, OptimizerConfig, ParallelConfig
from r1mega.parallel.mesh import Mesh
from r1mega.platforms import CPU
from r1mega.samples import PackedBatch

STEPS = 3
MICRO_BATCHES = 8
"""Of the whole batch, shared over the data axis: what DualPipeV asks of four ranks."""
MTP_WEIGHT = 0.3
SEED = 11
TIMEOUT_SECONDS = 300.0

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.15,
    "rope_theta": 10000.0,
}
V3 = SHAPE | {
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_nextn_predict_layers": 0,
}
MTP = V3 | {"num_nextn_predict_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "V3": V3,
    "V3 MTP": MTP,
    "deep V3": V3 | {"num_hidden_layers": 7},
    "deep V3 MTP": MTP | {"num_hidden_layers": 7},
    "Qwen2": SHAPE | {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Llama": SHAPE | {"model_type": "llama", "num_key_value_heads": 2},
}
"""A pipeline of four ranks takes the deep ones: as many as eight stages."""


ONE = ParallelConfig()


@dataclass(frozen=True)
class Layout:
    model: str
    parallel: ParallelConfig = ONE
    recompute: str = "none"
    dtype: str = "float32"
    balance_loss: float = 0.1
    """Of the models with multi-token prediction."""
    replay: bool = False
    """Gates take random experts that come with the batches (models/replay.py)."""

    @property
    def ranks(self) -> int:
        parallel = self.parallel
        return parallel.tensor * parallel.context * parallel.data * parallel.pipeline

    def alone(self, dtype: str) -> Layout:
        """One process."""
        return Layout(self.model, dtype=dtype, balance_loss=self.balance_loss, replay=self.replay)


def _table() -> dict[str, Layout]:
    axes: dict[str, dict[str, Any]] = {
        "TP2": {"tensor": 2},
        "TP2 EP2": {"tensor": 2, "expert": 2},
        "TP2 ETP2": {"tensor": 2, "expert_tensor": 2},
        "EP2": {"data": 2, "expert": 2},
        "ETP2": {"data": 2, "expert_tensor": 2},
        "DP2": {"data": 2},
        "DP2 ZeRO-1": {"data": 2, "distributed_optimizer": True},
        "CP2": {"context": 2},
        "CP2 EP2": {"context": 2, "expert": 2},
        "EP4": {"data": 4, "expert": 4},
        "EP2 ETP2": {"data": 4, "expert": 2, "expert_tensor": 2},
        "TP2 CP2": {"tensor": 2, "context": 2},
        "CP4": {"context": 4},
        "DP2 CP2 EP2 ZeRO-1": {"data": 2, "context": 2, "expert": 2, "distributed_optimizer": True},
        "TP2 PP2 EP2": {"tensor": 2, "pipeline": 2, "expert": 2},
        "PP2 CP2 EP2": {"pipeline": 2, "context": 2, "expert": 2},
        "PP2 DP2 EP2 ZeRO-1": {"pipeline": 2, "data": 2, "expert": 2, "distributed_optimizer": True},
    }
    for ranks in (2, 4):
        axes |= {f"PP{ranks} {name}": {"pipeline": ranks, "schedule": name} for name in SCHEDULES}
    for name in ("EP2", "EP4", "EP2 ETP2", "TP2 PP2 EP2"):
        axes[f"{name} replicas"] = axes[name] | {"expert_replicas": 2}
    axes["PP4 searched"] = {"pipeline": 4, "schedule": "searched"}
    layouts = {}
    for name, sizes in axes.items():
        if sizes.get("schedule") == "interleaved":
            sizes = sizes | {"virtual_pipeline": 2}
        deep = "deep " if sizes.get("pipeline") == 4 else ""
        for model in (f"{deep}V3", f"{deep}V3 MTP"):
            layouts[f"{name}, {model}"] = Layout(model, ParallelConfig(**sizes))
    for schedule in SCHEDULES:
        layouts[f"PP2 {schedule}, Qwen2"] = replace(layouts[f"PP2 {schedule}, V3"], model="Qwen2")
    layouts["TP2, Qwen2"] = replace(layouts["TP2, V3"], model="Qwen2")
    without = ParallelConfig(tensor=2, sequence_parallel=False)
    layouts["TP2 without sequence_parallel, Llama"] = Layout("Llama", without)
    layouts["CP2, Llama"] = replace(layouts["CP2, V3"], model="Llama")
    for name in ("TP2 EP2", "EP2", "EP4", "EP4 replicas", "TP2 PP2 EP2", "CP2 EP2"):
        layout = layouts[f"{name}, V3 MTP"]
        parallel = replace(layout.parallel, dispatcher="allgather")
        layouts[f"{name} allgather, V3 MTP"] = replace(layout, parallel=parallel)
    alone = {"1, V3 MTP": Layout("V3 MTP")}
    for recompute, names in RECOMPUTED.items():
        for name in names:
            layout = (alone | layouts)[f"{name}, V3 MTP"]
            layouts[f"{name} recompute={recompute}, V3 MTP"] = replace(layout, recompute=recompute)
    for name in REPLAYED:
        layouts[f"{name} replay, V3 MTP"] = replace(layouts[f"{name}, V3 MTP"], replay=True)
    for name in IN_BFLOAT16:
        layouts[f"{name}, V3 MTP bfloat16"] = replace(layouts[f"{name}, V3 MTP"], dtype="bfloat16")
    return layouts


SCHEDULES = ("1f1b", "zb1p", "interleaved", "zb-v", "dualpipev")
RECOMPUTED = {
    "full": ("1", "TP2", "EP2", "CP2", "PP2 dualpipev", "TP2 PP2 EP2", "TP2 PP2 EP2 replicas"),
    "selective": ("1", "TP2 EP2", "CP2 EP2", "PP2 1f1b"),
}
REPLAYED = ("CP2 EP2", "EP2 replicas", "PP2 dualpipev recompute=full", "TP2 PP2 EP2")
IN_BFLOAT16 = (
    "TP2",
    "TP2 EP2",
    "TP2 ETP2",
    "EP2",
    "EP2 replicas",
    "ETP2",
    "DP2 ZeRO-1",
    "CP2",
    "PP2 1f1b",
    "PP2 dualpipev",
    "TP2 PP2 EP2",
    "PP2 CP2 EP2",
)
LAYOUTS = _table()


# ---------------------------------------------------------------- one rank


@dataclass(frozen=True)
class Outcome:
    """What one rank has of a layout."""

    losses: tuple[float, ...] | None
    """Of each step, of this rank's micro-batches; None where another rank counts them."""
    norms: tuple[float, ...]
    gradients: dict[str, Tensor]
    """Of the first step, whole."""
    weights: dict[str, Tensor]
    """After the last step, whole."""
    logprobs: dict[int, Tensor]
    """Micro-batch -> its log-probs, after the last step; of those that come out here."""
    seconds: float
    """Of the fastest step."""


def train(layout: Layout, mesh: Mesh, overlap: bool | None = None) -> Outcome:
    """The steps of one rank, on the mesh of the layout. overlap: as PipelinedModel's."""
    from r1mega.models.hf_weights import named_hf_tensors
    from r1mega.models.language_model import build_model
    from r1mega.models.replay import replay_routing
    from r1mega.training.optimizer import Optimizer
    from r1mega.training.pipelined_model import PipelinedModel

    hf_config, parallel = MODELS[layout.model], layout.parallel
    mtp_weight = MTP_WEIGHT if hf_config.get("num_nextn_predict_layers") else 0.0
    options = ModelConfig(
        dtype=layout.dtype,
        init="random",
        mtp_loss_weight=mtp_weight,
        router_bias_rate=1e-3 if "n_routed_experts" in hf_config else 0.0,
        balance_loss=layout.balance_loss if mtp_weight else 0.0,
        recompute=layout.recompute,
    )

    def build(part: Any) -> Any:
        return build_model(hf_config, options, parallel, seed=SEED, part=part)

    def compute(stage: Any, batch: PackedBatch, hidden: Any) -> Any:
        return stage(batch, hidden)

    def step(number: int) -> tuple[float, float]:
        """(loss, gradient's norm)"""
        batches, parts = mine(number), []

        def loss(outputs: Any, micro_batch: int) -> Tensor:
            value = -(batches[micro_batch].token_weights_T * outputs.logprobs_T).sum()
            if outputs.mtp_loss_sum is not None:
                value = value + mtp_weight * outputs.mtp_loss_sum
            parts.append(value.item())
            return value

        optimizer.zero_grad()
        model.place_experts()
        model.forward_backward(optimizer.wrapped, batches, compute, loss)
        return sum(parts), optimizer.step(number).grad_norm

    def mine(number: int) -> list[PackedBatch]:
        batches = micro_batches(number, hf_config["vocab_size"])
        batches = [_with_experts(batch, hf_config) for batch in batches] if layout.replay else batches
        return batches[mesh.data_rank :: parallel.data]

    model = PipelinedModel(build, hf_config, options, parallel, mesh, overlap=overlap)
    if layout.replay:
        replay_routing(model.stages)
    # A usual epsilon would make steps of full size, either way, of gradients that are rounding errors.
    settings = OptimizerConfig(lr=1e-3, clip_grad=0.0)
    optimizer = Optimizer(model.stages, settings, parallel, STEPS, epsilon=1e-3)
    model.train()
    steps = [step(0)]
    if parallel.distributed_optimizer:
        _gather_shards(optimizer.wrapped)
    main_grads = [{name: p.main_grad for name, p in stage.named_parameters()} for stage in model.stages]
    gradients = {name: tensor.clone() for name, tensor in named_hf_tensors(model.stages, main_grads)}
    optimizer.config = replace(settings, clip_grad=steps[0][1] / 2)  # the other steps' gradients are clipped
    seconds = []
    for number in range(1, STEPS):
        began = time.perf_counter()
        steps.append(step(number))
        seconds.append(time.perf_counter() - began)
    weights = {name: tensor.clone() for name, tensor in named_hf_tensors(model.stages)}
    model.eval()
    outputs = model.outputs(mine(STEPS), compute)
    numbers = range(mesh.data_rank, MICRO_BATCHES, parallel.data)
    counts = model.has_last and mesh.tensor_rank == mesh.context_rank == 0
    return Outcome(
        losses=tuple(loss for loss, _ in steps) if counts else None,
        norms=tuple(norm for _, norm in steps),
        gradients=gradients,
        weights=weights,
        logprobs={i: out.logprobs_T for i, out in zip(numbers, outputs, strict=True) if out is not None},
        seconds=min(seconds),
    )


def micro_batches(step: int, vocab_size: int) -> list[PackedBatch]:
    """Random tokens of several sequences, 64 in each micro-batch; random weights, zero on a few tokens."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for number in range(MICRO_BATCHES):
        lengths = torch.tensor([23, 9 + number, 32 - number])
        tokens = torch.randint(0, vocab_size, (65,), generator=generator)
        weights_T = torch.rand(64, generator=generator) / 64
        weights_T[torch.rand(64, generator=generator) < 0.2] = 0.0
        made.append(
            PackedBatch(
                tokens_T=tokens[:-1],
                targets_T=tokens[1:],
                positions_T=torch.cat([torch.arange(int(length)) for length in lengths]),
                cu_seqlens_S=torch.cat([lengths.new_zeros(1), lengths]).cumsum(0).int(),
                loss_mask_T=(weights_T > 0).float(),
                token_weights_T=weights_T,
            )
        )
    return made


def _with_experts(batch: PackedBatch, hf_config: dict[str, Any]) -> PackedBatch:
    generator = torch.Generator().manual_seed(int(batch.tokens_T.sum()))
    layers = hf_config["num_hidden_layers"] - hf_config["first_k_dense_replace"]
    scores_TLE = torch.rand(len(batch.tokens_T), layers, hf_config["n_routed_experts"], generator=generator)
    return replace(batch, experts_TLK=scores_TLE.topk(hf_config["num_experts_per_tok"]).indices.byte())


def _gather_shards(wrapped: Sequence[Any]) -> None:
    """With the distributed optimizer a data rank has the gradients' sums of its own shard only: fetch the others."""
    for stage in wrapped:
        for group in stage.bucket_groups + stage.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shards = list(bucket.grad_data.chunk(ranks.size()))
                dist.all_gather(shards, shards[ranks.rank()].clone(), group=ranks)


# ---------------------------------------------------------------- all ranks


def run(layouts: Mapping[Any, Layout], folder: Path) -> dict[Any, list[Outcome]]:
    """What the ranks of each layout have. Those of as many ranks run in one set of processes, one after the other."""
    for ranks in sorted({layout.ranks for layout in layouts.values()}):
        jobs = [(str(i), layout) for i, layout in enumerate(layouts.values()) if layout.ranks == ranks]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_rank, (jobs, port, folder), nprocs=ranks)
    return {
        name: [pickle.loads((folder / f"{i} {rank}").read_bytes()) for rank in range(layout.ranks)]
        for i, (name, layout) in enumerate(layouts.items())
    }


def _rank(rank: int, jobs: Sequence[tuple[str, Layout]], port: int, folder: Path) -> None:
    CPU.prepare_megatron()
    CPU.set_threads(1)
    CPU.init_process_group(rank, jobs[0][1].ranks, "127.0.0.1", port, TIMEOUT_SECONDS)
    from r1mega.parallel import mesh

    for name, layout in jobs:
        outcome = train(layout, mesh.init_mesh(layout.parallel, seed=SEED))
        (folder / f"{name} {rank}").write_bytes(pickle.dumps(outcome))
        mesh.destroy_mesh()
    dist.destroy_process_group()


# ---------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Difference:
    """A layout's numbers beside those of one process in float32: the worst of all ranks, steps and tensors."""

    ranks: int
    loss: float
    """Relative, absolute where the loss is under 1."""
    norm: float
    """Of the gradient's norm, relative."""
    gradient: float
    """Of one entry, relative to its tensor's largest."""
    gradient_name: str
    """The tensor of that entry."""
    distance: float
    """Of all gradients together: the difference's norm over the norm."""
    weights: float
    """Absolute, after the last step (learning rate 0.001)."""
    logprobs: float
    """Absolute, after the last step."""
    bfloat16_ratio: float | None
    """`distance` over that of one process in bfloat16; None in float32."""
    time_ratio: float
    """Of a step's seconds to one process, in the same run: noisy, and more ranks than cores take turns."""
    changed: tuple[str, ...]
    """Tensors whose gradient is not bit-identical."""


def measure(layouts: Mapping[str, Layout], folder: Path) -> dict[str, Difference]:
    """Run the layouts, and one process for each of their models."""
    alone = {layout.alone(dtype) for layout in layouts.values() for dtype in ("float32", layout.dtype)}
    named: dict[Any, Layout] = {**layouts, **{layout: layout for layout in alone}}
    outcomes = run(named, folder)
    differences = {}
    for name, layout in layouts.items():
        expected = outcomes[layout.alone("float32")][0]
        difference = compare(outcomes[name], expected)
        yardstick = outcomes[layout.alone(layout.dtype)]
        ratio = None
        if layout.dtype != "float32":
            ratio = difference.distance / compare(yardstick, expected).distance
        seconds = max(outcome.seconds for outcome in outcomes[name]) / yardstick[0].seconds
        differences[name] = replace(difference, bfloat16_ratio=ratio, time_ratio=seconds)
    return differences


def compare(ranks: Sequence[Outcome], expected: Outcome) -> Difference:
    assert expected.losses is not None
    counted = [rank.losses for rank in ranks if rank.losses is not None]
    losses = [sum(parts) for parts in zip(*counted, strict=True)]
    gradients: dict[str, float] = {}
    changed: set[str] = set()
    weights, distances = [], []
    for rank in ranks:
        assert rank.gradients.keys() == expected.gradients.keys()
        assert rank.weights.keys() == expected.weights.keys()
        squares = 0.0
        for name, wanted in expected.gradients.items():
            error = (rank.gradients[name] - wanted).double()
            largest = float(error.abs().max() / wanted.abs().max())
            gradients[name] = max(gradients.get(name, 0.0), largest)
            squares += float(error.square().sum())
            if largest:
                changed.add(name)
        distances.append(squares**0.5 / _norm(expected.gradients.values()))
        weights += [_largest(rank.weights[name] - wanted) for name, wanted in expected.weights.items()]
    worst = max(gradients, key=lambda name: gradients[name])
    found = [(number, values) for rank in ranks for number, values in rank.logprobs.items()]
    assert {number for number, _ in found} == expected.logprobs.keys(), "log-probs are missing"
    return Difference(
        ranks=len(ranks),
        loss=max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, expected.losses, strict=True)),
        norm=max(abs(a / b - 1) for rank in ranks for a, b in zip(rank.norms, expected.norms, strict=True)),
        gradient=gradients[worst],
        gradient_name=worst,
        distance=max(distances),
        weights=max(weights),
        logprobs=max(_largest(values - expected.logprobs[number]) for number, values in found),
        bfloat16_ratio=None,
        time_ratio=1.0,
        changed=tuple(sorted(changed)),
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


# ---------------------------------------------------------------- the benchmark


def table() -> list[dict[str, Any]]:
    """Measure and print every layout; returns the rows."""
    with tempfile.TemporaryDirectory(prefix="r1mega-bench-") as folder:
        differences = measure(LAYOUTS, Path(folder))
    print(f"\n{STEPS} optimizer steps of tiny models, beside one process in fp32 (largest differences)")
    print("gradient: relative to its tensor's largest entry; bf16: error over that of one process in bf16")
    print("time: a step's seconds over those of one process in the same run; noisy, ranks share the cores")
    print(f"  {'':42}{'ranks':>6}{'loss':>9}{'gradient':>10}{'norm':>9}{'weights':>9}{'bf16':>7}{'time':>7}")
    rows = []
    for name, row in differences.items():
        bf16 = f"{row.bfloat16_ratio:.2f}" if row.bfloat16_ratio is not None else ""
        print(
            f"  {name:42}{row.ranks:>6}{row.loss:>9.0e}{row.gradient:>10.0e}{row.norm:>9.0e}{row.weights:>9.0e}"
            f"{bf16:>7}{row.time_ratio:>7.1f}"
        )
        fields = asdict(row)
        fields["changed"] = len(row.changed)
        rows.append({"layout": name, **fields})
    return rows
