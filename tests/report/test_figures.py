"""What is drawn, and how; numbers are worked out by hand."""

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fedray.errors import ConfigError
from fedray.methods import METHODS
from fedray.report import canvas, figures
from fedray.report.colours import COLOURS, MARKS, alike, base_of, distance, inks
from fedray.report.decision_figure import DECISIONS
from fedray.report.reading import load_run
from fedray.report.series import settings
from fedray.report.table import write_report
from tests.report.rundirs import lines_of, staged, write_run


def settings_of(*paths):
    return settings([load_run(path) for path in paths])


def test_a_line_is_the_mean_over_seeds_where_all_were_measured(tmp_path):
    one = write_run(tmp_path / "a", {"seed": 0}, (0.1, 0.5, 0.8), up=10)
    two = write_run(tmp_path / "b", {"seed": 1}, (0.3, None, 0.6), up=20)
    (look,) = figures.looks_of(settings_of(one, two))
    curve = figures.curve_of(look, "total/bytes/up", "val/accuracy")
    assert curve is not None
    np.testing.assert_allclose(curve.x, [0, 30])
    np.testing.assert_allclose(curve.mean, [0.2, 0.7])
    np.testing.assert_allclose(curve.low, [0.1, 0.6])
    np.testing.assert_allclose(curve.high, [0.3, 0.8])
    assert figures.curve_of(look, "round", "no/metric") is None


def test_no_name_in_a_picture_is_cut_to_anothers(tmp_path):
    long = dict.fromkeys(("first_option_of_a_long_name", "second_option_of_a_long_name"), 1) | {
        "steepest": 0.0
    }
    changed = {name: 2 for name in long} | {"steepest": 0.5}
    changes = [staged(**long), staged(**changed), staged(**(changed | {"steepest": 0.9}))]
    paths = [write_run(tmp_path / f"t{number}", change) for number, change in enumerate(changes)]
    names = [look.name for look in figures.looks_of(settings_of(*paths))]
    assert len(set(names)) == 3 and "steepest=0.9" in (names[2] or "")


def test_fedavg_is_black_and_the_best_have_colours(tmp_path):
    many = canvas.MAX_NAMED + 3
    paths = [write_run(tmp_path / "dense", accuracies=(0.1, 0.2))]
    paths += [write_run(tmp_path / f"t{n}", staged(threshold=n), (0.1, 0.3 + n / 100)) for n in range(many)]
    looks = figures.looks_of(settings_of(*paths))
    named = [look for look in looks if look.name is not None]
    assert [look.setting.label for look in looks[:4]] == [f"staged threshold={n}" for n in range(4)]
    assert len(looks) - len(named) == 4
    assert named[0].name == "fedavg" and named[0].color == canvas.BLACK
    assert len({look.ink for look in named}) == canvas.MAX_NAMED


def test_shipped_methods_have_colours_that_differ():
    assert set(COLOURS) == set(METHODS)
    colours = [colour for colour, _ in COLOURS.values()]
    assert min(distance(a, b) for a, b in combinations(colours, 2)) > 0.08
    assert len({mark for _, mark in COLOURS.values()}) == len(COLOURS)  # also in grey
    assert distance("#000000", "#ffffff") == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 13, 60, 400])
@pytest.mark.parametrize("methods", [["fedavg"], ["staged", "mine"], ["a", "b", "snip"], [*METHODS]], ids=len)
def test_no_two_settings_look_alike_whatever_their_number(methods, count):
    drawn = inks(methods[number % len(methods)] for number in range(count))
    assert not [pair for pair in combinations(drawn, 2) if alike(*pair)]
    assert len(set(drawn)) == count


def test_a_method_has_its_colour_in_every_picture(tmp_path):
    one = write_run(tmp_path / "a", {"method": {"name": "snip"}})
    other = write_run(tmp_path / "b", {"method": {"name": "mine"}})
    dense = write_run(tmp_path / "c")

    def inks_of(*paths):
        looks = figures.looks_of(settings_of(*paths))
        return {look.setting.flat["method.name"]: look.ink for look in looks}

    alone = inks_of(one) | inks_of(other)
    together = inks_of(dense, other, one)
    assert together == alone | {"fedavg": together["fedavg"]}


def test_formats(tmp_path):
    run = write_run(tmp_path / "a", accuracies=(0.1, 0.5))
    drawn = figures.draw(settings_of(run), None, ("png", "svg", "pdf"))
    heads = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert {name.rpartition(".")[2] for name in drawn} == set(heads)
    assert all(data.startswith(heads[name.rpartition(".")[2]]) for name, data in drawn.items())
    assert figures.draw(settings_of(run), None, ("png", "svg", "pdf")) == drawn  # the same bytes
    first = write_report([run], tmp_path / "r", formats=("svg", "pdf"))
    assert {path.suffix for path in first.files} == {".svg", ".pdf", ".md", ".csv", ".json"}
    again = write_report([run], tmp_path / "r")
    assert {path.name for path in (tmp_path / "r").iterdir()} == {path.name for path in again.files}
    with pytest.raises(ConfigError, match=r"^--format: unknown format 'pgn'; did you mean 'png'"):
        write_report([run], tmp_path / "other", formats=("pgn",))
    assert not (tmp_path / "other").exists()


def test_density_of_clients_is_drawn_only_where_it_is_their_own(tmp_path):
    paths = [write_run(tmp_path / name, {"model": name}) for name in ("shared", "own")]
    for path, density in zip(paths, ((1.0, 0.5), (0.3, 0.3)), strict=True):
        lines = lines_of((0.1, 0.5, 0.8), 1)
        for line, server, client in zip(lines, (1.0, 0.5, 0.5), (None, *density), strict=True):
            line["metrics"]["density/global"] = server
            if client is not None:  # of the mask that the round began with
                line["metrics"]["density/client_mean"] = client
        (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared, own = (
        figures.curve_of(look, "round", "density/global") for look in figures.looks_of(settings_of(*paths))
    )
    assert shared is not None and own is not None
    assert figures.density_of_clients(shared) is None
    drawn = figures.density_of_clients(own)
    assert drawn is not None
    np.testing.assert_allclose(drawn.mean, [0.3, 0.3])


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(1, 5)), min_size=1, max_size=15))
@examples(deadline=None, max_examples=50)
def test_names_do_not_overlap_and_stay_in_order(things):
    wanted = sorted(place for place, _ in things)
    sizes = [size for _, size in things]
    centres = canvas.spread(wanted, sizes, 100.0)
    for (a, b), (left, right) in zip(pairwise(sizes), pairwise(centres), strict=True):
        assert right - left >= (a + b) / 2 - 1e-9
    assert centres[0] >= -1e-9 and centres[-1] <= 100 + 1e-9


def test_names_with_room_stay_where_they_want():
    assert canvas.spread([10, 50, 90], [4, 4, 4], 100) == [10, 50, 90]
    assert canvas.spread([50, 50], [4, 4], 100) == [48, 52]
    assert canvas.spread([100, 100], [4, 4], 100) == [96, 100]


def test_decisions_are_drawn_where_somebody_decided(tmp_path):
    decided = write_run(tmp_path / "a", {"method": {"name": "staged", "policy": "agent"}}, (0.1, 0.5, 0.8))
    path = decided / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[1]["metrics"] |= {"method/action": 2, "method/asked": 4, "method/factor": 0.75}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    plain = write_run(tmp_path / "b", staged(), (0.1, 0.5, 0.8))
    assert DECISIONS in figures.draw(settings_of(decided, plain))
    assert DECISIONS not in figures.draw(settings_of(plain))


def test_the_picture_of_clients_says_on_which_examples(tmp_path):
    plain = write_run(tmp_path / "a", {"seed": 0}, (0.1, 0.5))
    held = write_run(tmp_path / "b", {"seed": 0, "data": {"client_test_fraction": 0.2}}, (0.1, 0.5))

    def label(*paths):
        figure = figures._clients(figures.looks_of(settings_of(*paths)))
        assert figure is not None
        (axes,) = figure.axes
        return axes.get_xlabel(), [text.get_text() for text in axes.get_yticklabels()]

    assert "a client's own training examples" in label(plain)[0]
    assert "a client's own held-out examples" in label(held)[0]
    both, names = label(plain, held)
    assert "own examples" in both
    assert [name.splitlines()[-1] for name in names] == ["(training examples)", "(held-out examples)"]


def test_every_mark_can_be_drawn(tmp_path):
    """Methods that come with fedray and others, whose mark follows from their name."""
    names, number = dict.fromkeys(COLOURS), 0
    while {base_of(name)[1] for name in names} < set(MARKS):
        names[f"method{number}"] = None
        number += 1
    paths = [write_run(tmp_path / name, {"method.name": name}, (0.1, 0.5, 0.8)) for name in names]
    pictures = figures.draw(settings([load_run(path) for path in paths]))
    assert {"accuracy_by_round.png", "accuracy_by_bytes.png"} <= set(pictures)
