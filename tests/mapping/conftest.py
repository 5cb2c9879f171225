<<<<<<< HEAD
"""Lets the tests of mapping use the maker of small rasters of geo, `geo_making`."""

from __future__ import annotations
=======
"""Tests of the folder import `mapping_making` from here."""
>>>>>>> mosaic

import sys
from pathlib import Path

<<<<<<< HEAD
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "geo"))
=======
sys.path.insert(0, str(Path(__file__).parent))
>>>>>>> mosaic
