"""DATASETS, PARTITIONS: data sets, and how clients share their examples."""

from fedray.data.checking import checked
from fedray.data.datasets import DATASETS, Dataset, DatasetSpec, Examples, Splits, split
from fedray.data.partition import PARTITIONS, Partition, PartitionKind

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
