"""The code blocks of README and docs run; those of RUN_ELSEWHERE have their own tests."""

from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

import fedray
from fedray.config import yaml_text
from fedray.config.schema import file_schema
from tests.test_docs import PAGES, ROOT, blocks

RUN_ELSEWHERE = {"docs/bring_your_own.md", "docs/adding_a_method.md"}
SMALL = {"rounds": 1, "clients.actors": 0, "tracking.uri": "none", "model": "mlp"}
YAML = [(page, line, text) for page in PAGES for line, text in blocks(page, "yaml")]
PYTHON = [(page, line, text) for page in PAGES for line, text in blocks(page, "python")]


def names(found: list[tuple[Path, int, str]]) -> list[str]:
    return [f"{page.relative_to(ROOT)}:{line}" for page, line, _ in found]


@pytest.mark.parametrize(("page", "line", "text"), YAML, ids=names(YAML))
def test_a_block_of_yaml_is_a_config(page: Path, line: int, text: str):
    tree = yaml_text.parse(text, f"{page}, line {line}")
    assert [e.message for e in jsonschema.Draft202012Validator(file_schema()).iter_errors(tree)] == []


@pytest.mark.parametrize(("page", "line", "text"), PYTHON, ids=names(PYTHON))
def test_a_block_of_python_runs(page: Path, line: int, text: str, in_tmp, monkeypatch: pytest.MonkeyPatch):
    """As it is shown, on a smaller config."""
    if str(page.relative_to(ROOT)) in RUN_ELSEWHERE:
        return
    load = fedray.RunConfig.load

    def smaller(path: str, overrides: Any = ()) -> fedray.RunConfig:
        return load(ROOT / path, overrides).override(SMALL)

    monkeypatch.setattr(fedray.RunConfig, "load", smaller)
    found: dict[str, Any] = {}
    exec(compile(text, f"{page}:{line}", "exec"), found)
    assert found["history"].result["status"] == "finished"
    assert sum(weights.numel() for weights in found["model"].parameters()) > 1000


def test_there_are_blocks():
    assert {page.name for page, _, _ in YAML} >= {"README.md", "samplers.md"}
    assert {page.name for page, _, _ in PYTHON} >= {"README.md", "bring_your_own.md"}
