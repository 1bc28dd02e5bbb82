"""The Ray actor that hosts virtual clients, and the form in which a job reaches it."""

import copyreg
import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, replace
from typing import TYPE_CHECKING
from warnings import catch_warnings, simplefilter

import numpy as np
import torch

from fedray.data.datasets import Examples
from fedray.federation.aggregate import Node, Partial, merge_within
from fedray.federation.client import Outcome
from fedray.federation.exchange import Answer, Chunk, Job, Trained
from fedray.federation.worker import Worker, masks_of
from fedray.types import Extra, Layout, Mask, Params, Task

if TYPE_CHECKING:
    from ray import ObjectRef

# A user's method is pickled by value, dataclass fields and all. Without this their `MISSING` comes back as
# another object, and a field without a default seems to have one.
copyreg.pickle(type(MISSING), lambda _: "MISSING")


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h

PackedTask = tuple[np.ndarray, bytes, dict[str, Extra]]


@dataclass(frozen=True)
class PackedJob:
    """A job on its way through the object store: a flat numpy vector and one bit per weight for each task."""

    job: Job
    tasks: tuple[PackedTask, ...]

    @classmethod
    def pack(cls, job: Job) -> "PackedJob":
        """Take the tensors out of a job."""
        tasks = tuple((t.params.flat.numpy(), t.mask.packed, dict(t.extras)) for t in job.tasks)
        return cls(replace(job, tasks=()), tasks)

    def unpack(self, layout: Layout) -> Job:
        """Rebuild the job; its weights stay in the object store, where all actors read and none writes."""
        tasks = []
        for vector, packed, extras in self.tasks:
            bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=layout.size)
            mask = Mask(torch.from_numpy(bits.astype(np.bool_)), layout)
            with catch_warnings():  # torch says that the vector must not be written
                simplefilter("ignore", UserWarning)
                params = Params(torch.from_numpy(vector), layout)
            tasks.append(Task(params, mask, extras))
        return replace(self.job, tasks=tuple(tasks))


Prepare = Callable[[], None]
"""Called in an actor before anything reaches it. Pickles."""


Partials = Mapping[Node, Partial]


class ClientActor:
    """A Ray actor that hosts virtual clients. It holds nothing that must survive it.

    Args:
        places: a reference to the workplace, in a list: Ray would read it before `prepare` is called.
        device: where clients train, as torch names it.
        prepare: called first, e.g. to import the modules of the workplace.
    """

    def __init__(self, places: "Sequence[ObjectRef]", device: str, prepare: Prepare | None = None) -> None:
        import ray

        if prepare is not None:
            prepare()
        keep_freed_memory()
        torch.set_num_threads(1)
        self.worker = Worker(ray.get(places[0]), device)

    def ready(self) -> int:
        """Answer with the process id, once the actor is placed and set up."""
        return os.getpid()

    def run(self, packed: PackedJob, chunks: Sequence[Chunk]) -> Answer:
        """Train and fold chunks."""
        return self.worker.run(packed.unpack(self.worker.engine.layout), chunks)

    def fold(self, packed: PackedJob, chunks: Sequence[Chunk]) -> tuple[Answer, Partials]:
        """Train and fold chunks; return the partials apart, so that they can stay in the object store."""
        answer = self.run(packed, chunks)
        return replace(answer, partials={}), answer.partials

    def merge(self, packed: PackedJob, *parts: Partials) -> tuple[None, Partials]:
        """Merge what several actors folded, as far as the tree allows."""
        model = self.worker.place.model
        masks = masks_of(model, packed.unpack(model.layout).tasks)
        nodes = {node: partial for part in parts for node, partial in part.items()}
        for partial in nodes.values():
            partial.arrived(model.layout, masks)
        return None, merge_within(nodes)

    def train(self, packed: PackedJob, chunk: Chunk) -> list[Trained]:
        """Train the clients of a chunk without folding them."""
        self.worker.begin()
        return list(self.worker.results(packed.unpack(self.worker.engine.layout), chunk))

    def evaluate(self, packed: PackedJob, examples: Examples, start: int, stop: int) -> list[Outcome]:
        """Classify a range of examples."""
        (task,) = packed.unpack(self.worker.engine.layout).tasks
        return self.worker.evaluate(task, Examples(examples.x[start:stop], examples.y[start:stop]))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next client.

    Otherwise it unmaps every vector, and the next client's pages fault again.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28), (M_MMAP_THRESHOLD, 2**25)):
            mallopt(option, value)
