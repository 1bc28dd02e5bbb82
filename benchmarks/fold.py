"""What the server's arithmetic costs: folding updates, and the threshold of a global pruning.

    python -m benchmarks.fold

Milliseconds, one thread, for an update of the two-convolution CNN: under one common mask, with masks of the
clients' own, by the literal rule of FedSA (`w ≠ 0`), beside the plain fold; then those of an exact global
mask, beside a stable sort.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fedray.federation.actor import keep_freed_memory
from fedray.federation.aggregate import Fold, Partial
from fedray.pruning.masks import top_k
from fedray.types import ClientUpdate, Layout, Mask, Params

UPDATES = 6
"""Different updates, more than stay in a cache."""


def folds(size: int) -> dict[str, Callable[[], None]]:
    """Return name → a function that folds UPDATES updates of a model of `size` weights."""
    layout = Layout(("w",), ((size,),), (True,), (True,))
    full, common = Mask.full(layout), Mask(torch.rand(size) < 0.5, layout)
    params = [Params(torch.randn(size), layout) for _ in range(UPDATES)]
    own = [torch.rand(size) < 0.5 for _ in range(UPDATES)]
    masks = {mask.digest: mask for mask in (full, common)}
    rules = {name: Partial(layout, Fold(by="mask"), masks) for name in ("plain", "common", "own")}
    rules["literal"] = Partial(layout, Fold(by="nonzero"), masks)

    def fold(name: str, mask_of: Callable[[int], Mask]) -> Callable[[], None]:
        def some() -> None:
            for index, update in enumerate(params):
                rules[name].add(index, 60, ClientUpdate(update, mask_of(index)))

        return some

    return {
        "plain": fold("plain", lambda _: full),
        "one common mask": fold("common", lambda _: common),
        "clients' own masks": fold("own", lambda index: Mask(own[index], layout)),
        "literal, w ≠ 0": fold("literal", lambda _: full),
    }


def thresholds(size: int, density: float = 0.1) -> dict[str, Callable[[], None]]:
    """Return name → a function that finds which of `size` scores a global pruning keeps."""
    layout = Layout(("w",), ((size,),), (True,), (True,))
    scores = torch.randn(size).abs_()
    return {
        "top_k": lambda: _drop(top_k(scores, density, layout)),
        "torch.sort": lambda: _drop(scores.sort(descending=True, stable=True)),
    }


def _drop(result: object) -> None:
    """Compute, and drop the result."""


def measure(name: str, functions: dict[str, Callable[[], None]], times: int, each: int) -> None:
    """Print medians in ms, alternating, and ratios to the first."""
    seconds: dict[str, list[float]] = {label: [] for label in functions}
    for number in range(times + 1):
        for label, function in functions.items():
            start = time.perf_counter()
            function()
            if number:  # the first one fills the memory
                seconds[label].append((time.perf_counter() - start) / each)
    medians = {label: statistics.median(some) for label, some in seconds.items()}
    first = next(iter(medians.values()))
    print(f"\n{name}; alternating, medians of {times}\n{'':24}{'ms':>9}{'min … max':>18}{'×':>7}")
    for label, median in medians.items():
        spread = f"{min(seconds[label]) * 1e3:.2f} … {max(seconds[label]) * 1e3:.2f}"
        print(f"{label:24}{median * 1e3:9.2f}{spread:>18}{median / first:7.2f}")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1_663_370, help="weights of the model whose updates fold")
    parser.add_argument("--scores", type=int, default=11_000_000, help="weights of the model that is pruned")
    parser.add_argument("--times", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    measure(f"an update of {arguments.size:,} weights", folds(arguments.size), arguments.times, UPDATES)
    measure(f"the mask of {arguments.scores:,} scores", thresholds(arguments.scores), arguments.times, 1)


if __name__ == "__main__":
    main()
