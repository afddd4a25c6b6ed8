"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that are free for this process; None where the system does not tell (other than Linux).

    That is what the machine has free, or what a limit on the process's control group (of a container, of a cluster's
    job) leaves, where that is less. The system's files are below `root`.
    """
    free = [_machine_memory(root / "proc/meminfo")]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line.removeprefix("0::/") for line in groups if line.startswith("0::/"))
    except (OSError, StopIteration):
        own = ""
    top = root / "sys/fs/cgroup"
    folder = top / own
    # A limit binds all groups below it.
    for group in (folder, *folder.parents):
        free.append(_group_memory(group))
        if group == top:
            break
    return min((amount for amount in free if amount is not None), default=None)


def _machine_memory(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _group_memory(folder: Path) -> int | None:
    """What a control group (version 2) has left; None where it has no limit."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        # Cached files count as used, but make room.
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
        return max(limit - used + int(cached), 0)
    except (OSError, KeyError, ValueError):
        return None
