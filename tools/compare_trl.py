"""r1mega and TRL's GRPOTrainer side by side on this machine's CPU: seconds of one steady step, samples a second.

    python tools/compare_trl.py            # in r1mega's environment, about eight minutes and a download

Both train the same checkpoint (r1mega/bench/model.py: a DeepSeek-V3 of a million parameters) on the same
prompts: 16 questions x 16 samples, one update, KL against a reference, fp32, every core. TRL (transformers
generation) runs in an environment of its own, build/trl-venv, pinned by requirements/trl.lock. Its first step
is not counted, nor are r1mega's first two. Two kinds of responses: "varying", mean 60 tokens and at most 256,
what reinforcement learning really sees; "uniform", 36 tokens each, where generation in one batch is at its best.

Writes docs/benchmarks/step_vs_trl_cpu.json and the table in docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from r1mega.bench import model, step, write_json
from r1mega.bench.machine import machine

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "trl.lock"
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where the machine's own package index has no CPU build (as in the Makefile)."""
GOALS = {"varying": 6.0, "uniform": 1.0}
"""Times TRL's samples per second."""
NAME = "step_vs_trl_cpu.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", choices=[*model.RESPONSES, "both"], default="both")
    parser.add_argument("--trl-steps", type=int, default=4, help="the first is not counted")
    parser.add_argument(
        "--steps", type=int, default=step.STEPS, help="of r1mega, after two that are not counted"
    )
    parser.add_argument(
        "--rounds", type=int, default=step.ROUNDS, help="of vLLM alone and transformers alone"
    )
    parser.add_argument("--venv", type=Path, default=ROOT / "build" / "trl-venv")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    if options.trl_steps < 2:
        parser.error("--trl-steps: at least 2, for the first is not counted")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind: no process and no folder stays behind
    python = environment(options.venv)
    results: dict[str, Any] = {"machine": machine()}
    for responses in model.RESPONSES if options.responses == "both" else (options.responses,):
        theirs = run_trl(python, responses, options.trl_steps)
        ours = step.run(responses, options.steps, options.rounds)
        ratio = ours["samples_per_second"] / theirs["samples_per_second"]
        results[responses] = {"trl": theirs, "r1mega": ours, "ratio": ratio, "goal": GOALS[responses]}
        print(table(results), flush=True)
    write_json(options.output / NAME, results)
    (options.output / "README.md").write_text(page(results))
    print(f"wrote {options.output / NAME} and README.md")


def environment(venv: Path) -> Path:
    """The Python of TRL's environment, built where it is missing or the lock file has changed."""
    python, stamp = venv / "bin" / "python", venv / ".installed"
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"[set-up] TRL's environment in {venv}, about a minute and a half", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*pip, f"{TORCH}+cpu"], check=False, stderr=subprocess.DEVNULL).returncode:
        subprocess.run([*pip, "--index-url", TORCH_CPU_INDEX, TORCH], check=True)
    subprocess.run([*pip, "-r", str(LOCK)], check=True)
    stamp.write_text(wanted)
    return python


def run_trl(python: Path, responses: str, steps: int) -> dict[str, Any]:
    """TRL's median step over `steps` less the first."""
    print(f"TRL, {responses} responses: {steps} steps", flush=True)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="r1mega-trl-") as folder:
        work = Path(folder)
        model.write_model(work / "model", responses)
        config = step.run_config(work / "model", responses, num_steps=1)
        rows = [{"prompt": p.text, "answer": p.answer} for p in step.training_prompts(config)]
        (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [str(python), str(ROOT / "tools" / "trl_worker.py")]
        command += [str(work / "model"), str(work / "prompts.jsonl"), str(work / "result.json")]
        command += ["--steps", str(steps), "--max-tokens", str(model.MAX_TOKENS[responses])]
        command += ["--threads", str(cores)]
        done = subprocess.run(
            command,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(cores), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"TRL ended with exit code {done.returncode}:\n{done.stdout[-4000:]}")
        result = json.loads((work / "result.json").read_text())
    seconds = statistics.median(result["step_seconds"][1:])
    generate = statistics.median(result["generate_seconds"][1:])
    return {
        "seconds": {"generate": generate, "step": seconds},
        "samples_per_second": config.outputs_per_rollout / seconds,
        "response_length": statistics.mean(result["response_length"][1:]),
        "every_step": result,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: one row a system and kind of response."""
    rows = [
        ["responses", "system", "mean length", "generate", "step", "samples/s", "times TRL", "goal"],
        ["---"] * 8,
    ]
    for responses in model.RESPONSES:
        if responses not in results:
            continue
        entry = results[responses]
        trl = f"TRL {entry['trl']['every_step']['versions']['trl']}"
        goal = f"at least {entry['goal']:g}"
        rows += [
            [responses, trl, *cells(entry["trl"]), "1", ""],
            [responses, "r1mega", *cells(entry["r1mega"]), f"**{entry['ratio']:.2f}**", goal],
        ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cells(entry: dict[str, Any]) -> list[str]:
    seconds = entry["seconds"]
    texts = [f"{entry['response_length']:.1f}", f"{seconds['generate']:.2f} s", f"{seconds['step']:.2f} s"]
    return [*texts, f"{entry['samples_per_second']:.1f}"]


def phases(results: dict[str, Any]) -> str:
    """Markdown: r1mega's step in its phases, and its two references."""
    kinds = [responses for responses in model.RESPONSES if responses in results]
    ours = [results[responses]["r1mega"] for responses in kinds]
    rows = [
        [phase, *(f"{o['seconds'][phase]:.3f} s, {o['share'][phase]:.1%}" for o in ours)]
        for phase in step.PHASES
    ]
    rows += [
        ["sync + pack (goal: under 3 %)", *(f"{o['share']['sync'] + o['share']['pack']:.1%}" for o in ours)],
        ["rollout / vLLM alone, tokens/s (goal: 80 %)", *(f"{o['rollout']['ratio']:.0%}" for o in ours)],
        ["update / transformers alone, CPU s (goal: 1.15)", *(f"{o['training']['ratio']:.2f}" for o in ours)],
    ]
    head = [["", *kinds], ["---"] * (1 + len(kinds))]
    return "\n".join("| " + " | ".join(row) + " |" for row in head + rows)


def page(results: dict[str, Any]) -> str:
    facts = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"""# Benchmarks

Written by `python tools/compare_trl.py`; the raw numbers are in [{NAME}]({NAME}).
Measured {facts["date"]} on {facts["cores"]} cores of {facts["processor"]}, {facts["memory_gib"]} GiB, load before
the start {facts["load"]}. {versions}.

## One GRPO step beside TRL, CPU, fp32

A DeepSeek-V3 of about a million parameters, 16 questions x 16 samples, one update, KL against a reference, the
same checkpoint and prompts in both systems. "varying" is geometric, mean 60 tokens, at most 256; "uniform" is 36
tokens each. TRL generates with transformers. Medians of steady steps.

{table(results)}

## r1mega's step

Medians, as `r1mega bench step` prints them. "vLLM alone" is offline `LLM.generate`: as many engines and threads,
the same requests. "transformers alone" does the same update on the same samples, in padded micro-batches sorted
by length.

{phases(results)}
"""


if __name__ == "__main__":
    main()
