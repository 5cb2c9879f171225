"""Tool: memory and work of training steps from shapes. Lines of JSON in and out: `plan` calls it, not people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rtshpc.core.errors import drop_lost_output
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.stages.predict import traced


def main(arguments: Sequence[str]) -> int:
    """Reads a MemorySpec a line and answers each at once with what `traced` gives, as long as somebody asks and listens."""
    try:
        for line in sys.stdin:
            print(json.dumps(traced(MemorySpec.model_validate_json(line)), allow_nan=False), flush=True)
    except BrokenPipeError:
        drop_lost_output()  # whoever asked was killed, and its terminal may be in use again
    return 0
