"""Whether a device still works for this process. Owns the question alone: what follows from the answer is its askers'.

After some errors (an illegal address, a failed assertion in a kernel, a fault of the hardware) CUDA refuses all further
work of the process ("sticky" errors, CUDA Runtime API, section "Error Handling").
"""

from __future__ import annotations

import torch

from .errors import DeviceLost


def require_working(device: torch.device | str) -> None:
    """To be asked when work has failed. Waits for the work that was given to the device before.

    Raises:
        DeviceLost: it takes no more work. Never for a CPU, nor where only memory is short.
    """
    if torch.device(device).type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except torch.OutOfMemoryError:
        return
    except RuntimeError as error:
        raise DeviceLost(f"{device} takes no more work from this process: {_first_line(error)}") from error


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]
