"""The experts that vLLM's routers chose for every token, for routing replay, on CPU.

vLLM 0.32 delivers them (AuxOutput, with a store of its own for prompts from the prefix cache) by its second model runner
alone, and that one needs Triton. Here the first runner feeds the same delivery. On GPUs vLLM does it all by itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector, get_aux_output_connector
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class RecordingRunner(CPUModelRunner):
    """Hands each step's experts to vLLM's delivery, where the engine was asked for them (vllm_engine.py)."""

    _delivery: AuxOutputWorkerConnector | None = None
    _step: Any = None
    """What the scheduler wants of the step that runs."""

    def load_model(self, *args: Any, **options: Any) -> None:
        """The draft model's configuration is a checked copy of the engine's, and vLLM's check wants the second runner."""
        settings = self.vllm_config.aux_output_config
        wanted, settings.enable_return_routed_experts = settings.enable_return_routed_experts, False
        super().load_model(*args, **options)
        settings.enable_return_routed_experts = wanted

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **options: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **options)
        if self.vllm_config.aux_output_config.enabled:
            self._delivery = get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)

    def execute_model(self, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if self._delivery is not None:
            self._delivery.begin_step(scheduler_output.aux_output_connector_metadata)
            self._step = scheduler_output
        return super().execute_model(scheduler_output, *args, **options)

    def sample_tokens(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        output = super().sample_tokens(*args, **options)
        if self._delivery is not None and isinstance(output, ModelRunnerOutput) and output.req_ids:
            output.aux_output_connector_output = self._experts_of(output, self._delivery)
        return output

    def _experts_of(self, output: ModelRunnerOutput, delivery: AuxOutputWorkerConnector) -> Any:
        """Of the step's accepted tokens, by request; None in the processes of a tensor group but the first."""
        requests = output.req_ids
        ends = np.cumsum([0] + [self._step.num_scheduled_tokens[request] for request in requests])
        pending: Any = delivery.prepare_output(
            SimpleNamespace(  # type: ignore[arg-type]
                req_ids=requests,
                query_start_loc_np=ends,
                num_computed_tokens_np=self.input_batch.num_computed_tokens_cpu[: len(requests)].copy(),
            )
        )
        if pending is None:
            return None
        sampled = [len(tokens) for tokens in output.sampled_token_ids]
        drafted = [len(self._step.scheduled_spec_decode_tokens.get(request, ())) for request in requests]
        rejected = [d + 1 - s if d else 0 for d, s in zip(drafted, sampled, strict=True)]
        pending.enqueue_cpu_copy(np.array(sampled), np.array(rejected))
        return pending.process_output()


def install() -> None:
    """vLLM's CPU workers make their runners of this class."""
    cpu_worker.CPUModelRunner = RecordingRunner  # type: ignore[misc]
