"""A device as its driver sees it: NVML's memory v2, utilisation and energy, sampled in a thread at most five times a second.

NVML sees the whole device, other processes and the driver's own share included: figures beside the allocator's, never
in their place. What could not be followed to the end is None, with the reason; the rest is not lost with it.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

FASTEST_HZ = 5.0
"""More samples a second would disturb what is measured."""

MARK = "fake"
"""How the version of a driver begins that is none: a library that tests put in NVML's place."""

INITIAL_NAMESPACE = "pid:[4026531836]"
"""What Linux calls the host's own PID namespace, on every machine (PROC_PID_INIT_INO)."""


class NvmlUnavailable(Exception):
    """NVML, or one of its figures, cannot be read here; the message is the reason for the record."""


def visible_device(variable: str | None = None) -> str:
    """First entry of CUDA_VISIBLE_DEVICES: an index or a UUID (GPU-... or MIG-...); "0" where it is not set.

    Raises:
        NvmlUnavailable: it hides every device.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES") if variable is None else variable
    if value is None:
        return "0"
    first = value.split(",")[0].strip()
    if not first or first in ("-1", "NoDevFiles"):
        raise NvmlUnavailable(f"CUDA_VISIBLE_DEVICES = {value!r} hides every GPU")
    return first


def host_pid(status: str | None = None, namespace: str | None = None) -> int:
    """The number under which the driver, which lives on the host, knows this process.

    Args:
        status: text of /proc/self/status.
        namespace: what /proc/self/ns/pid points to.

    Raises:
        NvmlUnavailable: the container hides it.
    """
    try:
        namespace = os.readlink("/proc/self/ns/pid") if namespace is None else namespace
        status = Path("/proc/self/status").read_text() if status is None else status
    except OSError as error:
        raise NvmlUnavailable(f"the number of this process on the host is unknown: {error.strerror}") from None
    if namespace == INITIAL_NAMESPACE:
        return os.getpid()
    numbers = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), list[str]())
    if len(numbers) < 2:
        raise NvmlUnavailable(
            "the container hides which number this process has on the host (a PID namespace of its own)"
        )
    return int(numbers[0])


class Nvml:
    """The driver's library, open.

    Attributes:
        driver: its version.

    Raises:
        NvmlUnavailable: nvidia-ml-py or the driver is not there.
    """

    def __init__(self) -> None:
        try:
            self._library: Any = importlib.import_module("pynvml")
        except ImportError:
            raise NvmlUnavailable("nvidia-ml-py is not installed") from None
        try:
            self._library.nvmlInit()
            self.driver = str(self._library.nvmlSystemGetDriverVersion())
        except self._library.NVMLError as error:
            raise NvmlUnavailable(f"NVML cannot start: {error}") from None

    @property
    def fake(self) -> bool:
        """Whether this is no driver but a library made for tests, which says so in its version."""
        return self.driver.startswith(MARK)

    def handle(self, device: str) -> Any:
        """The device of an index, or of a UUID: with or without its prefix, or its beginning as CUDA takes it.

        Of a GPU in MIG mode it is the only slice, as no process can use the GPU itself.

        Raises:
            NvmlUnavailable: there is no such device, or no single one.
        """
        library = self._library
        try:
            if not device.isdigit():
                return self._alone(self._by_uuid(device))
            count = int(library.nvmlDeviceGetCount())
            if int(device) >= count:
                raise NvmlUnavailable(f"no GPU {device}: the driver sees {count}")
            return self._alone(library.nvmlDeviceGetHandleByIndex(int(device)))
        except library.NVMLError as error:
            raise NvmlUnavailable(f"no GPU {device}: {error}") from None

    def devices(self) -> dict[str, Any]:
        """UUID -> handle of every GPU, and of every slice of those in MIG mode; what cannot be read is left out."""
        library, found = self._library, list[Any]()
        with suppress(library.NVMLError):
            for index in range(int(library.nvmlDeviceGetCount())):
                with suppress(library.NVMLError):
                    gpu = library.nvmlDeviceGetHandleByIndex(index)
                    found += [gpu, *self._slices(gpu)]
        return {self.uuid(handle): handle for handle in found}

    def uuid(self, handle: Any) -> str:
        """`GPU-...`, or `MIG-...` of a slice."""
        return str(self._ask("the UUID", self._library.nvmlDeviceGetUUID, handle))

    def name(self, handle: Any) -> str:
        """The device's name."""
        return str(self._ask("the name", self._library.nvmlDeviceGetName, handle))

    def memory(self, handle: Any) -> tuple[int, int]:
        """Memory in use without what the driver keeps for itself, and that (memory v2), bytes.

        Raises:
            NvmlUnavailable: it cannot be read (a lost GPU, an old driver).
        """
        # Version 1 counts the driver's reserve as used: ask for version 2 and for nothing else.
        try:
            version = self._library.nvmlMemory_v2
        except AttributeError:
            raise NvmlUnavailable("memory v2 cannot be read: nvidia-ml-py is too old") from None
        facts = self._ask("memory v2", self._library.nvmlDeviceGetMemoryInfo, handle, version=version)
        return int(facts.used), int(facts.reserved)

    def utilisation(self, handle: Any) -> float:
        """Share of the last sampling period (up to 1 s) in which some kernel ran, 0..1.

        Raises:
            NvmlUnavailable: it cannot be read (a MIG slice, a lost GPU).
        """
        return int(self._ask("utilisation", self._library.nvmlDeviceGetUtilizationRates, handle).gpu) / 100

    def energy_mj(self, handle: Any) -> int:
        """Energy that the GPU has taken since its driver was loaded, mJ.

        Raises:
            NvmlUnavailable: there is no such counter (before Volta, a MIG slice), or the GPU is lost.
        """
        if self.uuid(handle).startswith("MIG-"):
            raise NvmlUnavailable("a MIG slice has no energy counter of its own")
        return int(self._ask("energy", self._library.nvmlDeviceGetTotalEnergyConsumption, handle))

    def process_bytes(self, handle: Any, pid: int) -> int | None:
        """What a process holds of the device, bytes; None where the driver lists no such process.

        Args:
            handle: the device.
            pid: the process's number on the host.

        Raises:
            NvmlUnavailable: the driver does not tell.
        """
        library = self._library
        try:
            listed = library.nvmlDeviceGetComputeRunningProcesses_v3(handle)
        except (library.NVMLError_FunctionNotFound, AttributeError):
            listed = self._ask("processes", library.nvmlDeviceGetComputeRunningProcesses_v2, handle)
        except library.NVMLError as error:
            raise NvmlUnavailable(f"processes cannot be read: {error}") from None
        own = [one.usedGpuMemory for one in listed if one.pid == pid]
        if any(size is None for size in own):
            raise NvmlUnavailable("the driver does not tell the memory of a process")
        return sum(map(int, own)) if own else None

    def close(self) -> None:
        """Give the library back."""
        with suppress(self._library.NVMLError):
            self._library.nvmlShutdown()

    def _ask(self, what: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        except self._library.NVMLError_FunctionNotFound:
            raise NvmlUnavailable(f"{what} cannot be read: driver {self.driver} is too old for it") from None
        except (self._library.NVMLError, TypeError) as error:
            raise NvmlUnavailable(f"{what} cannot be read: {error}") from None

    def _by_uuid(self, device: str) -> Any:
        """A device by its UUID, else the only one whose UUID begins so."""
        names = [device] if device.startswith(("GPU-", "MIG-")) else [f"GPU-{device}", f"MIG-{device}"]
        for name in names:
            with suppress(self._library.NVMLError):
                return self._library.nvmlDeviceGetHandleByUUID(name)
        begun = [handle for uuid, handle in self.devices().items() if uuid.startswith(tuple(names))]
        if len(begun) == 1:
            return begun[0]
        raise NvmlUnavailable(
            f"no GPU {device}: {len(begun)} UUIDs begin so" if begun else f"no GPU {device}: Not Found"
        )

    def _alone(self, handle: Any) -> Any:
        """The handle itself; of a GPU in MIG mode its only slice."""
        library = self._library
        try:
            if not library.nvmlDeviceGetMigMode(handle)[0]:
                return handle
        except library.NVMLError:  # no MIG here, or a slice already
            return handle
        slices = self._slices(handle)
        if len(slices) != 1:
            text = f"{self.uuid(handle)} is in MIG mode with {len(slices)} slices"
            raise NvmlUnavailable(f"{text}; CUDA_VISIBLE_DEVICES must name one by its UUID")
        return slices[0]

    def _slices(self, gpu: Any) -> list[Any]:
        """Handles of the slices of a GPU in MIG mode that this process may see; none of any other."""
        library, found = self._library, list[Any]()
        with suppress(library.NVMLError):
            for index in range(int(library.nvmlDeviceGetMaxMigDeviceCount(gpu))):
                with suppress(library.NVMLError):
                    found.append(library.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
        return found


def is_fake() -> bool:
    """Whether an NVML can be read here that is none."""
    try:
        with closing(Nvml()) as nvml:
            return nvml.fake
    except NvmlUnavailable:
        return False


def used_before() -> dict[str, int]:
    """UUID -> used memory of every device, bytes: before this process touches one. Empty where NVML tells nothing."""
    found: dict[str, int] = {}
    with suppress(NvmlUnavailable), closing(Nvml()) as nvml:
        for uuid, handle in nvml.devices().items():
            with suppress(NvmlUnavailable):
                found[uuid] = nvml.memory(handle)[0]
    return found


class _Series:
    """Readings of one figure; void from the first one that fails."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self.values: list[Any] = []
        self.reason = ""

    def take(self) -> None:
        """Read once, unless it has failed before; what is not there yet (None) is no reading."""
        if self.reason:
            return
        try:
            value = self._read()
        except NvmlUnavailable as error:
            count = len(self.values)
            self.reason = f"lost after {count} readings: {error}" if count else str(error)
            return
        self.values += [] if value is None else [value]


class NvmlSampler:
    """Follows one device while a block runs; `timed` is the part of it whose utilisation and energy are wanted.

    Attributes:
        fake: the figures come from no driver, see `Nvml.fake`.
        device: name of the device; empty where there is none.
        reasons: figure -> why it is None.
    """

    MEMORY = ("device_used_peak_v2", "device_baseline", "driver_reserved", "process_peak")
    FIGURES = (*MEMORY, "gpu_utilisation", "energy_joules")

    def __init__(
        self, uuid: str | None = None, hertz: float = FASTEST_HZ, before: Mapping[str, int] | None = None
    ) -> None:
        """Choose the device.

        Args:
            uuid: of the device, with or without `GPU-` or `MIG-`; None = the first visible one. Of a slice that
                CUDA_VISIBLE_DEVICES names, CUDA tells the whole GPU's: the slice it is.
            hertz: readings a second, at most FASTEST_HZ.
            before: what `used_before` gave when this process had touched no device; None = the first reading counts.
        """
        self._uuid = uuid
        self._before = before
        self._pause = 1.0 / min(hertz, FASTEST_HZ)
        self._end, self._lock, self._working = threading.Event(), threading.Lock(), False
        self._thread: threading.Thread | None = None
        self._nvml: Nvml | None = None
        self._series: dict[str, _Series] = {}
        self._figures: dict[str, int | float] = {}
        self.fake, self.device, self._own, self.reasons = False, "", "", dict[str, str]()

    @property
    def samples(self) -> int:
        """Readings of the memory."""
        return len(self._series["memory"].values) if self._series else 0

    def figures(self) -> dict[str, int | float | None]:
        """Every one of FIGURES, in bytes, J and 0..1; None where `reasons` says why. Call it after the block."""
        return {name: self._figures.get(name) for name in self.FIGURES}

    def __enter__(self) -> NvmlSampler:
        try:
            named = visible_device()
            device = named if self._uuid is None or named.startswith("MIG-") else self._uuid
            self._nvml = nvml = Nvml()
            self.fake = nvml.fake
            handle = nvml.handle(device)
            self.device, self._own = nvml.name(handle), nvml.uuid(handle)
        except NvmlUnavailable as error:
            self.reasons = dict.fromkeys(self.FIGURES, str(error))
            return self
        self._series = {
            "memory": _Series(lambda: nvml.memory(handle)),
            "process": _Series(lambda: nvml.process_bytes(handle, host_pid())),
            "utilisation": _Series(lambda: nvml.utilisation(handle)),
            "energy": _Series(lambda: nvml.energy_mj(handle)),
        }
        self._take("memory", "process")
        self._thread = threading.Thread(target=self._watch, name="nvml", daemon=True)
        self._thread.start()
        return self

    @contextmanager
    def timed(self) -> Generator[None]:
        """The block whose utilisation and energy are wanted; once a sampler."""
        self._take("energy")
        self._working = True
        try:
            yield
        finally:
            self._working = False
            self._take("energy", "utilisation")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            # The last reading: a block shorter than the pause is seen at its end at least.
            self._take("memory", "process")
            self._settle()
        if self._nvml is not None:
            self._nvml.close()

    def _watch(self) -> None:
        while not self._end.wait(self._pause):
            self._take("memory", "process", *(("energy", "utilisation") if self._working else ()))

    def _take(self, *names: str) -> None:
        with self._lock:
            for name in names:
                if name in self._series:
                    self._series[name].take()

    def _settle(self) -> None:
        """Readings -> figures, and why there is none."""
        energy, before = self._series["energy"], self._before
        steps = [later - earlier for earlier, later in zip(energy.values, energy.values[1:], strict=False)]
        if steps and not energy.reason and (min(steps) < 0 or max(steps) == 0):
            fell = "fell in between: its driver was reset"
            energy.reason = f"the energy counter {fell if min(steps) < 0 else 'stood still'}"
        if before is not None and self._own not in before:
            self.reasons["device_baseline"] = "the device could not be read before this process touched it"
        rules: tuple[tuple[str, str, Callable[[list[Any]], int | float]], ...] = (
            ("device_used_peak_v2", "memory", lambda values: max(used for used, _ in values)),
            ("device_baseline", "memory", lambda values: before[self._own] if before else values[0][0]),
            ("driver_reserved", "memory", lambda values: max(reserved for _, reserved in values)),
            ("process_peak", "process", max),
            ("gpu_utilisation", "utilisation", lambda values: sum(values) / len(values)),
            ("energy_joules", "energy", lambda values: (values[-1] - values[0]) / 1000),
        )
        unread = {"process": "the driver lists no memory of this process"}
        for name, source, rule in rules:
            series = self._series[source]
            if series.reason or not series.values:
                self.reasons[name] = series.reason or unread.get(source, "no step was timed")
            elif name not in self.reasons:
                self._figures[name] = rule(series.values)
