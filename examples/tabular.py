"""A table: 30 measurements of a tumour, benign or malignant.  A data set and a model in one file.

    fedray run tune_configs/quickstart.yaml --import examples/tabular.py data.name=tumours model=table

The table comes with scikit-learn: Wolberg, Street and Mangasarian, Breast Cancer Wisconsin (Diagnostic), UCI,
1995 (CC BY 4.0). Its columns have different units, so the data set gives a mean and a deviation for each.
"""

from pathlib import Path

import numpy as np
from torch import nn

from fedray import DATASETS, MODELS, Architecture, Dataset, DatasetSpec, Examples


def load(root: Path | None) -> Dataset:
    """Load the table; every fifth row is for testing."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)  # float64 (569, 30), int64 (569,)
    test = np.arange(len(y)) % 5 == 0
    train = x[~test]
    return Dataset(
        "tumours",
        train=Examples(train, y[~test]),
        test=Examples(x[test], y[test]),
        num_classes=2,
        input_shape=(30,),
        mean=tuple(train.mean(axis=0)),
        std=tuple(train.std(axis=0)),
    )


def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a perceptron with two hidden layers."""
    (columns,) = input_shape
    return nn.Sequential(
        nn.Linear(columns, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes)
    )


DATASETS["tumours"] = DatasetSpec(
    load=load, input_shape=(30,), num_classes=2, train_examples=455, test_examples=114
)
MODELS["table"] = Architecture(build, source="this file", summary="fc 64, fc 32, fc classes; ReLU")
