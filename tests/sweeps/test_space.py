"""A sweep's points: which there are, what they are called, and that all are valid before anything starts."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.config.tune_config import VERBS, TuneConfig, tune_config
from fedray.errors import ConfigError
from fedray.methods.snip import SNIP
from fedray.methods.staged import Staged
from fedray.sweeps.drawing import expand
from fedray.sweeps.space import Sweep


@pytest.fixture
def load(in_tmp):
    """Return a function that reads the sweep of a text."""

    def load(text: str, *overrides: str) -> Sweep:
        (in_tmp / "x.yaml").write_text(text, encoding="utf-8")
        return Sweep.load("x.yaml", overrides)

    return load


@pytest.fixture
def refused(load):
    """Return a function that returns the message for a text."""

    def refused(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return refused


def changes(sweep: Sweep) -> list[dict[str, object]]:
    return [dict(point.changes) for point in sweep.points]


# ── points
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_without_a_space_is_one_point(load):
    for text in ("", "rounds: 3", "base: {rounds: 3}", "base: {rounds: 3}\nspace:\ntune:"):
        sweep = load(text)
        assert [(point.name, point.changes) for point in sweep.points] == [("00-base", {})]
        assert sweep.name == "x"
        assert sweep.tune == TuneConfig()


def test_grids_are_crossed_the_first_one_slowest(load):
    sweep = load("base: {rounds: 3}\nspace: {method.lr: {grid: [0.1, 0.2]}, seed: {grid: [0, 1, 2]}}")
    assert changes(sweep) == [{"method.lr": lr, "seed": seed} for lr in (0.1, 0.2) for seed in (0, 1, 2)]
    for point in sweep.points:
        assert (point.config.method.options.lr, point.config.seed) == tuple(point.changes.values())
        assert point.config.rounds == 3


def test_a_grid_of_methods_keeps_what_all_methods_have(load):
    sweep = load(
        "base: {method: {name: staged, lr: 0.3, density: 0.4, stages: 2}}\n"
        "space: {method: {grid: [{name: snip}, {name: staged, density: 0.2}, {name: staged, lr: 0.1}]}}"
    )
    assert [point.config.method.options for point in sweep.points] == [
        SNIP(lr=0.3),
        Staged(lr=0.3, density=0.2, stages=2),
        Staged(lr=0.1, density=0.4, stages=2),
    ]


def test_a_grid_may_hold_lists_and_nothing(load):
    sweep = load(
        "base: {method: {name: frlp}, data: {server_fraction: 0.1}}\n"
        "space: {method.prune_rounds: {grid: [[1, 2], null]}}"
    )
    assert [point.config.method.options.prune_rounds for point in sweep.points] == [(1, 2), None]


DRAWS = {
    "choice": (["a", "b"], lambda value: value in ("a", "b")),
    "uniform": ([2, 3], lambda value: 2 <= value <= 3),
    "quniform": ([2, 3, 0.5], lambda value: value in (2, 2.5, 3)),
    "loguniform": ([0.01, 0.1], lambda value: 0.01 <= value <= 0.1),
    "qloguniform": ([0.5, 4, 0.5], lambda value: 0.5 <= value <= 4 and value % 0.5 == 0),
    "randint": ([2, 5], lambda value: value in (2, 3, 4)),
    "qrandint": ([2, 8, 2], lambda value: value in (2, 4, 6, 8)),
    "lograndint": ([1, 100], lambda value: 1 <= value < 100),
    "randn": ([0, 1], lambda value: -9 < value < 9),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_draws_plain_values_from_its_range(verb):
    if verb == "grid":
        assert expand({"x": {"grid": [3]}}, TuneConfig(num_samples=9), "x.yaml") == [{"x": 3}]
        return
    arguments, allowed = DRAWS[verb]
    drawn = [point["x"] for point in expand({"x": {verb: arguments}}, TuneConfig(num_samples=30), "x.yaml")]
    assert len(drawn) == 30
    assert all(allowed(value) for value in drawn), drawn
    assert {type(value) for value in drawn} <= {int, float, str}
    assert len(set(drawn)) > 1


def test_random_verbs_are_drawn_anew_at_each_point_of_the_grids(load):
    sweep = load(
        "space: {method.lr: {loguniform: [0.01, 0.3]}, seed: {grid: [0, 1]}}\ntune: {num_samples: 3}",
    )
    assert [point.config.seed for point in sweep.points] == [0, 1] * 3
    assert len({point.config.method.options.lr for point in sweep.points}) == 6


def test_draws_are_those_of_the_seed(load):
    text = (
        "space: {method.lr: {uniform: [0.01, 0.3]}, clients.cohort: {randint: [1, 9]}}\ntune: {num_samples: 4"
    )
    assert changes(load(f"{text}, seed: 1}}")) == changes(load(f"{text}, seed: 1}}"))
    assert changes(load(f"{text}, seed: 1}}")) != changes(load(f"{text}, seed: 2}}"))
    more = changes(load(f"{text}, seed: 1}}", "tune.num_samples=7"))
    assert more[:4] == changes(load(f"{text}, seed: 1}}"))  # more samples are more, not others


def test_the_longest_trial(load):
    assert load("base: {rounds: 3}\nspace: {rounds: {grid: [2, 5, 4]}}").rounds == 5


# ── names
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_point_is_named_by_what_it_changes(load):
    sweep = load(
        "base: {data: {name: mnist, server_fraction: 0.1}}\n"
        "space:\n"
        "  method: {grid: [{name: snip, density: 0.25}, {name: frlp}]}\n"
        "  method.lr: {grid: [0.0123456]}\n"
        "  data.partition.kind: {grid: [shards]}\n"
        "  seed: {grid: [3]}\n"
    )
    assert [point.name for point in sweep.points] == [
        "00-snip,density=0.25,lr=0.01235,shards,seed=3",
        "01-frlp,lr=0.01235,shards,seed=3",
    ]


def test_names_sort_in_the_order_of_the_points(load):
    names = [point.name for point in load(f"space: {{seed: {{grid: {list(range(120))}}}}}").points]
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("000-seed=0", "119-seed=119")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.text(max_size=200), st.integers(), st.floats()), min_size=1, max_size=4))
def test_names_are_unique_and_safe_in_any_file_system(values):
    changes = [{"tracking.experiment": str(value).encode(errors="replace").decode()} for value in values]
    sweep = Sweep.of("x", {"base": {}}, TuneConfig(), changes, "x.yaml")
    names = [point.name for point in sweep.points]
    assert len({name.lower() for name in names}) == len(values)
    assert all(re.fullmatch(r"[0-9]{2}-[A-Za-z0-9.,=_+-]{1,97}", name) for name in names), names


# ── overrides
# ──────────────────────────────────────────────────────────────────────────────────────────

SPACE = "base: {rounds: 9}\nspace: {seed: {grid: [1, 2]}, method.lr: {grid: [0.1, 0.2]}}\ntune: {mode: max}"


def test_an_override_of_a_key_of_the_space_fixes_it(load):
    sweep = load(SPACE, "seed=7", "rounds=3")
    assert changes(sweep) == [{"method.lr": 0.1}, {"method.lr": 0.2}]
    assert {(point.config.seed, point.config.rounds) for point in sweep.points} == {(7, 3)}
    assert sweep.tree == {
        "base": {"rounds": 3, "seed": 7},
        "space": {"method.lr": {"grid": [0.1, 0.2]}},
        "tune": {"mode": "max"},
    }


@pytest.mark.parametrize("override", ["method.name=snip", "method={name: snip}"])
def test_an_override_of_the_method_fixes_a_space_of_methods(load, override):
    sweep = load("space: {method: {grid: [{name: fedavg}, {name: staged}]}, seed: {grid: [1, 2]}}", override)
    assert [(point.config.method.name, point.config.seed) for point in sweep.points] == [
        ("snip", 1),
        ("snip", 2),
    ]


def test_an_override_of_an_option_reaches_every_method_of_a_space(load):
    sweep = load("space: {method: {grid: [{name: fedavg}, {name: snip}]}}", "method.lr=0.3")
    assert [(p.config.method.name, p.config.method.options.lr) for p in sweep.points] == [
        ("fedavg", 0.3),
        ("snip", 0.3),
    ]


def test_overrides_of_the_space_and_of_tune(load):
    sweep = load(
        SPACE,
        "space.seed={grid: [5]}",
        "space.model={grid: [mlp, cnn]}",
        "tune.scheduler=asha",
        "tune.metric=val/loss",
        "tune.mode=min",
    )
    assert [point.changes["seed"] for point in sweep.points] == [5] * 4
    assert {point.config.model for point in sweep.points} == {"mlp", "cnn"}
    assert (sweep.tune.scheduler.name, sweep.tune.metric, sweep.tune.direction) == ("asha", "val/loss", "min")
    whole = load(SPACE, "space={seed: {grid: [5]}}", "tune={scheduler: asha}")
    assert changes(whole) == [{"seed": 5, "method.lr": 0.1}, {"seed": 5, "method.lr": 0.2}]
    assert whole.tree["tune"] == {"mode": "max", "scheduler": "asha"}


def test_a_resumed_sweep_has_the_same_points(load):
    """`Sweep.of` makes them from what `sweep.yaml` keeps."""
    text = "space: {method.lr: {uniform: [0.01, 0.3]}, seed: {grid: [1, 2]}}\ntune: {num_samples: 2}"
    sweep = load(text, "rounds=4")
    again = Sweep.of(
        sweep.name, sweep.tree, tune_config(sweep.tree["tune"], "x"), changes(sweep), "sweep.yaml"
    )
    assert again == sweep


# ── bad input
# ──────────────────────────────────────────────────────────────────────────────────────────

BAD = r"""
space: {seed: {grd: [1]}}
space.seed (x.yaml): unknown verb 'grd'; did you mean 'grid'? Known: choice, grid, lograndint, loguniform,
qloguniform, qrandint, quniform, randint, randn, uniform

space: {seed: 3}
space.seed (x.yaml): got 3; write one verb and its list, e.g. {grid: [1, 2]}

space: {seed: {grid: [1], choice: [2]}}
space.seed (x.yaml): got {'grid': [1], 'choice': [2]}; write one verb and its list, e.g. {grid: [1, 2]}

space: {seed: {grid: []}}
space.seed.grid (x.yaml): got []; must be a list with something in it

space: {seed: {grid: 1}}
space.seed.grid (x.yaml): got 1; must be a list with something in it

space: {method.lr: {uniform: [1]}}
space.method.lr.uniform (x.yaml): got [1]; uniform does not take that: …

space: {method.lr: {uniform: [a, b]}}
space.method.lr.uniform (x.yaml): got ['a', 'b']; uniform does not take that: …

space: {seed: {randint: [3, 1]}}
space.seed.randint (x.yaml): got [3, 1]; randint does not take that: …

space: {method.lr: {loguniform: [0, 1]}}
space.method.lr.loguniform (x.yaml): got [0, 1]; loguniform does not take that: …

space: {method.lr: {quniform: [0, 1, 0.3]}}
space.method.lr.quniform (x.yaml): got [0, 1, 0.3]; quniform does not take that: …

space: [1]
space (x.yaml): got [1]; must be a mapping of keys to values

tune: 3
tune (x.yaml): got 3; must be a mapping of keys to values

tune: {metrc: val/loss}
tune.metrc (x.yaml): unknown; did you mean 'metric'? Keys here: concurrent, constraints, …

tune: {metric: val/acuracy}
tune.metric (x.yaml): unknown metric 'val/acuracy'; did you mean 'val/accuracy'? Known: bytes/down, …

tune: {metric: test/accuracy}
tune.metric (x.yaml): unknown metric 'test/accuracy'…

tune: {scheduler: ashaa}
tune.scheduler.name (x.yaml): unknown scheduler 'ashaa'; did you mean 'asha'? Known: asha, fifo, …

tune: {concurrent: "2"}
tune.concurrent (x.yaml): got '2'; must be a whole number; write tune.concurrent=2

tune: {reduction: 1}
tune.reduction (x.yaml): got 1; must be greater than or equal to 2

space: {1: {grid: [2]}}
1 (x.yaml): unknown. Keys here: checkpoint_every, …

space: {clients.cohrt: {grid: [2]}}
clients.cohrt (x.yaml): unknown; did you mean 'cohort'? Keys here: …
"""
CASES = [case.split("\n", 1) for case in BAD.strip().split("\n\n")]


@pytest.mark.parametrize(("text", "message"), CASES, ids=[text for text, _ in CASES])
def test_one_message_says_what_is_wrong(refused, text, message):
    found, wanted = refused(text), " ".join(message.split())
    assert "\n" not in found
    assert found == wanted or (wanted.endswith("…") and found.startswith(wanted[:-1].rstrip()))


@pytest.mark.parametrize("metric", ["val/loss", "total/bytes/up", "time/simulated_s", "train/loss"])
def test_a_scheduler_may_compare_what_rounds_report(load, metric):
    assert load(f"tune: {{metric: {metric}}}").tune.metric == metric


def test_an_invalid_point_is_named(refused):
    message = refused("space: {method.lr: {grid: [0.1, -1]}, seed: {grid: [0, x]}}")
    assert message.splitlines() == [
        "seed (x.yaml): got 'x'; must be a whole number [lr=0.1,seed=x and 1 more]",
        "method.lr (x.yaml): got -1; must be greater than 0 [lr=-1,seed=0 and 1 more]",
    ]
    assert refused("space: {clients.cohort: {grid: [10, 200]}}") == (
        "clients.cohort (x.yaml): 200 clients a round of a population of 100; lower clients.cohort or raise "
        "clients.population [cohort=200]"
    )


def test_a_point_that_is_drawn_is_validated_too(refused):
    message = refused("space: {method.lr: {uniform: [-1, -0.5]}}\ntune: {num_samples: 2}")
    assert re.fullmatch(
        r"(method\.lr \(x\.yaml\): got -0\.\d+; must be greater than 0 \[lr=-0\.\d+\]\n?){2}", message
    )


def test_what_is_wrong_with_every_point_is_said_once(refused):
    assert refused("base: {rounds: 0}\nspace: {seed: {grid: [1, 2]}}") == (
        "rounds (x.yaml): got 0; must be greater than 0"
    )
    assert refused("space: {seed: {grid: [1, 2]}}", "rounds=0") == (
        "rounds (override): got 0; must be greater than 0"
    )


def test_the_message_says_what_an_override_broke(refused):
    assert refused("", "tune.seed=x") == "tune.seed (override): got 'x'; must be a whole number"
    assert refused("", "tune=3") == "tune (override): got 3; must be a mapping of keys to values"
    assert refused("", "space.seed=3").startswith("space.seed (override): got 3; write one verb")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{method: {lr: {grid: [0.1, 0.2]}}}", "write the key with its dots: method.lr: {grid: [0.1, 0.2]}"),
        (
            "{method: {lr: [0.1], steps: {choice: [1, 2]}}}",
            "write the key with its dots: method.lr: {grid: [0.1]}, method.steps: {choice: [1, 2]}",
        ),
        (
            "{data: {partition: {alpha: {grid: [1, 2]}}}}",
            "write the key with its dots: data.partition.alpha: {grid: [1, 2]}",
        ),
        ("{method.lr: [0.1, 0.2]}", "write one verb and its list, e.g. {grid: [0.1, 0.2]}"),
    ],
)
def test_a_section_in_space_is_told_how_it_is_written(load, space, message):
    with pytest.raises(ConfigError) as caught:
        load(f"space: {space}")
    assert message in str(caught.value)


def test_a_section_with_a_verb_is_a_choice_among_whole_sections(load):
    assert len(load("space: {method: {grid: [{name: fedavg}, {lr: 0.2}]}}").points) == 2


@pytest.mark.parametrize(
    "overrides, name, given",
    [
        (["tune.scheduler.reduction=4"], "asha", {"reduction": 4}),
        (["tune.scheduler.name=median"], "median", {}),
        (["tune.scheduler.name=median", "tune.scheduler.min_trials=2"], "median", {"min_trials": 2}),
        (["tune.scheduler={name: hyperband, reduction: 2}"], "hyperband", {"reduction": 2}),
        (["tune={scheduler.reduction: 2}"], "asha", {"reduction": 2}),
    ],
)
def test_an_override_reaches_an_option_of_the_scheduler(load, overrides, name, given):
    sweep = load(SPACE.replace("mode: max", "scheduler: asha"), *overrides)
    assert sweep.tune.scheduler.name == name
    assert {option: getattr(sweep.tune.rules, option) for option in given} == given
    assert Sweep.of("again", sweep.tree, sweep.tune, [{}], "x").tune == sweep.tune


def test_thousands_of_points_that_cannot_run_are_refused_after_a_hundred():
    seen: list[int] = []
    grid = {"method.lr": {"grid": [*range(1, 40), *(-n for n in range(1, 20_000))]}}
    tree = {"base": {"model": "mlp", "data": {"name": "digits"}}, "space": grid}
    with pytest.raises(ConfigError) as caught:
        Sweep.read(tree, "x.yaml", "x", {}, lambda done, all: seen.append(done))
    lines = str(caught.value).splitlines()
    assert lines[-1] == "100 of the first 139 points cannot run; 19,899 more points were not checked"
    assert len(seen) == 138 and len(lines) <= 52


def test_a_hundred_points_are_all_checked():
    tree = {"base": {"model": "mlp", "data": {"name": "digits"}}, "space": {"rounds": {"grid": [0] * 1}}}
    tree["space"] = {"seed": {"grid": list(range(100))}, "rounds": {"grid": [0]}}
    with pytest.raises(ConfigError) as caught:
        Sweep.read(tree, "x.yaml", "x", {})
    assert "not checked" not in str(caught.value) and "[" not in str(caught.value).splitlines()[-1]


@pytest.mark.parametrize(
    "spec",
    [
        {"uniform": [0.1]},
        {"uniform": ["a", 1.0]},
        {"uniform": [[0.1], 1.0]},
        {"loguniform": [0.1, "b"]},
        {"quniform": [0.0, 1.0]},
        {"quniform": [0.0, 1.0, 0.0]},
        {"randint": [1]},
        {"randint": [None, 3]},
    ],
)
def test_first_points_beside_a_verb_that_cannot_be_drawn_are_one_message(spec):
    tree = {"base": {"model": "mlp", "data": {"name": "digits"}}, "space": {"method.lr": spec}}
    for point in (0.5, 1, "x", float("inf"), 10**400):
        tree["tune"] = {"points_to_evaluate": [{"method.lr": point}]}
        with pytest.raises(ConfigError):
            Sweep.read(tree, "x.yaml", "x", {})
