"""Every file that docs/bring_your_own.md shows works in a run, and all of them in one sweep on Ray."""

import re
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from tests.experiment import tiny

PAGE = Path(__file__).parents[1] / "docs" / "bring_your_own.md"
CHANGES: dict[str, dict[str, Any]] = {
    "A device, a link": {"clients.devices": {"esp32": 0.7, "esp32@lora": 0.3}},
    "A partition": {"data.partition.kind": "blocks"},
    "A data set": {"data.name": "wine"},
    "A model": {"model": "attention"},
    "A client sampler": {"clients.sampler.name": "largest"},
    "A codec": {"clients.uplink.name": "half_precision"},
    "A method": {"method.name": "half", "method.density": 0.3},
}
"""Heading → the keys that choose what its file adds."""
SHORT = 10
"""A file has fewer lines than this, blank ones aside, but for a method, which has a docstring too."""


def files() -> dict[str, str]:
    """Return heading → the file below it."""
    found: dict[str, str] = {}
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        found |= {part.partition("\n")[0]: block for block in re.findall(r"```python\n(.*?)```", part, re.S)}
    return found


FILES = files()


def name_of(heading: str) -> str:
    return f"{re.sub(r'[^a-z]+', '_', heading.lower())}.py"


def test_every_file_of_the_page_is_tested():
    assert set(FILES) == set(CHANGES)
    for heading, text in FILES.items():
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(lines) < SHORT or (heading == "A method" and len(lines) <= SHORT)


@pytest.mark.parametrize("heading", CHANGES)
def test_a_file_works_in_a_run_and_after_resume(in_tmp, heading):
    (in_tmp / name_of(heading)).write_text(FILES[heading])
    changes = {"imports": [name_of(heading)], "rounds": 2, **CHANGES[heading]}
    history = fedray.run(tiny.config(changes), out="first")
    assert history.result["status"] == "finished" and len(history.rounds) == 3
    again = fedray.resume("first", {"rounds": 3})
    assert (
        again.weights_sha256 == fedray.run(tiny.config(changes | {"rounds": 3}), out="whole").weights_sha256
    )


@pytest.mark.slow
def test_all_files_work_together_in_a_sweep_on_ray(ray_local, in_tmp):
    for heading, text in FILES.items():
        (in_tmp / name_of(heading)).write_text(text)
    changes: dict[str, Any] = {"imports": [name_of(heading) for heading in FILES], "rounds": 1}
    for own in CHANGES.values():
        changes |= own
    base = override_tree(tiny.TREE, changes | {"clients.actors": 1})
    space = {"data.name": {"grid": ["wine", "digits"]}}
    (in_tmp / "x.yaml").write_text(yaml_text.dump({"base": base, "space": space}))
    result = fedray.sweep(fedray.Sweep.load("x.yaml"), out="sweep")
    assert [(trial.status, trial.error) for trial in result.trials] == [("finished", None)] * 2
    for trial in result.trials:
        config = trial.point.config.override({"clients.actors": 0})
        alone = fedray.run(config, out=f"alone-{trial.point.name}")
        found = fedray.load_run(trial.path).result
        assert found is not None and found["weights_sha256"] == alone.weights_sha256
