"""Simulated devices: hardware on a link.

Two tables, `HARDWARE` and `LINKS`, each number with its source. `DEVICES` puts each piece of hardware on its
usual link, and `profile` also resolves `device@link`. `draw` gives every client of a population a device and
a jitter. `YARDSTICKS` are two devices far apart, on which every run is also timed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedray.costs.hardware import HARDWARE, Hardware
from fedray.costs.links import LINKS, Link
from fedray.errors import ConfigError, unknown
from fedray.types import DeviceProfile


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
        step_s=hardware.step_s,
        round_s=hardware.round_s,
        compute_w=hardware.compute_w,
        idle_w=hardware.idle_w,
        down_j_per_byte=link.down_j_per_byte,
        up_j_per_byte=link.up_j_per_byte,
    )


DEVICES: dict[str, DeviceProfile] = {name: _join(name, h, LINKS[h.link]) for name, h in HARDWARE.items()}
"""Name → device. `DEVICES["esp32"] = DeviceProfile("esp32", …)` adds one, also on every link: `esp32@lte`."""

YARDSTICKS: Mapping[str, DeviceProfile] = {
    kind: _join(f"{hardware}@{link}", HARDWARE[hardware], LINKS[link])
    for kind, hardware, link in (
        ("compute_bound", "raspberry_pi_4", "fibre"),
        ("network_bound", "workstation_gpu", "3g"),
    )
}
"""What bounds a fleet → the device of all its clients: slow on a fast link, or fast on a slow link."""

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
            down_j_per_byte=link.down_j_per_byte,
            up_j_per_byte=link.up_j_per_byte,
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
            device.step_s / speed,  # the processor that is slow at FLOPs is slow at the rest
            device.round_s,
            device.compute_w,
            device.idle_w,
            device.down_j_per_byte,
            device.up_j_per_byte,
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
