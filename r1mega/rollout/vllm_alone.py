"""vLLM by itself, the step benchmark's reference for the rollout: offline `LLM.generate`, no Ray, no streaming.

Same engine options, same requests (prompts, limits, seeds) as RolloutEngine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from r1mega import platforms
from r1mega.config import RunConfig
from r1mega.rollout import vllm_engine
from r1mega.rollout.engine import rollout_sampling, sample_seed
from r1mega.samples import Prompt


class VLLMAlone:
    """One engine. Every round generates the next share of `rounds`, which holds the prompts of each round."""

    def __init__(self, config: RunConfig, threads: int, rounds: Sequence[Sequence[Prompt]], first_step: int):
        platform = platforms.detect(config.platform)
        os.environ.update(vllm_engine.environment(platform, config.rollout.tensor_parallel))
        platform.set_threads(threads)
        if platform is platforms.CPU:
            vllm_engine.forbid_torch_compile()
        from vllm import LLM

        options = vllm_engine.engine_options(config, platform, config.model.path, seed=config.seed)
        for ours in ("weight_transfer_config", "worker_extension_cls"):
            del options[ours]
        self.llm = LLM(**options)
        self.config, self.rounds, self.step = config, list(rounds), first_step

    def round(self) -> dict[str, float]:
        """Seconds, requests and sampled tokens of one `generate`."""
        prompts, step = self.rounds.pop(0), self.step
        self.step += 1
        requests = [(prompt, i) for prompt in prompts for i in range(self.config.grpo.group_size)]
        inputs: list[Any] = [{"prompt_token_ids": list(prompt.token_ids)} for prompt, _ in requests]
        parameters = [self._parameters(prompt, index, step) for prompt, index in requests]
        began = time.monotonic()
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        seconds = time.monotonic() - began
        self.llm.reset_prefix_cache()
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"seconds": seconds, "requests": len(requests), "tokens": tokens}

    def _parameters(self, prompt: Prompt, index: int, step: int) -> Any:
        from vllm import SamplingParams

        sampling = rollout_sampling(self.config, step)
        seed = sample_seed(self.config.seed, step, prompt.id, index) if self.config.rollout.seeded else None
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=seed,
            stop_token_ids=[int(self.llm.model_config.hf_config.eos_token_id)],
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
