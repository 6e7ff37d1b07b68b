"""Where measured code computes: the GPU where there is one, else the CPU."""

import torch

DEVICE = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def finish() -> None:
    """Wait until the device has done what it was given; without that only the giving would be timed."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
