"""The benchmarks' own correctness: known response lengths, equal work in every reference. No timing is asserted."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from r1mega import bench
from r1mega.bench import model, step
from r1mega.bench.machine import machine
from r1mega.bench.processes import Measured, round_together
from r1mega.bench.training_alone import TrainerAlone, TransformersAlone
from r1mega.cli import main
from r1mega.config import ConfigError
from r1mega.data.packing import pack
from r1mega.samples import Sample
from r1mega_kernels import bench as kernel_bench

ROOT = Path(__file__).parents[2]


def probabilities(responses):
    """[current, next] in float64, prompts' last token first."""
    return model.next_token_logits(responses).double().softmax(dim=-1).numpy()


def length_distribution(responses, longest):
    """P(response has n tokens, the end included), n < longest, by walking the chain from the prompt's end."""
    now, lengths = np.zeros(len(model.VOCABULARY)), []
    now[model.ID[":"]] = 1.0
    for _ in range(longest):
        now = now @ probabilities(responses)
        lengths.append(now[model.ID["<eos>"]])
        now[model.ID["<eos>"]] = 0.0
    return np.array(lengths), now.sum()


def test_varying_responses_have_sixty_tokens_on_average():
    ends, unfinished = length_distribution("varying", 4000)
    assert unfinished < 1e-6
    mean = (ends * np.arange(1, 4001)).sum()
    assert mean == pytest.approx(60, abs=1.5)
    assert ends[:256].sum() > 0.97


def test_uniform_responses_have_thirty_six_tokens():
    ends, _ = length_distribution("uniform", 64)
    assert ends[35] > 1 - 1e-6


def test_head_and_embedding_give_the_prescribed_logits():
    for responses in model.RESPONSES:
        hidden_VD = torch.nn.functional.rms_norm(model.embedding().double(), (model.CONFIG["hidden_size"],))
        wanted_VV = model.next_token_logits(responses).double()
        torch.testing.assert_close(hidden_VD @ model.head(wanted_VV).double().T, wanted_VV, atol=1e-4, rtol=0)


def test_layers_add_little_to_the_prescribed_logits(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert 0.8e6 < model.write_model(tmp_path, "varying") < 1.2e6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path)("Q:3+4*2-9+1*3=?A:ab<answer>7</answer>")["input_ids"]
    with torch.no_grad():
        found_TV = loaded(torch.tensor([ids])).logits[0].softmax(dim=-1).double()
    wanted_TV = torch.from_numpy(probabilities("varying"))[ids]
    assert (found_TV - wanted_TV).abs().max() < 0.01


def test_prompts_have_nineteen_known_tokens(tmp_path):
    model.write_model(tmp_path, "uniform")
    prompts = step.training_prompts(step.run_config(tmp_path, "uniform", 1))
    assert {len(prompt.token_ids) for prompt in prompts} == {19}
    assert not any(model.ID["<unk>"] in prompt.token_ids for prompt in prompts)


def test_an_unknown_kind_of_response_is_the_users_mistake():
    with pytest.raises(ConfigError, match="--responses sometimes"):
        bench.run("step", None, "sometimes")
    with pytest.raises(ValueError, match="responses=sometimes"):
        model.next_token_logits("sometimes")


def random_samples(num, rng):
    samples = []
    for _ in range(num):
        length = int(rng.integers(20, 60))
        mask = np.zeros(length - 1, dtype=np.float32)
        mask[19:] = 1
        samples.append(
            Sample(
                token_ids=rng.integers(8, 50, length),
                loss_mask=mask,
                token_weights=mask / mask.sum() / num,
                advantages=mask * np.float32(rng.normal()),
                rollout_logprobs=mask * 0,
            )
        )
    return samples


def test_trainer_and_transformers_do_the_same_work(tmp_path):
    model.write_model(tmp_path / "model", "varying")
    config = step.run_config(tmp_path / "model", "varying", 4)
    config = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, data=1),
        gates=dataclasses.replace(config.gates, logprob=(1e3, 1e3)),
    )
    samples = random_samples(40, np.random.default_rng())
    ours = step._trainer_rounds(
        config, pack(samples, 1, config.parallel.tokens_per_chunk), tmp_path, rounds=1
    )
    with Measured(TransformersAlone, config, samples, log=tmp_path / "log") as process:
        process.ready()
        theirs = [round_together([process])[1][0] for _ in range(2)]
    assert ours[0][0]["grad_norm"] == pytest.approx(theirs[1]["grad_norm"], rel=1e-3)
    assert theirs[1]["cpu_seconds"] > 0


def test_a_reference_that_cannot_start_says_why(tmp_path):
    config = step.run_config(tmp_path / "nothing", "varying", 1)
    with (
        Measured(TrainerAlone, config, [], log=tmp_path / "log") as process,
        pytest.raises(RuntimeError, match=r"exit code 1(.|\n)*RANK"),
    ):
        process.ready()


def test_kernel_benchmarks_exist():
    for module in bench.KERNEL_BENCHES.values():
        assert importlib.util.find_spec(module), module


def test_a_kernels_rows_are_kept_beside_those_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_bench, "RECORDS", tmp_path)
    kernel_bench.keep("one", [{"milliseconds": 1.23456789}], "cpu", None)
    kernel_bench.keep("other", [{"provider": "own"}, {"provider": "floor"}], "cpu", None)
    kernel_bench.keep("other", [{"provider": "own"}], "cpu", None)
    kernel_bench.keep("one", [], "cpu", tmp_path / "elsewhere.json")
    record = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert {op: kept["rows"] for op, kept in record.items()} == {
        "one": [{"milliseconds": 1.23457}],
        "other": [{"provider": "own"}],
    }
    assert record["one"]["measured"]["versions"]["torch"] == torch.__version__
    assert {file.name for file in tmp_path.iterdir()} == {"kernels_cpu.json", "elsewhere.json"}


def test_a_peer_that_fails_is_left_out_and_our_own_fault_rises(capsys):
    def broken(inputs):
        raise TypeError(f"no {inputs}")

    seen = []
    calls = {"floor": seen.append, "own": seen.append, "peer": broken}
    found = kernel_bench.take_turns(calls, lambda: "inputs", "cpu", repeats=2)
    assert [*found] == ["floor", "own"]
    assert seen == ["inputs"] * 6
    assert capsys.readouterr().err == "LEFT OUT peer: TypeError: no inputs\n"
    with pytest.raises(TypeError, match="no inputs"):
        kernel_bench.take_turns({"own": broken}, lambda: "inputs", "cpu", repeats=1)


def test_the_command_line_offers_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    offered = capsys.readouterr().out
    assert all(name in offered for name in ("step", "kernels", "all", *bench.KERNEL_BENCHES))


def test_machine_facts_are_json_with_versions():
    facts = json.loads(json.dumps(machine()))
    assert facts["cores"] >= 1
    assert facts["versions"]["torch"] == torch.__version__


def comparison_tool():
    spec = importlib.util.spec_from_file_location("compare_trl", ROOT / "tools" / "compare_trl.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_comparison_page_shows_the_ratio_and_the_machine():
    seconds = dict.fromkeys((*step.PHASES, "step"), 1.5)
    ours = {
        "seconds": seconds,
        "share": dict.fromkeys(step.PHASES, 0.01),
        "samples_per_second": 128.0,
        "response_length": 36.0,
        "rollout": {"ratio": 0.9},
        "training": {"ratio": 1.05},
    }
    trl = {
        "seconds": {"generate": 1.0, "step": 2.0},
        "samples_per_second": 64.0,
        "response_length": 36.0,
        "every_step": {"versions": {"trl": "1.2.3"}},
    }
    entry = {"trl": trl, "r1mega": ours, "ratio": 2.0, "goal": 1.0}
    page = comparison_tool().page({"machine": machine(), "uniform": entry})
    assert "| uniform | r1mega | 36.0 | 1.50 s | 1.50 s | 128.0 | **2.00** | at least 1 |" in page
    assert "TRL 1.2.3" in page
    assert "90%" in page
    assert "varying |" not in page


def test_every_pinned_package_of_trls_environment_has_a_version():
    lines = [
        line for line in (ROOT / "requirements" / "trl.lock").read_text().splitlines() if line[:1] != "#"
    ]
    assert any(line.startswith("trl==") for line in lines)
    assert all(line.count("==") == 1 for line in lines)
    assert not any(line.startswith("torch") for line in lines)
