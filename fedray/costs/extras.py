"""Extras sent beside a model: named tensors and scalars → bytes, and back. A run pays for their length.

Tensors are written as safetensors, scalars as JSON in its metadata. Decoding reads numbers and JSON, never
code.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from torch import Tensor

from fedray.errors import MethodError, WireError
from fedray.types import Extra

_DTYPES = {
    torch.float32: ("F32", "<f4"),
    torch.float16: ("F16", "<f2"),
    torch.int64: ("I64", "<i8"),
    torch.int32: ("I32", "<i4"),
    torch.uint8: ("U8", "u1"),
    torch.bool: ("BOOL", "u1"),
}
_METADATA = "__metadata__"  # where safetensors keeps text; no tensor may have this name


def encode_extras(extras: Mapping[str, Extra]) -> bytes:
    """Write named tensors and scalars as safetensors, the scalars as JSON in its metadata.

    Args:
        extras: name → bool, int, float, str, or tensor of float32, float16, int64, int32, uint8 or bool.

    Returns:
        The same bytes for the same content, in any order; no bytes for no extras.

    Raises:
        MethodError: for any other type.
    """
    if not extras:
        return b""
    tensors: dict[str, npt.NDArray[Any]] = {}
    scalars: dict[str, bool | int | float | str] = {}
    for name, value in extras.items():
        if isinstance(value, Tensor) and value.dtype in _DTYPES and name != _METADATA:
            tensors[name] = value.detach().cpu().contiguous().numpy()
        elif isinstance(value, bool | int | float | str):
            scalars[name] = value
        else:
            given = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise MethodError(
                f"extra {name!r} is {given}; bool, int, float, str and tensors of {dtypes} can be sent, "
                f"except under the name {_METADATA!r}. Change `extras`, `sums` or `each` of the method."
            )
    # one entry of metadata: safetensors writes several in any order
    metadata = {"scalars": json.dumps(scalars, sort_keys=True, separators=(",", ":"))} if scalars else None
    return bytes(save(tensors, metadata))


def decode_extras(data: bytes) -> dict[str, Extra]:
    """Read extras written by `encode_extras`.

    Raises:
        WireError: if the bytes are anything else.
    """
    if not data:
        return {}
    try:
        tensors = {name: _read_tensor(**tensor) for name, tensor in deserialize(data)}  # type: ignore[no-untyped-call]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        scalars = json.loads((header.get(_METADATA) or {}).get("scalars", "{}"))
        if not all(isinstance(value, bool | int | float | str) for value in scalars.values()):
            raise ValueError(f"scalars {scalars}")
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WireError(f"extras: found {error!r}, expected safetensors of our own") from error
    return {**scalars, **tensors}


def extras_size(extras: Mapping[str, Extra]) -> int:
    """Return the length in bytes of `encode_extras(extras)`."""
    return len(encode_extras(extras))


def _read_tensor(dtype: str, shape: list[int], data: bytearray) -> Tensor:
    for ours, (name, numpy_dtype) in _DTYPES.items():
        if name == dtype:
            array = np.frombuffer(data, numpy_dtype).reshape(shape)
            return torch.from_numpy(array != 0 if ours is torch.bool else array)
    raise ValueError(f"tensor of {dtype}")
