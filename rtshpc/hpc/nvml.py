"""Device memory as the driver counts it: NVML, memory v2, sampled in a thread at most five times a second.

NVML sees the whole device, other processes and the driver's own share included: a figure beside the
allocator's, never in its place. A peak that could not be followed to the end is None, with the reason.
"""

from __future__ import annotations

import importlib
import os
import threading
from types import TracebackType
from typing import Any, cast

FASTEST_HZ = 5.0
"""More samples a second would disturb what is measured."""


class NvmlUnavailable(Exception):
    """NVML cannot be read here; the message is the reason for the record."""


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


class Nvml:
    """The driver's library, open.

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
        except self._library.NVMLError as error:
            raise NvmlUnavailable(f"NVML cannot start: {error}") from None

    def handle(self, device: str) -> Any:
        """The device of an index, or of a UUID with or without its prefix.

        Raises:
            NvmlUnavailable: there is no such device.
        """
        library = self._library
        try:
            if device.isdigit():
                count = int(library.nvmlDeviceGetCount())
                if int(device) >= count:
                    raise NvmlUnavailable(f"no GPU {device}: the driver sees {count}")
                return library.nvmlDeviceGetHandleByIndex(int(device))
            names = [device] if device.startswith(("GPU-", "MIG-")) else [f"GPU-{device}", f"MIG-{device}"]
            return self._by_uuid(names)
        except library.NVMLError as error:
            raise NvmlUnavailable(f"no GPU {device}: {error}") from None

    def _by_uuid(self, names: list[str]) -> Any:
        """The first of `names` that the driver knows; its last error where it knows none."""
        for name in names[:-1]:
            try:
                return self._library.nvmlDeviceGetHandleByUUID(name)
            except self._library.NVMLError:
                continue
        return self._library.nvmlDeviceGetHandleByUUID(names[-1])

    def used_bytes(self, handle: Any) -> int:
        """Memory in use on the device, without what the driver reserves (memory v2).

        Raises:
            NvmlUnavailable: it cannot be read (a lost GPU, an old driver).
        """
        library = self._library
        try:
            # Version 1 counts the driver's reserve as used: ask for version 2 and for nothing else.
            facts = library.nvmlDeviceGetMemoryInfo(handle, version=library.nvmlMemory_v2)
        except (library.NVMLError, TypeError, AttributeError) as error:
            raise NvmlUnavailable(f"memory v2 cannot be read: {error}") from None
        return int(cast(int, facts.used))

    def close(self) -> None:
        """Give the library back."""
        try:
            self._library.nvmlShutdown()
        except self._library.NVMLError:
            return


class NvmlSampler:
    """Follows the used memory of one device while a block runs.

    Attributes:
        peak_bytes: highest use seen; None where NVML could not be read to the end.
        baseline_bytes: use when the block began.
        samples: readings taken.
        reason: why there is no peak; None where there is one.
    """

    def __init__(self, uuid: str | None = None, hertz: float = FASTEST_HZ) -> None:
        """Choose the device.

        Args:
            uuid: of the device, with or without `GPU-` or `MIG-`; None = the first visible one.
            hertz: readings a second, at most FASTEST_HZ.
        """
        self._uuid = uuid
        self._pause = 1.0 / min(hertz, FASTEST_HZ)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml: Nvml | None = None
        self._handle: Any = None
        self._highest = 0
        self.baseline_bytes: int | None = None
        self.samples = 0
        self.reason: str | None = None

    @property
    def peak_bytes(self) -> int | None:
        """Highest use seen, bytes; None with a `reason`."""
        return None if self.reason is not None or self.samples == 0 else self._highest

    def __enter__(self) -> NvmlSampler:
        try:
            device = self._uuid if self._uuid is not None else visible_device()
            self._nvml = Nvml()
            self._handle = self._nvml.handle(device)
            self.baseline_bytes = self._read()
        except NvmlUnavailable as error:
            self.reason = str(error)
            return self
        self._thread = threading.Thread(target=self._watch, name="nvml", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            # The last reading: a block shorter than the pause is seen at its end at least.
            self._try_read()
        if self._nvml is not None:
            self._nvml.close()

    def _watch(self) -> None:
        while not self._end.wait(self._pause):
            if not self._try_read():
                return

    def _try_read(self) -> bool:
        """Read once; on an error the peak is void and the reason kept."""
        if self.reason is not None:
            return False
        try:
            self._read()
        except NvmlUnavailable as error:
            self.reason = f"lost after {self.samples} readings: {error}"
            return False
        return True

    def _read(self) -> int:
        assert self._nvml is not None
        used = self._nvml.used_bytes(self._handle)
        self._highest = max(self._highest, used)
        self.samples += 1
        return used
