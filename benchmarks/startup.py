"""How long help texts take, against `import torch`: medians of fresh processes.

    python benchmarks/startup.py [--repeats 5]

Prints one line a verb: seconds, and the ratio to `import torch` on the same machine. No ratio should pass 0.5.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

from ditlab.cli.main import verbs


def seconds(arguments: list[str], repeats: int) -> float:
    """Returns the median duration of a Python process."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - begin)
    return median(times)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--verbs", nargs="*", help="all if not given")
    arguments = parser.parse_args()
    torch = seconds(["-c", "import torch"], arguments.repeats)
    print(f"{'import torch':<16} {torch:.2f} s")
    for verb in arguments.verbs or ("", *verbs()):
        duration = seconds(["-m", "ditlab", *verb.split(), "--help"], arguments.repeats)
        print(f"{verb or 'ditlab':<16} {duration:.2f} s  {duration / torch:.2f}")


if __name__ == "__main__":
    main()
