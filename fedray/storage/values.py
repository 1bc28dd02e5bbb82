"""Values as JSON and raw bytes, without pickle: the format of the memories of methods and clients.

    None, bool, int, float, str     JSON's own; NaN and infinity by their bits
    dict with str keys              a JSON mapping
    everything else                 a list whose first entry is the kind: ["tensor", …], ["tuple", …]

An object that occurs several times is written once (["same", n]), and is one object again after reading.
Equal contents of different tensors share their bytes in the file. A dataclass, a named tuple or an enum is
written by the name of its class, and read into the class of that name: no constructor is called.
"""

import base64
import dataclasses
import io
import math
import struct
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from hashlib import sha256
from importlib import import_module
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedray.config.plugins import modules_called
from fedray.errors import FedrayError
from fedray.types import Layout, Mask, Params

PLUGIN = "fedray_import_"
"""Prefix of the module names of `imports:` files; the part after the file's stem depends on its folder."""

INLINE = 256
"""Byte strings up to this length are stored in the JSON."""

KINDS = (
    "None, bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, range, deque, Path, "
    "tensors and arrays on the CPU, Params, Mask, enums, named tuples, and dataclasses of these"
)


class Unwritable(FedrayError):
    """A value that cannot be written; the message begins with its position."""


class Unreadable(FedrayError):
    """Stored values whose class no longer exists, or has changed."""


Read = Callable[[int], bytearray]
"""Number of a buffer → its checked bytes, in fresh memory."""


class Writer:
    """Turns values into JSON, and collects the bytes of the buffers.

    Attributes:
        buffers: the different contents, in the order of their numbers.
        digests: SHA-256 (hex) of each.
    """

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []
        self.digests: list[str] = []
        self._numbers: dict[str, int] = {}
        self._done: dict[int, int] = {}
        self._open: set[int] = set()
        self._kept: list[Any] = []  # an id is an object's only while the object lives
        self._layouts: dict[Layout, Layout] = {}

    def encode(self, value: Any, at: str) -> Any:
        """Return a value as JSON; `at` is its position, for messages.

        Raises:
            Unwritable: if it is of another kind than KINDS, or holds itself.
        """
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind in _NUMBERS:
            return _NUMBERS[kind](value)
        if id(value) in self._done:
            return ["same", self._done[id(value)]]
        if id(value) in self._open:
            raise Unwritable(f"{at} holds itself")
        self._open.add(id(value))
        node = self._compound(value, at)
        self._open.discard(id(value))
        self._done[id(value)] = len(self._kept)
        self._kept.append(value)
        return node

    def buffer(self, data: memoryview) -> int:
        """Return the number of the buffer that holds some bytes."""
        digest = sha256(data).hexdigest()
        if digest not in self._numbers:
            self._numbers[digest] = len(self.buffers)
            self.buffers.append(data)
            self.digests.append(digest)
        return self._numbers[digest]

    def _compound(self, value: Any, at: str) -> Any:
        kind = type(value)
        if kind in _WRITERS:
            return _WRITERS[kind](self, value, at)
        if isinstance(value, np.generic):
            return ["scalar", self._array(np.asarray(value), at)]
        if isinstance(value, Enum):
            return ["enum", _name_of(kind, at), value.name]
        if isinstance(value, PurePath):
            return ["path", str(value)]
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return ["named", _name_of(kind, at), self._items(value, at)]
        if dataclasses.is_dataclass(value):
            return self._dataclass(value, at)
        raise Unwritable(f"{at} is {_described(kind)}; kept can be {KINDS}")

    def _items(self, values: Any, at: str) -> list[Any]:
        return [self.encode(value, f"{at}[{index}]") for index, value in enumerate(values)]

    def _dataclass(self, value: Any, at: str) -> Any:
        names = [field.name for field in dataclasses.fields(value)]
        name, unset = _name_of(type(value), at), [n for n in names if not hasattr(value, n)]
        if unset:
            raise Unwritable(f"{at}.{unset[0]} was never set")
        return ["object", name, {n: self.encode(getattr(value, n), f"{at}.{n}") for n in names}]

    def _flat(self, value: Params | Mask, at: str) -> Any:
        layout = self._layouts.setdefault(value.layout, value.layout)  # equal ones are written once
        return [
            type(value).__name__.lower(),
            self.encode(layout, f"{at}.layout"),
            self.encode(value.flat, f"{at}.flat"),
        ]

    def _dict(self, value: Mapping[Any, Any], at: str) -> Any:
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: self.encode(entry, f"{at}[{key!r}]") for key, entry in value.items()}
        kind = "dict" if type(value) is dict else "ordered"
        pairs = [
            [self.encode(key, f"a key of {at}"), self.encode(entry, f"{at}[{key!r:.60}]")]
            for key, entry in value.items()
        ]
        return [kind, pairs]

    def _bytes(self, value: bytes | bytearray, at: str) -> Any:
        kind = type(value).__name__
        if len(value) <= INLINE:
            return [kind, base64.b64encode(value).decode()]
        return [kind, self.buffer(memoryview(bytes(value)))]

    def _array(self, value: np.ndarray, at: str) -> int:
        """Write an array as NumPy writes a file, which keeps its type, shape and order."""
        file = io.BytesIO()
        try:
            np.lib.format.write_array(file, value, allow_pickle=False)
        except ValueError:
            raise Unwritable(f"{at} is an array of Python objects; kept can be numbers and text") from None
        return self.buffer(file.getbuffer())

    def _tensor(self, value: Tensor, at: str) -> Any:
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            where = value.layout if value.device.type == "cpu" else value.device
            raise Unwritable(f"{at} is a tensor of {where}; keep it dense and on the CPU")
        plain = value.detach().resolve_conj().resolve_neg()
        order = sorted(range(plain.dim()), key=lambda i: -plain.stride()[i])  # e.g. channels last
        flat = plain.permute(order).reshape(-1)
        if flat.stride(0) != 1:  # at most one entry, which is contiguous with any stride
            flat = torch.empty(len(flat), dtype=flat.dtype).copy_(flat)
        raw = flat.view(torch.uint8).numpy()
        dtype = str(value.dtype).removeprefix("torch.")
        number = self.buffer(raw.data)
        node = ["tensor", dtype, list(plain.shape), number]
        if order != sorted(order) or value.requires_grad:
            node += [order, value.requires_grad]
        return node


class Checker(Writer):
    """A writer that only checks whether values can be written; it does not read contents."""

    def buffer(self, data: memoryview) -> int:
        """Return any number."""
        return 0


class Reader:
    """Restores the values that a Writer wrote.

    Args:
        read: number of a buffer → its bytes, checked.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._done: list[Any] = []

    def decode(self, node: Any) -> Any:
        """Return the value of a node.

        Raises:
            Unreadable: if a class is missing, or has other fields.
        """
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, list) and node[0] in _INLINE_READERS:
            return _INLINE_READERS[node[0]](node[1])
        if isinstance(node, list) and node[0] == "same":
            return self._done[node[1]]
        value = self._compound(node)
        self._done.append(value)
        return value

    def _compound(self, node: Any) -> Any:
        if isinstance(node, dict):
            return {key: self.decode(entry) for key, entry in node.items()}
        return _READERS[node[0]](self, *node[1:])

    def _items(self, nodes: list[Any]) -> Iterator[Any]:
        return (self.decode(node) for node in nodes)

    def _pairs(self, pairs: list[Any]) -> Iterator[tuple[Any, Any]]:
        return ((self.decode(key), self.decode(entry)) for key, entry in pairs)

    def _bytes(self, content: str | int) -> bytes | bytearray:
        return base64.b64decode(content) if isinstance(content, str) else self._read(content)

    def _array(self, number: int) -> np.ndarray:
        array: np.ndarray = np.lib.format.read_array(io.BytesIO(self._read(number)), allow_pickle=False)
        return array

    def _tensor(
        self, dtype: str, shape: list[int], number: int, order: list[int] | None = None, grad: bool = False
    ) -> Tensor:
        order = list(range(len(shape))) if order is None else order
        raw = self._read(number)
        flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)
        tensor = flat.view(getattr(torch, dtype)).view([shape[i] for i in order])
        tensor = tensor.permute([order.index(i) for i in range(len(order))])
        return tensor.requires_grad_() if grad else tensor

    def _flat(self, layout: Any, flat: Any) -> dict[str, Any]:
        decoded = self.decode(layout)  # in the order in which they were written
        return {"layout": decoded, "flat": self.decode(flat)}

    def _object(self, name: str, entries: dict[str, Any]) -> Any:
        kind = _class(name)
        fields = (
            [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else None
        )
        if fields != list(entries):
            had, has = ", ".join(entries), ", ".join(fields or ()) or "none"
            raise Unreadable(f"the class {name} has the fields {has}; written were {had}")
        value: Any = object.__new__(kind)
        for key, entry in entries.items():
            object.__setattr__(value, key, self.decode(entry))
        return value

    def _enum(self, name: str, member: str) -> Any:
        kind = _class(name)
        if not issubclass(kind, Enum) or member not in kind.__members__:
            raise Unreadable(f"the class {name} has no member {member}")
        return kind[member]

    def _named(self, name: str, nodes: list[Any]) -> Any:
        kind = _class(name)
        if not issubclass(kind, tuple) or len(getattr(kind, "_fields", ())) != len(nodes):
            raise Unreadable(f"the class {name} is not a named tuple of {len(nodes)}")
        return tuple.__new__(kind, tuple(self._items(nodes)))


def _described(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _name_of(kind: type, at: str) -> str:
    """Return module:class.

    Raises:
        Unwritable: if the class would not be found by that name.
    """
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found = _class(name)
    except Unreadable:
        found = None
    if found is not kind:
        raise Unwritable(
            f"{at} is of the class {_described(kind)}, which is not found by that name; "
            "define it at the top of its file"
        )
    return name


def _class(name: str) -> type:
    """Return the class of a name.

    Raises:
        Unreadable: if it is missing.
    """
    place, _, qualname = name.partition(":")
    try:
        found: Any = _module(place)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise Unreadable(f"the class {qualname} of the module {place} is not there ({error})") from None
    if not isinstance(found, type):
        raise Unreadable(f"{qualname} of the module {place} is not a class")
    return found


def _module(name: str) -> ModuleType:
    """Return the module of a name; a file that was imported by another path, or by its name, is the same."""
    is_plugin = name.startswith(PLUGIN)
    if name in sys.modules:
        return sys.modules[name]
    stem = name.removeprefix(PLUGIN).rpartition("_")[0] if is_plugin else name.rpartition(".")[2]
    moved = modules_called(stem)
    if len(moved) == 1 and "." not in name:
        return moved[0]
    if is_plugin:
        raise ImportError(f"no `imports:` file {stem}.py")
    try:
        return import_module(name)
    except ImportError:
        if len(moved) != 1:
            raise
        return moved[0]


def _float(value: float) -> Any:
    return value if math.isfinite(value) else ["float", struct.pack("<d", value).hex()]


def _int(value: int) -> Any:
    return value if abs(value) < 2**63 else ["int", hex(value)]  # JSON's readers differ beyond


def _complex(value: complex) -> Any:
    return ["complex", struct.pack("<dd", value.real, value.imag).hex()]


_NUMBERS: dict[type, Callable[[Any], Any]] = {int: _int, float: _float, complex: _complex}

_WRITERS: dict[type, Callable[[Writer, Any, str], Any]] = {
    dict: Writer._dict,
    OrderedDict: Writer._dict,
    tuple: lambda w, value, at: ["tuple", w._items(value, at)],
    list: lambda w, value, at: ["list", w._items(value, at)],
    set: lambda w, value, at: ["set", w._items(value, at)],
    frozenset: lambda w, value, at: ["frozenset", w._items(value, at)],
    deque: lambda w, value, at: ["deque", w._items(value, at), value.maxlen],
    range: lambda w, value, at: ["range", [_int(n) for n in (value.start, value.stop, value.step)]],
    bytes: Writer._bytes,
    bytearray: Writer._bytes,
    np.ndarray: lambda w, value, at: ["array", w._array(value, at)],
    Tensor: Writer._tensor,
    Params: Writer._flat,
    Mask: Writer._flat,
}

_INLINE_READERS: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "float": lambda text: struct.unpack("<d", bytes.fromhex(text))[0],
    "complex": lambda text: complex(*struct.unpack("<dd", bytes.fromhex(text))),
}

_READERS: dict[str, Callable[..., Any]] = {
    "dict": lambda r, pairs: dict(r._pairs(pairs)),
    "ordered": lambda r, pairs: OrderedDict(r._pairs(pairs)),
    "tuple": lambda r, nodes: tuple(r._items(nodes)),
    "list": lambda r, nodes: list(r._items(nodes)),
    "set": lambda r, nodes: set(r._items(nodes)),
    "frozenset": lambda r, nodes: frozenset(r._items(nodes)),
    "deque": lambda r, nodes, length: deque(r._items(nodes), length),
    "range": lambda r, nodes: range(*r._items(nodes)),
    "bytes": lambda r, content: bytes(r._bytes(content)),
    "bytearray": lambda r, content: bytearray(r._bytes(content)),
    "array": lambda r, number: r._array(number),
    "scalar": lambda r, number: r._array(number)[()],
    "tensor": Reader._tensor,
    "params": lambda r, layout, flat: Params(**r._flat(layout, flat)),
    "mask": lambda r, layout, flat: Mask(**r._flat(layout, flat)),
    "path": lambda r, text: Path(text),
    "enum": Reader._enum,
    "named": Reader._named,
    "object": Reader._object,
}
