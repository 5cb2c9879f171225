"""Lets the tests of mapping use the maker of small rasters of geo, `geo_making`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "geo"))
