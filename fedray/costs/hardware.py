"""Hardware of simulated devices, each number with its source.

A speed is what training in float32 sustains, never a peak; `step_s` and `round_s` are what a framework takes
beside it, and a power is that of the whole device. `docs/costs.md` discusses where each comes from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedray.types import Exploits

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """A piece of hardware. Fields that DeviceProfile has too mean the same there.

    Args:
        stands_for: the product with these numbers.
        link: its usual link, a key of LINKS.
        flops_per_s: sustained float32 FLOP/s while training, > 0.
        step_s: seconds of a step beside its FLOPs, ≥ 0.
        round_s: seconds of an exchange beside its steps and its bytes, ≥ 0.
        memory_bytes: memory for training, > 0.
        compute_w: watts while it computes, > 0.
        idle_w: watts while it waits for bytes, > 0.
        availability: probability that it can be asked in a round, in (0, 1].
        dropout: probability that it never answers, in [0, 1).
        sources: source of each of these eight numbers.
        exploits: which zeros of a mask make it faster.
    """

    stands_for: str
    link: str
    flops_per_s: float
    step_s: float
    round_s: float
    memory_bytes: float
    compute_w: float
    idle_w: float
    availability: float
    dropout: float
    sources: Mapping[str, str] = field(repr=False)
    exploits: Exploits = "structured"


_OPERATORS = "70 operators of a step of LeNet-5 (torch.profiler) × "
_CALL = "7 µs for the simplest operator on a desktop (github.com/pytorch/pytorch/issues/41383, 2020)"
_ROUND = (
    "assumed, no measurement found: opening a connection, reading the task and allocating take a tenth of a "
    "second where the training process is kept alive"
)
_PI_POWER = "Geerling, Raspberry Pi Dramble, power consumption, about 2020: Raspberry Pi 4 "
_PI_CURRENT = " × 800 / 600, the typical currents of the bare boards in Raspberry Pi's documentation, 2023"


def _phone(
    stands_for: str,
    *,
    flops_per_s: float,
    flops: str,
    step_s: float,
    core: float,
    ram_gib: int,
    ram: str,
) -> Hardware:
    """Return a phone: a quarter of its RAM, a quarter of the day; `flops` and `ram` are sources.

    `core` is how many times as long as a desktop's one of its cores takes to call an operator.
    """
    sources = {
        "flops_per_s": flops,
        "step_s": f"assumed: {_OPERATORS}1 µs, the share of C++ in {_CALL}, × {core:g} for a phone's core; "
        "runtimes on phones call no Python",
        "round_s": _ROUND,
        "compute_w": "Tarkoma et al., Smartphone Energy Consumption, 2014, as told by Warden, 2015: most "
        "phones cannot dissipate more than 3 W for long",
        "idle_w": "Carroll and Heiser, USENIX ATC 2010: 269 mW idle, display off (Openmoko Freerunner)",
        "memory_bytes": f"estimate: a quarter of the RAM, Android and other apps hold the rest; {ram}",
        "availability": "estimate: a quarter of the day, the night hours when it is idle and charging; the "
        "rule (idle, charging, unmetered) is that of Bonawitz et al., MLSys 2019, who give no share",
        "dropout": "Bonawitz et al., MLSys 2019: 6 to 10 % of the devices of a round drop out; the middle",
    }
    return Hardware(
        stands_for, "wifi", flops_per_s, step_s, 0.1, ram_gib * GIB / 4, 3.0, 0.269, 0.25, 0.08, sources
    )


def _board(
    stands_for: str,
    *,
    link: str,
    flops_per_s: float,
    flops: str,
    step_s: float,
    step: str,
    watts: tuple[float, float],
    power: tuple[str, str],
    ram_gib: int,
    ram: str,
    round_s: float = 0.1,
    round: str = _ROUND,
) -> Hardware:
    """Return a single-board computer on mains power: half of its RAM; the texts are sources.

    `watts` and `power` are of computing and of idling.
    """
    sources = {
        "flops_per_s": flops,
        "step_s": step,
        "round_s": round,
        "compute_w": power[0],
        "idle_w": power[1],
        "memory_bytes": f"estimate: half of the RAM, the system and the data hold the rest; {ram}",
        "availability": "estimate: always on, one hour in twenty lost to restarts and outages",
        "dropout": "estimate: mains power and no user, so a quarter of the dropout of phones",
    }
    return Hardware(
        stands_for, link, flops_per_s, step_s, round_s, ram_gib * GIB / 2, *watts, 0.95, 0.02, sources
    )


_SNAPDRAGON_855 = (
    "estimate: Das et al., arXiv 2202.10100, 2022, measured 15 to 30 GFLOP/s in CPU kernels while training "
    "on Snapdragon 8-series phones (MNN); the middle, 22.5, is taken for a Snapdragon 855"
)
_SCALED = f"{_SNAPDRAGON_855} and scaled by the median float CPU scores of AI-Benchmark, 2020, by "
_FLOWER = "Flower Labs, Raspberry Pi 5: Ready for Federated Vision, 2023: "
_LAMBDA = "Lambda, RTX 2080 Ti Deep Learning Benchmarks, 2018: training ResNet-50 in float32, "

HARDWARE: dict[str, Hardware] = {
    "phone": _phone(
        "mid-range phone of 2019 (Xiaomi Redmi Note 8, Snapdragon 665)",
        flops_per_s=11e9,
        flops=f"{_SCALED}1553.5 / 3212 (8 phones with a Snapdragon 665, 33 with an 855)",
        step_s=0.28e-3,
        core=4,
        ram_gib=4,
        ram="4 GB: AI-Benchmark, 2020, median of 8 phones",
    ),
    "phone_2016": _phone(
        "flagship phone of 2016 (Snapdragon 820)",
        flops_per_s=12e9,
        flops=f"{_SCALED}1669.5 / 3212 (4 phones with a Snapdragon 820, 33 with an 855)",
        step_s=0.28e-3,
        core=4,
        ram_gib=4,
        ram="4 GB: AI-Benchmark, 2020, the smaller of two sizes",
    ),
    "phone_2019": _phone(
        "flagship phone of 2019 (Samsung Galaxy Note 10, Snapdragon 855)",
        flops_per_s=22.5e9,
        flops=_SNAPDRAGON_855,
        step_s=0.14e-3,
        core=2,
        ram_gib=8,
        ram="8 GB: AI-Benchmark, 2020, median of 33 phones",
    ),
    "phone_2023": _phone(
        "flagship phone of 2023 (Samsung Galaxy S23, Snapdragon 8 Gen 2)",
        flops_per_s=53e9,
        flops=f"{_SNAPDRAGON_855} and scaled by Geekbench 5, machine learning, as published by NanoReview, "
        "2023, by 114.1 / 48.0",
        step_s=0.07e-3,
        core=1,
        ram_gib=8,
        ram="8 GB: Samsung's specification, 2023",
    ),
    "raspberry_pi_4": _board(
        "Raspberry Pi 4 B (4 Cortex-A72 cores), PyTorch 2 on the CPU",
        link="wifi",
        flops_per_s=15.8e9,
        flops=f"{_FLOWER}training ResNet-18 at 224 px takes 10.92 s for a batch of 16; "
        "16 × 3 × 2 × 1.8 GMAC / 10.92 s",
        step_s=2.5e-3,
        step=f"assumed: {_OPERATORS}{_CALL} × 5 for a Cortex-A72",
        watts=(6.4, 2.7),
        power=(f"{_PI_POWER}under stress --cpu 4, 1,280 mA, 6.4 W", f"{_PI_POWER}idle, 540 mA, 2.7 W"),
        ram_gib=4,
        ram="4 GB: Raspberry Pi's specification, 2019",
    ),
    "raspberry_pi_5": _board(
        "Raspberry Pi 5 (4 Cortex-A76 cores), PyTorch 2 on the CPU",
        link="wifi",
        flops_per_s=32e9,
        flops=f"{_FLOWER}'consistently 2x faster' than the Raspberry Pi 4; 2 × 15.8 GFLOP/s",
        step_s=1.25e-3,
        step="estimate: half of the Raspberry Pi 4's, as its speed is twice",
        watts=(8.5, 3.6),
        power=(f"estimate: 6.4 W of the Raspberry Pi 4{_PI_CURRENT}", f"estimate: 2.7 W of it{_PI_CURRENT}"),
        ram_gib=8,
        ram="8 GB: Raspberry Pi's specification, 2023",
    ),
    "raspberry_pi_prunefl": _board(
        "Raspberry Pi of PruneFL's prototype, with the software of its time",
        link="prunefl",
        flops_per_s=0.92e9,
        flops="PruneFL's repository (Jiang et al., TNNLS 2022), configs/femnist.py: a dense step of Conv-2 "
        "with a batch of 20 takes 2.2486 s; 20 × 3 × 2 × 17.21 MMAC / 2.2486 s",
        step_s=0.0,
        step="by definition: the speed is that of whole steps",
        round_s=0.0,
        round="PruneFL's repository (Jiang et al., TNNLS 2022), configs: no such time",
        watts=(6.4, 2.7),
        power=(
            f"{_PI_POWER}under stress --cpu 4, 1,280 mA, 6.4 W; assumed to be this model",
            f"{_PI_POWER}idle, 540 mA, 2.7 W; assumed to be this model",
        ),
        ram_gib=2,
        ram="2 GB: assumed, the repository does not name the model",
    ),
    "jetson_nano": _board(
        "NVIDIA Jetson Nano (128-core Maxwell GPU)",
        link="fibre",
        flops_per_s=120e9,
        flops="NVIDIA, jetson-inference, docs/pytorch-cat-dog.md, 2019: an epoch of ResNet-18 at 224 px over "
        "5,000 images takes 7 to 8 minutes; 5,000 × 3 × 2 × 1.8 GMAC / 450 s",
        step_s=3.4e-3,
        step=f"assumed: {_OPERATORS}{_CALL} × 7 for a Cortex-A57, which starts the GPU's kernels",
        watts=(10.0, 2.0),
        power=(
            "NVIDIA, Jetson Linux guide, 2019: the budget of 10 W of the default mode, MaxN",
            "assumed, no measurement found: a fifth of its budget",
        ),
        ram_gib=4,
        ram="4 GB: NVIDIA's specification, 2019",
    ),
    "laptop": Hardware(
        "Apple MacBook Pro of 2021 (M1 Pro, 16-core GPU)",
        link="wifi",
        flops_per_s=1.8e12,
        step_s=1.4e-3,
        round_s=0.1,
        memory_bytes=8 * GIB,
        compute_w=39.8,
        idle_w=7.2,
        availability=0.33,
        dropout=0.05,
        sources={
            "flops_per_s": "github.com/tlkh/tf-metal-experiments, 2021: training ResNet-50 in float32, "
            "72.8 images/s; × 3 × 2 × 4.1 GMAC",
            "step_s": f"estimate: {_OPERATORS}20 µs to dispatch one to the GPU of an M1 Pro "
            "(github.com/pytorch/pytorch/issues/148219, 2025)",
            "round_s": _ROUND,
            "compute_w": "tf-metal-experiments, 2021: 32.8 W of the chip in the run that gives the speed, "
            "and 7 W for the rest of the laptop, as of idle_w",
            "idle_w": "AnandTech, Apple's M1 Pro, M1 Max SoCs Investigated, 2021: 7.2 W at the wall, "
            "of which 0.2 W for the chip, on a MacBook Pro 16 with an M1 Max",
            "memory_bytes": "estimate: half of the RAM; 16 GB: Apple's specification, 2021",
            "availability": "estimate: open for eight hours of the day",
            "dropout": "estimate: between phones and boards",
        },
    ),
    "workstation_gpu": Hardware(
        "workstation with an NVIDIA RTX 2080 Ti",
        link="fibre",
        flops_per_s=7.2e12,
        step_s=0.5e-3,
        round_s=0.1,
        memory_bytes=11 * GIB,
        compute_w=320.0,
        idle_w=75.0,
        availability=0.9,
        dropout=0.01,
        sources={
            "flops_per_s": f"{_LAMBDA}294 images/s; × 3 × 2 × 4.1 GMAC",
            "step_s": f"estimate: {_OPERATORS}{_CALL}; it starts the GPU's kernels",
            "round_s": _ROUND,
            "compute_w": "estimate: 260 W, the limit of the card (NVIDIA's specification, 2018), and 60 W "
            "for the rest",
            "idle_w": "estimate: 15 W of the card (Tom's Hardware, 2019: less than 18 W), and 60 W for "
            "the rest",
            "memory_bytes": "estimate: all of the GPU's memory; 11 GB: NVIDIA's specification, 2018",
            "availability": "estimate: always on, a tenth of the time taken by its owner",
            "dropout": "estimate: mains power and a wired link, so half of the dropout of boards",
        },
    ),
    "server": Hardware(
        "the server of a federation, one NVIDIA V100",
        link="datacentre",
        flops_per_s=10e12,
        step_s=0.5e-3,
        round_s=0.0,
        memory_bytes=32 * GIB,
        compute_w=350.0,
        idle_w=125.0,
        availability=1.0,
        dropout=0.0,
        sources={
            "flops_per_s": f"{_LAMBDA}405 images/s; × 3 × 2 × 4.1 GMAC",
            "step_s": f"estimate: {_OPERATORS}{_CALL}; it starts the GPU's kernels",
            "round_s": "by definition: the server's process lives as long as the run",
            "compute_w": "estimate: 250 W, the limit of the card (NVIDIA's specification, 2018), and 100 W "
            "for the rest",
            "idle_w": "estimate: a tenth of the card's limit, and 100 W for the rest",
            "memory_bytes": "estimate: all of the GPU's memory; 32 GB: the V100 of the same benchmark, 2018",
            "availability": "by definition: without its server there is no round",
            "dropout": "by definition: without its server there is no round",
        },
    ),
}
"""Name → hardware."""
