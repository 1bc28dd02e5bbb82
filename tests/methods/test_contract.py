"""What every method of the table keeps to. A new entry of METHODS is tested without a change here."""

import ast
import io
import pickle
import re
import sys
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from functools import cache
from inspect import isfunction
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
from typing_extensions import get_original_bases

from fedray.config import yaml_text
from fedray.config.run_config import RunConfig
from fedray.config.trees import Tree
from fedray.errors import ConfigError
from fedray.federation.exchange import Answer, Chunk, Job
from fedray.federation.method import Method
from fedray.federation.pool import LocalPool
from fedray.federation.server import Checkpoint, Schedule, Server
from fedray.federation.worker import Rules, Workplace
from fedray.methods import METHODS
from fedray.pruning.channels import removed_entries
from fedray.types import RoundReport, ServerState, Task
from tests import small

ROUNDS = 3
DOCS = Path(__file__).parents[2] / "docs" / "methods"
SHARED = {field.name for field in fields(Method)}
DATA = small.dataset(600)

every_method = pytest.mark.parametrize("name", METHODS)
# an option that all methods share is tried with one of them
every_option = pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, field.name)
        for name, cls in METHODS.items()
        for field in fields(cls)
        if name == "fedavg" or field.name not in SHARED
    ],
)


class WatchedPool(LocalPool):
    """A pool that remembers what the devices were sent."""

    def __init__(self, place: Workplace) -> None:
        super().__init__(place)
        self.sent: list[Task] = []

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        self.sent += job.tasks
        return super().run(job, chunks)


@dataclass
class Run:
    """A finished run: its server, and what there was before and after each round (the set-up is round 0)."""

    server: Server
    initial_loss: float
    reports: list[RoundReport]
    states: list[ServerState]
    weights: list[str]


def begin(
    method: Method, seed: int = 0, checkpoint: Checkpoint | None = None, rules: Rules = small.RULES
) -> Server:
    """Return a federation of six clients, with examples for the server too, that has not begun."""
    schedule = Schedule(rounds=ROUNDS, cohort=4)
    return small.server(
        method,
        schedule=schedule,
        server_rows=60,
        seed=seed,
        data=DATA,
        rules=rules,
        pool=WatchedPool,
        checkpoint=checkpoint,
    )


@cache
def run_of(name: str, seed: int = 0) -> Run:
    """Run a method of the table with its defaults, once for all tests; nobody may change what it returns."""
    server = begin(METHODS[name](), seed)
    run = Run(server, server.evaluate(server.side.validation).loss, [], [], [])
    for make in (server.setup, *[server.step] * ROUNDS):
        run.reports.append(make())
        run.states.append(server.state)
        run.weights.append(server.state.params.sha256)
    return run


def tree_of(name: str, **options: object) -> Tree:
    """Return the config of a run that any method can make."""
    return {
        "method": {"name": name, **options},
        "data": {"server_fraction": 0.1},
        "tracking": {"uri": "none"},
    }


# ── what it looks like


@every_method
def test_a_frozen_dataclass_straight_below_method(name: str) -> None:
    cls = METHODS[name]
    assert cls.__bases__ == (Method,), "methods do not inherit from each other"
    assert is_dataclass(cls)
    method = cls()
    assert set(vars(method)) == {field.name for field in fields(cls)}, "state lives in ServerState.memory"
    with pytest.raises(FrozenInstanceError):
        method.lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        cls(1)  # type: ignore[call-arg]


@every_method
def test_a_file_of_its_own_that_says_where_it_is_from(name: str) -> None:
    cls = METHODS[name]
    assert cls.__module__ == f"fedray.methods.{name}"
    text = sys.modules[cls.__module__].__doc__ or ""
    assert "Differs from the paper" in text
    assert cls.citation, "the class has no citation"
    for source in cls.citation.split(";"):
        author, year = source.split()[0], re.findall(r"\b\d{4}\b", source)[-1]
        assert author in text and year in text, f"{source.strip()} is not cited in the module's docstring"


@every_method
def test_a_page_that_names_its_options_and_all_it_sends(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("Overview", "Usage", "Implementation details", "Results"):
        assert re.search(rf"^## {heading}", page, re.MULTILINE), f"no heading {heading}"
    own = {field.name for field in fields(METHODS[name])} - SHARED
    missing = {word for word in own | names_sent_by(name) if f"`{word}`" not in page}
    assert not missing, f"docs/methods/{name}.md does not say a word about {sorted(missing)}"


def names_sent_by(name: str) -> set[str]:
    """Return the keys of all `extras=`, `sums=` and `each=` in a method's file."""
    source = sys.modules[METHODS[name].__module__].__file__
    assert source is not None
    sent = [
        node.value
        for node in ast.walk(ast.parse(Path(source).read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg in ("extras", "sums", "each")
    ]
    dicts = [node for value in sent for node in ast.walk(value) if isinstance(node, ast.Dict)]
    return {str(key.value) for keys in dicts for key in keys.keys if isinstance(key, ast.Constant)}


# ── how it is configured and carried about


@every_method
def test_the_defaults_survive_config_and_yaml(name: str, tmp_path: Path) -> None:
    config = RunConfig.from_tree(tree_of(name))
    assert config.method.options == METHODS[name]()
    path = tmp_path / "config.yaml"
    path.write_text(yaml_text.dump(config.to_tree()), encoding="utf-8")
    again = RunConfig.from_tree(yaml_text.load(path))
    assert again.method == config.method
    assert again.to_tree() == config.to_tree()
    assert again.digest == config.digest


@every_option
def test_values_out_of_range_are_refused_by_name(name: str, option: str) -> None:
    default = getattr(METHODS[name](), option)
    wrong: list[object] = [{"not": "a value"}]
    if isinstance(default, bool):
        wrong.append("perhaps")
    elif isinstance(default, int | float):
        wrong += [-1, "many"]
    elif isinstance(default, str):
        wrong.append("no such choice")
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"method\.{option}\b"):
            RunConfig.from_tree(tree_of(name, **{option: value}))


@every_method
def test_an_unknown_option_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.local_epoch .*did you mean 'method\.local_epochs'"):
        RunConfig.from_tree(tree_of(name, local_epoch=1))


@every_method
def test_pickles_with_the_function_that_runs_on_the_device(name: str) -> None:
    method = METHODS[name](lr=0.125)
    assert pickle.loads(pickle.dumps(method)) == method
    assert pickle.loads(pickle.dumps(method.client_update)).__self__ == method


# ── what it does


@every_method
def test_three_rounds_improve_the_model(name: str) -> None:
    run = run_of(name)
    assert run.reports[-1].metrics["val/loss"] < run.initial_loss


@every_method
def test_its_memory_is_of_the_type_that_its_class_names(name: str) -> None:
    (base,) = get_original_bases(METHODS[name])
    (named,) = get_args(base)
    kinds = get_args(named) if isinstance(named, UnionType) else (named,)
    for state in run_of(name).states:
        assert isinstance(state.memory, kinds)


@every_method
def test_no_hook_takes_or_returns_a_state_of_another_memory(name: str) -> None:
    (memory,) = get_args(get_original_bases(METHODS[name])[0])
    found = {
        get_args(hint)
        for member in vars(METHODS[name]).values()
        if isfunction(member)
        for hint in get_type_hints(member).values()
        if get_origin(hint) is ServerState or hint is ServerState
    }
    assert found <= {(memory,)}


@every_method
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(name: str) -> None:
    again = begin(METHODS[name]())
    reports = small.run(again)
    assert again.model.sha256 == run_of(name).server.model.sha256
    for report, before in zip(reports, run_of(name).reports, strict=True):
        assert {k: v for k, v in report.metrics.items() if "wall" not in k} == {
            k: v for k, v in before.metrics.items() if "wall" not in k
        }
    assert run_of(name, seed=1).server.model.sha256 != again.model.sha256


@every_method
def test_a_run_that_goes_on_from_a_checkpoint_ends_like_one_that_never_stopped(name: str) -> None:
    first = begin(METHODS[name]())
    first.setup()
    for _ in range(ROUNDS - 1):
        first.step()
    file = io.BytesIO()
    torch.save(first.checkpoint, file)
    file.seek(0)
    second = begin(METHODS[name](), checkpoint=torch.load(file, weights_only=False))
    report = second.step()
    whole = run_of(name)
    assert second.state.round == ROUNDS + 1
    assert second.state.params.sha256 == whole.server.state.params.sha256
    assert second.state.mask == whole.server.state.mask
    for metric in ("bytes/up", "bytes/down", "total/bytes/down", "total/flops/server", "total/flops/clients"):
        assert report.metrics[metric] == whole.reports[-1].metrics[metric], metric


@every_method
def test_a_round_leaves_the_state_before_it_as_it_was(name: str) -> None:
    run = run_of(name)
    assert [state.params.sha256 for state in run.states] == run.weights


@every_method
def test_every_round_is_paid_for(name: str) -> None:
    for report in run_of(name).reports[1:]:
        for cost in ("bytes/up", "bytes/down", "flops/clients", "time/simulated_s"):
            assert report.metrics[cost] > 0, f"{cost} in round {report.round}"


@every_method
def test_the_servers_own_training_is_metered_if_it_declares_any(name: str) -> None:
    spent = run_of(name).reports[-1].metrics
    assert (spent["total/time/server_wall_s"] > 0) == METHODS[name].uses_server_data
    if METHODS[name].uses_server_data:
        assert spent["total/flops/server"] > 0


@every_method
def test_the_mask_holds_all_that_is_not_prunable_but_whole_channels(name: str) -> None:
    groups = run_of(name).server.place.model.channel_groups
    for state in run_of(name).states:
        held = state.mask.flat | removed_entries(state.mask, groups)
        assert bool(held[~state.mask.layout.prunable_flat].all())
        assert 0 < state.mask.density <= 1


@every_method
def test_the_density_is_what_the_options_promise(name: str) -> None:
    method, mask = METHODS[name](), run_of(name).server.state.mask
    weight = 1 / mask.layout.prunable_count
    if (target := getattr(method, "density", None)) is not None and not getattr(method, "threshold", None):
        assert mask.density == pytest.approx(target, abs=weight)
    if (floor := getattr(method, "min_density", None)) is not None:
        assert mask.density >= floor - weight


@every_method
def test_devices_get_zeros_outside_the_mask(name: str) -> None:
    server = run_of(name).server
    assert isinstance(server.pool, WatchedPool)
    assert server.pool.sent
    for task in server.pool.sent:
        assert not bool(task.params.flat[~task.mask.flat].any())
    assert not bool(server.model.flat[~server.state.mask.flat].any())


@every_method
def test_a_round_that_nobody_answers_does_no_harm(name: str) -> None:
    server = begin(METHODS[name](), rules=Rules(deadline_s=1e-6))
    reports = small.run(server)
    assert [len(r.clients) for r in reports[1:]] == [4] * ROUNDS
    assert all(record.fate == "late" for report in reports for record in report.clients)
    assert server.model.is_finite()
    assert int(server.model.flat.count_nonzero()) > server.state.mask.count // 2


@every_method
def test_coarser_values_cost_fewer_bytes_and_still_learn(name: str) -> None:
    exactly = replace(METHODS[name](), uplink_values="fp32", downlink_values="fp32")
    coarsely = replace(exactly, uplink_values="int8", downlink_values="fp16")
    exact, coarse = (small.run(begin(method))[-1].metrics for method in (exactly, coarsely))
    assert coarse["total/bytes/up"] < exact["total/bytes/up"]
    assert coarse["total/bytes/down"] < exact["total/bytes/down"]
    assert coarse["val/loss"] < run_of(name).initial_loss
