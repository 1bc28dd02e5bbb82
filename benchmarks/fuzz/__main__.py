"""Read damaged and hostile inputs: only declared errors, in bounded time and memory.

    python -m benchmarks.fuzz --inputs 1000000 --seed 0 --out fuzz.jsonl      again: continues
    python -m benchmarks.fuzz --only configs --inputs 5000
    python -m benchmarks.fuzz --again configs 1234                             one input, with its traceback

Exit status 1 if there is a fault.
"""

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path
from random import Random

from benchmarks.fuzz.pieces import outcomes
from benchmarks.fuzz.target import workplace
from benchmarks.fuzz.targets import TARGETS


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000, help="in all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=2_000, help="inputs of a piece with a share of 10 %%")
    parser.add_argument("--out", type=Path, help="file with the finished pieces; a second start goes on")
    parser.add_argument("--only", choices=TARGETS, help="one target")
    parser.add_argument("--again", nargs=2, metavar=("TARGET", "NUMBER"), help="repeat one input")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if given.again:
        return again(given.again[0], int(given.again[1]), given.seed)
    import fedray.config.run_config  # the children are forks: they need not import it

    del fedray
    return report(given.inputs, given.seed, given.each, given.out, given.only)


def again(target: str, number: int, seed: int) -> int:
    """Repeat one input; an undeclared error is not caught."""
    with workplace() as folder:
        try:
            TARGETS[target].make(folder)(Random(f"{seed} {target} {number}"))
        except TARGETS[target].declared as error:
            print(f"{type(error).__name__}: {error}")
    return 0


def report(inputs: int, seed: int, each: int, out: Path | None, only: str | None) -> int:
    """Read all inputs and print a line for each target; return the exit status."""
    made, read, faults, seconds = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    slowest: dict[str, float] = {}
    for outcome in outcomes(inputs, seed, each, out, only):
        name = outcome.piece.target
        made[name] += outcome.piece.count
        read[name] += outcome.read
        seconds[name] += outcome.seconds  # type: ignore[assignment]
        slowest[name] = max(slowest.get(name, 0.0), outcome.slowest_s)
        for number, text in outcome.faults:
            faults[name] += 1
            print(f"fault: {name} {number}: {text}", flush=True)
    print(f"{'target':24} {'inputs':>9} {'read':>8} {'faults':>6} {'slowest s':>9} {'s':>6}")
    for name in made:
        counts = f"{made[name]:9,} {read[name]:8,} {faults[name]:6}"
        print(f"{name:24} {counts} {slowest[name]:9.3f} {seconds[name]:6.0f}")
    print(f"{sum(made.values()):,} inputs of seed {seed}, {sum(faults.values())} faults")
    return 1 if sum(faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
