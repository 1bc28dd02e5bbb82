"""Every command that a page or a config shows is one that fedray takes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedray.cli import app
from fedray.config.plugins import import_modules
from fedray.config.run_config import RunConfig
from fedray.costs.differences import CODECS
from fedray.federation.sampling import SAMPLERS
from fedray.methods import METHODS
from fedray.sweeps.space import Sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("tune_configs/*.yaml"))]
COMMAND = re.compile(r"^(?:[#\s]*)((?:\.venv/bin/)?fedray (?:run|sweep) .*?)(?:\s+#.*)?$")


def commands(page: Path) -> list[str]:
    text = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))  # a command may go on in the next line
    found = (COMMAND.match(line) for line in text.splitlines())
    return [match[1] for match in found if match]


SHOWN = [(page, command) for page in PAGES for command in commands(page)]


@pytest.fixture
def tables(monkeypatch):
    """Put the tables back after a file has added to them."""
    tables: list[dict[str, Any]] = [METHODS, SAMPLERS, CODECS]
    before = [dict(table) for table in tables]
    monkeypatch.setattr("fedray.config.plugins._imported", {})
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{p.name}:{c[:60]}" for p, c in SHOWN])
def test_a_command_that_is_shown_can_be_run(page, command, tables, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, verb, *words = shlex.split(command)
    words, imports = _without_options(words)
    import_modules(imports)
    # data that a reader has is not there: what is shown after data.root= stands for their folder
    words = [word for word in words if not word.startswith("data.root=")]
    file, *overrides = words
    if verb == "run":
        RunConfig.load(file, overrides)
    else:
        assert Sweep.load(file, overrides).configs


def _without_options(words: list[str]) -> tuple[list[str], list[str]]:
    kept, imports = [], []
    rest = iter(words)
    for word in rest:
        if word == "--import":
            imports.append(next(rest))
        elif word in ("--out", "--address"):
            next(rest)
        else:
            kept.append(word)
    return kept, imports


def test_the_readme_names_every_verb():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert {verb for verb in verbs if not re.search(rf"\b{verb}\b", text)} == set()


def test_the_readme_is_short_and_its_picture_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") < 150
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    links = re.findall(r"(?<!!)\[[^\]]+\]\((?!http)([^)#]+)", text)
    assert pictures
    assert [link for link in [*pictures, *links] if not (ROOT / link).exists()] == []
