"""The training log: `log.jsonl`, one JSON object a line.

Each line has the step, the images seen so far and what was known then. Timings and memory stand under the key
"machine", apart from everything that a repeated run must reproduce exactly.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ditlab.errors import DitlabError


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that was cut off by a kill is left out.

    Raises:
        DitlabError: for a line before the last that is not JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise DitlabError(f"{path}, line {number}: expected a JSON object, found '{line[:40]}'") from None
    return records


class TrainingLog:
    """Appends lines; cuts back those that a resumed run will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Removes every line after `step`, whole file at a time, so that a kill leaves the old or the new one.

        Raises:
            DitlabError: when the disk is full; the log stays as it was.
        """
        if not self.path.exists():
            return
        kept = [record for record in read_log(self.path) if record["step"] <= step and (step > 0)]
        beside = self.path.with_suffix(".tmp")
        try:
            with beside.open("w") as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise DitlabError(f"{self.path}: the log could not be written: {error.strerror}") from None

    def write(self, record: dict[str, Any], machine: dict[str, Any]) -> None:
        """Appends one line.

        Args:
            record: what a repeated run reproduces.
            machine: timings and memory, which it does not.

        Raises:
            DitlabError: when the disk is full.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({**record, "machine": machine}) + "\n")
        except OSError as error:
            raise DitlabError(f"{self.path}: the log could not be written: {error.strerror}") from None
