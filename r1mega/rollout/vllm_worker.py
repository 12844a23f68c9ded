"""Weight sync, the engine's half: a vLLM weight-transfer backend, loaded in every vLLM worker.

vLLM imports this module in its workers because `worker_extension_cls` names SyncExtension; the import
registers the backend. Every bucket is compared with its header before it is loaded. After a mismatch the
remaining buckets are still received, so that the trainer and the other engines finish, and then it rises.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.parallel_state import get_ep_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler

from r1mega import platforms
from r1mega.rollout import routed_experts
from r1mega.rollout.expert_placement import begin_loading, finish_loading, install
from r1mega.rollout.weight_sync import (
    Bucket,
    WeightChecksumError,
    WeightSyncError,
    broadcast,
    checksums,
    open_store,
)

BACKEND = "r1mega"


@dataclass
class SyncAddress(WeightTransferInitInfo):
    host: str
    port: int
    first_rank: int
    """Rank of this engine's first worker; rank 0 is the trainer."""
    world_size: int
    timeout_seconds: float


@dataclass
class SyncSession(WeightTransferUpdateInfo):
    version: int
    plan: bytes
    """Pickled (buckets of this session, buckets of the one after it); vLLM's own messages lose their classes."""


class SyncEngine(WeightTransferEngine[SyncAddress, SyncSession]):
    """Receives buckets from the trainer and loads them layer by layer (vLLM's layerwise reload)."""

    init_info_cls = SyncAddress
    update_info_cls = SyncSession
    _group: dist.ProcessGroup | None = None
    _store: dist.Store | None = None

    def init_transfer_engine(self, init_info: SyncAddress) -> None:
        """Again, with another address, where an engine or the trainer was replaced."""
        self.shutdown()
        self.platform = platforms.detect(self.device.type)
        rank = init_info.first_rank + self.parallel_config.rank
        self._store = open_store(init_info.host, init_info.port, init_info.timeout_seconds, is_master=False)
        self._group = self.platform.join_group(
            self._store, rank, init_info.world_size, init_info.timeout_seconds
        )

    def start_weight_update(self) -> None:
        if self.platform is platforms.CPU:
            _repack_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        self.platform.synchronize()

    def receive_weights(self, update_info: SyncSession) -> None:
        self.times = {"transfer_seconds": 0.0, "load_seconds": 0.0}
        buckets, later = pickle.loads(update_info.plan)
        fault: WeightSyncError | None = None
        with disable_mtp_completeness_check():
            for bucket, bytes_N, header in self._arriving(buckets):
                fault = fault or _compare(bucket, bytes_N, header, update_info.version)
                if fault is None:
                    began = time.monotonic()
                    self._load(bucket, bytes_N)
                    self.times["load_seconds"] += time.monotonic() - began
        if fault is not None:
            for _ in self._arriving(later):  # the trainer sends on: take it and drop it
                pass
            raise fault

    def _load(self, bucket: Bucket, bytes_N: Tensor) -> None:
        model: Any = self.model
        model.load_weights((info.name, view) for info, view in bucket.views(bytes_N))

    def _arriving(self, buckets: list[Bucket]) -> Iterator[tuple[Bucket, Tensor, Tensor]]:
        """(bucket, bytes, header), the next one on its way while the caller works on this one.

        Every bucket has memory of its own: layerwise reload keeps views until their layer is complete.
        """
        on_the_way: list[tuple[Bucket, Tensor, Tensor, list[dist.Work]]] = []
        for index, bucket in enumerate(buckets):
            if not on_the_way:
                on_the_way.append(self._receive(bucket))
            on_the_way += [self._receive(after) for after in buckets[index + 1 : index + 2]]
            began = time.monotonic()
            _, bytes_N, header, works = on_the_way.pop(0)
            for work in works:
                work.wait()
            self.times["transfer_seconds"] += time.monotonic() - began
            yield bucket, bytes_N, header
            del bytes_N, header

    def _receive(self, bucket: Bucket) -> tuple[Bucket, Tensor, Tensor, list[dist.Work]]:
        assert self._group is not None, "init_sync comes first"
        bytes_N = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self.device)
        header = torch.empty(4, dtype=torch.int64, device=self.device)
        return bucket, bytes_N, header, [broadcast(self._group, bytes_N), broadcast(self._group, header)]

    def finish_weight_update(self) -> None:
        began = time.monotonic()
        finalize_layerwise_reload(self.model, self.model_config)
        self.times["load_seconds"] += time.monotonic() - began

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.abort()
        self._group = self._store = None


def _compare(bucket: Bucket, bytes_N: Tensor, header: Tensor, version: int) -> WeightSyncError | None:
    sent_version, sent_index, *sent = header.tolist()
    if (sent_version, sent_index) != (version, bucket.index):
        return WeightSyncError(
            f"weight sync: version {sent_version} bucket {sent_index} came, "
            f"version {version} bucket {bucket.index} was due"
        )
    found = checksums(bytes_N).tolist()
    if found != sent:
        first, last = bucket.tensors[0].name, bucket.tensors[-1].name
        return WeightChecksumError(
            f"{WeightChecksumError.MARK} in bucket {bucket.index} of version {version} ({first} to {last}): "
            f"sent {sent}, arrived {found}"
        )
    return None


class SyncExtension:
    """Mixed into vLLM's workers."""

    def sync_times(self) -> dict[str, float]:
        return self.weight_transfer_engine.times  # type: ignore[attr-defined]

    def begin_loading_experts(self) -> None:
        """Before a sync, where vLLM balances experts (expert_placement.py); elsewhere nothing."""
        self._former_placements = begin_loading(self._balanced_models())

    def finish_loading_experts(self) -> None:
        models = self._balanced_models()
        if models:
            finish_loading(models, self._former_placements, get_ep_group().device_group)

    def _balanced_models(self) -> list[Any]:
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        state = runner.eplb.state if hasattr(runner, "eplb") else runner.eplb_state  # vLLM has two runners
        return [] if state is None else list(state.model_states.values())


WeightTransferEngineFactory.register_engine(BACKEND, SyncEngine)
install()


# ---------------------------------------------------------------- what vLLM 0.32 gets wrong on CPU


def _repack_experts(model: torch.nn.Module) -> None:
    """Experts are packed for the CPU when their kernel object is first made, and only then: after a reload the
    raw weights would be read in the packed layout, silently wrong. Without the object they are packed again."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(module, "w13_weight") and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _expand_batch_to_tokens(
    x_S: Tensor, cu_num_tokens_S: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Repeat each sequence's value for its drafted tokens; speculative decoding's temperature and top-p.

    vLLM's CPU version writes to a copy and returns memory that was never set: samples and log-probs of a
    random temperature.
    """
    counts_S = torch.diff(cu_num_tokens_S, prepend=cu_num_tokens_S.new_zeros(1))
    x_T = x_S.repeat_interleave(counts_S.long(), output_size=num_tokens)
    return x_T.masked_fill(x_T == replace_from, replace_to)


if current_platform.is_cpu():
    rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens  # type: ignore[assignment]
    routed_experts.install()
