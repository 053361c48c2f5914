"""What a server of processes does once for all that it forks: it imports what is imported on first use."""

import torch

import mezzotint
import together  # noqa: F401
from mezzotint.jobs import quantize as budgeted  # noqa: F401
from runs import TEXT, TINY_LLAMA

torch.set_num_threads(1)
for _format in ("mezzotint", "compressed-tensors"):
    mezzotint.plan(TINY_LLAMA, "default", format=_format, calibration=TEXT)
