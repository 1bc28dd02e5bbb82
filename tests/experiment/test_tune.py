"""What is kept of a trial's error: the traceback, and a line that names the user's own code."""

import pytest

from fedray.config.plugins import import_modules, imported_modules
from fedray.errors import ConfigError, RunError
from fedray.experiment.tune import TRACEBACK, attempt

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
