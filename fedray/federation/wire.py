"""The link between the server and its clients: both ends of it.

    server   send          encode tasks; return the decoded ones, and the bytes to each client
    device   arrive        add the client's own norms to a decoded task
    device   upload        encode an update; return the decoded one, its bytes, and the entries to keep
    server   keep_norms    put back the server's norms if clients keep theirs

`costs/codec.py` turns a model into bytes, and `models/norms.py` knows the entries that never travel. Entries
that a device keeps for the link are part of the client's memory, hidden from methods. A lossless codec does
not run: its payload would decode to the same bits, so its size is enough.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedray.costs.codec import Codec
from fedray.costs.differences import (
    PLAIN,
    DeltaCodec,
    UplinkCodec,
    decode_update,
    encode_update,
    update_size,
)
from fedray.errors import MethodError
from fedray.models.norms import overlaid
from fedray.models.spec import ModelSpec
from fedray.types import ClientUpdate, Extra, Layout, Mask, Params, ServerState, Task

Memory = dict[str, Any]
"""A client's memory between rounds: entries of its method, and of the link."""

OWN_NORMS = "own norms"
"""Entry of a client's memory: the BatchNorm that stays with it."""

RESIDUAL = "uplink residual"
"""Entry of a client's memory: the residual of its codec, float32 in the layout of the wire."""

KEPT = (OWN_NORMS, RESIDUAL)
"""Entries of a client's memory that belong to the link; methods do not see them."""


@dataclass(frozen=True)
class Order:
    """One client's part in an exchange: the number of its task, and the bytes that reached it."""

    client: int
    task: int
    bytes_down: int


class Upload(NamedTuple):
    """An update as the server decodes it, its bytes, and the entries that the device keeps for the link."""

    update: ClientUpdate
    bytes_up: int
    kept: Memory


@dataclass(frozen=True)
class Wire:
    """The link of one run.

    Args:
        model: its structure, which says where norms lie.
        downlink: writes tasks.
        uplink: writes updates.
        seed: of the run; clients start from the norms that it initialises.
        codec: a `DeltaCodec` writes the updates of a round's training; otherwise `uplink` does.
    """

    model: ModelSpec
    downlink: Codec
    uplink: Codec
    seed: int
    codec: UplinkCodec = PLAIN

    # ── the server's end ─────────────────────────────────────────────────────────────────────────────────

    def send(
        self, tasks: Mapping[int, Task], holds: dict[int, bytes]
    ) -> tuple[tuple[Task, ...], dict[int, Order]]:
        """Encode each different task once.

        Args:
            tasks: client → its task.
            holds: client → digest of the mask that it decoded last; updated in place.

        Returns:
            The different tasks as devices decode them, and each client's order.

        Raises:
            MethodError: if a task is not of the model's layout.
        """
        numbers: dict[tuple[object, ...], int] = {}
        sent: list[Task] = []
        orders: dict[int, Order] = {}
        sizes: dict[tuple[int, bool], int] = {}
        for client, task in sorted(tasks.items()):
            extras = tuple((name, _identity(value)) for name, value in sorted(task.extras.items()))
            key = (id(task.params), id(task.mask), extras)
            if key not in numbers:
                _check_layout(task, self.model.layout, client)
                numbers[key] = len(sent)
                sent.append(self._decoded(task))
            number, mask = numbers[key], self.model.norms.sent_mask(task.mask)
            is_known = holds.get(client) == mask.digest
            if (number, is_known) not in sizes:
                known = mask.digest if is_known else None
                sizes[number, is_known] = self.downlink.size(mask, known=known, extras=task.extras)
            orders[client] = Order(client, number, sizes[number, is_known])
            holds[client] = mask.digest
        return tuple(sent), orders

    def _decoded(self, task: Task) -> Task:
        """Return a task as a device decodes it: the same bits under the mask, unless the codec rounds."""
        codec, norms = self.downlink, self.model.norms
        if codec.lossless:
            return replace(task, params=task.params.masked(task.mask))
        payload = codec.encode(norms.sent(task.params), norms.sent_mask(task.mask))
        return replace(task, params=norms.received(codec.decode(payload, norms.sent_layout).params))

    def predicted_bytes(self, mask: Mask, holds: bytes | None) -> tuple[int, int]:
        """Return bytes down and up of a client that trains under a mask and holds the one of this digest."""
        sent = self.model.norms.sent_mask(mask)
        known = sent.digest if holds == sent.digest else None
        down = self.downlink.size(sent, known=known)
        if isinstance(self.codec, DeltaCodec):
            return down, update_size(self.codec, sent, sent.digest)
        return down, self.uplink.size(sent, known=sent.digest)

    def keep_norms(self, before: ServerState, after: ServerState) -> ServerState:
        """Return the state after aggregation, with the server's norms as before if clients keep theirs."""
        norms = self.model.norms
        if not norms.private:
            return after
        kept = overlaid(after.params, norms.entries, before.params.flat[norms.entries])
        return replace(after, params=kept)

    def evaluated(self, params: Params, mask: Mask, memory: Memory | None = None) -> Task:
        """Return a model as it is evaluated: with the norms of a client's memory, if it keeps any."""
        norms, own = self.model.norms, (memory or {}).get(OWN_NORMS)
        if own is None:
            return Task(params, norms.global_mask(mask))
        return Task(overlaid(params, norms.entries, own, mask), mask)

    # ── a device's end ───────────────────────────────────────────────────────────────────────────────────

    def arrive(self, task: Task, kept: Memory) -> Task:
        """Return a decoded task as a client holds it: with its own norms, if clients keep theirs."""
        norms = self.model.norms
        if not norms.private:
            return task
        own = kept.get(OWN_NORMS, self._first_norms)
        return replace(task, params=overlaid(task.params, norms.entries, own, task.mask))

    def upload(
        self,
        task: Task,
        update: ClientUpdate,
        kept: Memory,
        *,
        training: bool = True,
        rng: np.random.Generator | None = None,
    ) -> Upload:
        """Send a well-formed update.

        Args:
            task: as the client held it.
            update: the client's.
            kept: the entries that the device kept for the link so far.
            training: whether the update is that of a round's training. Only such updates follow one another,
                so only they are sent as differences.
            rng: of the client in this round, for codecs that round at random.

        Raises:
            MethodError: if a value in the update cannot travel.
        """
        norms = self.model.norms
        mask, known = norms.sent_mask(update.mask), norms.sent_mask(task.mask)
        extras: dict[str, Extra] = {f"sums.{name}": value for name, value in update.sums.items()}
        extras |= {f"each.{name}": value for name, value in update.each.items()}
        extras |= {f"metrics.{name}": value for name, value in update.metrics.items()}
        keeps = self._kept_norms(update, kept)
        keeps |= {key: kept[key] for key in (RESIDUAL,) if key in kept}
        if training and isinstance(self.codec, DeltaCodec) and mask.count:
            return self._upload_difference(self.codec, task, update, keeps, extras, rng)
        shared = norms.shared_mask(update.mask)
        vouched = update if shared is update.mask else replace(update, mask=shared)
        codec = self.uplink
        if codec.lossless:
            return Upload(vouched, codec.size(mask, known=known.digest, extras=extras), keeps)
        payload = codec.encode(norms.sent(update.params), mask, known=known.digest, extras=extras)
        decoded = codec.decode(payload, norms.sent_layout, known={known.digest: known})
        return Upload(replace(vouched, params=norms.received(decoded.params)), len(payload), keeps)

    def _upload_difference(
        self,
        codec: DeltaCodec,
        task: Task,
        update: ClientUpdate,
        keeps: Memory,
        extras: Mapping[str, Extra],
        rng: np.random.Generator | None,
    ) -> Upload:
        """Send the difference to the task plus the residual; keep the new residual."""
        norms = self.model.norms
        mask, known = norms.sent_mask(update.mask), norms.sent_mask(task.mask)
        before, after = norms.sent(task.params).masked(known), norms.sent(update.params)
        residual = keeps.get(RESIDUAL)
        moved = after.flat - before.flat
        due = Params(moved if residual is None else moved + residual, after.layout).masked(mask)
        payload = encode_update(codec, due, mask, known.digest, extras, rng)
        arrived, _ = decode_update(codec, payload, norms.sent_layout, known)
        received = norms.received(Params(before.flat + arrived.flat, after.layout).masked(mask))
        if codec.feedback:
            left = due.flat - arrived.flat
            left = left if residual is None else torch.where(mask.flat, left, residual)
            keeps = keeps | {RESIDUAL: Params(left, after.layout).masked(known).flat}
        vouched = replace(update, params=received, mask=norms.shared_mask(update.mask))
        return Upload(vouched, len(payload), keeps)

    def _kept_norms(self, update: ClientUpdate, kept: Memory) -> Memory:
        """Return the norms that the client trained and vouches for; it keeps none that were never trained."""
        norms = self.model.norms
        if not norms.private:
            return {}
        before = kept.get(OWN_NORMS, self._first_norms)
        after = update.params.flat[norms.entries]
        after = torch.where(update.mask.flat[norms.entries] & after.isfinite(), after, before)
        return {OWN_NORMS: after} if OWN_NORMS in kept or not torch.equal(after, before) else {}

    @cached_property
    def _first_norms(self) -> Tensor:
        """The norms that every client starts with, without being sent them."""
        return self.model.init(self.seed).flat[self.model.norms.entries]


def split_memory(memory: Memory) -> tuple[Memory, Memory]:
    """Return the entries of a client's memory that are the method's, and those that are the link's."""
    kept = {key: memory[key] for key in KEPT if key in memory}
    return {key: value for key, value in memory.items() if key not in kept}, kept


def reject_unknown(clients: Iterable[int], population: int) -> None:
    """Raise MethodError if a task is for a client that does not exist."""
    unknown = [k for k in clients if not 0 <= k < population]
    if unknown:
        raise MethodError(f"asked clients {unknown[:5]}, but there are 0 … {population - 1}")


def malformed(update: object, size: int) -> str | None:
    """Return the problem with the form of an update, or None."""
    if not isinstance(update, ClientUpdate):
        return f"client_update returned {type(update).__name__}, not ClientUpdate"
    for name, kind in (("params", Params), ("mask", Mask)):
        part = getattr(update, name)
        if not isinstance(part, kind):
            return f"its {name} is {type(part).__name__}, not {kind.__name__}"
        if part.flat.shape != (size,):
            return f"its {name} has the shape {tuple(part.flat.shape)}, the model ({size},)"
        if part.flat.dtype != kind.dtype or part.flat.device.type != "cpu":
            return f"its {name} is {part.flat.dtype} on {part.flat.device}, not {kind.dtype} on the CPU"
    for name in ("sums", "each", "metrics"):
        part = getattr(update, name)
        if not isinstance(part, Mapping):
            return f"its {name} is {type(part).__name__}, not a mapping from names"
    return None


def check_types(update: ClientUpdate) -> None:
    """Refuse values that cannot be summed or averaged.

    Raises:
        MethodError: if `sums` or `each` hold anything but tensors, or `metrics` anything but numbers.
    """
    tensors: tuple[tuple[str, Mapping[str, object]], ...] = (("sums", update.sums), ("each", update.each))
    for part, sent in tensors:
        for name, value in sent.items():
            if not isinstance(value, Tensor):
                raise MethodError(
                    f"'{part}.{name}' is {type(value).__name__}, not a tensor; wrap a number in torch.tensor"
                )
    for name, number in update.metrics.items():
        given: object = number
        if not (isinstance(given, bool | int | float) or (isinstance(given, Tensor) and given.numel() == 1)):
            raise MethodError(
                f"'metrics.{name}' is {type(number).__name__}, not a number; values that are not averaged go "
                "into `each`"
            )


def _check_layout(task: Task, layout: Layout, client: int) -> None:
    """Refuse a task that is not of the model.

    Raises:
        MethodError: with the client, and which part is of another layout.
    """
    for part, given in (("params", task.params.layout), ("a mask", task.mask.layout)):
        if given != layout:
            raise MethodError(
                f"the task for client {client} has {part} of another layout than the model's: {given.size:,} "
                f"entries, the model has {layout.size:,}; tasks are made "
                "from the state's own params and mask"
            )


def _identity(value: Extra) -> object:
    """Return what distinguishes an extra: True, 1 and 1.0 are three, as are 0.0 and −0.0."""
    if isinstance(value, float):
        return type(value), value.hex()
    return (type(value), value) if isinstance(value, bool | int | str) else id(value)
