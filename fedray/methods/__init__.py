"""The table of methods. One file each; none imports another. A new one takes its file and one line here."""

from fedray.federation.method import Method
from fedray.methods.fedavg import FedAvg
from fedray.methods.frlp import FRLP
from fedray.methods.snip import SNIP
from fedray.methods.staged import Staged

METHODS: dict[str, type[Method]] = {
    "fedavg": FedAvg,
    "staged": Staged,
    "snip": SNIP,
    "frlp": FRLP,
}
