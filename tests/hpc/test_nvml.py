from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rtshpc.hpc.nvml import FASTEST_HZ, NvmlSampler, NvmlUnavailable, visible_device

FAKE = r"""
/* The few calls of libnvidia-ml.so.1 that the sampler makes; use rises by 1 MiB a reading. */
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
static int readings = 0;
int nvmlInitWithFlags(unsigned flags) { return getenv("FAKE_NO_DRIVER") ? 9 : 0; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : code == 9 ? "Driver Not Loaded" : "Not Found"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    if (!strcmp(uuid, "GPU-aaaa")) { *handle = (void *)1; return 0; }
    if (!strcmp(uuid, "MIG-bbbb")) { *handle = (void *)2; return 0; }
    return 6;
}
int nvmlDeviceGetMemoryInfo_v2(void *handle, Memory2 *memory) {
    const char *lost = getenv("FAKE_LOST_AFTER");
    if (lost && readings >= atoi(lost)) return 15;
    readings++;
    memory->total = 80ull << 30; memory->reserved = 500ull << 20; memory->free = 0;
    memory->used = ((unsigned long long)(long)handle << 30) + ((unsigned long long)readings << 20);
    return 0;
}
"""

READ = """
import json, sys, time
from rtshpc.hpc.nvml import NvmlSampler
with NvmlSampler(sys.argv[1] or None, hertz=float(sys.argv[2])) as sampler:
    time.sleep(float(sys.argv[3]))
print(json.dumps([sampler.peak_bytes, sampler.baseline_bytes, sampler.samples, sampler.reason]))
"""

GIB, MIB = 1 << 30, 1 << 20


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small libnvidia-ml.so.1 that the real nvidia-ml-py loads."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler to build a small libnvidia-ml.so.1")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "fake.c").write_text(FAKE)
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(folder / "fake.c")], check=True)
    return folder


def _sample(
    library: Path | None, uuid: str = "", hertz: float = 5.0, seconds: float = 0.5, **variables: str
) -> list[object]:
    environment = {"PATH": "/usr/bin:/bin", **variables}
    if library is not None:
        environment["LD_LIBRARY_PATH"] = str(library)
    command = [sys.executable, "-c", READ, uuid, str(hertz), str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_peak_is_the_highest_reading_of_memory_v2(library: Path) -> None:
    peak, baseline, samples, reason = _sample(library)
    assert reason is None and baseline == GIB + MIB
    assert isinstance(samples, int) and samples >= 2 and peak == GIB + samples * MIB


def test_no_more_than_five_readings_a_second_are_taken(library: Path) -> None:
    _, _, samples, _ = _sample(library, hertz=1000.0, seconds=1.0)
    assert isinstance(samples, int) and samples <= FASTEST_HZ + 2


@pytest.mark.parametrize(
    ("uuid", "device"), [("GPU-aaaa", 1), ("aaaa", 1), ("bbbb", 2), ("MIG-bbbb", 2), ("1", 2), ("", 1)]
)
def test_a_device_is_found_by_uuid_with_or_without_prefix_and_by_index(library: Path, uuid: str, device: int) -> None:
    _, baseline, _, reason = _sample(library, uuid, seconds=0)
    assert reason is None and baseline == device * GIB + MIB


def test_the_visible_device_is_the_one_that_is_read(library: Path) -> None:
    _, baseline, _, _ = _sample(library, seconds=0, CUDA_VISIBLE_DEVICES="MIG-bbbb,GPU-aaaa")
    assert baseline == 2 * GIB + MIB
    peak, baseline, _, reason = _sample(library, seconds=0, CUDA_VISIBLE_DEVICES="")
    assert peak is None and baseline is None and "hides every GPU" in str(reason)


def test_a_gpu_lost_on_the_way_leaves_no_peak_but_a_reason(library: Path) -> None:
    peak, _, samples, reason = _sample(library, seconds=1.0, FAKE_LOST_AFTER="2")
    assert peak is None and samples == 2 and reason == "lost after 2 readings: memory v2 cannot be read: GPU is lost"


def test_an_unknown_device_and_a_missing_driver_are_named(library: Path) -> None:
    assert "no GPU GPU-cccc" in str(_sample(library, "GPU-cccc", seconds=0)[3])
    assert _sample(library, "7", seconds=0)[3] == "no GPU 7: the driver sees 2"
    assert "Driver Not Loaded" in str(_sample(library, seconds=0, FAKE_NO_DRIVER="1")[3])


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="needs a machine without a GPU")
def test_without_a_driver_the_reason_says_so() -> None:
    with NvmlSampler() as sampler:
        pass
    assert sampler.peak_bytes is None and sampler.samples == 0
    assert "NVML" in str(sampler.reason)


def test_the_first_visible_device_is_chosen() -> None:
    assert visible_device("2,3") == "2" and visible_device("GPU-1234") == "GPU-1234"
    with pytest.raises(NvmlUnavailable):
        visible_device("-1")
