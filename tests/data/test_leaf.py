"""LEAF's files: what is read, and which faults of a file are named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedray.config.run_config import RunConfig
from fedray.data import DATASETS
from fedray.data.leaf import LETTERS
from fedray.errors import DataError
from fedray.experiment.run import run
from fedray.models import build_model

LINE = ("to be, or not to be: that is the question " * 2)[:80]


def write(folder: Path, users: dict[str, tuple[list[Any], list[Any]]], name: str = "all_0.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
    counts = [len(x) for x, _ in users.values()]
    path = folder / name
    path.write_text(json.dumps({"users": list(users), "num_samples": counts, "user_data": data}))
    return path


def femnist(root: Path) -> Path:
    """Two files of writers; image i of a writer has i dark pixels."""

    def images(count: int) -> list[list[float]]:
        return [[0.0] * i + [1.0] * (784 - i) for i in range(count)]

    write(root / "femnist" / "train", {"f1": (images(2), [0, 61]), "f0": (images(1), [3])})
    write(root / "femnist" / "train", {"f9": (images(3), [1, 2, 3]), "empty": ([], [])}, "all_1.json")
    write(root / "femnist" / "test", {"f1": (images(1), [5])})
    return root


def shakespeare(root: Path, roles: int = 3, lines: int = 12) -> Path:
    turned = [LINE[i:] + LINE[:i] for i in range(lines)]
    for part, count in (("train", lines), ("test", 3)):
        texts = turned[:count]
        users = {f"ROLE {k}": (texts, [text[0] for text in texts]) for k in range(roles)}
        write(root / "shakespeare" / part, users)
    return root


def test_images_are_white_on_black_and_writers_are_numbered_in_the_order_of_the_files(tmp_path: Path) -> None:
    data = DATASETS["femnist"].load(femnist(tmp_path))
    assert data.train.x.shape == (6, 1, 28, 28) and data.train.x.dtype == np.uint8
    assert data.train.x.reshape(6, -1).sum(axis=1).tolist() == [0, 255, 0, 0, 255, 510]
    assert data.train.y.tolist() == [0, 61, 3, 1, 2, 3] and data.test.y.tolist() == [5]
    assert data.writers is not None and data.writers.tolist() == [0, 0, 1, 2, 2, 2]
    assert (data.num_classes, data.tokens, data.warnings) == (62, 0, ())


def test_characters_are_places_in_the_alphabet_of_leaf(tmp_path: Path) -> None:
    data = DATASETS["shakespeare"].load(shakespeare(tmp_path, roles=2))
    assert len(LETTERS) == len(set(LETTERS)) == 80 == data.num_classes == data.tokens
    assert data.train.x.shape == (24, 80)
    assert "".join(LETTERS[code] for code in data.train.x[0]) == LINE
    assert (
        LETTERS[data.train.y[1]] == "o"
        and data.writers is not None
        and data.writers.tolist() == [0] * 12 + [1] * 12
    )
    tokens = data.normalise(data.train.x[:3])
    assert tokens.dtype == torch.int64 and build_model("char_transformer", (80,), 80).input_shape == (80,)


@pytest.mark.parametrize(
    "users, message",
    [
        ({"a": ([LINE[:-1] + "é"], ["a"])}, "cannot be read"),
        ({"a": ([LINE], [])}, r"user 'a' has 1 examples and 0 labels"),
        ({"a": ([LINE, LINE[:-1]], ["a", "b"])}, "cannot be read"),
        ({"a": ([[0.5]], ["a"])}, "cannot be read"),
    ],
)
def test_a_fault_of_a_file_is_named(tmp_path: Path, users: Any, message: str) -> None:
    shakespeare(tmp_path)
    path = write(tmp_path / "shakespeare" / "train", users)
    with pytest.raises(DataError, match=message) as error:
        DATASETS["shakespeare"].load(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", '{"users": ["a"]}', '{"users": 3}', "[" * 100_000])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    femnist(tmp_path)
    (tmp_path / "femnist" / "train" / "all_1.json").write_text(content)
    with pytest.raises(DataError, match=r"all_1\.json"):
        DATASETS["femnist"].load(tmp_path)


def test_a_user_that_stands_in_two_files_is_refused(tmp_path: Path) -> None:
    femnist(tmp_path)
    write(tmp_path / "femnist" / "train", {"f1": ([[1.0] * 784], [0])}, "all_2.json")
    with pytest.raises(DataError, match=r"user 'f1' stands twice"):
        DATASETS["femnist"].load(tmp_path)


@pytest.mark.parametrize("pixel", [-0.1, 1.1, float("nan")])
def test_pixels_outside_their_range_are_refused(tmp_path: Path, pixel: float) -> None:
    femnist(tmp_path)
    write(tmp_path / "femnist" / "train", {"f5": ([[pixel] * 784], [0])}, "all_2.json")
    with pytest.raises(DataError, match=r"outside 0\.\.1"):
        DATASETS["femnist"].load(tmp_path)


def test_a_missing_folder_is_named_with_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"femnist/train: has no JSON file; data\.root needs the train/ and test/"
    ):
        DATASETS["femnist"].load(tmp_path)


def test_a_federation_of_roles_trains_and_is_pruned(tmp_path: Path) -> None:
    shakespeare(tmp_path / "data")
    config = RunConfig.from_tree(
        {
            "rounds": 2,
            "model": "char_transformer",
            "data": {"name": "shakespeare", "root": str(tmp_path / "data"), "partition": {"kind": "natural"}},
            "clients": {"population": 3, "cohort": 2, "actors": 0},
            "method": {
                "name": "random_mask",
                "density": 0.3,
                "batch_size": 4,
                "optimizer": "adam",
                "lr": 0.003,
            },
            "tracking": {"uri": "none"},
        }
    )
    history = run(config, out=tmp_path / "run")
    assert history.result["density/global"] == pytest.approx(0.3, abs=0.001)
    assert history.result["total/flops/clients"] > 0
