"""Answers that were paid for, kept in one file: a question asked again costs nothing.

SQLite in write-ahead mode: an answer is there after the process was killed, several processes may share the
file, and rows are only added. It holds hashes of questions and the replies, never a key.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError

BUSY_SECONDS = 30.0
"""How long a write waits for another process's."""


class AnswerCache:
    """key -> answer (a JSON object). Belongs to one thread at a time; raises ConfigError for an unusable file."""

    def __init__(self, path: str):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Opened by the caller's thread, used by the endpoint's alone.
            self._base = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, "
                "at TEXT DEFAULT CURRENT_TIMESTAMP) WITHOUT ROWID"
            )
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"judge.cache={path}: not a cache that can be used ({error}); remove it or name another"
            ) from None

    def get(self, key: str) -> dict[str, Any] | None:
        row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """The first answer to a question stays."""
        text = json.dumps(answer, ensure_ascii=True)
        self._base.execute("INSERT OR IGNORE INTO answers (key, answer) VALUES (?, ?)", (key, text))

    def close(self) -> None:
        self._base.close()
