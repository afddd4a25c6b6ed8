"""The training log: `log.jsonl`, one JSON object a line.

Each line has the step, the images seen so far and the values known then. Timings and memory stand under the key
"machine", apart from everything that a repeated run must reproduce exactly.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditlab.errors import Damaged, DitlabError
from ditlab.files import write_file

__all__ = ["LogLength", "TrainingLog", "read_log"]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log, without a last one that a kill cut off; any other bad line raises Damaged."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            start = line[:40].decode(errors="replace")
            raise Damaged(f"{path}, line {number}: expected a JSON object with a step, found '{start}'")
    return records


@dataclass(frozen=True)
class LogLength:
    """How long a log was when a checkpoint was written."""

    lines: int
    bytes: int


@dataclass(frozen=True)
class TrainingLog:
    """Appends lines to a log, and cuts off those that a resumed run will write again."""

    path: Path

    def flush(self) -> LogLength:
        """Forces the log to disk and returns its length."""
        if not self.path.exists():
            return LogLength(0, 0)
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            content = file.read()
        return LogLength(content.count(b"\n"), len(content))

    def cut(self, step: int) -> LogLength:
        """Removes every line after `step`, and lines that cannot be read; returns the length of what is left.

        Step 0 empties the log. A kill or a full disk leaves the old file as it was.
        """
        if not self.path.exists():
            return LogLength(0, 0)
        records = map(_record, self.path.read_bytes().splitlines())
        text = "".join(json.dumps(record) + "\n" for record in records if record and 0 < step >= record["step"])
        write_file(self.path, lambda file: file.write(text.encode()), sync=True)
        return LogLength(text.count("\n"), len(text))

    def write(self, record: dict[str, Any], machine: dict[str, Any]) -> None:
        """Appends one line: the values that a repeated run reproduces, then timings and memory, which it does not."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({**record, "machine": machine}) + "\n")
        except OSError as error:
            raise DitlabError(f"{self.path}: the log could not be written: {error.strerror}") from None
