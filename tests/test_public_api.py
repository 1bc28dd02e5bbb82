"""What `import fedray` gives: the names that are promised, each from where it lives, and nothing heavy."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest

import fedray
from fedray.errors import FedrayError


def test_all_is_sorted_and_true():
    assert fedray.__all__ == sorted(fedray.__all__, key=lambda name: (not name.isupper(), name))
    assert len(set(fedray.__all__)) == len(fedray.__all__)
    for name in fedray.__all__:
        assert getattr(fedray, name) is not None
    assert set(fedray.__all__) == set(fedray._HOMES)


def test_names_are_those_of_where_they_live():
    from fedray.config.run_config import RunConfig
    from fedray.experiment.history import History
    from fedray.experiment.run import resume, run
    from fedray.federation.method import Method

    assert (fedray.RunConfig, fedray.History, fedray.Method) == (RunConfig, History, Method)
    assert (fedray.run, fedray.resume, fedray.FedrayError) == (run, resume, FedrayError)
    assert {"fedavg", "snip"} <= set(fedray.METHODS)
    assert "mlp" in fedray.MODELS
    assert "digits" in fedray.DATASETS
    assert "phone" in fedray.DEVICES
    assert "lte" in fedray.LINKS and "iid" in fedray.PARTITIONS and "uniform" in fedray.SAMPLERS
    assert fedray.report.load_run is fedray.load_run and fedray.report.write_report is fedray.write_report


def test_the_package_of_reports_is_the_same_before_and_after_its_import():
    """A function of this name would be hidden as soon as anything imports the package."""
    code = "import fedray; first = fedray.report; import fedray.report.table; assert first is fedray.report"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_know_every_public_name():
    """The imports under TYPE_CHECKING are those of the table."""
    typed: set[str] = set()
    for node in ast.walk(ast.parse(Path(fedray.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedray"):
            typed |= {f"{node.module}.{name.name}" for name in node.names}
    homes = {name: home for name, home in fedray._HOMES.items() if name != "report"}
    assert typed == {f"{home}.{name}" for name, home in homes.items()} | {"fedray.report"}


def test_dir_lists_the_public_names():
    assert dir(fedray) == sorted([*fedray.__all__, "__version__"])


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="module 'fedray' has no attribute 'Runconfig'"):
        fedray.Runconfig  # noqa: B018


def test_the_version_is_that_of_the_package():
    assert fedray.__version__ == version("fedray")


def test_the_version_is_stated_alike():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    (dated,) = re.findall(rf"^## {re.escape(project)} · (\d{{4}}-\d\d-\d\d)$", changelog(root), flags=re.M)
    assert f"version: {project}\ndate-released: {dated}\n" in citation


def changelog(root: Path) -> str:
    return (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_types_are_shipped():
    assert files("fedray").joinpath("py.typed").is_file()


def test_importing_it_is_quick():
    code = "import sys, fedray; print(*({'torch', 'numpy', 'ray', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
