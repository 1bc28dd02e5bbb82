"""What is learnt from: data sets, and how their examples are spread over the clients."""

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
