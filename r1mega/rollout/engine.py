"""Rollout: G outputs per question from vLLM, each handed on as soon as it is finished.

A `RolloutEngine` is one vLLM engine; a `RolloutGroup` shares prompts over N of them. Both are plain async
classes. Every output is a request of its own, with a seed of its own, so that a rerun repeats it whatever it
was batched with; the outputs of a question share its prompt through the prefix cache. So what a dead engine had
not finished can be sampled by another one: `RolloutGroup.generate`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from r1mega import platforms
from r1mega.cluster import WorkerDied
from r1mega.config import RunConfig, value_at
from r1mega.data.tokenizer import read_tokenizer
from r1mega.rollout.vllm_engine import build_engine, check_numbers
from r1mega.rollout.weight_sync import WeightChecksumError, WeightMetadata, WeightSyncError
from r1mega.samples import Prompt, Rollout

GATHER_SECONDS = 0.05
"""Outputs that finish within this time travel together: a message costs more than an output."""
CLOSE_SECONDS = 10.0

OutputName = tuple[str, int]
"""(prompt id, index) of one output."""


class EngineDied(RuntimeError):
    """An engine failed, or finished nothing for `rollout.timeout_seconds`. It cannot be used again."""


Faults = dict[int, EngineDied]
"""What engines died of, by their place in the group."""


@dataclass(frozen=True)
class Sampling:
    """How every output of one `generate` call is sampled."""

    temperature: float
    """0 is greedy."""
    top_p: float
    max_tokens: int
    n: int = 1
    """Outputs per prompt."""


def rollout_sampling(config: RunConfig, step: int) -> Sampling:
    """Training's sampling at `step`: G outputs per question."""
    rollout = config.rollout
    limit = value_at(rollout.max_tokens, step)
    return Sampling(rollout.temperature, rollout.top_p, limit, n=config.grpo.group_size)


def greedy_sampling(config: RunConfig, step: int) -> Sampling:
    """Evaluation's most likely output."""
    return Sampling(0.0, 1.0, value_at(config.rollout.max_tokens, step))


def sample_seed(run_seed: int, step: int, prompt_id: str, index: int) -> int:
    """Seed of one output, below 2^63: the same in every process and on every machine."""
    key = f"{run_seed}/{step}/{prompt_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


class RolloutEngine:
    """One vLLM engine, ready when constructed. Everything vLLM runs in one thread of its own.

    Raises ConfigError for a model that cannot be served and EngineDied when vLLM fails.
    """

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        tokenizer_path: str,
        engine_index: int = 0,
        num_engines: int = 1,
        threads: int = 1,
    ):
        self.config, self.name = config, f"rollout engine {engine_index} of {num_engines}"
        self.tokenizer = read_tokenizer(tokenizer_path)
        self.stop_ids = stop_token_ids(self.tokenizer, model_path)
        self._version, self._fault = 0, ""
        self._one_at_a_time = asyncio.Lock()
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
        seed = sample_seed(config.seed, 0, "engine", engine_index) >> 32
        platform = platforms.detect(config.platform)
        self._llm = self._thread.submit(build_engine, config, platform, model_path, seed, threads).result()
        self._dense_layers = getattr(self._llm.model_config.hf_config, "first_k_dense_replace", 0)

    # ------------------------------------------------------------ generation

    async def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        step: int = 0,
        done: Collection[OutputName] = frozenset(),
    ) -> AsyncIterator[list[Rollout]]:
        """`len(prompts) * sampling.n` rollouts less the `done`, in small lists as they finish; `step` enters their seeds.

        Raises ValueError for a prompt that does not fit, EngineDied when vLLM fails or stalls.
        """
        self._check(prompts, sampling)
        requests = {
            f"{number}-{index}": (prompt, index)
            for number, prompt in enumerate(prompts)
            for index in range(sampling.n)
            if (prompt.id, index) not in done
        }
        async with self._one_at_a_time:
            await self._run(self._add, requests, sampling, step)
            unfinished = len(requests)
            running = self._submit(self._advance, requests, sampling.max_tokens)
            try:
                while unfinished:
                    finished = await self._within_timeout(running, unfinished)
                    unfinished -= len(finished)
                    if unfinished:
                        running = self._submit(self._advance, requests, sampling.max_tokens)
                    yield finished
            finally:
                if unfinished and not self._fault:
                    await self._abandon(running, requests)

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        limit = self._llm.model_config.max_model_len
        for prompt in prompts:
            if len(prompt.token_ids) + sampling.max_tokens > limit:
                raise ValueError(
                    f"prompt {prompt.id}: {len(prompt.token_ids)} tokens and a response of up to {sampling.max_tokens} "
                    f"exceed the engine's {limit} (data.max_prompt_tokens + rollout.max_tokens)"
                )

    def _add(self, requests: dict[str, tuple[Prompt, int]], sampling: Sampling, step: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for key, (prompt, index) in requests.items():
            seed = (
                sample_seed(self.config.seed, step, prompt.id, index) if self.config.rollout.seeded else None
            )
            parameters = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed,
                stop_token_ids=self.stop_ids,
                ignore_eos=True,  # config.json's end of sequence is not always the tokenizer's
                logprobs=0,  # the sampled token's only
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._llm.add_request(key, {"prompt_token_ids": list(prompt.token_ids)}, parameters)

    def _advance(self, requests: dict[str, tuple[Prompt, int]], limit: int) -> list[Rollout]:
        """Step until something is finished, and GATHER_SECONDS at least; takes the finished out of `requests`."""
        began, finished = time.monotonic(), []
        while self._llm.has_unfinished_requests() and not self._stop.is_set():
            finished += self._llm.step()
            if finished and time.monotonic() - began > GATHER_SECONDS:
                break
        rollouts = self._rollouts([(output, *requests.pop(output.request_id)) for output in finished], limit)
        if requests and not self._llm.has_unfinished_requests():
            raise RuntimeError(f"{len(requests)} requests were lost")
        return rollouts

    def _rollouts(self, finished: list[tuple[Any, Prompt, int]], limit: int) -> list[Rollout]:
        outputs = [request.outputs[0] for request, _, _ in finished]
        ends = [output.finish_reason == "stop" for output in outputs]
        ids = [list(output.token_ids) for output in outputs]
        shown = [tokens[:-1] if end else tokens for tokens, end in zip(ids, ends, strict=True)]
        texts = self.tokenizer.batch_decode(
            shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        rollouts = []
        for (_, prompt, index), output, tokens, text in zip(finished, outputs, ids, texts, strict=True):
            assert output.finish_reason in ("stop", "length"), f"finish reason {output.finish_reason!r}"
            logprobs = tuple(output.logprobs.logprobs)
            assert len(logprobs) == len(tokens), f"{len(logprobs)} log-probs for {len(tokens)} tokens"
            end, experts = output.finish_reason, output.routed_experts
            if experts is not None:
                experts = experts[:, self._dense_layers :]
            rollouts.append(
                Rollout(prompt, index, tuple(tokens), logprobs, text, end, self._version, limit, experts)
            )
        return rollouts

    async def _abandon(self, running: asyncio.Future, requests: dict[str, tuple[Prompt, int]]) -> None:
        """The consumer stopped early: take the unfinished requests back."""
        self._stop.set()
        await asyncio.wait([running])
        self._stop.clear()
        await self._run(lambda: self._llm.abort_request(list(requests)))

    # ------------------------------------------------------------ weights

    async def weight_version(self) -> int:
        """Version of the last sync; 0 for the weights the engine started with."""
        return self._version

    async def check(self) -> None:
        """Wait for what vLLM does; raises EngineDied where this engine cannot be used any more."""
        await self._run(lambda: None)
        if self._fault:
            raise EngineDied(self._fault)

    async def init_sync(self, host: str, port: int, first_rank: int, world_size: int) -> None:
        """Join the trainer's WeightSender; this engine's workers get ranks from `first_rank`.

        Raises ConfigError for a quantised model.
        """
        check_numbers(self._llm.model_config.model)
        address = {
            "host": host,
            "port": port,
            "first_rank": first_rank,
            "world_size": world_size,
            "timeout_seconds": self.config.sync.timeout_seconds,
        }
        await self._run(self._rpc, "init_weight_transfer_engine", address)

    async def receive(self, metadata: WeightMetadata, version: int) -> dict[str, float]:
        """Take the weights a WeightSender is sending; returns seconds by phase.

        Raises WeightChecksumError naming the bucket; the engine then refuses to generate.
        """
        async with self._one_at_a_time:
            return await self._run(self._receive, metadata, version)

    def _receive(self, metadata: WeightMetadata, version: int) -> dict[str, float]:
        began = time.monotonic()
        target, draft = metadata.target_buckets, metadata.draft_buckets
        self._rpc("begin_loading_experts")
        times = self._session("start_weight_update", version, target, draft)
        if draft:
            drafted = self._session("start_draft_weight_update", version, draft, [])
            times = {key: seconds + drafted[key] for key, seconds in times.items()}
        self._rpc("finish_loading_experts")
        self._llm.reset_prefix_cache()
        self._version = version
        return times | {"receive_seconds": time.monotonic() - began}

    def _session(self, start: str, version: int, buckets: list, later: list) -> dict[str, float]:
        self._rpc(start)
        self._rpc("update_weights", {"version": version, "plan": pickle.dumps((buckets, later))})
        self._rpc("finish_weight_update")
        return self._rpc("sync_times")[0]

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        """Call every vLLM worker of this engine."""
        return self._llm.collective_rpc(method, args=args)

    # ------------------------------------------------------------ vLLM's thread

    def _submit(self, function: Callable[..., Any], *args: Any) -> asyncio.Future:
        if self._fault:
            raise EngineDied(self._fault)
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await self._named(self._submit(function, *args))

    async def _named(self, running: asyncio.Future) -> Any:
        """The result; any failure of vLLM's ends this engine and rises with its name."""
        try:
            return await running
        except Exception as error:
            # From a process of its own, vLLM passes on an exception's text alone.
            text = str(error)
            if isinstance(error, WeightSyncError) or WeightChecksumError.MARK in text:
                self._fault = f"{self.name}: {text}"
                kind = type(error) if isinstance(error, WeightSyncError) else WeightChecksumError
                raise kind(self._fault) from error
            self._fault = f"{self.name} died: {type(error).__name__}: {text.splitlines()[0] if text else ''}"
            raise EngineDied(self._fault) from error

    async def _within_timeout(self, running: asyncio.Future, unfinished: int) -> list[Rollout]:
        seconds = self.config.rollout.timeout_seconds
        done, _ = await asyncio.wait([running], timeout=seconds)
        if not done:
            self._stop.set()
            waited = f"{seconds:g} s (rollout.timeout_seconds)"
            self._fault = f"{self.name} finished nothing for {waited}; {unfinished} outputs are open"
            raise EngineDied(self._fault)
        return await self._named(running)

    async def close(self) -> None:
        """Stop vLLM and its processes."""
        self._stop.set()
        stopping = asyncio.get_running_loop().run_in_executor(self._thread, self._llm.engine_core.shutdown)
        await asyncio.wait([stopping], timeout=CLOSE_SECONDS)  # its thread may hang inside vLLM
        self._thread.shutdown(wait=False)


class Engine(Protocol):
    """What a RolloutGroup needs: a RolloutEngine, or a handle on one in another process."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, done: Collection[OutputName]
    ) -> AsyncIterator[list[Rollout]]: ...

    async def init_sync(self, host: str, port: int, first_rank: int, world_size: int) -> None: ...

    async def receive(self, metadata: WeightMetadata, version: int) -> dict[str, float]: ...

    async def weight_version(self) -> int: ...

    async def close(self) -> None: ...


class RolloutGroup:
    """N engines as one: prompts are shared evenly, rollouts come from whichever engine finishes first.

    mend: puts living engines in the places of dead ones; without it a dead engine ends `generate`.
    silent_seconds: an engine from which nothing comes for this long is dead, though its process lives.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        receivers_per_engine: int = 1,
        mend: Callable[[Faults], Awaitable[None]] | None = None,
        silent_seconds: float | None = None,
    ):
        self.engines, self.receivers_per_engine = list(engines), receivers_per_engine
        self.mend, self.silent_seconds = mend, silent_seconds

    @property
    def num_receivers(self) -> int:
        """vLLM workers that a weight sync reaches."""
        return len(self.engines) * self.receivers_per_engine

    async def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int = 0
    ) -> AsyncIterator[Rollout]:
        """`len(prompts) * sampling.n` rollouts, one by one as they finish; prompt ids differ.

        When engines die the others finish their shares; then the dead ones are replaced, and what they had not
        finished is sampled anew, with the same seeds. Raises EngineDied where there is no `mend`.
        """
        done: set[OutputName] = set()
        faults: Faults = {}
        while True:
            async for rollout in self._generate(prompts, sampling, step, done, faults):
                done.add((rollout.prompt.id, rollout.index))
                yield rollout
            if not faults:
                return
            assert self.mend is not None
            await self.mend(faults)
            faults = {}
            prompts = [p for p in prompts if any((p.id, index) not in done for index in range(sampling.n))]

    async def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        step: int,
        done: Collection[OutputName],
        faults: Faults,
    ) -> AsyncIterator[Rollout]:
        """All that is not `done` yet, but for what engines leave that die; they are put into `faults`."""
        shares = [prompts[i :: len(self.engines)] for i in range(len(self.engines))]
        finished: asyncio.Queue[list[Rollout] | None] = asyncio.Queue()
        before = frozenset(done)

        async def forward(place: int, share: Sequence[Prompt]) -> None:
            stream = self.engines[place].generate(share, sampling, step, before)
            try:
                while True:
                    async with asyncio.timeout(self.silent_seconds):
                        finished.put_nowait(await anext(stream))
            except StopAsyncIteration:
                pass
            except (EngineDied, WorkerDied, TimeoutError) as error:
                faults[place] = died = as_died(error, place)
                if self.mend is None:
                    raise died from died.__cause__
            finally:
                finished.put_nowait(None)

        tasks = [asyncio.create_task(forward(i, share)) for i, share in enumerate(shares) if share]
        try:
            while not all(task.done() for task in tasks) or not finished.empty():
                for rollout in await finished.get() or ():
                    yield rollout
                for task in tasks:
                    if task.done():
                        task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def init_sync(self, host: str, port: int) -> None:
        """All engines join the sender at once."""
        await self._all(self.joining(host, port))

    def joining(self, host: str, port: int) -> list[Awaitable[None]]:
        """Each engine's part of it, in order of rank."""
        size = self.num_receivers + 1
        ranks = range(1, size, self.receivers_per_engine)
        return [
            engine.init_sync(host, port, rank, size) for engine, rank in zip(self.engines, ranks, strict=True)
        ]

    async def receive(self, metadata: WeightMetadata, version: int) -> list[dict[str, float]]:
        """Every engine takes the weights; seconds by phase of each."""
        return await self._all([engine.receive(metadata, version) for engine in self.engines])

    async def weight_versions(self) -> list[int]:
        return await self._all([engine.weight_version() for engine in self.engines])

    async def close(self) -> None:
        await self._all([engine.close() for engine in self.engines])

    async def _all(self, calls: list[Any]) -> list[Any]:
        try:
            return await asyncio.gather(*calls)
        except WorkerDied as error:
            raise EngineDied(str(error)) from error


def as_died(error: Exception, place: int) -> EngineDied:
    """The failure of a call to the engine in `place`, its silence included."""
    if isinstance(error, EngineDied):
        return error
    died = EngineDied(f"engine {place} does not answer" if isinstance(error, TimeoutError) else str(error))
    died.__cause__ = error
    return died


def stop_token_ids(tokenizer: Any, model_path: str) -> list[int]:
    """Tokens that end a response: the tokenizer's end of sequence, and those generation_config.json names."""
    found = {tokenizer.eos_token_id}
    file = Path(model_path) / "generation_config.json"
    if file.is_file():
        named = json.loads(file.read_text()).get("eos_token_id")
        found |= set(named) if isinstance(named, list) else {named}
    return sorted(found - {None})
