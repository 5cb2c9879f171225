"""Lets tests import the makers of this folder (`mapping_making`, `table_making`) and of small rasters (`geo_making`)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "geo")]
