"""Lists of runs: what they say of each, conditions and order, and directories that are damaged."""

import json
import time
from pathlib import Path

import pytest
from rich.console import ConsoleDimensions
from typer.testing import CliRunner

from fedray import cli
from fedray.config import yaml_text
from fedray.errors import ConfigError
from fedray.experiment.run import run
from fedray.overview import listing, summary
from fedray.storage.directory import Lock
from tests.experiment import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, an interrupted one, one that failed, and two trials of a sweep."""
    folder = tmp_path_factory.mktemp("runs")
    run(tiny.config(seed=3), out=folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config({"method.lr": 0.2}), out=folder / "cut", on_round=tiny.ending(1, KeyboardInterrupt))
    run(tiny.config(rounds=1), out=folder / "swept" / "trials" / "00-a")
    stopped = folder / "swept" / "trials" / "01-b"
    with pytest.raises(SystemExit):
        run(tiny.config(rounds=9), out=stopped, on_round=tiny.ending(2, SystemExit))
    (stopped / "stopped.json").write_text('{"round": 2}')
    return folder


def command(*words: str) -> str:
    done = CliRunner().invoke(cli.app, list(words), env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_list_says_of_each_run_how_it_ended_and_what_it_reached(runs: Path) -> None:
    found = {one.name: one for one in summary.summaries([runs])}
    assert {name: one.status for name, one in found.items()} == {
        "whole": "finished",
        "cut": "interrupted",
        "swept/00-a": "finished",
        "swept/01-b": "stopped",
    }
    result = json.loads((runs / "whole" / "result.json").read_text())
    whole, cut = found["whole"], found["cut"]
    assert whole.value("accuracy") == result["test/accuracy"]
    assert whole.value("bytes") == result["total/bytes/up"] + result["total/bytes/down"]
    assert (whole.round, whole.rounds, whole.value("seed"), whole.value("data")) == (3, 3, 3, "digits")
    last = json.loads((runs / "cut" / "rounds.jsonl").read_text().splitlines()[-1])
    assert (cut.round, cut.value("accuracy")) == (1, last["metrics"]["val/accuracy"])


def test_a_run_runs_while_a_process_has_its_lock(runs: Path) -> None:
    with Lock(runs / "cut"):
        assert summary.summary(runs / "cut").status == "running"
    assert summary.summary(runs / "cut").status == "interrupted"


def test_a_failed_run_says_why_until_it_is_resumed(tmp_path: Path) -> None:
    from fedray.errors import RunError
    from fedray.experiment.run import resume

    with pytest.raises(RunError):
        run(tiny.config(), out=tmp_path / "r", on_round=tiny.ending(1, RunError))
    found = summary.summary(tmp_path / "r")
    assert (found.status, found.problem) == ("failed", "after round 1")
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "r", on_round=tiny.ending(2, KeyboardInterrupt))
    assert summary.summary(tmp_path / "r").status == "interrupted"
    resume(tmp_path / "r")
    assert summary.summary(tmp_path / "r").status == "finished"


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (["status=finished"], ["swept/00-a", "whole"]),
        (["status!=finished"], ["cut", "swept/01-b"]),
        (["method.lr>0.1"], ["cut"]),
        (["method.lr<=0.05", "rounds=3"], ["whole"]),
        (["method=fedavg", "seed==3"], ["whole"]),
        (["test/accuracy>=0"], ["swept/00-a", "whole"]),
        (["val/accuracy>0.999"], []),
        (["data.root=null"], ["cut", "swept/00-a", "swept/01-b", "whole"]),
        (["data.root!=null"], []),
    ],
    ids=str,
)
def test_conditions(runs: Path, where: list[str], names: list[str]) -> None:
    assert [one.name for one in listing.select(summary.summaries([runs]), where)] == names


def test_order(runs: Path) -> None:
    found = summary.summaries([runs])
    by_seed = [one.value("seed") for one in listing.select(found, sort="seed", reverse=True)]
    assert by_seed == [3, 0, 0, 0]
    # a run without the value comes last, in both directions
    for reverse in (False, True):
        tested = [
            one.value("test/accuracy") for one in listing.select(found, sort="test/accuracy", reverse=reverse)
        ]
        assert tested[2:] == [None, None] and None not in tested[:2]
        assert tested[:2] == sorted(tested[:2], reverse=reverse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": ["methd=x"]}, "--where: no run has 'methd'; did you mean 'method'?"),
        ({"where": ["method.lrr>1"]}, "no run has 'method.lrr'; did you mean 'method.lr'?"),
        ({"where": ["method"]}, "is not of the form KEY=VALUE"),
        ({"where": ["=3"]}, "is not of the form KEY=VALUE"),
        ({"where": ["method=[1"]}, "--where method=[1"),
        ({"sort": "acuracy"}, "--sort: no run has 'acuracy'; did you mean 'accuracy'?"),
        ({"status": ["done"]}, "--status: unknown status 'done'"),
    ],
    ids=str,
)
def test_what_a_list_refuses(runs: Path, options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        listing.select(summary.summaries([runs]), **options)  # type: ignore[arg-type]
    assert message in str(refused.value)


DAMAGE = {
    "config.yaml": ("rounds: [1", "config.yaml, line 1"),
    "result.json": ("[]", "result.json: is damaged"),
    "rounds.jsonl": ("nothing\n{}\n{}\n", "a line near its end: not a JSON mapping"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_directory_is_shown_with_the_reason(tmp_path: Path, name: str) -> None:
    for other in ("sound", "broken"):
        run(tiny.config(rounds=1), out=tmp_path / other)
    text, reason = DAMAGE[name]
    (tmp_path / "broken" / name).write_text(text)
    found = {one.name: one for one in summary.summaries([tmp_path])}
    assert (found["broken"].status, found["sound"].status) == ("damaged", "finished")
    assert reason in str(found["broken"].problem)
    assert "damaged" in command("runs", str(tmp_path))


def test_only_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run(tiny.config(), out=tmp_path / "r")
    (tmp_path / "r" / "result.json").unlink()
    with open(tmp_path / "r" / "rounds.jsonl", "a") as file:
        file.write('{"round": 4, "metr')
    found = summary.summary(tmp_path / "r")
    assert (found.status, found.round) == ("interrupted", 3)


def test_accuracy_is_found_however_long_ago_it_was_measured(tmp_path: Path) -> None:
    lines = [{"round": 0, "metrics": {"val/accuracy": 0.5, "density/global": 1.0}}]
    lines += [{"round": k, "metrics": {"density/global": k / 1e4, "val/loss": None}} for k in range(1, 3000)]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (tmp_path / "rounds.jsonl").stat().st_size > 4 * summary.TAIL
    round, metrics = summary.last_rounds(tmp_path / "rounds.jsonl")
    assert (round, metrics["val/accuracy"], metrics["density/global"]) == (2999, 0.5, 0.2999)


def test_json_is_valid_and_has_no_nan(runs: Path) -> None:
    listed = json.loads(command("runs", str(runs), "--json", "--where", "status=finished"))
    assert [one["name"] for one in listed] == ["swept/00-a", "whole"]
    assert listed[1]["config"]["method"]["lr"] == 0.05
    assert summary.plain({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x")}) == {
        "a": None,
        "b": [None, 1.5],
        "c": "x",
    }


def test_columns(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = command("runs", str(runs), "--columns", "name,method.lr,bytes")
    assert text.splitlines()[0].split() == ["name", "method.lr", "MB"]
    assert any(line.split()[:2] == ["cut", "0.2"] for line in text.splitlines())
    for width in (60, 80, 120):
        monkeypatch.setattr(type(cli.out), "size", ConsoleDimensions(width, 25))
        shown = command("runs", str(runs))
        assert max(map(len, shown.splitlines())) <= width
        assert "accuracy" in shown and "status" in shown


def test_thousands_of_runs_are_listed_in_seconds(tmp_path: Path) -> None:
    run(tiny.config(), out=tmp_path / "first")
    text = {
        name: (tmp_path / "first" / name).read_bytes()
        for name in ("config.yaml", "rounds.jsonl", "result.json")
    }
    for number in range(500):
        place = tmp_path / f"r-{number}"
        place.mkdir()
        for name, data in text.items():
            (place / name).write_bytes(data)
    started = time.perf_counter()
    assert len(summary.summaries([tmp_path])) == 501
    assert time.perf_counter() - started < 5
    quick = yaml_text.load_quickly(tmp_path / "first" / "config.yaml")
    assert quick == yaml_text.load(tmp_path / "first" / "config.yaml")
