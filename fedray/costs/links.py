"""Network links of simulated devices, each number with its source."""

from collections.abc import Mapping
from dataclasses import dataclass, field

KIB_PER_S = 1024.0
MBIT_PER_S = 1e6 / 8  # in bytes per second


@dataclass(frozen=True)
class Link:
    """A network link. Its five numbers mean the same as in DeviceProfile, and `sources` has each of them."""

    downlink_bytes_per_s: float
    uplink_bytes_per_s: float
    latency_s: float
    down_j_per_byte: float = 0.0
    up_j_per_byte: float = 0.0
    sources: Mapping[str, str] = field(repr=False, default_factory=dict)


def _link(
    downlink_bytes_per_s: float,
    uplink_bytes_per_s: float,
    latency_s: float,
    down_j_per_byte: float,
    up_j_per_byte: float,
    *,
    down: str,
    up: str,
    latency: str,
    joules: tuple[str, str],
) -> Link:
    """Return a link; the texts are sources, `joules` those of a byte down and up."""
    sources = {
        "downlink_bytes_per_s": down,
        "uplink_bytes_per_s": up,
        "latency_s": latency,
        "down_j_per_byte": joules[0],
        "up_j_per_byte": joules[1],
    }
    speeds = downlink_bytes_per_s, uplink_bytes_per_s, latency_s
    return Link(*speeds, down_j_per_byte, up_j_per_byte, sources)


def _radio(name: str, slopes: tuple[float, float], base_mw: float) -> tuple[str, str]:
    """Return the sources of a byte down and up over a radio whose power is linear in its throughput."""
    text = f"Huang et al., MobiSys 2012, table of power over {name}: "
    return (
        f"{text}{slopes[0]} mW for each Mbit/s and {base_mw} mW, at the speed of this link",
        f"{text}{slopes[1]} mW for each Mbit/s and {base_mw} mW, at the speed of this link",
    )


_WIFI_POWER = _radio("Wi-Fi", (137.01, 283.17), 132.86)
_XU = "estimate: Xu et al., SIGCOMM 2020: 5G takes 2 to 3 times the power of 4G; 2.5 times that of lte, "
_WIRE = (
    "estimate: 0.3 W of a Raspberry Pi 4 with a cable (raspberrypi-5.com, 2023), at the speed of this link"
)


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
        2.09e-6,
        1.022e-5,
        down=f"{_OFCOM}5.9 Mbit/s over 3G",
        up=f"{_OFCOM}2 Mbit/s over 3G",
        latency="Ofcom, 4G and 3G mobile broadband, Q4 2014: average of five towns, 63.5 ms over 3G",
        joules=_radio("3G", (122.12, 868.98), 817.88),
    ),
    "lte": _link(
        29.5 * MBIT_PER_S,
        7.6 * MBIT_PER_S,
        0.021,
        7.65e-7,
        4.86e-6,
        down=f"{_OFCOM}29.5 Mbit/s over 4G",
        up=f"{_OFCOM}7.6 Mbit/s over 4G",
        latency=f"{_OFCOM_2024}18.3 and 23.7 ms over 4G",
        joules=_radio("LTE", (51.97, 438.39), 1288.04),
    ),
    "5g": _link(
        129.9 * MBIT_PER_S,
        14.7 * MBIT_PER_S,
        0.019,
        4.34e-7,
        6.29e-6,
        down=f"{_OFCOM}129.9 Mbit/s over 5G",
        up=f"{_OFCOM}14.7 Mbit/s over 5G",
        latency=f"{_OFCOM_2024}16.3 and 21.4 ms over 5G",
        joules=(f"{_XU}2.82 W down", f"{_XU}4.62 W up"),
    ),
    "wifi": _link(
        4317.6 * KIB_PER_S,
        3285.7 * KIB_PER_S,
        0.015,
        1.126e-6,
        2.305e-6,
        down=f"{_FLASH}4317.6 KiB/s{_FLASH_WIFI}",
        up=f"{_FLASH}3285.7 KiB/s{_FLASH_WIFI}",
        latency="estimate: the 9 ms of the fixed line behind it (see fibre), and a few for the radio",
        joules=_WIFI_POWER,
    ),
    "fibre": _link(
        270.91 * MBIT_PER_S,
        124.37 * MBIT_PER_S,
        0.009,
        8.9e-9,
        1.93e-8,
        down=f"{_EMIRATES}270.91 Mbit/s",
        up=f"{_EMIRATES}124.37 Mbit/s",
        latency="Ookla on the United States, about 2020, as told by POTs and PANs: Verizon (fibre), 9 ms",
        joules=(_WIRE, _WIRE),
    ),
    "prunefl": _link(
        1.4384e6,
        1.4384e6,
        0.0,
        1.188e-6,
        2.358e-6,
        down=_PRUNEFL,
        up=_PRUNEFL,
        latency="PruneFL's repository (Jiang et al., TNNLS 2022), configs: C_COMM = 0",
        joules=_WIFI_POWER,
    ),
    "datacentre": _link(
        1.175e9,
        1.175e9,
        0.0003,
        4.3e-9,
        4.3e-9,
        down=_ETHERNET,
        up=_ETHERNET,
        latency="estimate: a fraction of a millisecond within a data centre",
        joules=("assumed, no measurement found: 5 W of the interface at its speed",) * 2,
    ),
}
"""Name → link."""
