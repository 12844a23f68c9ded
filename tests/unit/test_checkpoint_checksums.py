"""Checksums of a checkpoint's files: any changed byte is named, by file and by tensor."""

import contextlib
import json
import random

import pytest

from r1mega.training import checkpoint_checksums as checksums
from r1mega.training.checkpoint_checksums import DamagedCheckpoint, DigestingStream, Piece, whole_file

CONTENTS = {"first.weight": b"a" * 1000, "second.weight": bytes(range(256)) * 5, "third.bias": b"x"}


@pytest.fixture
def directory(tmp_path):
    """A file of three tensors and a small one, with their checksums."""
    path, pieces = tmp_path / "step-00000001", []
    path.mkdir()
    with (path / "__0_0.distcp").open("wb") as file:
        stream = DigestingStream(file)
        for tensor, content in CONTENTS.items():
            offset = stream.tell()
            stream.write(content[:7])
            stream.write(memoryview(content)[7:])
            pieces.append(Piece("__0_0.distcp", offset, stream.tell() - offset, tensor, stream.take_digest()))
    (path / "state.json").write_text('{"step": 1}')
    checksums.write(path, [*pieces, whole_file(path / "state.json")])
    return path


def verify(directory):
    for name, pieces in checksums.by_file(checksums.read(directory)).items():
        checksums.verify_file(directory, name, pieces)


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def test_whole_files_pass(directory):
    verify(directory)


@pytest.mark.parametrize("tensor", CONTENTS)
def test_a_flipped_byte_is_named_by_file_and_tensor(tensor, directory):
    file = directory / "__0_0.distcp"
    before = list(CONTENTS).index(tensor)
    start = sum(len(content) for content in list(CONTENTS.values())[:before])
    flip(file, start + random.randrange(len(CONTENTS[tensor])))
    with pytest.raises(
        DamagedCheckpoint, match=rf"__0_0\.distcp: damaged in tensor {tensor}, bytes {start} to"
    ):
        verify(directory)


def test_a_flipped_byte_of_a_small_file_is_named_by_file(directory):
    flip(directory / "state.json", random.randrange(11))
    with pytest.raises(DamagedCheckpoint, match=rf"{directory}/state\.json: damaged bytes 0 to 11.*; delete"):
        verify(directory)


@pytest.mark.parametrize("change", ["shorter", "longer", "missing"])
def test_a_file_of_another_length_is_named(change, directory):
    file = directory / "__0_0.distcp"
    content = file.read_bytes()
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if change == "shorter" else content + b"0")
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp: "):
        verify(directory)


def test_no_change_of_the_list_itself_passes_for_another_list(directory):
    path = directory / checksums.NAME
    whole, pieces = path.read_bytes(), checksums.read(directory)
    for offset in range(len(whole)):
        flip(path, offset)
        with contextlib.suppress(DamagedCheckpoint):
            assert checksums.read(directory) == pieces, f"byte {offset}"  # white space in the JSON
        path.write_bytes(whole)


def test_a_checkpoint_without_its_list_is_refused(directory):
    (directory / checksums.NAME).unlink()
    with pytest.raises(DamagedCheckpoint, match=r"checksums\.json: .*delete"):
        checksums.read(directory)


def test_the_list_is_json_a_person_can_read(directory):
    rows = json.loads((directory / checksums.NAME).read_text())["pieces"]
    assert [row[3] for row in rows] == [*CONTENTS, ""]
