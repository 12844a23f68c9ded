"""Checksums of a checkpoint's files, written with it and compared before anything of it is used.

`checksums.json` lists every other file. A file of tensors is a chain of pieces, one for each stored tensor (or part
of one), so that a damaged byte is named by file and by tensor; a small file has one checksum as a whole. The list
carries a checksum of itself. Megatron's own format has none: torch.load does not compare the CRC of its records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

NAME = "checksums.json"
BLOCK_BYTES = 4 << 20


class DamagedCheckpoint(OSError):
    """A file of a checkpoint is not as it was written; the message names the file, and the tensor where it can."""


@dataclass(frozen=True)
class Piece:
    """Bytes [offset, offset + length) of a file."""

    file: str
    offset: int
    length: int
    tensor: str
    """The tensor's name in the checkpoint and where the stored part begins in it; empty for a whole file."""
    sha256: str


class DigestingStream:
    """A file opened for writing that hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def take_digest(self) -> str:
        """The hash of everything written since the last call."""
        digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
        return digest


def whole_file(path: Path) -> Piece:
    length = path.stat().st_size
    with path.open("rb") as file:
        return Piece(path.name, 0, length, "", _digest(file, length))


def write(directory: Path, pieces: Iterable[Piece]) -> Path:
    """Write the list for `directory`, whose other files are complete; returns its path."""
    rows = [list(astuple(piece)) for piece in pieces]
    path = directory / NAME
    path.write_text(json.dumps({"sha256": _digest_of(rows), "pieces": rows}))
    return path


def read(directory: Path) -> list[Piece]:
    """The list of a checkpoint; raises DamagedCheckpoint where it is missing or not as it was written."""
    path = directory / NAME
    try:
        content = json.loads(path.read_text())
        rows = content["pieces"]
        if content["sha256"] != _digest_of(rows):
            raise ValueError("its own checksum differs")
        return [Piece(*row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: not JSON, not UTF-8
        raise DamagedCheckpoint(
            f"{path}: the list of checksums cannot be used ({error}); {_advice(directory)}"
        ) from error


def verify_file(directory: Path, name: str, pieces: list[Piece]) -> None:
    """Compare one file with its pieces; raises DamagedCheckpoint for the first that differs."""
    path = directory / name
    try:
        with path.open("rb") as file:
            for piece in pieces:
                file.seek(piece.offset)
                if _digest(file, piece.length) != piece.sha256:
                    where = f"in tensor {piece.tensor}, " if piece.tensor else ""
                    raise DamagedCheckpoint(
                        f"{path}: damaged {where}bytes {piece.offset} to {piece.offset + piece.length}: the "
                        f"checksum is not the one written; {_advice(directory)}"
                    )
            expected, size = pieces[-1].offset + pieces[-1].length, path.stat().st_size
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path}: missing; {_advice(directory)}") from error
    if size != expected:
        raise DamagedCheckpoint(f"{path}: {size} bytes, {expected} were written; {_advice(directory)}")


def by_file(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    files: dict[str, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.offset)):
        files.setdefault(piece.file, []).append(piece)
    return files


def _advice(directory: Path) -> str:
    return f"delete {directory} to use the checkpoint before"


def _digest(file: BinaryIO, length: int) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(length, BLOCK_BYTES)))
    while length > 0:
        count = file.readinto(block[: min(length, len(block))])  # type: ignore[attr-defined]
        if not count:
            break  # a shorter file: the digest differs
        digest.update(block[:count])
        length -= count
    return digest.hexdigest()


def _digest_of(rows: list[list[Any]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
