"""Trials of Tune: what is kept of an error, and how a trial ends that is stopped."""

import os
import time

import pytest

from fedray.config.plugins import import_modules, imported_modules
from fedray.errors import ConfigError, RunError
from fedray.experiment.interrupt import signals
from fedray.federation.pool import ActorOptions
from fedray.sweeps.tune import TRACEBACK, attempt, end_if_asked, fit, room

BROKEN = """
import json
from fedray.pruning.masks import top_k

def in_own_code(name):
    raise KeyError("threshold")

def in_a_library(name):
    json.loads("{")

def in_fedray(name):
    top_k(None, 0.5, None)

def without_words(name):
    assert name == "x"

def in_many_lines(name):
    raise ValueError("first line\\nsecond line")
"""


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    import_modules([path])
    return next(module for module in imported_modules() if module.__file__ == str(path))


@pytest.mark.parametrize(
    "function, kind, line",
    [
        ("in_own_code", "KeyError: 'threshold'", 6),
        ("in_a_library", "JSONDecodeError: Expecting property name", 9),
        ("in_fedray", "Error: ", 12),
        ("without_words", "AssertionError: no message", 15),
        ("in_many_lines", "ValueError: first line (", 18),
    ],
)
def test_the_line_of_a_user_s_file_is_named_and_the_traceback_kept(broken, tmp_path, function, kind, line):
    place = tmp_path / "trial"
    with pytest.raises(RunError) as caught:
        attempt(getattr(broken, function), "00", place)
    message = str(caught.value)
    assert "\n" not in message
    assert kind in message
    assert f"({broken.__file__}, line {line}, in {function})" in message
    assert str(place / TRACEBACK) in message
    kept = (place / TRACEBACK).read_text()
    assert kept.startswith("Traceback (most recent call last)") and f'broken.py", line {line}' in kept


def test_what_fedray_says_on_purpose_is_said_as_it_is(tmp_path):
    def refuse(name: str) -> None:
        raise ConfigError("rounds: got 0")

    with pytest.raises(RunError, match=r"^rounds: got 0; traceback in .*error\.txt$"):
        attempt(refuse, "00", tmp_path)
    assert "in refuse" in (tmp_path / TRACEBACK).read_text()


def test_an_attempt_that_succeeds_leaves_no_traceback_of_the_one_before(tmp_path):
    (tmp_path / TRACEBACK).write_text("of the attempt before")
    attempt(lambda name: None, "00", tmp_path)
    assert not (tmp_path / TRACEBACK).exists()


def test_tune_ends_a_trial_by_system_exit_and_a_signal_by_another(tmp_path):
    def stopped(name: str) -> None:
        raise SystemExit(0)

    with pytest.raises(SystemExit):  # returning would let Tune wait for a report that nobody takes
        attempt(stopped, "00", tmp_path)

    def asked(name: str) -> None:
        (tmp_path / ".ending").touch()
        end_if_asked(tmp_path)

    attempt(asked, "00", tmp_path)
    assert not (tmp_path / TRACEBACK).exists()


def test_the_process_of_a_stopped_trial_is_taken_over(ray_local, tmp_path):
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class First(FIFOScheduler):  # type: ignore[misc]  # Ray has no types
        """Stops the first trial after its first report."""

        def on_trial_result(self, controller, trial, result):
            first = trial.config["name"] == "00"
            return TrialScheduler.STOP if first else TrialScheduler.CONTINUE

    def body(name: str) -> None:
        from ray import tune

        (tmp_path / name).mkdir()
        try:
            for number in range(3):
                tune.report({"number": number})
        finally:
            (tmp_path / name / "process").write_text(f"{os.getpid()} {number}")

    names = ("00", "01")
    started = time.monotonic()
    with signals() as stop:
        failed = fit(
            body,
            {name: tmp_path / name for name in names},
            {name: room([ActorOptions(cpu=1.0)]) for name in names},
            tmp_path / "tune" / "files",
            concurrent=1,
            max_failures=0,
            stop=stop,
            scheduler=First(),
            reuse=True,
        )
    assert not failed
    processes, ends = zip(*((tmp_path / name / "process").read_text().split() for name in names), strict=True)
    assert processes[0] == processes[1]
    assert ends == ("0", "2")
    assert time.monotonic() - started < 60
