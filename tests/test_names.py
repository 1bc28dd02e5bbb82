"""Names that a config allows and the tables they are looked up in hold the same names."""

from collections.abc import Collection
from typing import Any, get_args, get_type_hints

import pytest

from fedray import randomness
from fedray.costs.layer_times import MEASURED, MeasuredName
from fedray.methods.frlp import FRLP
from fedray.methods.prunefl import PruneFL
from fedray.methods.staged import Staged
from fedray.policies import observation, rate_search
from fedray.policies.decider import PolicyName
from fedray.policies.line_search import LINE_SEARCHES, SOLVERS, LineSearch
from fedray.pruning.schedules import SCHEDULES, ScheduleName
from rllib_pruner.processes import PROCESSES
from rllib_pruner.rate_search.curves import FAMILIES, Family, Measured, measured


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (ScheduleName, SCHEDULES),
        (LineSearch, LINE_SEARCHES),
        (MeasuredName, MEASURED),
        (Family, FAMILIES),
        (randomness.Purpose, randomness.PURPOSES),
    ],
)
def test_a_literal_has_the_names_of_its_table(names: Any, table: Collection[str]) -> None:
    assert get_args(names) == tuple(table)


@pytest.mark.parametrize(
    ("method", "field", "names"),
    [
        (Staged, "schedule", tuple(SCHEDULES)),
        (Staged, "policy", ("schedule", *get_args(PolicyName))),
        (PruneFL, "time_model", ("profile", *MEASURED)),
        (FRLP, "solver", SOLVERS),
    ],
)
def test_a_field_allows_the_names_of_its_table(method: type, field: str, names: tuple[str, ...]) -> None:
    assert get_args(get_type_hints(method)[field]) == names


def test_processes_are_listed_under_the_names_that_their_policies_carry() -> None:
    assert {name: kind.interface for name, kind in PROCESSES.items()} == {
        "rate_search": rate_search.INTERFACE,
        "stages": observation.INTERFACE,
    }


@pytest.mark.parametrize("model", get_args(Measured))
def test_each_measured_curve_is_there(model: Any) -> None:
    assert len(measured(model)[0]) > 2
