"""A run's directory: one run, one owner, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from r1mega.config import ConfigError, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from r1mega.stages.run_directory import RunDirectory, checksum, lineage, write_json


def test_a_directory_refused_before_it_began_may_hold_another_run(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", RunConfig(seed=1)) as directory:
        assert not directory.begun
    with RunDirectory(tmp_path / "run", RunConfig(seed=2)) as directory:
        directory.begin()
        assert directory.begun
    with pytest.raises(ConfigError, match=r"holds a run with seed=2, now 1: .*dir=PATH, or remove this one"):
        RunDirectory(tmp_path / "run", RunConfig(seed=1)).__enter__()


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 7},
        {"dir": "elsewhere"},
        {"checkpoint": replace(RunConfig().checkpoint, every=3)},
        {"rollout": replace(RunConfig().rollout, timeout_seconds=5.0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_change_the_run_may_change_on_resume(tmp_path: Path, change: dict) -> None:
    with RunDirectory(tmp_path, RunConfig()) as directory:
        directory.begin()
    with RunDirectory(tmp_path, replace(RunConfig(), **change)) as directory:
        directory.begin()


def test_the_first_of_several_changes_is_named_and_the_others_counted(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, RunConfig()) as directory:
        directory.begin()
    other = RunConfig(seed=5, optimizer=OptimizerConfig(lr=1.0, betas=(0.5, 0.95)))
    with pytest.raises(ConfigError, match=r"seed=1, now 5 \(and 2 more\)"):
        RunDirectory(tmp_path, other).__enter__()


def test_a_second_owner_is_refused_even_in_another_process_until_the_first_is_gone(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from r1mega.config import RunConfig; "
        "from r1mega.stages.run_directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1]), RunConfig()): print('in', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(ConfigError, match="another run is using this directory"):
            RunDirectory(tmp_path, RunConfig()).__enter__()
    finally:
        holder.kill()  # a killed owner leaves no lock
        holder.communicate(timeout=30)
    with RunDirectory(tmp_path, RunConfig()):
        pass


def test_results_are_merged_and_replaced_in_one_step(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, RunConfig()) as directory:
        assert directory.results() == {}
        directory.add_results(before=1)
        assert directory.add_results(after=2) == {"before": 1, "after": 2}
    assert json.loads((tmp_path / "results.json").read_text()) == {"before": 1, "after": 2}
    assert sorted(os.listdir(tmp_path)) == [".lock", "results.json"]


def test_a_value_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(UnicodeEncodeError):
        write_json(tmp_path / "a.json", {"new": "long" * 100_000 + "\ud800"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_lineage_names_the_inputs_that_are_files_and_nothing_else(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    config = RunConfig(model=ModelConfig(path=str(tmp_path / "absent")), data=DataConfig(path=str(data)))
    found = lineage(config)
    assert found["inputs"] == {"data": checksum(data)}
    assert found["versions"]["torch"]
    generated = lineage(replace(config, data=DataConfig(path="generated:chain")))
    assert generated["inputs"] == {}


def test_a_checksum_depends_on_every_name_and_byte(tmp_path: Path) -> None:
    def of(**files: bytes) -> str:
        folder = tmp_path / "-".join([*files, *(content.hex() for content in files.values())])
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return checksum(folder).rpartition(" ")[2]

    assert of(a=b"1", b=b"2") == of(b=b"2", a=b"1")
    assert len({of(a=b"1"), of(a=b"2"), of(c=b"1"), of(a=b"12")}) == 4


def test_a_large_file_s_checksum_depends_on_its_head_its_tail_and_blocks_between(tmp_path: Path) -> None:
    """Beyond the limit: files of the same size, as the shards of two training runs are."""
    size, limit = 1 << 20, 1 << 14

    def of(*places: int) -> str:
        content = bytearray(size)
        for place in places:
            content[place] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        return checksum(tmp_path, limit).rpartition(" ")[2]

    sampled = [0, size - 1, *(n * (size - 16) // 63 + 7 for n in range(1, 63))]
    assert len({of(), *(of(place) for place in sampled), of(*range(size))}) == len(sampled) + 2
    assert of() == of()
    assert of(1000) == of(), "between two blocks: what is not read is not seen"


def test_a_directory_of_another_version_is_named_and_not_taken_for_a_mistyped_setting(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, RunConfig()) as directory:
        directory.begin()
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["eval"]["forgotten"] = 0
    write_json(tmp_path / "config.json", stored)
    with pytest.raises(
        ConfigError, match=r"config\.json: unknown setting 'eval\.forgotten': another version"
    ):
        RunDirectory(tmp_path, RunConfig()).__enter__()
