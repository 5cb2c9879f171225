"""Lets the tests of geo import their maker of small rasters, `geo_making`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
