"""CIFAR-100 and Tiny ImageNet: files are read as published, and faults are named."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedray.data import DATASETS
from fedray.errors import DataError


def cifar100(root: Path) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for part, count in (("train", 3), ("test", 2)):
        pixels = (np.arange(count * 3072) % 251).astype(np.uint8).reshape(count, 3072)
        fine, coarse = [10 * k for k in range(count)], [k for k in range(count)]
        batch = {"data": pixels, "fine_labels": fine, "coarse_labels": coarse, "filenames": ["x"] * count}
        (folder / part).write_bytes(pickle.dumps(batch, protocol=2))
    return root


def tiny_imagenet(root: Path) -> Path:
    """Two classes of two colours; one image is grey, as some of the published ones are."""
    folder = root / "tiny-imagenet-200"
    colours = {"n02": (255, 0, 0), "n01": (0, 0, 255)}
    (folder / "val" / "images").mkdir(parents=True)
    for wnid, colour in colours.items():
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(images / f"{wnid}_0.JPEG")
        Image.new("L", (64, 64), 100).save(images / f"{wnid}_1.JPEG")
        Image.new("RGB", (64, 64), colour).save(folder / "val" / "images" / f"val_{wnid}.JPEG")
    rows = "".join(f"val_{wnid}.JPEG\t{wnid}\t0\t0\t63\t63\n" for wnid in colours)
    (folder / "val" / "val_annotations.txt").write_text(rows)
    return root


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    data = DATASETS["cifar100"].load(cifar100(tmp_path))
    assert data.train.x.shape == (3, 3, 32, 32) and data.train.y.tolist() == [0, 10, 20]
    assert data.train.x[0, 1, 0, 0] == 1024 % 251
    assert "the published set 50,000 and 10,000" in data.warnings[0]


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = cifar100(tmp_path) / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps({"data": Path("x"), "fine_labels": []}))
    with pytest.raises(DataError, match=r"train: cannot be read .*has no place in a batch"):
        DATASETS["cifar100"].load(tmp_path)


def test_tiny_imagenet_numbers_its_classes_and_tests_on_the_validation_images(tmp_path: Path) -> None:
    data = DATASETS["tiny_imagenet"].load(tiny_imagenet(tmp_path))
    assert data.train.y.tolist() == [0, 0, 1, 1] and data.test.y.tolist() == [1, 0]
    assert data.train.x.shape == (4, 3, 64, 64)
    blue, grey = data.train.x[0].mean(axis=(1, 2)), data.train.x[1].mean(axis=(1, 2))
    assert blue.argmax() == 2 and np.ptp(grey) == 0
    assert data.test.x[0].mean(axis=(1, 2)).argmax() == 0


@pytest.mark.parametrize(
    "path, content, message",
    [
        ("val/val_annotations.txt", "val_n01.JPEG\tn99\n", "n99"),
        ("val/val_annotations.txt", "no tabs\n", "cannot be read"),
        ("train/n01/images/n01_0.JPEG", "no image", "n01_0.JPEG: cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, path: str, content: str, message: str) -> None:
    (tiny_imagenet(tmp_path) / "tiny-imagenet-200" / path).write_text(content)
    with pytest.raises(DataError, match=message):
        DATASETS["tiny_imagenet"].load(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"train: has no folder of a class; data\.root needs the unzipped archive"
    ):
        DATASETS["tiny_imagenet"].load(tmp_path)
