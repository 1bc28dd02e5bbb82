"""Simulated devices: hardware on a link, each number with its source; and the seconds that a cost takes.

Two tables, `HARDWARE` and `LINKS`. `DEVICES` puts each piece of hardware on its usual link, and `profile`
also resolves `device@link`. `draw` gives every client of a population a device and a jitter.

A speed is what training in float32 sustains, never a peak. `docs/costs.md` discusses where each comes from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedray.errors import ConfigError, unknown
from fedray.types import Cost, DeviceProfile, Exploits

GIB = 2**30
KIB_PER_S = 1024.0
MBIT_PER_S = 1e6 / 8  # in bytes per second


@dataclass(frozen=True)
class Hardware:
    """A piece of hardware. Fields that DeviceProfile has too mean the same there.

    Args:
        stands_for: the product with these numbers.
        link: its usual link, a key of LINKS.
        flops_per_s: sustained float32 FLOP/s while training, > 0.
        memory_bytes: memory for training, > 0.
        availability: probability that it can be asked in a round, in (0, 1].
        dropout: probability that it never answers, in [0, 1).
        sources: source of each of these four numbers.
        exploits: which zeros of a mask make it faster.
    """

    stands_for: str
    link: str
    flops_per_s: float
    memory_bytes: float
    availability: float
    dropout: float
    sources: Mapping[str, str] = field(repr=False)
    exploits: Exploits = "structured"


@dataclass(frozen=True)
class Link:
    """A network link. Its three numbers mean the same as in DeviceProfile, and `sources` has each of them."""

    downlink_bytes_per_s: float
    uplink_bytes_per_s: float
    latency_s: float
    sources: Mapping[str, str] = field(repr=False)


def _phone(stands_for: str, *, link: str, flops_per_s: float, flops: str, ram_gib: int, ram: str) -> Hardware:
    """Return a phone: a quarter of its RAM, a quarter of the day; `flops` and `ram` are sources."""
    sources = {
        "flops_per_s": flops,
        "memory_bytes": f"estimate: a quarter of the RAM, Android and other apps hold the rest; {ram}",
        "availability": "estimate: a quarter of the day, the night hours when it is idle and charging; the "
        "rule (idle, charging, unmetered) is that of Bonawitz et al., MLSys 2019, who give no share",
        "dropout": "Bonawitz et al., MLSys 2019: 6 to 10 % of the devices of a round drop out; the middle",
    }
    return Hardware(stands_for, link, flops_per_s, ram_gib * GIB / 4, 0.25, 0.08, sources)


def _board(stands_for: str, *, link: str, flops_per_s: float, flops: str, ram_gib: int, ram: str) -> Hardware:
    """Return a single-board computer on mains power: half of its RAM; `flops` and `ram` are sources."""
    sources = {
        "flops_per_s": flops,
        "memory_bytes": f"estimate: half of the RAM, the system and the data hold the rest; {ram}",
        "availability": "estimate: always on, one hour in twenty lost to restarts and outages",
        "dropout": "estimate: mains power and no user, so a quarter of the dropout of phones",
    }
    return Hardware(stands_for, link, flops_per_s, ram_gib * GIB / 2, 0.95, 0.02, sources)


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
        link="lte",
        flops_per_s=11e9,
        flops=f"{_SCALED}1553.5 / 3212 (8 phones with a Snapdragon 665, 33 with an 855)",
        ram_gib=4,
        ram="4 GB: AI-Benchmark, 2020, median of 8 phones",
    ),
    "phone_2016": _phone(
        "flagship phone of 2016 (Snapdragon 820)",
        link="lte",
        flops_per_s=12e9,
        flops=f"{_SCALED}1669.5 / 3212 (4 phones with a Snapdragon 820, 33 with an 855)",
        ram_gib=4,
        ram="4 GB: AI-Benchmark, 2020, the smaller of two sizes",
    ),
    "phone_2019": _phone(
        "flagship phone of 2019 (Samsung Galaxy Note 10, Snapdragon 855)",
        link="lte",
        flops_per_s=22.5e9,
        flops=_SNAPDRAGON_855,
        ram_gib=8,
        ram="8 GB: AI-Benchmark, 2020, median of 33 phones",
    ),
    "phone_2023": _phone(
        "flagship phone of 2023 (Samsung Galaxy S23, Snapdragon 8 Gen 2)",
        link="5g",
        flops_per_s=53e9,
        flops=f"{_SNAPDRAGON_855} and scaled by Geekbench 5, machine learning, as published by NanoReview, "
        "2023, by 114.1 / 48.0",
        ram_gib=8,
        ram="8 GB: Samsung's specification, 2023",
    ),
    "raspberry_pi_4": _board(
        "Raspberry Pi 4 B (4 Cortex-A72 cores), PyTorch 2 on the CPU",
        link="wifi",
        flops_per_s=15.8e9,
        flops=f"{_FLOWER}training ResNet-18 at 224 px takes 10.92 s for a batch of 16; "
        "16 × 3 × 2 × 1.8 GMAC / 10.92 s",
        ram_gib=4,
        ram="4 GB: Raspberry Pi's specification, 2019",
    ),
    "raspberry_pi_5": _board(
        "Raspberry Pi 5 (4 Cortex-A76 cores), PyTorch 2 on the CPU",
        link="wifi",
        flops_per_s=32e9,
        flops=f"{_FLOWER}'consistently 2x faster' than the Raspberry Pi 4; 2 × 15.8 GFLOP/s",
        ram_gib=8,
        ram="8 GB: Raspberry Pi's specification, 2023",
    ),
    "raspberry_pi_prunefl": _board(
        "Raspberry Pi of PruneFL's prototype, with the software of its time",
        link="prunefl",
        flops_per_s=0.92e9,
        flops="PruneFL's repository (Jiang et al., TNNLS 2022), configs/femnist.py: a dense step of Conv-2 "
        "with a batch of 20 takes 2.2486 s; 20 × 3 × 2 × 17.21 MMAC / 2.2486 s",
        ram_gib=2,
        ram="2 GB: assumed, the repository does not name the model",
    ),
    "jetson_nano": _board(
        "NVIDIA Jetson Nano (128-core Maxwell GPU)",
        link="fibre",
        flops_per_s=120e9,
        flops="NVIDIA, jetson-inference, docs/pytorch-cat-dog.md, 2019: an epoch of ResNet-18 at 224 px over "
        "5,000 images takes 7 to 8 minutes; 5,000 × 3 × 2 × 1.8 GMAC / 450 s",
        ram_gib=4,
        ram="4 GB: NVIDIA's specification, 2019",
    ),
    "laptop": Hardware(
        "Apple MacBook Pro of 2021 (M1 Pro, 16-core GPU)",
        link="wifi",
        flops_per_s=1.8e12,
        memory_bytes=8 * GIB,
        availability=0.33,
        dropout=0.05,
        sources={
            "flops_per_s": "github.com/tlkh/tf-metal-experiments, 2021: training ResNet-50 in float32, "
            "72.8 images/s; × 3 × 2 × 4.1 GMAC",
            "memory_bytes": "estimate: half of the RAM; 16 GB: Apple's specification, 2021",
            "availability": "estimate: open for eight hours of the day",
            "dropout": "estimate: between phones and boards",
        },
    ),
    "workstation_gpu": Hardware(
        "workstation with an NVIDIA RTX 2080 Ti",
        link="fibre",
        flops_per_s=7.2e12,
        memory_bytes=11 * GIB,
        availability=0.9,
        dropout=0.01,
        sources={
            "flops_per_s": f"{_LAMBDA}294 images/s; × 3 × 2 × 4.1 GMAC",
            "memory_bytes": "estimate: all of the GPU's memory; 11 GB: NVIDIA's specification, 2018",
            "availability": "estimate: always on, a tenth of the time taken by its owner",
            "dropout": "estimate: mains power and a wired link, so half of the dropout of boards",
        },
    ),
    "server": Hardware(
        "the server of a federation, one NVIDIA V100",
        link="datacentre",
        flops_per_s=10e12,
        memory_bytes=32 * GIB,
        availability=1.0,
        dropout=0.0,
        sources={
            "flops_per_s": f"{_LAMBDA}405 images/s; × 3 × 2 × 4.1 GMAC",
            "memory_bytes": "estimate: all of the GPU's memory; 32 GB: the V100 of the same benchmark, 2018",
            "availability": "by definition: without its server there is no round",
            "dropout": "by definition: without its server there is no round",
        },
    ),
}
"""Name → hardware."""


def _link(
    downlink_bytes_per_s: float,
    uplink_bytes_per_s: float,
    latency_s: float,
    *,
    down: str,
    up: str,
    latency: str,
) -> Link:
    """Return a link; `down`, `up` and `latency` are sources."""
    sources = {"downlink_bytes_per_s": down, "uplink_bytes_per_s": up, "latency_s": latency}
    return Link(downlink_bytes_per_s, uplink_bytes_per_s, latency_s, sources)


_OFCOM = "Ofcom, Mobile Matters 2023 (data of Opensignal): average of the United Kingdom, "
_OFCOM_2024 = "Ofcom, Mobile Matters 2024: middle between the best and the worst operator, "
_FLASH = "FLASH (Yang et al., WWW 2021) network trace, 19 clients, median of the clients' means, "
_FLASH_WIFI = "; that this is Wi-Fi is our reading: FLASH admits clients on Wi-Fi only"
_EMIRATES = "Ookla, Q1 2024: median of fixed lines in the United Arab Emirates, assumed to be fibre, "
_PRUNEFL = (
    "PruneFL's repository (Jiang et al., TNNLS 2022), configs: 5.561621e-6 s for the 8 bytes that a "
    "parameter takes down and up, so 1.4384 MB/s"
)
_ETHERNET = "estimate: Ethernet of 10 Gbit/s, less 6 % for the headers of its frames"

LINKS: dict[str, Link] = {
    "3g": _link(
        5.9 * MBIT_PER_S,
        2.0 * MBIT_PER_S,
        0.0635,
        down=f"{_OFCOM}5.9 Mbit/s over 3G",
        up=f"{_OFCOM}2 Mbit/s over 3G",
        latency="Ofcom, 4G and 3G mobile broadband, Q4 2014: average of five towns, 63.5 ms over 3G",
    ),
    "lte": _link(
        29.5 * MBIT_PER_S,
        7.6 * MBIT_PER_S,
        0.021,
        down=f"{_OFCOM}29.5 Mbit/s over 4G",
        up=f"{_OFCOM}7.6 Mbit/s over 4G",
        latency=f"{_OFCOM_2024}18.3 and 23.7 ms over 4G",
    ),
    "5g": _link(
        129.9 * MBIT_PER_S,
        14.7 * MBIT_PER_S,
        0.019,
        down=f"{_OFCOM}129.9 Mbit/s over 5G",
        up=f"{_OFCOM}14.7 Mbit/s over 5G",
        latency=f"{_OFCOM_2024}16.3 and 21.4 ms over 5G",
    ),
    "wifi": _link(
        4317.6 * KIB_PER_S,
        3285.7 * KIB_PER_S,
        0.015,
        down=f"{_FLASH}4317.6 KiB/s{_FLASH_WIFI}",
        up=f"{_FLASH}3285.7 KiB/s{_FLASH_WIFI}",
        latency="estimate: the 9 ms of the fixed line behind it (see fibre), and a few for the radio",
    ),
    "fibre": _link(
        270.91 * MBIT_PER_S,
        124.37 * MBIT_PER_S,
        0.009,
        down=f"{_EMIRATES}270.91 Mbit/s",
        up=f"{_EMIRATES}124.37 Mbit/s",
        latency="Ookla on the United States, about 2020, as told by POTs and PANs: Verizon (fibre), 9 ms",
    ),
    "prunefl": _link(
        1.4384e6,
        1.4384e6,
        0.0,
        down=_PRUNEFL,
        up=_PRUNEFL,
        latency="PruneFL's repository (Jiang et al., TNNLS 2022), configs: C_COMM = 0",
    ),
    "datacentre": _link(
        1.175e9,
        1.175e9,
        0.0003,
        down=_ETHERNET,
        up=_ETHERNET,
        latency="estimate: a fraction of a millisecond within a data centre",
    ),
}
"""Name → link."""


def _join(name: str, hardware: Hardware, link: Link) -> DeviceProfile:
    return DeviceProfile(
        name=name,
        flops_per_s=hardware.flops_per_s,
        downlink_bytes_per_s=link.downlink_bytes_per_s,
        uplink_bytes_per_s=link.uplink_bytes_per_s,
        latency_s=link.latency_s,
        memory_bytes=hardware.memory_bytes,
        availability=hardware.availability,
        dropout=hardware.dropout,
        exploits=hardware.exploits,
        sources={**hardware.sources, **link.sources},
    )


DEVICES: dict[str, DeviceProfile] = {name: _join(name, h, LINKS[h.link]) for name, h in HARDWARE.items()}
"""Name → device. `DEVICES["esp32"] = DeviceProfile("esp32", …)` adds one, also on every link: `esp32@lte`."""

TABLES: Mapping[str, dict[str, Any]] = {"device": DEVICES, "hardware": HARDWARE, "link": LINKS}
"""The tables that `profile` reads; a file of `imports` may add to each."""


def profile(name: str) -> DeviceProfile:
    """Return the device of this name: a key of DEVICES or HARDWARE, or one of these on a link.

    Args:
        name: e.g. `raspberry_pi_4`, or `raspberry_pi_4@lte`.

    Raises:
        ConfigError: if the device or the link is not in its table.
    """
    entries = dict(entries_of(name))
    device = DEVICES.get(entries.get("device", ""))
    if device is None:
        hardware = HARDWARE[entries["hardware"]]
        device = _join(name, hardware, LINKS[entries["link"]])
    elif "link" in entries:
        link = LINKS[entries["link"]]
        device = replace(
            device,
            downlink_bytes_per_s=link.downlink_bytes_per_s,
            uplink_bytes_per_s=link.uplink_bytes_per_s,
            latency_s=link.latency_s,
            sources={**device.sources, **link.sources},
        )
    return device if device.name == name else replace(device, name=name)


def entries_of(name: str) -> list[tuple[str, str]]:
    """Return the entries that make up a device: names of `TABLES`, each with its key.

    Raises:
        ConfigError: if a table has no such entry.
    """
    base, at, link = name.partition("@")
    if base not in DEVICES and base not in HARDWARE:
        raise ConfigError(f"clients.devices: {unknown('device', base, DEVICES.keys() | HARDWARE.keys())}")
    if not at and base in DEVICES:
        return [("device", base)]
    link = link if at else HARDWARE[base].link
    if link not in LINKS:
        raise ConfigError(f"clients.devices: {name!r}: {unknown('link', link, LINKS)}")
    return [("device" if base in DEVICES else "hardware", base), ("link", link)]


@dataclass(frozen=True, eq=False)
class Fleet:
    """The device of each client of a population: 17 bytes a client; profiles are created on request.

    Args:
        profiles: the devices of the mix, in order of their names.
        index: client → position in `profiles`; uint8 (population,).
        jitter: client → factors of speed, downlink and uplink; float32 (population, 3), mean one.
    """

    profiles: tuple[DeviceProfile, ...]
    index: NDArray[np.uint8]
    jitter: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.index)

    def profile(self, client: int) -> DeviceProfile:
        """Return the device of `client`, in [0, len), with its jitter; the name stays that of the table.

        Raises:
            IndexError: if there is no such client.
        """
        if not 0 <= client < len(self):
            raise IndexError(f"client {client}: the fleet has clients 0 to {len(self) - 1}")
        device = self.profiles[int(self.index[client])]
        speed, down, up = self.jitter[client].tolist()
        return DeviceProfile(  # `replace` takes 2 µs more, for each client of a cohort
            device.name,
            device.flops_per_s * speed,
            device.downlink_bytes_per_s * down,
            device.uplink_bytes_per_s * up,
            device.latency_s,
            device.memory_bytes,
            device.availability,
            device.dropout,
            device.exploits,
            device.sources,
        )

    @cached_property
    def availability(self) -> NDArray[np.float32]:
        """Client → probability that it can be asked in a round; float32 (population,), read-only."""
        by_device = np.array([device.availability for device in self.profiles], dtype=np.float32)
        availability = by_device[self.index]
        availability.flags.writeable = False
        return availability

    @property
    def counts(self) -> dict[str, int]:
        """Name of a device → how many clients have it."""
        counts = np.bincount(self.index, minlength=len(self.profiles)).tolist()
        return {device.name: count for device, count in zip(self.profiles, counts, strict=True)}


def draw(
    population: int, mix: Mapping[str, float], seed: int | np.random.SeedSequence, jitter: float = 0.2
) -> Fleet:
    """Give every client a device.

    The mix fixes how many clients have which device (largest remainders), the seed which clients. Neither
    the order of the mix nor `jitter` changes the assignment.

    Args:
        population: number of clients, > 0.
        mix: name of a device, or `hardware@link` → weight ≥ 0; the weights need not sum to one.
        seed: the same seed gives the same fleet.
        jitter: σ ≥ 0 of three independent log-normal factors with mean one: of speed, downlink and uplink.

    Raises:
        ConfigError: for an unknown name, a negative or infinite weight, no positive one, or an argument
            out of its range.
    """
    if population < 1:
        raise ConfigError(f"clients.population: got {population}; must be at least 1")
    if not (isfinite(jitter) and jitter >= 0):
        raise ConfigError(f"clients.jitter: got {jitter}; must be finite and at least 0")
    counts = _apportion(population, mix)
    profiles = tuple(profile(name) for name in counts)
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(len(counts), dtype=np.uint8), list(counts.values()))
    rng.shuffle(index)
    factors = rng.standard_normal((population, 3), dtype=np.float32)
    factors *= np.float32(jitter)
    factors -= np.float32(jitter**2 / 2)  # exp(σz − σ²/2) has mean one
    return Fleet(profiles, index, np.exp(factors, out=factors))


def _apportion(population: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Return name → number of clients by largest remainders; a tie goes to the name that sorts first."""
    names = sorted(mix)
    weights = np.array([mix[name] for name in names], dtype=np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ConfigError(
            f"clients.devices: got {dict(mix)}; weights must be finite, at least 0, and not all of them 0"
        )
    quotas = weights / weights.sum() * population
    counts = np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(counts - quotas, kind="stable")
    counts[by_remainder[: population - counts.sum()]] += 1
    return dict(zip(names, counts.tolist(), strict=True))


def seconds(cost: Cost, device: DeviceProfile) -> float:
    """Return the seconds of one exchange on the device's clock: latency + download + computing + upload.

    Of `cost`, only `bytes_down`, `executed_flops` and `bytes_up` are read. Nothing overlaps.
    """
    return (
        device.latency_s
        + cost.bytes_down / device.downlink_bytes_per_s
        + cost.executed_flops / device.flops_per_s
        + cost.bytes_up / device.uplink_bytes_per_s
    )


def training_memory_bytes(num_params: int) -> int:
    """Return what training holds at least: weights, gradients, momentum and the update, in float32.

    Activations are left out, since they depend on batch and layers.
    """
    return 4 * 4 * num_params


def fits(device: DeviceProfile, num_params: int) -> bool:
    """Tell whether a device has the memory to train a model of this many parameters."""
    return training_memory_bytes(num_params) <= device.memory_bytes
