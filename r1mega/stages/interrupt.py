"""A driver that is told to end (SIGTERM, as batch schedulers send it) stops as after Ctrl-C: cleanly, by name."""

from __future__ import annotations

import asyncio
import signal


def cancel_on_sigterm() -> None:
    """Cancel the calling task on SIGTERM. Call it after Ray has started: Ray's own handler prints a stack and dies."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
