"""The tables that a config's values are names of. A file of `imports` adds to the tables themselves."""

from collections.abc import Mapping
from typing import Any

from fedray.config.trees import CHOICES
from fedray.costs.differences import CODECS
from fedray.data import DATASETS, PARTITIONS
from fedray.federation.sampling import SAMPLERS
from fedray.methods import METHODS
from fedray.models import MODELS

OPTIONS: Mapping[str, Mapping[str, type[Any]]] = {
    "method": METHODS,
    "data.partition": PARTITIONS,
    "clients.sampler": SAMPLERS,
    "clients.uplink": CODECS,
}
"""Section of `CHOICES` → its table: name → dataclass, whose fields are the other keys of the section."""

TABLES: Mapping[str, Mapping[str, Any]] = {
    **{f"{section}.{CHOICES[section]}": table for section, table in OPTIONS.items()},
    "data.name": DATASETS,
    "model": MODELS,
}
"""Key of a config → the table that its value is a name of."""
