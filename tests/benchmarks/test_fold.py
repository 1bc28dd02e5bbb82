"""The benchmark of folds prints a row for each rule."""

import sys

import pytest

from benchmarks import fold


def test_it_prints_a_row_for_each_rule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["fold", "--size", "1000", "--scores", "500", "--times", "1"])
    fold.main()
    shown = capsys.readouterr().out
    for row in ("plain", "one common mask", "clients' own masks", "literal, w ≠ 0", "top_k", "torch.sort"):
        assert f"\n{row} " in shown
    assert "an update of 1,000 weights" in shown
    assert "the mask of 500 scores" in shown
