from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rtshpc.hpc.nvml import FASTEST_HZ, INITIAL_NAMESPACE, NvmlSampler, NvmlUnavailable, host_pid, visible_device

READ = """
import json, sys, time
from rtshpc.hpc import nvml
nvml.INITIAL_NAMESPACE = __import__("os").readlink("/proc/self/ns/pid")  # as on the host, wherever the tests run
uuid, hertz, seconds, early = sys.argv[1] or None, float(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "True"
before = nvml.used_before() if early else None
with nvml.NvmlSampler(uuid, hertz, before) as sampler:
    with sampler.timed():
        time.sleep(seconds)
print(json.dumps({**sampler.figures(), "samples": sampler.samples, "reasons": sampler.reasons, "fake": sampler.fake,
    "before": before}))
"""

GIB, MIB = 1 << 30, 1 << 20
Sampled = dict[str, Any]


@pytest.fixture(scope="module")
def library(fake_nvml: dict[str, Path]) -> Path:
    return fake_nvml["current"]


def _sample(
    library: Path, uuid: str = "", seconds: float = 0.25, hertz: float = 5.0, early: bool = False, **variables: str
) -> Sampled:
    environment = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": str(library), **variables}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    command = [sys.executable, "-c", READ, uuid, str(hertz), str(seconds), str(early)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_used_memory_is_that_of_memory_v2_and_the_driver_s_share_stands_beside_it(library: Path) -> None:
    found = _sample(library)
    assert found["samples"] >= 2 and found["device_baseline"] == GIB
    assert found["device_used_peak_v2"] == GIB + (found["samples"] - 1) * MIB
    assert found["driver_reserved"] == 500 * MIB and found["process_peak"] == 300 * MIB
    assert found["fake"] and found["reasons"] == {}


def test_no_more_than_five_readings_a_second_are_taken(library: Path) -> None:
    assert 3 <= _sample(library, hertz=1000.0, seconds=1.0)["samples"] <= FASTEST_HZ + 2


def test_what_was_used_before_the_process_came_is_the_baseline(library: Path) -> None:
    found = _sample(library, "GPU-bbbb-2", seconds=0, early=True)
    assert found["before"] == {"GPU-aaaa-1": GIB, "GPU-bbbb-2": 2 * GIB + MIB}
    assert found["device_baseline"] == 2 * GIB + MIB < found["device_used_peak_v2"]


def test_energy_is_what_the_counter_rose_by_and_utilisation_the_mean_of_the_timed_block(library: Path) -> None:
    found = _sample(library, seconds=0.5)
    readings = round(found["energy_joules"] / 1.5)
    assert found["energy_joules"] == readings * 1.5 and readings >= 2
    assert 0.4 <= found["gpu_utilisation"] <= 0.6


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"FAKE_ENERGY_RESET_AT": "1"}, "the energy counter fell in between: its driver was reset"),
        ({"FAKE_ENERGY_STILL": "1"}, "the energy counter stood still"),
        ({"FAKE_NO_ENERGY": "1"}, "energy cannot be read: Not Supported"),
    ],
)
def test_energy_without_a_sound_counter_is_null_and_never_zero(
    library: Path, variables: dict[str, str], reason: str
) -> None:
    found = _sample(library, seconds=0, **variables)
    assert found["energy_joules"] is None and found["reasons"] == {"energy_joules": reason}
    assert found["device_used_peak_v2"] is not None and found["gpu_utilisation"] is not None


@pytest.mark.parametrize(
    ("uuid", "device"), [("GPU-aaaa-1", 1), ("bbbb-2", 2), ("GPU-bbbb", 2), ("aa", 1), ("1", 2), ("", 1)]
)
def test_a_device_is_found_by_uuid_by_the_beginning_of_one_and_by_index(library: Path, uuid: str, device: int) -> None:
    assert _sample(library, uuid, seconds=0)["device_baseline"] == device * GIB


def test_the_visible_device_is_the_one_that_is_read(library: Path) -> None:
    found = _sample(library, seconds=0, CUDA_VISIBLE_DEVICES="GPU-bbbb-2,GPU-aaaa-1")
    assert found["device_baseline"] == 2 * GIB
    hidden = _sample(library, seconds=0, CUDA_VISIBLE_DEVICES="")
    assert set(NvmlSampler.FIGURES) == set(hidden["reasons"])
    assert all(hidden[name] is None and "hides every GPU" in hidden["reasons"][name] for name in NvmlSampler.FIGURES)


@pytest.mark.parametrize("uuid", ["", "GPU-bbbb-2", "cccc-3", "1"])
def test_of_a_gpu_in_mig_mode_the_slice_is_read_and_tells_no_energy_or_utilisation(library: Path, uuid: str) -> None:
    visible = {} if uuid else {"CUDA_VISIBLE_DEVICES": "MIG-cccc-3"}
    found = _sample(library, uuid, seconds=0, FAKE_SLICES="1", **visible)
    assert found["device_baseline"] == 3 * GIB and found["process_peak"] == 300 * MIB
    assert found["reasons"] == {
        "energy_joules": "a MIG slice has no energy counter of its own",
        "gpu_utilisation": "utilisation cannot be read: Not Supported",
    }


def test_cuda_s_uuid_of_the_whole_gpu_does_not_hide_the_slice_that_is_visible(library: Path) -> None:
    found = _sample(library, "GPU-bbbb-2", seconds=0, early=True, FAKE_SLICES="2", CUDA_VISIBLE_DEVICES="MIG-dddd-4")
    assert found["device_baseline"] == found["before"]["MIG-dddd-4"]


def test_one_of_several_slices_is_never_guessed(library: Path) -> None:
    found = _sample(library, "GPU-bbbb-2", seconds=0, FAKE_SLICES="2")
    assert found["reasons"]["device_used_peak_v2"] == (
        "GPU-bbbb-2 is in MIG mode with 2 slices; CUDA_VISIBLE_DEVICES must name one by its UUID"
    )


def test_a_gpu_lost_on_the_way_leaves_no_figure_but_a_reason(library: Path) -> None:
    found = _sample(library, seconds=0.5, FAKE_LOST_AFTER="2")
    assert found["samples"] == 2 and all(found[name] is None for name in NvmlSampler.FIGURES)
    assert found["reasons"]["device_used_peak_v2"] == "lost after 2 readings: memory v2 cannot be read: GPU is lost"
    assert "GPU is lost" in found["reasons"]["energy_joules"] and "GPU is lost" in found["reasons"]["process_peak"]


def test_an_old_driver_gives_what_it_can(fake_nvml: dict[str, Path]) -> None:
    found = _sample(fake_nvml["old"], seconds=0, early=True)
    text = "memory v2 cannot be read: driver fake 1.0 is too old for it"
    assert found["reasons"] == dict.fromkeys(("device_used_peak_v2", "device_baseline", "driver_reserved"), text)
    assert found["process_peak"] == 300 * MIB and found["energy_joules"] == 1.5


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"FAKE_PID": "999999"}, "the driver lists no memory of this process"),
        ({"FAKE_NO_PROCESS_MEMORY": "1"}, "the driver does not tell the memory of a process"),
    ],
)
def test_memory_of_a_process_is_its_own_or_null(library: Path, variables: dict[str, str], reason: str) -> None:
    found = _sample(library, seconds=0, **variables)
    assert found["process_peak"] is None and found["reasons"] == {"process_peak": reason}


def test_the_driver_s_number_of_a_process_in_a_container_is_the_host_s_or_unknown() -> None:
    assert host_pid("NSpid:\t4711\t7\n", "pid:[4026532999]") == 4711
    assert host_pid("NSpid:\t7\n", INITIAL_NAMESPACE) == os.getpid()
    for hidden in ("NSpid:\t7\n", "Name:\tpython\n"):
        with pytest.raises(NvmlUnavailable, match="the container hides which number"):
            host_pid(hidden, "pid:[4026532999]")


def test_an_unknown_device_and_a_missing_driver_are_named(library: Path) -> None:
    assert _sample(library, "GPU-c", seconds=0)["reasons"]["process_peak"] == "no GPU GPU-c: Not Found"
    assert _sample(library, "GPU-", seconds=0)["reasons"]["process_peak"] == "no GPU GPU-: 2 UUIDs begin so"
    assert _sample(library, "7", seconds=0)["reasons"]["energy_joules"] == "no GPU 7: the driver sees 2"
    found = _sample(library, seconds=0, early=True, FAKE_NO_DRIVER="1")
    assert found["before"] == {} and "Driver Not Loaded" in found["reasons"]["device_baseline"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="needs a machine without a GPU")
def test_without_a_driver_the_reason_says_so() -> None:
    with NvmlSampler() as sampler, sampler.timed():
        pass
    assert sampler.samples == 0 and not sampler.fake and not any(sampler.figures().values())
    assert all("NVML" in sampler.reasons[name] for name in NvmlSampler.FIGURES)


def test_the_first_visible_device_is_chosen() -> None:
    assert visible_device("2,3") == "2" and visible_device("GPU-1234") == "GPU-1234"
    with pytest.raises(NvmlUnavailable):
        visible_device("-1")
