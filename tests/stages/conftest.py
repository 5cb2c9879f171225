"""Lets the tests of stages use the makers of small rasters (`geo_making`), of map runs (`publish_making`) and their own."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "geo"), str(TESTS / "mapping"), str(TESTS / "stages")]
