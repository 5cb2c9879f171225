"""What `apptainer test` runs: every library and stage, and a GeoTIFF through each of the three GDALs.

rasterio writes and reads one, the gdal bindings read it in their own process and write another, which rasterio reads;
pyogrio, which knows vectors alone, burns nothing: it writes and reads outlines of the pixels with its own GDAL.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyogrio
import rasterio
import shapely
import torch
from rasterio.features import shapes
from rasterio.transform import from_origin

from rtshpc.core.cell import STAGES
from rtshpc.hpc.gdal import gdal

PIXELS = np.arange(48, dtype=np.uint16).reshape(6, 8)
PLACE = from_origin(500_000, 7_700_000, 10, 10)
CRS = "EPSG:32605"


def rasters(folder: Path) -> None:
    """A GeoTIFF by rasterio, read by both; and one by the bindings, read by both."""
    ours, theirs = folder / "rasterio.tif", folder / "bindings.tif"
    facts = {"driver": "GTiff", "width": 8, "height": 6, "count": 1, "dtype": "uint16", "crs": CRS, "transform": PLACE}
    with rasterio.open(ours, "w", **facts) as file:
        file.write(PIXELS, 1)
    gdal("Translate", str(theirs), str(ours), creationOptions=["COMPRESS=DEFLATE", "TILED=YES"])
    for path in (ours, theirs):
        with rasterio.open(path) as file:
            assert (file.read(1) == PIXELS).all() and file.crs == CRS and file.transform == PLACE, path
        seen = gdal("Info", str(path), format="json", computeMinMax=True)
        assert (seen["bands"][0]["computedMin"], seen["bands"][0]["computedMax"]) == (0, 47), seen
        assert seen["geoTransform"] == list(PLACE.to_gdal()) and "UTM zone 5N" in seen["coordinateSystem"]["wkt"], seen


def vectors(folder: Path) -> None:
    """Outlines of the pixels of rasterio's GeoTIFF, written and read by pyogrio."""
    with rasterio.open(folder / "rasterio.tif") as file:
        drawn = [shapely.geometry.shape(outline) for outline, _ in shapes(file.read(1), transform=file.transform)]
    path = folder / "outlines.gpkg"
    pyogrio.raw.write(path, shapely.to_wkb(drawn), [], [], geometry_type="Polygon", crs=CRS)
    facts, _, outlines, _ = pyogrio.raw.read(path)
    assert facts["crs"] == CRS, facts
    assert sum(shapely.area(shapely.from_wkb(outlines))) == PIXELS.size * 100


def libraries() -> None:
    """Every stage with what it imports, and Detectron2 where the image has it."""
    for name in STAGES:
        importlib.import_module(f"rtshpc.stages.{name}")
    if importlib.util.find_spec("detectron2") is not None:
        importlib.import_module("rtshpc.model.detectron2_adapter")
        print("Detectron2: there")


def main() -> int:
    """Run all of it and print the versions."""
    with tempfile.TemporaryDirectory() as folder:
        rasters(Path(folder))
        vectors(Path(folder))
    libraries()
    print(f"rasterio {rasterio.__version__}: GDAL {rasterio.__gdal_version__}")
    print(f"pyogrio {pyogrio.__version__}: GDAL {pyogrio.__gdal_version_string__}")
    print(f"gdal bindings, in their own process: GDAL {gdal('VersionInfo', 'RELEASE_NAME')}")
    print(f"torch {torch.__version__}: CUDA {torch.version.cuda}, GPUs here: {torch.cuda.device_count()}")
    print(f"Python {sys.version.split()[0]}, rtshpc {importlib.import_module('rtshpc').__version__}: all is well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
