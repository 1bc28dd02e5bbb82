"""`train.precision`: bfloat16 is refused where it would not be faster, and recorded where it is used."""

import pytest
import torch

from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError
from fedray.tracking.provenance import declared

BASE = {"clients": {"population": 10, "cohort": 2}, "tracking": {"uri": "none"}}
BF16 = BASE | {"train": {"precision": "bf16"}}


def processor(monkeypatch: pytest.MonkeyPatch, **instructions: bool) -> None:
    """Let torch say which instructions the processor has."""
    found = {"cpu_name": "Acme 486", "avx2": True, **instructions}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_with_the_instructions_trains_in_bfloat16(monkeypatch: pytest.MonkeyPatch, name: str):
    processor(monkeypatch, **{name: True})
    config = RunConfig.from_tree(BF16)
    assert declared(config)["precision"] == "bf16"
    assert config.digest != RunConfig.from_tree(BASE).digest
    assert config.override({"train.precision": "fp32"}).digest == RunConfig.from_tree(BASE).digest


def test_any_other_is_refused_by_name_with_the_instructions_it_lacks(monkeypatch: pytest.MonkeyPatch):
    processor(monkeypatch, avx512_bf16=False)
    with pytest.raises(ConfigError, match=r"train\.precision.*Acme 486.*avx512_bf16, amx_bf16.*use fp32"):
        RunConfig.from_tree(BF16)
    assert RunConfig.from_tree(BASE).train.precision == "fp32"


def test_clients_on_gpus_do_not_need_the_instructions_of_the_driver(monkeypatch: pytest.MonkeyPatch):
    processor(monkeypatch)
    on_gpus = {"clients": {"population": 10, "cohort": 2, "actors": 2, "resources": {"gpu": 0.5}}}
    assert RunConfig.from_tree(BF16 | on_gpus).train.precision == "bf16"
    some = on_gpus["clients"] | {"resources": {"gpu": 1, "by_device": {"phone": {"cpu": 1}}}}
    with pytest.raises(ConfigError, match="Acme 486"):
        RunConfig.from_tree(BF16 | {"clients": some})


@pytest.mark.parametrize("given", ["bfloat16", "fp16", 16, None])
def test_other_precisions_are_refused_with_those_there_are(given: object):
    with pytest.raises(ConfigError, match=r"train\.precision.*fp32.*bf16"):
        RunConfig.from_tree(BASE | {"train": {"precision": given}})
