"""Tiny models of every supported architecture, packed batches, and one process that can run them."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platforms
from r1mega.config import ParallelConfig
from r1mega.samples import PackedBatch
from r1mega_kernels.fp8_block import dequantize_reference, quantize_reference

DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}
QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
LLAMA: dict[str, Any] = {
    **{name: value for name, value in QWEN2.items() if name != "rope_theta"},
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 16,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def free_port() -> int:
    """At random from below the range that the kernel gives to outgoing connections, so that none takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def process_group(rank: int = 0, world_size: int = 1, port: int = 0) -> Iterator[None]:
    """Prepare Megatron and join a process group; leave it afterwards."""
    platforms.CPU.prepare_megatron()
    platforms.CPU.set_threads(1)
    platforms.CPU.init_process_group(rank, world_size, "127.0.0.1", port or free_port(), timeout_seconds=60)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def mesh_of(parallel: ParallelConfig, rank: int = 0, port: int = 0) -> Iterator[Any]:
    """Join a process group and make the mesh; leave both afterwards."""
    with process_group(rank, parallel.tensor * parallel.context * parallel.data * parallel.pipeline, port):
        from r1mega.parallel import mesh

        yield mesh.init_mesh(parallel, seed=1)
        mesh.destroy_mesh()


def packed(lengths: list[int], vocab_size: int, seed: int) -> PackedBatch:
    """Random tokens; each target is the next token of its sequence; random weights, zero on a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocab_size, (length + 1,), generator=generator) for length in lengths]
    mask_T = (torch.rand(sum(lengths), generator=generator) < 0.8).float()
    return PackedBatch(
        tokens_T=torch.cat([row[:-1] for row in rows]),
        targets_T=torch.cat([row[1:] for row in rows]),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens_S=torch.tensor([0, *lengths]).cumsum(0).int(),
        loss_mask_T=mask_T,
        token_weights_T=mask_T * torch.rand(len(mask_T), generator=generator) / len(mask_T),
    )


def scramble(module: torch.nn.Module, seed: int) -> None:
    """Large random weights, so that every part of the model matters: norms about 1, biases about 0.1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and "proj" not in name:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_((0.1 if "bias" in name else 0.15) * noise)


class _RoundedToFloat8(torch.autograd.Function):
    """e4m3 with a scale for each 128 values of a row; the identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: torch.Tensor) -> torch.Tensor:
        return dequantize_reference(*quantize_reference(tokens_TD, 1), 1, tokens_TD.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> torch.Tensor:
        return gradient_TD


@contextlib.contextmanager
def float8_by_rounding_first(dispatch: Any) -> Iterator[None]:
    """Models built meanwhile round their tokens and then send them as "alltoall" does, where they would send fp8.

    dispatch: the module models/dispatch.py.
    """

    class RoundedFirst(dispatch.AllToAll):
        def rows_of(self, tokens_TD: torch.Tensor) -> torch.Tensor:
            return super().rows_of(_RoundedToFloat8.apply(tokens_TD))

    own = dispatch.DISPATCHERS["alltoall_fp8"]
    dispatch.DISPATCHERS["alltoall_fp8"] = RoundedFirst
    try:
        yield
    finally:
        dispatch.DISPATCHERS["alltoall_fp8"] = own
