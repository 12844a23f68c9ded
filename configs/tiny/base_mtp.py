"""The demo's base model with a multi-token-prediction layer, which base training trains with the rest."""

from dataclasses import replace
from pathlib import Path

from r1mega.overrides import load

base = load(Path(__file__).with_name("base.py"))
config = replace(base, model=replace(base.model, path="configs/tiny/model_mtp", mtp_loss_weight=0.1))
