"""Frames on a file descriptor, from inside a jail: four bytes of length, then the payload.

Standard library only: this file runs inside jails.
"""

from __future__ import annotations

import os


class Channel:
    """The private two-way byte channel of a jailed program."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def receive(self) -> bytes:
        """The next payload; EOFError when the other side is gone."""
        return self._exactly(int.from_bytes(self._exactly(4), "big"))

    def send(self, payload: bytes) -> None:
        view = memoryview(len(payload).to_bytes(4, "big") + payload)
        while view:
            view = view[os.write(self.descriptor, view) :]

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = os.read(self.descriptor, min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)
