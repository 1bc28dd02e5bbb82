"""FedRolex: windows that roll round the end, and a server that is wider than any client."""

import pytest
import torch

from fedray.federation.server import Schedule
from fedray.methods.fedrolex import FedRolex
from fedray.types import ClientInfo
from tests import small


def test_the_window_begins_one_channel_further_in_each_round() -> None:
    """conv1 has 4 channels, conv2 has 6; a slice of level b has 2 and 3 of them."""
    method = FedRolex(levels="b", lr=0.01)
    server = small.server(method, architecture=small.CNN, schedule=Schedule(6, 4))
    server.setup()
    assert server.state.mask.is_full
    seen = []
    for _ in range(6):
        mask = method.configure(server.state, ClientInfo(0, 10, small.DEVICE)).mask
        seen.append([mask[name].nonzero().squeeze(1).tolist() for name in ("bn1.bias", "conv2.bias")])
        inputs = mask["conv2.weight"].flatten(2).any(2).any(0).nonzero().squeeze(1).tolist()
        assert inputs == seen[-1][0]
        server.step()
    assert [conv1 for conv1, _ in seen] == [[0, 1], [1, 2], [2, 3], [0, 3], [0, 1], [1, 2]]
    assert [conv2 for _, conv2 in seen] == [
        *([0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]),
        *([0, 4, 5], [0, 1, 5]),
    ]


def test_every_weight_of_a_wider_server_is_trained() -> None:
    method = FedRolex(levels="c", lr=0.05, masked_loss=False)
    server = small.server(method, architecture=small.CNN, schedule=Schedule(6, 4))
    server.setup()
    start = server.state.params.flat.clone()
    touched = torch.zeros(len(start), dtype=torch.bool)
    for _ in range(6):
        before = server.state.params.flat.clone()
        window = method.configure(server.state, ClientInfo(0, 10, small.DEVICE)).mask.flat
        server.step()
        assert torch.equal(server.state.params.flat[~window], before[~window])
        touched |= window
    names = ("conv1.weight", "conv2.bias", "fc.weight")
    assert all(bool(touched[server.state.mask.layout.spans[name]].all()) for name in names)


def test_a_server_of_a_narrower_level_rolls_within_it() -> None:
    method = FedRolex(levels="c", server="b")
    server = small.server(method, architecture=small.CNN, schedule=Schedule(4, 4))
    server.setup()
    assert server.state.mask["conv2.bias"].tolist() == [True] * 3 + [False] * 3
    task = method.configure(server.state, ClientInfo(0, 10, small.DEVICE))
    assert task.extras == {"rate": 0.5}
    server.step()
    server.step()
    mask = method.configure(server.state, ClientInfo(0, 10, small.DEVICE)).mask  # of round 3
    assert mask["conv2.bias"].nonzero().squeeze(1).tolist() == [0, 2]  # ⌈6/4⌉ from channel 2 of 3 on
    assert mask["bn1.bias"].nonzero().squeeze(1).tolist() == [0]  # of 2


@pytest.mark.parametrize("server", ["c", "e"])
def test_a_client_that_is_wider_than_the_server_is_refused(server: str) -> None:
    reason = FedRolex(levels="b-e", server=server).check(small.setting(architecture=small.CNN))  # type: ignore[arg-type]
    assert reason is not None and reason.startswith(f"method.server={server} is narrower than the widest")
    assert FedRolex(levels="b-e", server="b").check(small.setting(architecture=small.CNN)) is None
