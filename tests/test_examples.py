"""The examples, and those of the docs on methods, run as they say and show what they claim."""

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from fedray import cli
from fedray.config import plugins
from fedray.config.run_config import RunConfig
from fedray.costs.differences import CODECS
from fedray.errors import ConfigError
from fedray.experiment.history import History
from fedray.experiment.run import Federation, run
from fedray.federation.sampling import SAMPLERS
from fedray.methods import METHODS
from fedray.report.reading import load_run
from fedray.storage.final_model import load_model
from fedray.sweeps.space import Sweep
from tests import small

ROOT = Path(__file__).parents[1]
NEW_METHOD = ROOT / "examples" / "new_method.py"
ADDING = ROOT / "docs" / "adding_a_method.md"
PAGES = [ADDING, *sorted((ROOT / "docs" / "methods").glob("*.md"))]
SMALL = ("clients.actors=0", "rounds=2", "model=mlp", "tracking.uri=none")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget afterwards what was imported and added to the tables of methods, samplers and codecs."""
    tables: list[dict[str, Any]] = [METHODS, SAMPLERS, CODECS]
    before = [dict(table) for table in tables]
    monkeypatch.setattr(plugins, "_imported", {})
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def run_command_of(example: str, page: str, out: Path, *overrides: str) -> None:
    """Run the command in an example's docstring in process; the page has the same command."""
    path = ROOT / "examples" / example
    lines = [line.strip() for line in path.read_text().splitlines()]
    (command,) = (line for line in lines if line.startswith("fedray "))
    assert command in (ROOT / "docs" / page).read_text()
    arguments = [*shlex.split(command)[1:], *SMALL, *overrides, "--out", str(out)]
    outcome = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output


@pytest.mark.usefixtures("tables")
def test_the_command_of_the_new_sampler_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients take part in turn: 12 clients that are always there train in three rounds of four."""
    monkeypatch.chdir(ROOT)
    everybody = ("clients.population=12", "clients.cohort=4", "clients.devices={server: 1}", "rounds=3")
    run_command_of("new_sampler.py", "samplers.md", tmp_path / "run", *everybody)
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    assert sorted(clients["client"]) == list(range(12))


@pytest.mark.usefixtures("tables")
def test_the_command_of_the_new_codec_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads have a bit for each weight and a few bytes beside them."""
    monkeypatch.chdir(ROOT)
    run_command_of("new_codec.py", "costs.md", tmp_path / "run")
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    weights = RunConfig(model="mlp").build_model((1, 8, 8), 10).layout.size
    (sent,) = set(clients["bytes_up"][clients["bytes_up"] > 0])
    assert weights / 8 < sent < weights / 8 + 100


def result_of(tmp_path: Path, name: str, *overrides: str) -> History:
    """Run the quickstart's base in process, in a directory called after `name`."""
    changes = [f"imports=[{NEW_METHOD}]", f"method.name={name}", *SMALL, *overrides]
    out = tmp_path / "-".join((name, *overrides))
    return run(RunConfig.load(ROOT / "tune_configs" / "quickstart.yaml", changes), out=out)


@pytest.mark.usefixtures("tables")
def test_the_command_of_the_new_method_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = (
        line.strip() for line in NEW_METHOD.read_text().splitlines() if line.strip().startswith("fedray ")
    )
    arguments = [*shlex.split(command)[1:], *SMALL, "--out", str(tmp_path / "run")]
    outcome = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    config = RunConfig.load(tmp_path / "run" / "config.yaml")
    assert config.method.name == "fedprox"
    assert config.method.options == METHODS["fedprox"](local_epochs=2, lr=0.1, batch_size=10)


@pytest.mark.usefixtures("tables")
def test_the_proximal_term_holds_clients_back(tmp_path: Path) -> None:
    fedavg = result_of(tmp_path, "fedavg")
    without = result_of(tmp_path, "fedprox", "method.mu=0.0")
    strong = result_of(tmp_path, "fedprox", "method.mu=5.0")
    assert without.result["val/loss"] == pytest.approx(fedavg.result["val/loss"], rel=1e-5)
    # two rounds are too short for the term to pay; but it must slow the clients down
    assert 1.02 * without.result["val/loss"] < strong.result["val/loss"] < strong.rounds[0]["val/loss"]
    assert strong.result["total/bytes/up"] == without.result["total/bytes/up"]


@pytest.mark.usefixtures("tables")
def test_the_new_methods_options_are_checked_like_any(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.mu .*got -1"):
        result_of(tmp_path, "fedprox", "method.mu=-1")
    with pytest.raises(ConfigError, match=r"method\.nu .*did you mean 'mu'"):
        result_of(tmp_path, "fedprox", "method.nu=1.0")


SHAPES = {
    # example → data set, model, lowest accuracy after the rounds, FLOPs of a forward pass of one example
    "tabular": ("tumours", "table", 0.85, 2 * (30 * 64 + 64 * 32 + 32 * 2)),
    "tokens": (
        "reviews",
        "attention",
        0.65,
        2 * (12 * 48 * 16 + 12 * 16 * 16 + 16 * 2) + 4 * 2 * 12 * 12 * 8,
    ),
    "signals": ("waves", "conv1d", 0.7, 2 * (64 * 16 * 7 + 64 * 32 * 16 * 7 + 32 * 3)),
}
FEW = ("clients.actors=0", "clients.population=20", "clients.cohort=5", "eval_every=2", "tracking.uri=none")


@pytest.mark.parametrize("example", SHAPES)
@pytest.mark.usefixtures("tables")
def test_an_example_of_each_shape_of_data_runs_as_it_says(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    data, model, lowest, flops = SHAPES[example]
    (command,) = commands((ROOT / "examples" / f"{example}.py").read_text(encoding="utf-8"))
    assert command[:4] == ["run", "tune_configs/quickstart.yaml", "--import", f"examples/{example}.py"]
    arguments = [*command, *FEW, "rounds=8", "method.name=staged", "method.density=0.5", "--out"]
    outcome = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "run")], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    config = RunConfig.load(tmp_path / "run" / "config.yaml")
    assert (config.data.name, config.model) == (data, model)
    result = load_run(tmp_path / "run").result
    assert result is not None
    assert result["status"] == "finished"
    assert result["density/global"] == pytest.approx(0.5, abs=0.01)
    assert result["test/accuracy"] > lowest
    place = Federation.of(config).place
    assert place.flops.dense() == flops
    module = load_model(tmp_path / "run")
    assert module(place.dataset.normalise(place.dataset.train.x[:3])).shape == (3, place.dataset.num_classes)


@pytest.mark.usefixtures("tables")
def test_data_and_models_of_unlike_kinds_are_refused() -> None:
    imports = [f"imports=[{', '.join(str(ROOT / 'examples' / f'{name}.py') for name in SHAPES)}]"]
    for changes, message in (
        (
            ("data.name=reviews", "model=table"),
            r"table does not take reviews: it takes numbers.* 30 different",
        ),
        (("data.name=tumours", "model=attention"), r"attention does not take tumours: it embeds 30 tokens"),
        (("data.name=tumours", "model=cnn"), r"cnn takes images .*, not examples of 30 numbers"),
        (("data.name=waves", "model=table"), r"table cannot be built for examples of 1×64 numbers"),
    ):
        with pytest.raises(ConfigError, match=rf"model .*{message}"):
            RunConfig.load(ROOT / "tune_configs" / "quickstart.yaml", [*imports, *FEW, *changes])
    listed = CliRunner().invoke(cli.app, ["models", "--import", str(ROOT / "examples" / "tokens.py")])
    assert listed.exit_code == 0 and "attention" in listed.output


def test_the_round_by_hand_and_fedrays_agree(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    runpy.run_path(str(ROOT / "examples" / "round_by_hand.py"), run_name="__main__")  # it asserts 1e-6 itself
    assert torch.get_num_threads() == threads
    hand, fedray, difference = capsys.readouterr().out.splitlines()[1:]
    assert hand.split()[:2] == ["by", "hand"] and fedray.split()[:2] == ["by", "fedray"]
    assert hand.split()[3] == fedray.split()[3], "the same accuracy"
    assert float(difference.split()[-1]) < 1e-6


def commands(text: str) -> list[list[str]]:
    """Return the indented `fedray …` lines of a page, as a shell splits them, without data.root=PATH_…."""
    text = re.sub(r" *\\\n\s*", " ", text)  # a command may go on in the next line
    found = (shlex.split(line)[1:] for line in re.findall(r"^    (fedray .*)$", text, re.MULTILINE))
    return [[word for word in words if not word.startswith("data.root=PATH_")] for words in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("tables")
def test_the_commands_of_a_page_are_ones_that_can_be_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown: set[str] = set()
    for verb, *arguments in commands(page.read_text(encoding="utf-8")):
        if "--import" in arguments:
            at = arguments.index("--import")
            arguments[at : at + 2] = [f"imports=[{arguments[at + 1]}]"]
        if verb == "run":
            shown.add(RunConfig.load(arguments[0], arguments[1:]).method.name)
        elif verb == "sweep":
            shown |= {c.method.name for c in Sweep.load(arguments[0], arguments[1:]).configs}
        else:
            assert verb in ("methods", "report")
    assert ("fedprox" if page is ADDING else page.stem) in shown


def test_the_methods_of_the_page_on_adding_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    file, memory = re.findall(r"```python\n(.*?)```", ADDING.read_text(encoding="utf-8"), re.DOTALL)
    module = ModuleType("adding_a_method")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look a class's module up
    exec(file, module.__dict__)
    exec(memory, module.__dict__)
    remembering = small.server(module.Mine())
    small.run(remembering)
    assert remembering.state.memory == module.Memory()
    server = small.server(module.Random(density=0.25))
    first = server.evaluate(server.side.validation).loss
    last = small.run(server)[-1]
    assert last.metrics["density/global"] == 0.25
    assert last.metrics["val/loss"] < first
