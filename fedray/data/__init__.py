"""DATASETS, PARTITIONS: data sets, and how clients share their examples."""

from fedray.data.checking import checked
from fedray.data.datasets import DATASETS, Dataset, DatasetSpec, Examples
from fedray.data.partition import PARTITIONS, Partition, PartitionKind
from fedray.data.splits import Splits, split

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "Dataset",
    "DatasetSpec",
    "Examples",
    "Partition",
    "PartitionKind",
    "Splits",
    "checked",
    "split",
]
