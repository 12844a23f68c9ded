"""RL after distillation: the first RL stage's recipe on the distilled Qwen2.5-32B, in the control's layout.

The paper says that RL on distilled models brings further gains and leaves it there (R1 v1, section 2.4), so that all
its numbers are [open]: here they are 04_reasoning_rl.py's, at the control's rate of 2e-6. Any other checkpoint:
`r1mega run configs/distill/rl_after_distillation.py model=PATH`.
"""

from dataclasses import replace
from pathlib import Path

from r1mega.overrides import load

HERE = Path(__file__).parent
dev2, control = load(HERE.parent / "r1" / "04_reasoning_rl.py"), load(HERE / "qwen2_5_32b_zero.py")
config = replace(
    dev2,
    model=replace(control.model, path="runs/distill/qwen2_5_32b/hf"),
    parallel=control.parallel,
    optimizer=control.optimizer,
    rollout=control.rollout,
)
