"""A stage's process keeps the memory of its arrays as it should."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from rtshpc.stages.runner import set_memory
set_memory(sys.argv[1])
for round in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    chips = [np.ones(3 << 20, np.uint8) for _ in range(10)]
    del chips
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose malloc it sets")
def test_the_memory_of_a_chip_stays_for_the_next_in_preprocess() -> None:
    def faults(stage: str) -> list[int]:
        answer = subprocess.run([sys.executable, "-c", FAULTS, stage], capture_output=True, text=True, check=True)
        return [int(line) for line in answer.stdout.split()]

    pages = 10 * (3 << 20) // 4096
    first, *later = faults("preprocess")
    assert first > pages / 2 and max(later) < pages / 20
    assert min(faults("gather")) > pages / 2
