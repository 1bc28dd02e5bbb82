"""The table of methods. One file each; none imports another. A new one takes its file and one line here."""

from fedray.federation.method import Method
from fedray.methods.autoflip import AutoFLIP
from fedray.methods.ceafl import CEAFL
from fedray.methods.fedavg import FedAvg
from fedray.methods.fedavg_server import FedAvgServer
from fedray.methods.fedavg_small import FedAvgSmall
from fedray.methods.fedavg_warm import FedAvgWarm
from fedray.methods.fedlp import FedLP
from fedray.methods.fedmef import FedMef
from fedray.methods.fedrolex import FedRolex
from fedray.methods.frlp import FRLP
from fedray.methods.heterofl import HeteroFL
from fedray.methods.pqsu import PQSU
from fedray.methods.prunefl import PruneFL
from fedray.methods.random_mask import RandomMask
from fedray.methods.snip import SNIP
from fedray.methods.staged import Staged

METHODS: dict[str, type[Method]] = {
    "fedavg": FedAvg,
    "fedavg_server": FedAvgServer,
    "fedavg_small": FedAvgSmall,
    "fedavg_warm": FedAvgWarm,
    "random_mask": RandomMask,
    "staged": Staged,
    "snip": SNIP,
    "frlp": FRLP,
    "prunefl": PruneFL,
    "autoflip": AutoFLIP,
    "fedlp": FedLP,
    "pqsu": PQSU,
    "ceafl": CEAFL,
    "fedmef": FedMef,
    "heterofl": HeteroFL,
    "fedrolex": FedRolex,
}
