"""R1-Zero on real questions: GSM8K's own file, tiny random checkpoints, a small trained tokenizer; all else real."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHARED, metrics_of, partial_files, succeeded

from r1mega.config import DataConfig
from r1mega.data.prompts import read_prompts

pytestmark = pytest.mark.end_to_end

GSM8K = SHARED / "data/gsm8k/train.jsonl"
MATH = SHARED / "data/math/train.json"
VOCABULARY = 512
needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason=f"no GSM8K at {GSM8K}")


def save_tokenizer(path: Path) -> Any:
    """A byte-level BPE tokenizer trained on GSM8K's questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [json.loads(line) for line in GSM8K.read_text().splitlines()[:500]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line["question"] for line in lines), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(path)
    return fast


def save_qwen2(path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)


def save_deepseek_v3(path: Path) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1,
        n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, first_k_dense_replace=1,
        kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=None,
        initializer_range=0.1,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(path)
    file = path / "config.json"
    published = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | published))


SAVE = {"qwen2": save_qwen2, "deepseek_v3": save_deepseek_v3}


def arguments(model: Path, directory: Path, dtype: str) -> tuple[str, ...]:
    """Two updates of 2 questions with 4 outputs each; the recipe's file decides everything else."""
    return (
        "run", "configs/gsm8k/r1_zero.py", f"model={model}", f"data={GSM8K}", f"dir={directory}",
        "platform=cpu", f"model.dtype={dtype}", f"rollout.dtype={dtype}", "num_steps=2",
        "grpo.group_size=4", "grpo.questions_per_step=2", "data.max_prompt_tokens=448", "data.eval_size=4",
        "rollout.max_tokens=24", "rollout.max_concurrent=16", "rollout.kv_cache_gib=0.0625",
        "parallel.tokens_per_chunk=1024",
    )  # fmt: skip


@needs_gsm8k
@pytest.mark.parametrize(
    "architecture, dtype", [("qwen2", "float32"), ("deepseek_v3", "float32"), ("qwen2", "bfloat16")]
)
def test_two_updates_on_gsm8k(architecture: str, dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model, directory = tmp_path / "model", tmp_path / "run"
    SAVE[architecture](model)
    tokenizer = save_tokenizer(model)
    finished = succeeded(*arguments(model, directory, dtype), scratch=tmp_path)
    assert finished.err == ""

    metrics = metrics_of(directory)
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert line["logprob_mismatch_max"] < (1e-5 if dtype == "float32" else 0.1), line
        assert line["ratio_deviation_max"] < 1e-3, line
        assert line["accuracy"] == 0.0, "24 tokens of noise answer nothing"
        assert line["response_length"] > 1
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert all(re.fullmatch(r"train\.jsonl:\d+", sample["prompt_id"]) for sample in samples)
    assert all(sample["answer"].replace(",", "").lstrip("-").isdigit() for sample in samples)
    assert {sample["weight_version"] for sample in samples} == {0, 1}

    exported = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
    logits = exported(tokenizer("How many clips?", return_tensors="pt")["input_ids"]).logits
    assert logits.shape[-1] == VOCABULARY
    assert torch.isfinite(logits).all()
    assert "<svg" in (directory / "report.html").read_text()
    assert partial_files(directory) == []


@pytest.mark.skipif(not MATH.exists(), reason=f"no MATH at {MATH}")
def test_the_training_file_of_math_is_read_whole(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    data = DataConfig(path=str(MATH), eval_size=100, max_prompt_tokens=10**6)
    prompts = read_prompts(data, tokenizer, seed=1)
    rows = json.loads(MATH.read_text())
    assert len(prompts.train) + len(prompts.heldout) + prompts.duplicates + prompts.unanswered == len(rows)
    assert prompts.unanswered == sum(not row["answer"] for row in rows) > 0
    assert prompts.dropped == 0
    assert prompts.train[0].question == rows[0]["problem"]
    assert prompts.train[0].answer == rows[0]["answer"]
