"""The memory that is free, as the machine and its control groups have it."""

from __future__ import annotations

from ditlab.memory import available_memory


def test_the_memory_that_is_free(tmp_path):
    found = available_memory()
    assert found is None or 2**20 < found < 2**50
    assert available_memory(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/jobs/one\n")
    group = tmp_path / "sys/fs/cgroup/jobs"
    (group / "one").mkdir(parents=True)
    (group / "one/memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 8000 * 1024
    # The limit of the group above binds; what it holds of files can be let go.
    for name, text in {"max": "3000000\n", "current": "2500000\n", "stat": "anon 5\ninactive_file 400000\n"}.items():
        (group / f"memory.{name}").write_text(text)
    assert available_memory(tmp_path) == 900000
