"""Reasoning RL: Dev-1 -> Dev-2, R1-Zero's recipe with the language-consistency reward (R1, section 3.2.1).

What differs from 01_r1_zero.py: responses up to 32,768 tokens throughout, a clip ratio of 10 as the paper prints it (for
a positive advantage it clips ratios above 11, for a negative one never), the chat template and the third reward.
The number of steps is [open].
"""

from dataclasses import replace
from pathlib import Path

from r1mega.overrides import load

PROMPTS = {"math": 26_000, "code": 17_000, "bug fixing": 8_000, "stem": 22_000, "logic": 15_000}
"""Of data/reasoning_prompts.jsonl by domain (table 4); STEM questions have 4 to 8 options."""
zero = load(Path(__file__).with_name("01_r1_zero.py"))
config = replace(
    zero,
    num_steps=4_000,  # [open]
    model=replace(zero.model, path="models/DeepSeek-R1-Dev1"),
    data=replace(zero.data, path="data/reasoning_prompts.jsonl", template="r1"),
    parallel=replace(zero.parallel, tokens_per_chunk=33_792),  # the longest prompt and response
    grpo=replace(zero.grpo, clip_low=10.0, clip_high=10.0),
    rollout=replace(zero.rollout, max_tokens=((0, 32_768),)),
    rewards=replace(zero.rewards, weights={"accuracy": 1.0, "reasoning_format": 1.0, "language": 1.0}),
)
