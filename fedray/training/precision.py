"""The precision of a client's forward and backward pass: float32, or bfloat16 with float32 weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Instructions for products in bfloat16, as torch names them: x86 of two kinds, Arm."""


def refusal(precision: Precision, device: torch.device) -> str | None:
    """Return why a device does not train in a precision, or None.

    Without the instructions torch computes bfloat16 by float32, which is slower than float32 itself.
    """
    if precision == "fp32":
        return None
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return None
        return f"bf16, but {torch.cuda.get_device_name(device)} has no bfloat16; use fp32"
    found = torch.cpu.get_capabilities()
    if any(found.get(name) for name in INSTRUCTIONS):
        return None
    processor = found.get("cpu_name") or found.get("architecture") or "this processor"
    return (
        f"bf16, but {processor} has no instructions for it ({', '.join(INSTRUCTIONS[:2])}), and would train "
        "more slowly than in fp32; use fp32, or another machine"
    )


def computing(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products and convolutions take the precision; weights stay float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
