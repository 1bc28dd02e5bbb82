"""The environment steps the very hooks of a run; federations are drawn by seed; logs are replayed."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray

from fedray.federation.pool import LocalPool
from fedray.federation.server import Server
from fedray.methods.staged import Staged
from fedray.policies import observation
from fedray.policies.observation import FEATURES
from fedray.policies.stages import ACTIONS, FACTORS
from rllib_pruner.stages import logs
from rllib_pruner.stages.env import StageEnv
from rllib_pruner.stages.federations import STAGES, Federations, server_of
from rllib_pruner.stages.process import StageProcess, evaluate
from rllib_pruner.stages.replay import Log, ReplayEnv

SMALL = {"rounds": (20, 20), "cohort": (4, 4)}
GROW = ACTIONS.index("×1.25")
PLAYED = [3, 0, GROW, 4, 1, 0, 2, 0, 0, 3, 0, 0]


def short() -> StageEnv:
    return StageEnv({"federations": SMALL})


def test_passes_gymnasiums_checks() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*", UserWarning)
        check_env(short(), skip_render_check=True)


def test_an_episode_is_the_run_that_the_same_decisions_make(monkeypatch: pytest.MonkeyPatch) -> None:
    env = short()
    first, begun = env.reset(options={"federation": 7, "preference": 0.2})
    seen = [first]
    total, ended = 0.0, False
    for action in PLAYED:
        observation, reward, ended, truncated, info = env.step(np.int64(action))
        seen.append(observation)
        total += float(reward)
        assert not truncated
    assert ended, "twelve decisions are a run"

    shown: list[NDArray[np.float32]] = []

    class Played:
        def act(self, observation: NDArray[np.float32], allowed: Sequence[int]) -> int:
            shown.append(observation)
            return PLAYED[len(shown) - 1]

    monkeypatch.setattr("fedray.policies.decider.TrainedPolicy.load", lambda *_: Played())
    config = Federations(**SMALL).draw(7, {"name": "staged", "policy": "bandit"})  # type: ignore[arg-type]
    options = {**vars(config.method.options), "policy": "agent", "preference": 0.2, "steepest": 0.0}
    server = server_of(config, Staged(**options))
    server.setup()
    reports = []
    while server.state.round <= config.rounds:
        reports.append(server.step())
    assert server.model.sha256 == env.episode.server.model.sha256
    for ours, theirs in zip(shown, seen, strict=False):
        np.testing.assert_array_equal(ours, theirs)
    # the traffic is what the run's reports say, of the clients that could be asked; rewards add up to the end
    moved = [(r.metrics["bytes/up"] + r.metrics["bytes/down"]) / len(r.clients) for r in reports]
    dense = config.rounds * 2 * 4 * server.place.model.layout.size
    assert info["spent_bytes"] == pytest.approx(sum(moved) / dense)
    gained, traffic, flops = (info[k] - begun[k] for k in ("accuracy", "spent_bytes", "spent_flops"))
    assert total == pytest.approx(gained - 0.2 * (traffic + 0.25 * flops))


def test_the_same_seed_draws_the_same_federation() -> None:
    drawn = Federations()
    method = {"name": "staged", "policy": "bandit"}
    assert drawn.draw(3, method) == drawn.draw(3, method) != drawn.draw(4, method)


def test_federations_are_various() -> None:
    drawn = [Federations().draw(seed, {"name": "fedavg"}) for seed in range(60)]
    assert len({config.method.options.lr for config in drawn}) == 60
    assert {config.clients.cohort for config in drawn} == set(range(4, 11))
    assert {config.data.partition.kind for config in drawn} == {"iid", "dirichlet"}
    assert all(18 <= config.rounds <= 45 for config in drawn)


# ── logs and their replay


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    env = short()
    rows = []
    for number in range(3):
        rows += logs.play(env, number, logs.behaviour(np.random.default_rng(number)))
    logs.write(rows, folder / "episodes-00000.parquet")
    return folder


def test_a_log_holds_every_stage_and_the_end(log: Path) -> None:
    table = logs.load(log)
    assert tuple(table.columns) == logs.COLUMNS
    for _, episode in table.groupby("episode"):
        assert episode["stage"].tolist() == list(range(len(episode)))
        assert STAGES - 1 <= len(episode) <= STAGES + 1  # a stage whose clients all dropped out is none
        assert (episode["action"].iloc[:-1] >= 0).all() and episode["action"].iloc[-1] == -1
        assert episode["spent_bytes"].is_monotonic_increasing


def test_a_schedule_is_kept_to_as_closely_as_the_actions_allow() -> None:
    choose = logs.scheduled(0.1, 4, 0.0, np.random.default_rng(0))
    density, played = 1.0, []
    for stage in range(6):
        seen = np.zeros(len(FEATURES), dtype=np.float32)
        seen[FEATURES.index("density")] = density
        played.append(choose(stage, seen))
        density *= FACTORS[played[-1]]
    # targets 0.480, 0.213, 0.114, 0.1: halves, and three quarters of the last eighth
    assert played == [3, 3, 3, 2, 0, 0]


def test_styles_differ_and_are_repeatable() -> None:
    nothing = np.zeros(len(FEATURES), dtype=np.float32)

    def played(seed: int) -> list[int]:
        choose = logs.behaviour(np.random.default_rng(seed))
        return [choose(stage, nothing) for stage in range(STAGES)]

    assert played(1) == played(1)
    assert len({tuple(played(seed)) for seed in range(20)}) > 10
    assert {action for seed in range(20) for action in played(seed)} == set(range(len(ACTIONS)))


def test_the_replay_passes_gymnasiums_checks(log: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*", UserWarning)
        check_env(ReplayEnv({"log": log}), skip_render_check=True)


def test_the_replay_of_one_episode_is_that_episode(log: Path) -> None:
    table = logs.load(log)
    first = table[table["episode"] == 0]
    alone = log.parent / "alone"
    alone.mkdir(exist_ok=True)
    logs.write(first.to_dict("records"), alone / "episodes-00000.parquet")
    env = ReplayEnv({"log": alone, "preference": 0.3, "neighbours": 1})
    seen, _ = env.reset(seed=0)
    total, ended, steps = 0.0, False, 0
    while not ended:
        assert seen[:-1].tolist() == first.iloc[steps][[f"x{i}" for i in range(len(FEATURES) - 1)]].tolist()
        assert seen[-1] == pytest.approx(1 + np.log10(0.3) / 2)
        seen, reward, ended, _, _ = env.step(np.int64(first["action"].iloc[steps]))
        total, steps = total + float(reward), steps + 1
    assert steps == len(first) - 1
    gained = first["accuracy"].iloc[-1] - first["accuracy"].iloc[0]
    spent = first[["spent_bytes", "spent_flops"]].iloc[-1] - first[["spent_bytes", "spent_flops"]].iloc[0]
    assert total == pytest.approx(gained - 0.3 * (spent["spent_bytes"] + 0.25 * spent["spent_flops"]))


def test_the_most_similar_stages_are_found(log: Path) -> None:
    logged = Log(log)
    for row in np.flatnonzero(logged.action >= 0)[:20]:
        found = logged.similar(int(row), int(logged.action[row]), 1)
        assert len(found) == 1
        assert found[0] == row  # nothing is more similar than itself
        others = logged.similar(int(row), 0, 5)
        assert (abs(logged.stage[others] - logged.stage[row]) <= 1).all()
        assert (logged.action[others] == 0).all()


def test_no_log_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no log of episodes"):
        logs.load(tmp_path)


def test_a_policy_is_judged_on_held_out_federations() -> None:
    process = StageProcess(federations=Federations(**SMALL), problems=1, preferences=(0.1, 1.0))  # type: ignore[arg-type]
    held = evaluate(process, lambda stage, _: 0)
    pruned = evaluate(process, lambda stage, _: 4 if stage < 3 else 0)
    assert held["bytes/0.1"] == pytest.approx(held["bytes/1"]) and held["bytes/1"] > 2 * pruned["bytes/1"]
    expected = np.mean([held["return/0.1"], held["return/1"]])
    assert held["score"] == pytest.approx(expected)


def test_the_server_is_in_this_process() -> None:
    config = Federations(**SMALL).draw(0, {"name": "fedavg"})  # type: ignore[arg-type]
    server = server_of(config)
    assert isinstance(server, Server) and isinstance(server.pool, LocalPool)
    assert StageProcess.interface.version == observation.VERSION


def test_the_bandit_of_the_table_is_the_bandit_of_a_run() -> None:
    env = short()
    env.reset(options={"federation": 7, "preference": 0.1})
    ended, asked = False, []
    while not ended:
        asked.append(env.asked_by_bandit())
        _, _, ended, _, _ = env.step(np.int64(asked[-1]))
    config = Federations(**SMALL).draw(7, {"name": "staged", "policy": "bandit"})  # type: ignore[arg-type]
    server = server_of(config, Staged(**vars(config.method.options)))
    server.setup()
    reports = [server.step() for _ in range(config.rounds)]
    decided = [r.metrics for r in reports if "method/asked" in r.metrics]
    assert asked == [m["method/asked"] for m in decided]
    assert env.episode.server.model.sha256 == server.model.sha256
