"""What this machine is: processor, cores, memory, free disk, cache folder; None where the system does not tell."""

import os
import platform
import shutil
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_NO_LIMIT = 2**60  # the first version of control groups writes a huge number where there is no limit


def processor_name() -> str:
    """Name of the processor model, or of its architecture where the system does not tell the model."""
    for line in _lines(_CPUINFO):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int | None:
    """Logical cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return os.cpu_count() if affinity is None else len(affinity(0))


def total_memory_bytes() -> int | None:
    """Main memory of the machine."""
    return _meminfo("MemTotal")


def available_memory_bytes() -> int | None:
    """Main memory that programs can still take."""
    return _meminfo("MemAvailable")


def memory_limit_bytes() -> int | None:
    """Memory that the container or control group allows."""
    for path in _LIMITS:
        text = "".join(_lines(path)).strip()
        if text.isdigit() and int(text) < _NO_LIMIT:
            return int(text)
    return None


def free_disk_bytes(folder: Path) -> int | None:
    """Free disk where the folder is, or would be made."""
    try:
        place = folder.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        return shutil.disk_usage(place).free
    except OSError:  # the current folder was deleted, or may not be read
        return None


def cache_folder() -> Path:
    """Where measurements of this machine are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mezzotint"


def _meminfo(name: str) -> int | None:
    for line in _lines(_MEMINFO):
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None


def _lines(path: Path) -> list[str]:
    """Lines of a file of the system; none where there is no such file, or it may not be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
