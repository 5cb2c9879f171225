"""GDAL's own Python bindings, behind one function and in a process of their own.

The wheels of rasterio and pyogrio each carry a libgdal, the bindings use a third one. Symbols, drivers and PROJ data of
several of them mix in one process, so the bindings never enter ours: they belong to another interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from rtshpc.core.errors import MissingExtra, RunError

VARIABLE = "RTSHPC_GDAL_PYTHON"
"""Environment variable: the interpreter that has the bindings; the image sets it."""

_DEFAULT = "/usr/bin/python3"

# What a wheel or a module of the site sets for its own libgdal would mislead the other one.
_NOT_THEIRS = ("GDAL_", "PROJ_", "PYTHON", "LD_LIBRARY_PATH", "LD_PRELOAD")

_CALL = """
import json, sys
try:
    from osgeo import gdal
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
gdal.UseExceptions()
call = json.load(sys.stdin)
try:
    answer = getattr(gdal, call["function"])(*call["arguments"], **call["options"])
except (RuntimeError, TypeError, AttributeError) as error:
    print(error, file=sys.stderr)
    sys.exit(4)
if isinstance(answer, gdal.Dataset):
    answer = answer.FlushCache()
print(json.dumps(answer))
"""


def gdal(function: str, *arguments: Any, **options: Any) -> Any:
    """What `osgeo.gdal.FUNCTION(*arguments, **options)` gives, e.g. `gdal("Info", "a.tif", format="json")`.

    Arguments and answer pass as JSON: name data sets by their paths. One that the function made is written and closed,
    and the answer is None.

    Raises:
        MissingExtra: the interpreter that `RTSHPC_GDAL_PYTHON` names (/usr/bin/python3) has no bindings.
        RunError: GDAL refused the call.
    """
    python = os.environ.get(VARIABLE, _DEFAULT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_THEIRS)}
    call = json.dumps({"function": function, "arguments": arguments, "options": options})
    try:
        answer = subprocess.run(
            [python, "-I", "-c", _CALL], input=call, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise MissingExtra(f"GDAL's bindings: {python}: {error.strerror}; {_WAY_OUT}") from None
    lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
    if answer.returncode == 3:
        raise MissingExtra(f"GDAL's bindings: {python}: {lines[-1]}; {_WAY_OUT}")
    if answer.returncode:
        raise RunError(f"gdal.{function}: {lines[-1]}")
    return json.loads(answer.stdout.splitlines()[-1])


_WAY_OUT = f"use the image, install them (Debian: apt-get install python3-gdal), or name their Python in {VARIABLE}"
