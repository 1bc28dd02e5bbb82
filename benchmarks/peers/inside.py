"""The process of one framework: `python -m benchmarks.peers.inside MODULE FOLDER`, see `line`.

MODULE is one of this package with a function `serve(line, folder)`, FOLDER holds the federation (`task`).
"""

import importlib
import sys
import traceback

import torch

from benchmarks.peers.line import Ended, Line


def main() -> None:
    """Serve until the measuring process asks for no more rounds."""
    module, *arguments = sys.argv[1:]
    line = Line()
    torch.set_num_threads(1)
    try:
        importlib.import_module(f"benchmarks.peers.{module}").serve(line, *arguments)
    except Ended:
        pass
    except Exception as error:
        traceback.print_exc()
        line.answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
