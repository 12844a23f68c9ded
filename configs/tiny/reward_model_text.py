"""A helpful reward model on real pairs of running text, such as Anthropic's hh-rlhf, on two CPU cores.

    r1mega run configs/tiny/reward_model_text.py data=harmless-base_test.jsonl.gz

The tiny model with a byte-level tokenizer (tools/make_text_model.py), from random weights: it knows no language
before these pairs, so it learns little more than which words the chosen responses use.
"""

from dataclasses import replace
from pathlib import Path

from r1mega.overrides import load

base = load(Path(__file__).with_name("reward_model_helpful.py"))
config = replace(
    base,
    model=replace(base.model, path="configs/tiny/model_text"),
    data=replace(base.data, path="", eval_size=600),
    sft=replace(base.sft, max_length=1024, num_epochs=4),
)
