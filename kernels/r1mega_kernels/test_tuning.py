"""Parameters measured per device: where they are kept, who gets them, how they are found."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1mega_kernels import bench, tuning
from r1mega_kernels.bench import Trial, tune
from r1mega_kernels.grouped_topk import cuda
from r1mega_kernels.tuning import Entry, Tunable, shape_class

OPS = ("linear_logprob", "grpo_loss", "grouped_topk", "moe_permute", "fp8_block")
GPU = torch.device("cuda", 0)
NAME = "NVIDIA H100 80GB HBM3"
FAST, SLOW = {"BLOCK": 64, "num_warps": 4}, {"BLOCK": 32, "num_warps": 8}
OP = Tunable("op.kernel", (SLOW, FAST))
ENTRY = Entry(FAST, 10.0, 12.5, "2.13.0", "3.7.1")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder of tuned files, on a machine whose GPU 0 is NAME."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
    tuning._entries_of.cache_clear()
    yield tmp_path / "tuned"
    tuning._entries_of.cache_clear()


def tunables_of(op):
    pytest.importorskip("triton")
    return importlib.import_module(f"r1mega_kernels.{op}.kernel").candidates()


def test_a_device_gets_what_was_measured_on_it_and_the_default_elsewhere():
    tuning.write(NAME, {"op.kernel": {"bfloat16 V131072": ENTRY}})
    assert OP.on(GPU, "bfloat16 V131072") == FAST
    assert OP.on(GPU, "bfloat16 V64") == SLOW
    assert Tunable("op.other", (SLOW, FAST)).on(GPU, "bfloat16 V131072") == SLOW
    assert OP.on(torch.device("cpu"), "bfloat16 V131072") == SLOW


def test_another_device_s_file_is_not_read(folder):
    file = tuning.write("NVIDIA H200", {"op.kernel": {"x": ENTRY}})
    assert file == folder / "nvidia-h200.json"
    assert OP.on(GPU, "x") == SLOW


def test_writing_keeps_the_other_entries_and_leaves_one_file(folder):
    tuning.write(NAME, {"op.kernel": {"a": ENTRY, "b": ENTRY}, "op.other": {"a": ENTRY}})
    newer = Entry(SLOW, 9.0, 9.0, "2.14.0", "3.8.0")
    file = tuning.write(NAME, {"op.kernel": {"b": newer}})
    assert tuning.read(file) == {"op.kernel": {"a": ENTRY, "b": newer}, "op.other": {"a": ENTRY}}
    assert [path.name for path in folder.iterdir()] == ["nvidia-h100-80gb-hbm3.json"]
    assert json.loads(file.read_text())["device"] == NAME


def test_a_write_that_fails_leaves_the_old_file(monkeypatch):
    file = tuning.write(NAME, {"op.kernel": {"a": ENTRY}})
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuning.write(NAME, {"op.kernel": {"b": ENTRY}})
    assert tuning.read(file) == {"op.kernel": {"a": ENTRY}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"tunables": []}',
        '{"tunables": {"op.kernel": 3}}',
        '{"tunables": {"op.kernel": {"a": {"parameters": {}}}}}',
        '{"tunables": {"op.kernel": {"a": {"parametres": {}, "microseconds": 1, "torch": "", "triton": ""}}}}',
    ],
)
def test_a_malformed_file_is_one_clear_error(folder, text):
    folder.mkdir()
    file = tuning.file_of(NAME)
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"{file.name}: malformed .*r1mega bench kernels --tune") as error:
        OP.on(GPU, "a")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("parameters", [{"BLOCK": 48, "num_warps": 4}, {"BLOCK": 64}, {}, None, "fast"])
def test_parameters_that_are_no_candidate_are_an_error(parameters):
    tuning.write(NAME, {"op.kernel": {"a": Entry(parameters, 1.0, 1.0, "", "")}})
    with pytest.raises(ValueError, match=r"op.kernel, a: .* is no candidate .*`r1mega bench op --tune`"):
        OP.on(GPU, "a")
    with tuning.writing():
        assert OP.on(GPU, "a") == OP.candidates[0], "else the command that the error names could not mend it"


def test_sizes_up_to_a_power_of_two_are_one_class():
    assert shape_class(torch.bfloat16, V=129280, D=1) == "bfloat16 V131072 D1"
    assert shape_class(V=131072) == shape_class(V=65537) != shape_class(V=65536)


def test_forced_parameters_end_with_their_block():
    with OP.forced(FAST) as asked:
        assert OP.on(GPU, "a") == FAST
        with OP.forced(SLOW):
            assert OP.on(torch.device("cpu"), "b") == SLOW
        assert OP.on(torch.device("cpu"), "c") == FAST
    assert OP.on(GPU, "a") == SLOW
    assert asked == {"a", "c"}


@pytest.fixture
def clock(monkeypatch):
    """A call takes as many microseconds as it returns."""
    pytest.importorskip("triton")
    monkeypatch.setattr(bench, "timed", lambda call, device: (float(call()), None))


def trial(candidates, check=lambda parameters: None):
    """Of an operator whose calls take as many microseconds as its parameter `count` says."""
    tunable = Tunable("op.kernel", tuple({"count": count} for count in candidates))

    def count():
        return tunable.on(torch.device("cpu"), "x")["count"]

    return Trial(tunable, lambda: check(count()), lambda: None, lambda inputs: count())


def test_tuning_keeps_the_fastest_and_the_operator_gets_it(clock, capsys):
    one = trial([60, 20, 120])
    rows = tune([one], "cpu", NAME, 3)
    assert one.tunable.on(GPU, "x") == {"count": 20}
    versions = (torch.__version__, importlib.import_module("triton").__version__)
    assert tuning.read(tuning.file_of(NAME)) == {
        "op.kernel": {"x": Entry({"count": 20}, 20.0, 60.0, *versions)}
    }
    assert [row["parameters"]["count"] for row in rows if row["kept"]] == [20]
    assert "count 60 (default)" in capsys.readouterr().out


def test_the_default_stays_where_nothing_is_clearly_faster(clock):
    one = trial([100, 99])
    tune([one], "cpu", NAME, 1)
    assert one.tunable.on(GPU, "x") == {"count": 100}


def test_a_candidate_with_wrong_results_is_dropped_loudly(clock, capsys):
    def check(count):
        assert count != 10, f"off by {count}"

    one = trial([60, 10, 20], check)
    rows = tune([one], "cpu", NAME, 1)
    assert one.tunable.on(GPU, "x") == {"count": 20}
    assert "DROPPED op.kernel count 10: AssertionError: off by 10" in capsys.readouterr().err
    assert all(row["parameters"] != {"count": 10} for row in rows)


def test_a_default_with_wrong_results_ends_the_search(clock, folder):
    def check(count):
        assert count != 10, f"off by {count}"

    with pytest.raises(AssertionError, match="off by 10"):
        tune([trial([10, 20], check)], "cpu", NAME, 1)
    assert not folder.exists()


def test_a_trial_that_launches_something_else_is_found_out(clock):
    one = trial([10, 20])
    with pytest.raises(AssertionError, match=r"op.kernel: the trial never launched it"):
        tune([Trial(one.tunable, one.check, one.make_inputs, lambda inputs: 1)], "cpu", NAME, 1)


@pytest.mark.parametrize("op", OPS)
def test_candidates_are_different_and_named_after_their_operator(op):
    """The default is the first of them by construction."""
    for tunable in tunables_of(op):
        assert tunable.name.startswith(f"{op}.")
        texts = [json.dumps(parameters, sort_keys=True) for parameters in tunable.candidates]
        assert len(set(texts)) == len(texts) > 1
        assert len({tuple(sorted(parameters)) for parameters in tunable.candidates}) == 1


@pytest.mark.parametrize("op", OPS)
def test_every_tunable_has_a_trial_whose_calls_work(op, monkeypatch):
    """On CPU, where the reference runs in the kernels' place, in small sizes."""
    module = importlib.import_module(f"r1mega_kernels.{op}.bench_{op}")
    small = {
        "linear_logprob": [(40, 128, 16), (40, 64, 16)],
        "grpo_loss": [(64, 128, 16)],
        "grouped_topk": [(32, 256, 8, 8, 4)],
        "moe_permute": [(32, 3, 8, 128)],
        "fp8_block": (64, 256),
    }
    tunables = tunables_of(op)
    monkeypatch.setitem(module.SHAPES, "cpu", small[op])
    trials = module.trials("cpu")
    assert {trial.tunable.name for trial in trials} - {"grouped_topk.implementation"} == {
        tunable.name for tunable in tunables
    }
    for one in trials:
        one.check()
        inputs = one.make_inputs()
        one.call(inputs)
        one.call(inputs)


def test_cuda_replaces_triton_only_where_it_was_measured_to_win(monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda: True)
    assert not cuda.is_faster_on(GPU, 256)
    entry = Entry({"implementation": "cuda"}, 10.0, 12.5, "2.13.0", "3.7.1")
    tuning.write(NAME, {"grouped_topk.implementation": {"E256": entry}})
    assert cuda.is_faster_on(GPU, 256)
    assert not cuda.is_faster_on(GPU, 512)
    monkeypatch.setattr(cuda, "load", lambda: False)
    assert not cuda.is_faster_on(GPU, 256)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command", [["r1mega", "bench", "kernels"], ["r1mega_kernels.fp8_block.bench_fp8_block"]]
)
def test_tuning_without_a_gpu_is_one_line_and_exit_code_2(command):
    result = subprocess.run([sys.executable, "-m", *command, "--tune"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "tuning needs a GPU" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_candidate_compiles_to_sm90_without_spills(tmp_path):
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "r1mega_kernels.aot", "--all-candidates"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
