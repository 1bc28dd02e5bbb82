"""Orders and records survive a process border whole, and take few bytes there."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.federation.exchange import Answer, Chunk
from fedray.federation.wire import Order
from fedray.types import ClientRecord, Cost, Fate

whole = st.integers(0, 2**53)
real = st.floats(allow_nan=False)
fates: list[Fate] = ["folded", "late", "dropped", "non-finite", "malformed"]
records = st.builds(
    ClientRecord,
    client=whole,
    device=st.sampled_from(["phone", "laptop"]),
    num_examples=whole,
    fate=st.sampled_from(fates),
    cost=st.builds(
        Cost,
        bytes_down=whole,
        bytes_up=whole,
        flops=real,
        executed_flops=real,
        seconds=real,
        steps=whole,
        energy_j=real,
    ),
    memory_bytes=whole,
    density=real,
    loss=real,
)


@given(st.lists(records, max_size=5), st.lists(st.builds(Order, whole, whole, whole), max_size=5))
def test_what_leaves_a_process_arrives(sent: list[ClientRecord], orders: list[Order]) -> None:
    answer = pickle.loads(pickle.dumps(Answer({}, sent, {3: {"a": 1}})))
    assert answer == Answer({}, sent, {3: {"a": 1}})
    assert [type(v) for r in answer.records for v in (r.client, r.loss, r.cost.bytes_up, r.cost.seconds)] == [
        int, float, int, float
    ] * len(sent)  # fmt: skip
    chunk = Chunk(2, 1, tuple(orders), {3: {"a": 1}}, 7)
    assert pickle.loads(pickle.dumps(chunk)) == chunk


@pytest.mark.parametrize("kind", ["records", "orders"])
def test_nothing_is_pickled_client_by_client(kind: str) -> None:
    """A dataclass of its own for each client costs Python calls, and 10,000 of them a round's time."""

    def size(clients: int) -> int:
        ids = range(clients)
        if kind == "orders":
            return len(pickle.dumps(Chunk(0, 0, tuple(Order(k, 0, 10) for k in ids), {}, clients)))
        rows = [ClientRecord(k, "phone", 60, "folded", Cost(1, 2, 3.0, 4.0, 5.0), 1.0, 0.5) for k in ids]
        return len(pickle.dumps(Answer({}, rows, {})))

    assert (size(2_000) - size(1_000)) / 1_000 < {"records": 110, "orders": 25}[kind]
