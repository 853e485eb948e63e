"""The memory that is free for this process: of a device, or of the machine or the container that it runs in."""

from __future__ import annotations

from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Returns the memory that is free on `device`, in bytes; 0 where nobody can say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return 0
    import psutil

    return min(psutil.virtual_memory().available, _container_bytes())


def _container_bytes() -> int:
    """Returns what the control group of a container leaves; very much where there is no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
        return int(limit) - int(used)
    except (OSError, ValueError):
        return 2**62
