"""`fedray.load_model`: the final model of a run, outside of fedray."""

import pytest
import torch

import fedray
from tests.experiment import tiny


@pytest.mark.parametrize("changes", [{}, {"model": "cnn"}], ids=["mlp", "cnn"])
def test_the_loaded_model_has_the_accuracy_that_the_run_reports(in_tmp, changes):
    history = fedray.run(tiny.config({**changes, "rounds": 2}))
    model = fedray.load_model(history.path)
    assert isinstance(model, torch.nn.Module) and not model.training
    data = fedray.DATASETS["digits"].load(None)
    with torch.no_grad():
        right = model(data.normalise(data.test.x)).argmax(1) == torch.from_numpy(data.test.y)
    assert right.float().mean().item() == pytest.approx(history.result["test/accuracy"], abs=1e-6)
    assert fedray.load_run(history.path).last("test/accuracy") == history.result["test/accuracy"]


def test_a_run_without_a_final_model(in_tmp):
    history = fedray.run(tiny.config({"rounds": 1}))
    (history.path / "model.safetensors").unlink()
    with pytest.raises(fedray.RunError, match=r"no model.safetensors: .* fedray resume runs/"):
        fedray.load_model(history.path)
    with pytest.raises(fedray.FedrayError, match="nowhere"):
        fedray.load_model("nowhere")
