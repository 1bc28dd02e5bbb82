"""A worker process has what the driver imported: the same text, whatever became of the file since."""

import pickle
import subprocess
import sys

import pytest

from fedray.config.plugins import import_modules, sources

TEXT = """
from fedray.models import MODELS
from fedray.models.spec import Architecture

class Mine:
    pass

def build(shape, classes):
    raise NotImplementedError

MODELS["{name}"] = Architecture(build, lambda shape: None, "", "as the driver read it")
"""

WORKER = """
import pickle, sys
from fedray.config.plugins import import_modules, take_over
from fedray.models import MODELS

path, name = sys.argv[1:]
given = pickle.load(sys.stdin.buffer)
take_over(given["sources"])
take_over(given["sources"])
assert MODELS[name].summary == "as the driver read it"
import_modules([path])  # what a config names is there already
made = pickle.loads(given["made"])
assert type(made).__name__ == "Mine" and sys.modules[type(made).__module__].__file__ == path
"""


@pytest.mark.parametrize("fate", ["kept", "edited", "gone"])
def test_a_worker_runs_the_text_that_the_driver_read(tmp_path, fate):
    path = tmp_path / "own_model.py"
    path.write_text(TEXT.format(name=fate))
    import_modules([path])
    (mine,) = (source for source in sources() if source.path == path)
    if fate == "gone":
        path.unlink()
    elif fate == "edited":
        path.write_text("raise RuntimeError('half of an edit')")
    module = next(m for m in sys.modules.values() if getattr(m, "__file__", None) == str(path))
    given = {"sources": [mine], "made": pickle.dumps(module.Mine())}  # by name: nothing else is needed
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(path), fate], input=pickle.dumps(given), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


BESIDE = """
from beside_a import build
from fedray.models import MODELS
from fedray.models.spec import Architecture

class Mine:
    pass

MODELS["beside"] = Architecture(build, lambda shape: None, "", "as the driver read it")
"""


def test_what_lies_beside_the_file_comes_along(tmp_path):
    """Two modules, one a package, neither of which the worker could find by itself."""
    path = tmp_path / "own_beside.py"
    path.write_text(BESIDE)
    (tmp_path / "beside_a.py").write_text("from beside_b.inner import build\n")
    (tmp_path / "beside_b").mkdir()
    (tmp_path / "beside_b" / "__init__.py").write_text("NAME = 'b'\n")
    inner = tmp_path / "beside_b" / "inner.py"
    inner.write_text("from . import NAME\ndef build(shape, classes): return NAME\n")
    import_modules([path])
    sent = [source for source in sources() if source.path.is_relative_to(tmp_path)]
    assert {source.path for source in sent} == {
        path,
        tmp_path / "beside_a.py",
        inner,
        inner.parent / "__init__.py",
    }
    for file in (path, tmp_path / "beside_a.py", inner):
        file.unlink()
    module = next(m for m in sys.modules.values() if getattr(m, "__file__", None) == str(path))
    given = {"sources": sent, "made": pickle.dumps(module.Mine())}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(path), "beside"], input=pickle.dumps(given), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
