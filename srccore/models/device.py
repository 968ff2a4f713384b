"""The device that a stage runs on: checked, and described once in the log."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import sys
import warnings
from pathlib import Path

from srccore.errors import UserError

__all__ = ["describe", "minimum_driver", "open_device"]

DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""Where the NVIDIA kernel driver gives its version, also to containers."""
MINIMUM_DRIVERS = {11: "450", 12: "525", 13: "580"}
"""The first driver branch that runs every CUDA of a major version, on Linux (NVIDIA's table of
minor version compatibility in the CUDA release notes)."""


@functools.cache
def open_device(name: str) -> str:
    """Chooses the device of this process, and says on stderr what it is.

    The line appears once, whatever the number of stages that a process runs, and in the first
    process of a pod only; workers of a stage leave it to the process that started them.

    Args:
        name: ``cpu``, ``cuda`` or ``auto``: ``cuda`` if torch sees a GPU.

    Returns:
        ``cpu`` or ``cuda``.

    Raises:
        UserError: It is ``cuda``, and torch sees no GPU.
    """
    missing = "" if name == "cpu" else _why_no_gpu()
    if name == "cuda" and missing:
        raise UserError(
            f"No GPU for device: cuda: {missing}.",
            f"{_needed()} Check nvidia-smi and CUDA_VISIBLE_DEVICES; in a pod, also the limit "
            "nvidia.com/gpu, NVIDIA's device plugin on the node, and that LD_LIBRARY_PATH has the "
            "folder of libcuda.so.1. To run without a GPU, use device: cpu.",
        )
    device = "cpu" if name == "cpu" or missing else "cuda"
    is_worker = multiprocessing.parent_process() is not None
    if os.environ.get("LOCAL_RANK", "0") == "0" and not is_worker:
        reason = f" No GPU: {missing}." if missing else ""
        print(f"{describe(device)}{reason}", file=sys.stderr, flush=True)
    return device


def describe(device: str) -> str:
    """Describes a device and the torch that uses it, in one sentence.

    Args:
        device: ``cpu`` or ``cuda``: the current GPU.

    Returns:
        The name and memory of a GPU and its driver, or the threads of the CPU; then torch's
        version and the CUDA that it was built for.
    """
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    used = f"torch {torch.__version__.partition('+')[0]} ({built})"
    if device == "cpu":
        threads = torch.get_num_threads()
        return f"Device: CPU, {threads} thread{'' if threads == 1 else 's'}, {used}."
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = f"{found.total_memory / 2**30:.1f} GiB"
    return f"Device: {found.name}, {memory}, driver {_driver() or 'unknown'}, {used}."


def minimum_driver(cuda: str) -> str:
    """Returns the oldest NVIDIA driver that runs a build of torch.

    Args:
        cuda: The CUDA that torch was built for: ``13.0``.

    Returns:
        The branch of the driver, ``580``; empty if it is not known.
    """
    return MINIMUM_DRIVERS.get(int(cuda.partition(".")[0]), "")


def _why_no_gpu() -> str:
    """Says why torch sees no GPU; empty if it sees one."""
    import torch

    with warnings.catch_warnings():
        # torch warns about an old driver; what is raised or printed here says it, too.
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return ""
    driver = _driver()
    if not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA"
    if not driver:
        return "no NVIDIA driver is loaded on this machine"
    oldest = minimum_driver(torch.version.cuda)
    if oldest and int(driver.partition(".")[0]) < int(oldest):
        return f"the NVIDIA driver {driver} is too old for torch's CUDA {torch.version.cuda}"
    return f"torch sees none, although the NVIDIA driver {driver} is loaded"


def _needed() -> str:
    import torch

    cuda = torch.version.cuda
    if not cuda:
        return "Install torch for CUDA."
    oldest = minimum_driver(cuda)
    wanted = f"NVIDIA driver {oldest} or later" if oldest else f"an NVIDIA driver for CUDA {cuda}"
    return f"torch {torch.__version__.partition('+')[0]} (CUDA {cuda}) needs {wanted}."


def _driver() -> str:
    """The version of the loaded NVIDIA driver: ``580.95.05``; empty if there is none."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", text)
    return found[1] if found else ""
