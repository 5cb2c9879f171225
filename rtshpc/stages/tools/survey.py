"""Tool: what the headers of scenes to map say. JSON on standard input and output: `launch map` calls it, not people."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from rtshpc.core.config import DataConfig, MapConfig
from rtshpc.core.scenes import Scene
from rtshpc.mapping.scenes.survey import survey


def main(arguments: Sequence[str]) -> int:
    """Reads `{data, map, scenes}`, prints what `survey` gives.

    Raises:
        LayoutError: chips of the data config cannot overlap as asked.
    """
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    given = json.load(sys.stdin)
    data, config = DataConfig.model_validate(given["data"]), MapConfig.model_validate(given["map"])
    seen = survey([Scene.model_validate(scene) for scene in given["scenes"]], data, config)
    json.dump([one.model_dump(mode="json", exclude_defaults=True) for one in seen], sys.stdout)
    return 0
