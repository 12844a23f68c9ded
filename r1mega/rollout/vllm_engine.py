"""How this project runs vLLM: its options on each platform, chosen around what vLLM 0.32 gets wrong on CPU.

What no option mends, vllm_worker.py corrects.

vLLM is imported here and in vllm_worker.py, inside functions here, so that a driver can import the rollout
package without vLLM's seconds of import.

On CPU the engine core shares the engine's process and is stepped by its thread: it is ready 14 s sooner and
uses one core where two processes use two. On GPU the core has its own process, so that scheduling overlaps
with the device's work.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.config import ConfigError, RunConfig
from r1mega.platforms import CPU, Platform

if TYPE_CHECKING:
    from vllm import LLMEngine

CPU_KV_CACHE_BYTES = 1 << 30
CPU_BLOCK_SIZE = 32
"""Tokens per block of the KV cache: the smallest the CPU attention takes, for short prompts share whole blocks."""
CPU_BATCHED_TOKENS = 8192


def build_engine(
    config: RunConfig, platform: Platform, model_path: str, seed: int, threads: int
) -> LLMEngine:
    """Load the model and return vLLM's synchronous engine. All later calls belong to the calling thread.

    Raises ConfigError for a model directory that cannot be served.
    """
    options = engine_options(config, platform, model_path, seed)
    os.environ.update(environment(platform, config.rollout.tensor_parallel))
    platform.set_threads(threads)  # of the calling thread, which OpenMP asks; vLLM on CPU forbids it later
    if platform is CPU:
        forbid_torch_compile()
    from vllm import EngineArgs, LLMEngine

    vllm_config = EngineArgs(**options).create_engine_config()
    if config.grpo.routing_replay and platform is CPU:  # vLLM's own check does not know routed_experts.py
        vllm_config.aux_output_config.enable_return_routed_experts = True
    return LLMEngine.from_vllm_config(vllm_config, disable_log_stats=options["disable_log_stats"])


def engine_options(config: RunConfig, platform: Platform, model_path: str, seed: int) -> dict[str, Any]:
    """vLLM's engine arguments for this run."""
    rollout = config.rollout
    hf_config = _read_hf_config(model_path)
    options: dict[str, Any] = {
        "model": model_path,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # no sampling defaults from the model's directory
        "load_format": "dummy" if config.model.init == "random" else "auto",
        "use_tqdm_on_load": False,
        "dtype": rollout.dtype,
        "max_model_len": max_model_len(config, hf_config),
        "max_num_seqs": rollout.max_concurrent,
        "tensor_parallel_size": rollout.tensor_parallel,
        "enable_prefix_caching": True,  # the outputs of a group share their prompt
        "logprobs_mode": "processed_logprobs",  # after the temperature: what the tokens were sampled with
        "seed": seed,
        "disable_log_stats": True,
        "weight_transfer_config": {"backend": "r1mega"},
        "worker_extension_cls": "r1mega.rollout.vllm_worker.SyncExtension",
    }
    if rollout.speculative_tokens:
        if not hf_config.get("num_nextn_predict_layers"):
            raise ConfigError(
                f"rollout.speculative_tokens={rollout.speculative_tokens}: {model_path} has no MTP layer "
                "(num_nextn_predict_layers in its config.json); set it to 0"
            )
        tokens = rollout.speculative_tokens
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": tokens}
    return options | (_cpu_options if platform is CPU else _gpu_options)(config, options["max_model_len"])


def _gpu_options(config: RunConfig, max_model_len: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "gpu_memory_utilization": config.rollout.gpu_memory,
    }
    if config.rollout.kv_cache_gib:
        options["kv_cache_memory_bytes"] = int(config.rollout.kv_cache_gib * 2**30)
    if config.grpo.routing_replay:
        options["enable_return_routed_experts"] = True
    ranks, replicas = config.rollout.tensor_parallel, config.parallel.expert_replicas
    if replicas and ranks > 1:  # vLLM's own balancer, with expert_placement.py's policy
        options |= {
            "enable_expert_parallel": True,
            "enable_eplb": True,
            # Moves weights between two steps, never beside one: a sync must find them in their places.
            "eplb_config": {"num_redundant_experts": replicas * ranks, "use_async": False},
        }
    return options


def _cpu_options(config: RunConfig, max_model_len: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        # With a KV cache of given size, eager execution starts without a warm-up.
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(config.rollout.kv_cache_gib * 2**30) or CPU_KV_CACHE_BYTES,
        "block_size": CPU_BLOCK_SIZE,
        # The CPU kernel of interleaved RoPE (DeepSeek's) corrupts three-dimensional queries, silently.
        "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
        # A prompt prefilled in parts rewinds its sample's generator, which CPU generators cannot: prefill whole.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, max_model_len),
    }
    if config.rollout.tensor_parallel > 1:
        options["distributed_executor_backend"] = "mp"
    return options


def environment(platform: Platform, tensor_parallel: int) -> dict[str, str]:
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "HF_HUB_OFFLINE": "1",  # models are directories
    }
    if platform is CPU:
        variables |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_MLA_DISABLE": "1",  # the CPU's latent-attention kernel takes one latent size; this serves all
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines would all bind to the first cores
            "TORCHDYNAMO_DISABLE": "1",
        }
    return variables


def forbid_torch_compile() -> None:
    """vLLM compiles the rank of a log-prob with the C++ compiler at the first request: 16 s for nothing on CPU."""
    import torch._dynamo

    torch._dynamo.config.disable = True


def _read_hf_config(model_path: str) -> dict[str, Any]:
    file = Path(model_path) / "config.json"
    if not file.is_file():
        raise ConfigError(f"no model at {model_path} (config.json is missing): set model.path=PATH")
    return json.loads(file.read_text())


def check_numbers(model_path: str) -> None:
    """Raise ConfigError for a quantised model, whose engine has quantised layers: a sync has no weights for them.

    Not among engine_options: engines of evaluations and data generation take no weights, and vLLM serves such a model.
    """
    quantization = _read_hf_config(model_path).get("quantization_config")
    if quantization:
        raise ConfigError(
            f"{model_path} is quantised ({quantization.get('quant_method')}, in its config.json) and engines of a run sample "
            f"with the trainer's bfloat16: `r1mega convert {model_path} TARGET`, and take TARGET as model.path"
        )


def max_model_len(config: RunConfig, hf_config: dict[str, Any]) -> int:
    """Longest sequence of the run: prompt and response. Raises ConfigError beyond the model's positions."""
    responses = [tokens for _, tokens in config.rollout.max_tokens]
    longest = config.data.max_prompt_tokens + max(responses)
    limit = hf_config.get("max_position_embeddings", longest)
    if longest > limit:
        raise ConfigError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and responses of up to "
            f"{longest - config.data.max_prompt_tokens} tokens need {longest} positions, the model has {limit}: lower one"
        )
    return longest
