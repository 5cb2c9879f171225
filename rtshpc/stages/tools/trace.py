"""Tool: memory and work of training steps from shapes. Lines of JSON in and out: `plan` calls it, not people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.stages.predict import traced


def main(arguments: Sequence[str]) -> int:
    """Reads a MemorySpec a line and answers each at once with what `traced` gives, to the end of the input."""
    for line in sys.stdin:
        print(json.dumps(traced(MemorySpec.model_validate_json(line)), allow_nan=False), flush=True)
    return 0
