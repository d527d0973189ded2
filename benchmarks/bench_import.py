"""What the course's packages add to the time that torch takes to import, each time in a new process."""

import statistics
import subprocess
import sys

SCRIPT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
from course_utils import checks, config, hooks, plots, pretrained
import solutions.ch02_transformer
print(middle - start, time.perf_counter() - middle)
"""


def test_import(benchmark, report) -> None:
    pairs = []

    def import_all() -> None:
        run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
        pairs.append([float(word) for word in run.stdout.split()])

    benchmark.pedantic(import_all, rounds=7, warmup_rounds=1)
    torch_alone, added = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    report("import: the course's packages add", "import torch", added, torch_alone, added / torch_alone, "<= 300 ms")
    benchmark.extra_info["added seconds"] = added
