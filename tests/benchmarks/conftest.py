"""The data sets that a benchmark adds to the table do not outlive its test."""

from collections.abc import Iterator

import pytest

from fedray.data import DATASETS


@pytest.fixture(autouse=True)
def the_table_of_data_sets_stays() -> Iterator[None]:
    """Put the table back."""
    before = dict(DATASETS)
    yield
    for name in set(DATASETS) - set(before):
        del DATASETS[name]
