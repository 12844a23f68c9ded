"""Rollouts through Ray and vLLM, and weights from another process, against transformers."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_fixtures import LAYERS, checkpoint_weights, deepseek, spawn_engine
from safetensors.torch import save_file
from tiny_models import mesh_of
from torch import Tensor

from r1mega import cluster, cluster_watch, platforms
from r1mega.algorithms.credit import plan_samples
from r1mega.config import ParallelConfig, RunConfig
from r1mega.data.packing import pack
from r1mega.rollout.engine import EngineDied, RolloutGroup, Sampling, greedy_sampling, rollout_sampling
from r1mega.rollout.weight_sync import (
    Bucket,
    Named,
    WeightChecksumError,
    WeightMetadata,
    WeightSender,
    checksums,
    weight_metadata,
)
from r1mega.samples import Prompt, Rollout

TOLERANCE = 1e-5


class CorruptingSender(WeightSender):
    """Announces the right checksums and sends one byte that is wrong, in bucket 1."""

    def _filled(self, named: Named) -> Iterator[tuple[Bucket, Tensor]]:
        for bucket, bytes_N in super()._filled(named):
            self.right = checksums(bytes_N)
            if bucket.index == 1:
                bytes_N[5] ^= 1
            yield bucket, bytes_N

    def _header(self, bucket: Bucket, bytes_N: Tensor, version: int) -> Tensor:
        return torch.cat([super()._header(bucket, bytes_N, version)[:2], self.right])


class Trainer:
    """A process that owns weights and sends them."""

    def __init__(self, sender: type[WeightSender] = WeightSender):
        self.sender_class = sender

    def open(
        self, weights: dict[str, Tensor], num_receivers: int, bucket_bytes: int, draft: bool
    ) -> tuple[WeightMetadata, tuple[str, int]]:
        self.weights = weights
        metadata = weight_metadata(
            iter(weights.items()), num_hidden_layers=LAYERS, draft=draft, bucket_bytes=bucket_bytes
        )
        self.sender = self.sender_class(platforms.CPU, metadata, num_receivers, timeout_seconds=60)
        return metadata, self.sender.address

    def connect(self) -> None:
        self.sender.connect()

    def send(self, version: int) -> dict[str, float]:
        return self.sender.send(iter(self.weights.items()), version)

    def imported_vllm(self) -> bool:
        return "vllm" in sys.modules


async def synchronise(
    engines: RolloutGroup,
    weights: dict[str, Tensor],
    version: int,
    bucket_bytes: int = 1 << 20,
    draft: bool = False,
    sender: type[WeightSender] = WeightSender,
) -> None:
    """From a fresh trainer process to the engines."""
    trainer = cluster.spawn(Trainer, sender, name="trainer")
    metadata, (host, port) = await trainer.open(weights, engines.num_receivers, bucket_bytes, draft)
    await asyncio.gather(trainer.connect(), engines.init_sync(host, port))
    await asyncio.gather(trainer.send(version), engines.receive(metadata, version))
    assert not await trainer.imported_vllm()
    cluster.kill(trainer)


def prompts(config: RunConfig, count: int) -> list[Prompt]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    texts = [f"{i} + {i * i} = ?" + " so" * (i % 3) for i in range(count)]
    return [
        Prompt(f"test:{i}", text, "0", "math", text, tuple(tokenizer.encode(text)))
        for i, text in enumerate(texts)
    ]


async def collect(
    engines: RolloutGroup, asked: Sequence[Prompt], sampling: Sampling, step: int = 0
) -> list[Rollout]:
    found = [rollout async for rollout in engines.generate(asked, sampling, step)]
    return sorted(found, key=lambda rollout: (rollout.prompt.id, rollout.index))


def largest_difference(model: Any, rollouts: list[Rollout], temperature: float = 1.0) -> float:
    """Largest |engine's log-prob - transformers'| over all sampled tokens."""
    worst = 0.0
    for rollout in rollouts:
        prompt, response = list(rollout.prompt.token_ids), list(rollout.response_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        reference = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        difference = (reference - torch.tensor(rollout.response_logprobs)).abs().max()
        assert torch.isfinite(difference), f"log-probs {rollout.response_logprobs}"
        worst = max(worst, float(difference))
    assert worst > 0.0, "two programs do not agree to the last bit: nothing was compared"
    return worst


def new_weights(config: RunConfig, tmp_path: Path, seed: int) -> tuple[Any, dict[str, Tensor]]:
    """(transformers' model, its checkpoint tensors with MTP) unlike those the engines started with."""
    vocab_size = len(_tokenizer(config))
    model = deepseek(vocab_size, seed)
    return model, checkpoint_weights(model, tmp_path / f"weights{seed}")


def _tokenizer(config: RunConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.model.path)


def other_choices(config: RunConfig, weights: dict[str, Tensor], rollouts: list[Rollout], path: Path) -> int:
    """At how many (token, layer) the trainer's own gates, in fp32, choose other experts than the engine did."""
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    (samples,) = plan_samples(rollouts, config, 0).mini_batches
    batches, different = pack(samples, 1, 512)[0], 0
    with mesh_of(ParallelConfig()), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        from r1mega.models import experts
        from r1mega.models.hf_config import load_hf_config
        from r1mega.models.hf_weights import import_hf
        from r1mega.models.language_model import build_model

        model = build_model(load_hf_config(config.model.path), config.model, config.parallel, seed=1).eval()
        import_hf(model, str(path))
        seen, operator = [], experts.grouped_topk
        patch.setattr(experts, "grouped_topk", lambda *a, **k: seen.append(operator(*a, **k)) or seen[-1])
        for batch in batches:
            seen.clear()
            model(batch)
            own_TLK = torch.stack([routing.expert_TK for routing in seen[: LAYERS - 1]], dim=1)
            same_TLK = own_TLK.sort(-1).values == batch.experts_TLK.long().sort(-1).values
            different += int((~same_TLK.all(-1)).sum())
    return different


@pytest.mark.parametrize("bucket_bytes", [4096, 1 << 30])
def test_engine_logprobs_equal_transformers_after_a_sync(
    engines: RolloutGroup, tiny_run: RunConfig, tmp_path: Path, bucket_bytes: int
) -> None:
    model, weights = new_weights(tiny_run, tmp_path, seed=bucket_bytes % 97)
    sampling = replace(rollout_sampling(tiny_run, 0), temperature=0.8)

    async def run() -> list[Rollout]:
        await synchronise(engines, weights, version=7, bucket_bytes=bucket_bytes)
        assert await engines.weight_versions() == [7, 7]
        return await collect(engines, prompts(tiny_run, 6), sampling)

    rollouts = asyncio.run(run())
    assert len(rollouts) == 6 * 4
    assert {rollout.weight_version for rollout in rollouts} == {7}
    assert largest_difference(model, rollouts, temperature=0.8) < TOLERANCE


def test_logprobs_equal_transformers_before_and_after_a_sync_with_mtp(
    ray_cluster: None, speculative_run: RunConfig, tmp_path: Path
) -> None:
    before = deepseek(len(_tokenizer(speculative_run)), seed=0)
    after, weights = new_weights(speculative_run, tmp_path, seed=5)
    sampling = rollout_sampling(speculative_run, 0)
    asked = prompts(speculative_run, 4)

    async def run() -> tuple[list[Rollout], list[Rollout]]:
        handle = spawn_engine(speculative_run, name="speculative engine")
        await handle.ready()
        group = RolloutGroup([handle])
        first = await collect(group, asked, sampling)
        await synchronise(group, weights, version=2, draft=True)
        second = await collect(group, asked, sampling)
        cluster.kill(handle)
        return first, second

    first, second = asyncio.run(run())
    assert largest_difference(before, first) < TOLERANCE
    assert largest_difference(after, second) < TOLERANCE
    assert {rollout.weight_version for rollout in second} == {2}
    assert other_choices(speculative_run, weights, second, tmp_path / "second") <= 1, (
        "rejected drafts do not count"
    )


def test_routed_experts_are_the_trainers_own_choice(
    engines: RolloutGroup, tiny_run: RunConfig, tmp_path: Path
) -> None:
    """After a sync too, and for prompt tokens that came from the prefix cache (a block is 32 tokens)."""
    _, weights = new_weights(tiny_run, tmp_path, seed=21)
    sampling = replace(rollout_sampling(tiny_run, 0), max_tokens=12)
    asked = [replace(p, token_ids=(p.token_ids * 5)[:44]) for p in prompts(tiny_run, 4)]

    async def run() -> list[list[Rollout]]:
        stale = await collect(engines, asked, sampling)
        await synchronise(engines, weights, version=3)
        return [stale, await collect(engines, asked, sampling), await collect(engines, asked, sampling)]

    stale, fresh, cached = asyncio.run(run())
    tokens = sum(len(r.prompt.token_ids) + len(r.response_ids) - 1 for r in fresh)
    assert other_choices(tiny_run, weights, fresh, tmp_path / "fresh") <= tokens // 500
    assert other_choices(tiny_run, weights, cached, tmp_path / "cached") <= tokens // 500
    assert other_choices(tiny_run, weights, stale, tmp_path / "stale") > tokens // 5, "the weights differ"


def test_seeds_repeat_and_depend_on_the_step(engines: RolloutGroup, tiny_run: RunConfig) -> None:
    asked, sampling = prompts(tiny_run, 6), rollout_sampling(tiny_run, 0)

    async def run() -> list[list[Rollout]]:
        one_engine = RolloutGroup(engines.engines[:1])
        groups = [(engines, 0), (engines, 0), (engines, 1), (one_engine, 0)]
        return [await collect(group, asked, sampling, step) for group, step in groups]

    first, again, other_step, one_engine = (
        [rollout.response_ids for rollout in run] for run in asyncio.run(run())
    )
    assert first == again
    assert first != other_step
    assert first == one_engine, "the number of engines must not change what is sampled"
    assert len(set(first)) > len(first) // 2


def test_text_leaves_out_the_stop_token_and_keeps_the_tags(
    engines: RolloutGroup, tiny_run: RunConfig
) -> None:
    tokenizer = _tokenizer(tiny_run)
    rollouts = asyncio.run(collect(engines, prompts(tiny_run, 12), rollout_sampling(tiny_run, 0)))
    for rollout in rollouts:
        stopped = rollout.finish_reason == "stop"
        assert stopped == (rollout.response_ids[-1] == tokenizer.eos_token_id)
        assert stopped or len(rollout.response_ids) == 24
        shown = rollout.response_ids[:-1] if stopped else rollout.response_ids
        assert rollout.response_text == "".join(tokenizer.convert_ids_to_tokens(shown))
    assert any(rollout.finish_reason == "stop" for rollout in rollouts)
    assert any("think>" in rollout.response_text for rollout in rollouts)


def test_greedy_outputs_are_the_most_likely_tokens(engines: RolloutGroup, tiny_run: RunConfig) -> None:
    asked, greedy = prompts(tiny_run, 3), greedy_sampling(tiny_run, 0)
    first = asyncio.run(collect(engines, asked, greedy))
    assert [r.response_ids for r in first] == [
        r.response_ids for r in asyncio.run(collect(engines, asked, greedy, step=9))
    ]
    assert all(rollout.index == 0 for rollout in first)


class Recording:
    """An engine that remembers how many prompts it was given."""

    def __init__(self, engine: Any):
        self.engine, self.num_prompts = engine, 0

    async def generate(
        self, asked: Sequence[Prompt], sampling: Sampling, step: int, done: Collection[Any]
    ) -> AsyncIterator[list[Rollout]]:
        self.num_prompts += len(asked)
        async for rollouts in self.engine.generate(asked, sampling, step, done):
            yield rollouts


def test_engines_share_the_prompts_evenly_and_lose_none(engines: RolloutGroup, tiny_run: RunConfig) -> None:
    recording: list[Any] = [Recording(engine) for engine in engines.engines]
    asked = prompts(tiny_run, 9)
    rollouts = asyncio.run(collect(RolloutGroup(recording), asked, rollout_sampling(tiny_run, 0)))
    assert sorted(engine.num_prompts for engine in recording) == [4, 5]
    assert [(r.prompt.id, r.index) for r in rollouts] == [(p.id, i) for p in asked for i in range(4)]
    assert all(len(r.response_ids) == len(r.response_logprobs) for r in rollouts)


def test_a_consumer_that_stops_early_leaves_the_engine_usable(
    engines: RolloutGroup, tiny_run: RunConfig
) -> None:
    asked, sampling = prompts(tiny_run, 6), rollout_sampling(tiny_run, 0)

    async def run() -> list[Rollout]:
        generation = engines.generate(asked, sampling)
        await anext(generation)
        await generation.aclose()
        return await collect(engines, asked, sampling)

    assert len(asyncio.run(run())) == 24


def test_a_corrupted_bucket_is_named_and_stops_the_engine(
    ray_cluster: None, tiny_run: RunConfig, tmp_path: Path
) -> None:
    _, weights = new_weights(tiny_run, tmp_path, seed=8)

    async def run() -> None:
        handle = spawn_engine(tiny_run, name="misled engine")
        await handle.ready()
        group = RolloutGroup([handle])
        with pytest.raises(WeightChecksumError, match=r"bucket 1 of version 4 .*model"):
            await synchronise(group, weights, 4, bucket_bytes=16384, sender=CorruptingSender)
        with pytest.raises(EngineDied, match="bucket 1"):
            await collect(group, prompts(tiny_run, 1), rollout_sampling(tiny_run, 0))
        cluster.kill(handle)

    asyncio.run(run())


def test_an_engine_that_stalls_or_is_killed_has_a_name(ray_cluster: None, tiny_run: RunConfig) -> None:
    impatient = replace(tiny_run, rollout=replace(tiny_run.rollout, timeout_seconds=1e-4))
    asked, sampling = prompts(tiny_run, 2), rollout_sampling(tiny_run, 0)

    async def run() -> None:
        handle = spawn_engine(impatient, name="lost engine")
        await handle.ready()
        group = RolloutGroup([handle])
        with pytest.raises(EngineDied, match=r"finished nothing for 0\.0001 s .*8 outputs are open"):
            await collect(group, asked, sampling)
        with pytest.raises(EngineDied, match="finished nothing"):
            await collect(group, asked, sampling)
        cluster.kill(handle)
        with pytest.raises(EngineDied, match="lost engine 0 died"):
            await collect(group, asked, sampling)

    asyncio.run(run())


DRIVER = """
import asyncio, os, sys, pickle
from concurrent.futures import ThreadPoolExecutor
from r1mega import cluster, cluster_watch
config = pickle.load(open(sys.argv[1], "rb"))

async def main():
    from r1mega.rollout.engine import RolloutEngine
    path = config.model.path
    handles = [cluster.spawn(ThreadPoolExecutor, name="another")]
    if sys.argv[2] == "engine":
        handles.append(cluster.spawn(RolloutEngine, config, path, path, name="engine"))
    for handle in handles:
        await handle.ready()
    print(os.environ[cluster_watch.VARIABLE], flush=True)
    await asyncio.sleep(60)

with cluster.start(config):
    asyncio.run(main())
"""


@pytest.mark.parametrize("how, worker", [(signal.SIGKILL, "engine"), (signal.SIGINT, "none")])
def test_a_killed_driver_leaves_no_process(
    tiny_run: RunConfig, tmp_path: Path, how: signal.Signals, worker: str
) -> None:
    (tmp_path / "config").write_bytes(pickle.dumps(tiny_run))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "config"), worker]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert driver.stdout is not None
    folder = driver.stdout.readline().strip()
    assert folder, "the driver never became ready"
    assert len(list(cluster_watch.processes_of(folder))) > 3
    driver.send_signal(how)
    driver.wait(timeout=30)
    driver.stdout.close()
    deadline = time.monotonic() + 20
    while os.path.exists(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(cluster_watch.processes_of(folder))
    assert not os.path.exists(folder)
