"""The demo with a multi-token-prediction layer: trained on, sent to the engines, and drafting their tokens.

V3 trained with one MTP layer and R1 names it as the way to shorten the longest outputs (supplement B.1);
whether its loss runs during RL the paper leaves open.
"""

from dataclasses import replace
from pathlib import Path

from r1mega.overrides import load

base = load(Path(__file__).with_name("r1_zero.py"))
config = replace(
    base,
    model=replace(base.model, path="runs/tiny/base_mtp/hf", mtp_loss_weight=0.1),
    rollout=replace(base.rollout, speculative_tokens=1),
)
