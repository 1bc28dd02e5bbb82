import csv
import os
import pickle
import re
import time
from dataclasses import fields, replace
from itertools import product
from math import log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.costs.clock import at_home, clocked, computing_s, fits, joules, seconds, training_memory_bytes
from fedray.costs.devices import DEVICES, YARDSTICKS, Fleet, draw, entries_of, profile
from fedray.costs.hardware import GIB, HARDWARE
from fedray.costs.links import LINKS
from fedray.errors import ConfigError
from fedray.types import Cost, DeviceProfile

NUMBERS = (
    "flops_per_s",
    "downlink_bytes_per_s",
    "uplink_bytes_per_s",
    "latency_s",
    "memory_bytes",
    "availability",
    "dropout",
    "step_s",
    "round_s",
    "compute_w",
    "idle_w",
    "down_j_per_byte",
    "up_j_per_byte",
)
MIX = {"phone": 0.6, "jetson_nano": 0.3, "raspberry_pi_4": 0.1}
DOCS = Path(__file__).parents[2] / "docs" / "costs.md"


# --- the tables ---------------------------------------------------------------------------------------------


def test_what_configs_rely_on_is_there():
    assert {"phone", "raspberry_pi_4", "jetson_nano", "laptop", "workstation_gpu", "server"} <= set(DEVICES)
    assert {"phone_2016", "phone_2019", "phone_2023"} <= set(DEVICES)
    assert len(DEVICES) >= 10
    assert {"3g", "lte", "5g", "wifi", "fibre", "prunefl"} <= set(LINKS)
    assert {h.link for name, h in HARDWARE.items() if "phone" in name} == {"wifi"}  # they are unmetered


@pytest.mark.parametrize("name", DEVICES)
def test_numbers_are_in_range_and_each_has_a_source(name):
    device = DEVICES[name]
    assert device.name == name
    assert device.flops_per_s > 0 and device.memory_bytes > 0 and device.latency_s >= 0
    assert device.downlink_bytes_per_s >= device.uplink_bytes_per_s > 0
    assert 0 < device.availability <= 1 and 0 <= device.dropout < 1
    assert device.exploits == "structured"
    assert 0 <= device.step_s < 0.01 and 0 <= device.round_s < 1
    assert 0 < device.idle_w < device.compute_w
    assert 0 < device.down_j_per_byte <= device.up_j_per_byte
    assert set(device.sources) == set(NUMBERS)


@pytest.mark.parametrize("table", [HARDWARE, LINKS])
def test_a_source_has_a_year_or_says_that_it_is_none(table):
    texts = {text for entry in table.values() for text in entry.sources.values()}
    honest = ("estimate: ", "assumed", "by definition: ")
    unsourced = [t for t in texts if not (re.search(r"\b20[12]\d\b", t) or t.startswith(honest))]
    assert not unsourced


@pytest.mark.parametrize(
    ("name", "flops_per_s"),
    [
        ("phone", 22.5e9 * 1553.5 / 3212),
        ("phone_2016", 22.5e9 * 1669.5 / 3212),
        ("phone_2019", (15e9 + 30e9) / 2),
        ("phone_2023", 22.5e9 * 114.1 / 48.0),
        ("raspberry_pi_4", 16 * 3 * 2 * 1.8e9 / 10.92),
        ("raspberry_pi_5", 2 * 15.8e9),
        # 5×5×32 at 28², 5×5×32×64 at 14², and two linear layers
        ("raspberry_pi_prunefl", 20 * 3 * 2 * (800 * 784 + 51_200 * 196 + 3136 * 2048 + 2048 * 62) / 2.2486),
        ("jetson_nano", 5000 * 3 * 2 * 1.8e9 / 450),
        ("laptop", 72.8 * 3 * 2 * 4.1e9),
        ("workstation_gpu", 294 * 3 * 2 * 4.1e9),
        ("server", 405 * 3 * 2 * 4.1e9),
    ],
)
def test_speeds_follow_from_their_sources(name, flops_per_s):
    assert DEVICES[name].flops_per_s == pytest.approx(flops_per_s, rel=0.03)


def test_links_follow_from_their_sources():
    assert LINKS["prunefl"].uplink_bytes_per_s == pytest.approx(8 / 5.561621e-6, rel=1e-4)
    assert LINKS["lte"].downlink_bytes_per_s == 3_687_500  # 29.5 Mbit/s
    assert LINKS["datacentre"].uplink_bytes_per_s == pytest.approx(0.94 * 10e9 / 8)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("phone", 1 * 4),
        ("phone_2019", 1 * 2),
        ("raspberry_pi_4", 7 * 5),
        ("jetson_nano", 7 * 7),
        ("laptop", 20),
        ("workstation_gpu", 7),
    ],
)
def test_overheads_of_a_step_follow_from_their_sources(name, factor):
    assert DEVICES[name].step_s == pytest.approx(70 * factor * 1e-6, rel=0.03)


@pytest.mark.parametrize(
    ("name", "slopes", "base_mw"),
    [
        ("3g", (122.12, 868.98), 817.88),
        ("lte", (51.97, 438.39), 1288.04),
        ("wifi", (137.01, 283.17), 132.86),
        ("prunefl", (137.01, 283.17), 132.86),
    ],
)
def test_joules_of_a_byte_follow_from_the_power_of_the_radio(name, slopes, base_mw):
    """Of α mW for each Mbit/s and β mW: (α + β / Mbit/s) mJ for a Mbit, which is 125,000 bytes."""
    link = LINKS[name]
    for slope, speed, joules_per_byte in (
        (slopes[0], link.downlink_bytes_per_s, link.down_j_per_byte),
        (slopes[1], link.uplink_bytes_per_s, link.up_j_per_byte),
    ):
        mj_per_mbit = slope + base_mw / (speed * 8e-6)
        assert joules_per_byte == pytest.approx(mj_per_mbit * 1e-3 / 125_000, rel=0.003)


def test_5g_takes_two_and_a_half_times_the_power_of_lte():
    lte, fast = LINKS["lte"], LINKS["5g"]
    for way in ("down", "up"):
        watts = [
            getattr(link, f"{way}_j_per_byte") * getattr(link, f"{way}link_bytes_per_s")
            for link in (lte, fast)
        ]
        assert watts[1] == pytest.approx(2.5 * watts[0], rel=0.003)


def test_wifi_is_the_median_of_the_flash_trace():
    path = Path(os.environ.get("FEDRAY_DATA", "missing")) / "devices" / "flash_network_speed.csv"
    if not path.is_file():
        pytest.skip("the FLASH network trace is not in FEDRAY_DATA")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 19
    for direction, speed in [
        ("down_mean", LINKS["wifi"].downlink_bytes_per_s),
        ("up_mean", LINKS["wifi"].uplink_bytes_per_s),
    ]:
        assert np.median([float(row[direction]) for row in rows]) * 1024 == pytest.approx(speed, rel=1e-4)


# --- names --------------------------------------------------------------------------------------------------


def test_hardware_at_a_link_has_the_numbers_of_both():
    device = profile("raspberry_pi_4@3g")
    assert device.name == "raspberry_pi_4@3g"
    assert (device.flops_per_s, device.availability) == (15.8e9, 0.95)
    assert (device.uplink_bytes_per_s, device.latency_s) == (250_000, 0.0635)
    assert "3G" in device.sources["uplink_bytes_per_s"] and "Flower" in device.sources["flops_per_s"]


def test_every_combination_resolves_and_the_usual_link_changes_nothing_but_the_name():
    for pair in product(HARDWARE, LINKS):
        assert set(profile("@".join(pair)).sources) == set(NUMBERS)
    for name, hardware in HARDWARE.items():
        assert profile(name) == replace(profile(f"{name}@{hardware.link}"), name=name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raspbery_pi_4", "unknown device 'raspbery_pi_4'; did you mean 'raspberry_pi_4'?"),
        ("laptpo@wifi", "unknown device 'laptpo'; did you mean 'laptop'?"),
        ("phone@wify", "'phone@wify': unknown link 'wify'; did you mean 'wifi'?"),
        ("phone@", "unknown link ''"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        profile(name)
    assert str(error.value).startswith("clients.devices: ") and "Known: " in str(error.value)


# --- time and memory ----------------------------------------------------------------------------------------

TOY = DeviceProfile(
    name="toy",
    flops_per_s=1e9,
    downlink_bytes_per_s=2e6,
    uplink_bytes_per_s=0.5e6,
    latency_s=0.1,
    memory_bytes=1600,
)


def test_a_device_that_was_added_to_a_table_is_looked_up(monkeypatch):
    """To DEVICES whole, to HARDWARE for every link, to LINKS for every piece of hardware."""
    mine = replace(DEVICES["phone"], name="mine", flops_per_s=1e7)
    monkeypatch.setitem(DEVICES, "mine", mine)
    assert profile("mine") is mine
    assert draw(4, {"mine": 1.0}, 0, jitter=0.0).profile(0) == mine
    monkeypatch.setitem(HARDWARE, "board", HARDWARE["phone"])
    monkeypatch.setitem(LINKS, "pigeon", LINKS["lte"])
    assert profile("board") == replace(DEVICES["phone"], name="board")
    assert profile("board@pigeon") == replace(profile("phone@lte"), name="board@pigeon")
    with pytest.raises(ConfigError, match="unknown device 'mien'; did you mean 'mine'"):
        profile("mien")
    with pytest.raises(ConfigError, match="'mine@pigoen': unknown link 'pigoen'; did you mean 'pigeon'"):
        profile("mine@pigoen")


def test_an_added_device_works_on_every_link_and_is_called_by_its_key(monkeypatch):
    monkeypatch.setitem(DEVICES, "toy", TOY)
    monkeypatch.setitem(DEVICES, "alias", TOY)
    lte = LINKS["lte"]
    device = profile("toy@lte")
    assert (device.name, device.flops_per_s, device.memory_bytes) == ("toy@lte", 1e9, 1600)
    assert (device.downlink_bytes_per_s, device.latency_s) == (lte.downlink_bytes_per_s, lte.latency_s)
    assert device.sources == lte.sources
    assert profile("alias") == replace(TOY, name="alias")


def test_a_device_that_was_replaced_is_the_new_one_on_every_link(monkeypatch):
    monkeypatch.setitem(DEVICES, "phone", TOY)
    assert profile("phone").flops_per_s == profile("phone@wifi").flops_per_s == TOY.flops_per_s


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_on_its_usual_link_is_the_device(name):
    assert profile(f"{name}@{HARDWARE[name].link}") == replace(
        DEVICES[name], name=f"{name}@{HARDWARE[name].link}"
    )


def test_a_device_names_the_entries_that_it_is_made_of(monkeypatch):
    monkeypatch.setitem(HARDWARE, "board", HARDWARE["phone"])
    assert entries_of("phone") == [("device", "phone")]
    assert entries_of("phone@wifi") == [("device", "phone"), ("link", "wifi")]
    assert entries_of("board") == [("hardware", "board"), ("link", "wifi")]
    assert entries_of("board@3g") == [("hardware", "board"), ("link", "3g")]


def test_seconds_by_hand():
    # 0.1 + 4 MB / 2 MB/s + 3 GFLOP / 1 GFLOP/s + 1 MB / 0.5 MB/s
    cost = Cost(bytes_down=4_000_000, bytes_up=1_000_000, executed_flops=3e9)
    assert seconds(cost, TOY) == pytest.approx(0.1 + 2 + 3 + 2)
    assert seconds(Cost(), TOY) == 0.1
    # and 27 steps of 50 ms, and 0.4 s of the exchange
    slow = replace(TOY, step_s=0.05, round_s=0.4)
    assert seconds(replace(cost, steps=27), slow) == pytest.approx(0.1 + 2 + (0.4 + 1.35 + 3) + 2)


def test_a_laptop_does_not_make_27_steps_in_a_millisecond():
    work = Cost(steps=27, executed_flops=27 * 44e6)
    laptop = DEVICES["laptop"]
    assert work.executed_flops / laptop.flops_per_s == pytest.approx(0.66e-3, rel=0.01)
    assert seconds(work, laptop) - seconds(Cost(), laptop) == pytest.approx(0.0378 + 0.00066)


def test_joules_by_hand():
    cost = Cost(bytes_down=4_000_000, bytes_up=1_000_000, executed_flops=3e9, steps=27)
    device = replace(
        TOY,
        step_s=0.05,
        round_s=0.4,
        compute_w=10.0,
        idle_w=2.0,
        down_j_per_byte=1e-6,
        up_j_per_byte=5e-6,
    )
    # 10 W for 4.75 s; 2 W for 0.1 + 2 + 2 s; 4 MB at 1 J/MB; 1 MB at 5 J/MB
    assert joules(cost, device) == pytest.approx(47.5 + 8.2 + 4 + 5)
    assert clocked(cost, device) == replace(
        cost, seconds=seconds(cost, device), energy_j=joules(cost, device)
    )
    # the server's own work has no link and no exchange: 10 W for 4.35 s
    own = at_home(cost, device)
    assert [own.seconds, own.energy_j] == pytest.approx([4.35, 43.5])


def test_the_docs_are_right_about_the_joules_of_a_phone():
    cost = Cost(bytes_down=1_000_000, bytes_up=1_000_000, executed_flops=10e9, steps=30)
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert f"{joules(cost, DEVICES['phone']):.2f} J. The same on LTE takes" in text
    assert f"on LTE takes {joules(cost, profile('phone@lte')):.2f} J." in text


def test_the_yardsticks_are_far_apart():
    """An exchange of LeNet-5: what takes longest on one of them is the least on the other."""
    cost = Cost(bytes_down=178_000, bytes_up=178_000, executed_flops=600 * 2.5e6, steps=30)
    slow, far = YARDSTICKS["compute_bound"], YARDSTICKS["network_bound"]
    assert (slow.name, far.name) == ("raspberry_pi_4@fibre", "workstation_gpu@3g")
    shares = [computing_s(cost, device) / seconds(cost, device) for device in (slow, far)]
    assert shares[0] > 0.8 and shares[1] < 0.2


def test_seconds_ignore_the_theoretical_flops_and_what_the_clock_said_before():
    cost = Cost(bytes_down=10, executed_flops=1e6)
    assert seconds(replace(cost, flops=1e15, seconds=99.0), TOY) == seconds(cost, TOY)


def test_four_float32_vectors_must_fit():
    assert training_memory_bytes(100) == 1600
    assert fits(TOY, 100) and not fits(TOY, 101)
    assert fits(DEVICES["phone"], GIB // 16) and not fits(DEVICES["phone"], GIB // 16 + 1)


# --- fleets -------------------------------------------------------------------------------------------------


def names_of(fleet: Fleet) -> list[str]:
    return [fleet.profile(client).name for client in range(len(fleet))]


def test_a_mix_is_met_exactly_and_shuffled():
    fleet = draw(10, MIX, seed=0)
    assert fleet.counts == {"jetson_nano": 3, "phone": 6, "raspberry_pi_4": 1}
    assert sorted(names_of(fleet)) == ["jetson_nano"] * 3 + ["phone"] * 6 + ["raspberry_pi_4"]
    assert names_of(fleet) != sorted(names_of(fleet))


def test_largest_remainders_by_hand():
    # quotas 3.5, 1.75, 1.75 of 7: floors 3, 1, 1, and the two left go to the remainders of 0.75
    assert draw(7, {"phone": 2, "laptop": 1, "server": 1}, seed=0).counts == {
        "laptop": 2,
        "phone": 3,
        "server": 2,
    }
    # a tie of 0.5 and 0.5 goes to the name that sorts first
    assert draw(1, {"phone": 1, "laptop": 1}, seed=0).counts == {"laptop": 1, "phone": 0}


@given(
    st.integers(1, 500),
    st.dictionaries(st.sampled_from(sorted(DEVICES)), st.floats(0, 1e6), min_size=1).filter(
        lambda mix: sum(mix.values()) > 0
    ),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=50)
def test_counts_are_quotas_rounded_and_the_order_of_the_mix_is_nothing(population, mix, seed):
    fleet = draw(population, mix, seed)
    assert sum(fleet.counts.values()) == len(fleet) == population
    for name, count in fleet.counts.items():
        assert abs(count - population * mix[name] / sum(mix.values())) < 1 + 1e-6
    turned = draw(population, dict(reversed(mix.items())), seed)
    assert np.array_equal(turned.index, fleet.index) and turned.profiles == fleet.profiles


def test_the_seed_alone_decides():
    sequence = np.random.SeedSequence([7, 3])
    first, second = draw(1000, MIX, sequence), draw(1000, MIX, sequence)
    assert np.array_equal(first.index, second.index) and np.array_equal(first.jitter, second.jitter)
    other = draw(1000, MIX, np.random.SeedSequence([7, 4]))
    assert not np.array_equal(first.index, other.index)
    assert not np.array_equal(first.jitter, other.jitter)


def test_jitter_changes_speeds_and_nobodys_device():
    plain, jittered = draw(200, MIX, seed=1, jitter=0.0), draw(200, MIX, seed=1, jitter=0.5)
    assert np.array_equal(plain.index, jittered.index)
    for client in range(200):
        before, after = plain.profile(client), jittered.profile(client)
        assert before == profile(before.name)
        changed = {f.name for f in fields(before) if getattr(before, f.name) != getattr(after, f.name)}
        assert changed == {"flops_per_s", "step_s", "downlink_bytes_per_s", "uplink_bytes_per_s"}
        assert after.step_s * after.flops_per_s == pytest.approx(before.step_s * before.flops_per_s)
        assert after == jittered.profile(client)


@pytest.mark.parametrize("jitter", [0.1, 0.5])
def test_jitter_is_log_normal_with_mean_one_and_independent(jitter):
    fleet = draw(100_000, {"phone": 1.0}, seed=2, jitter=jitter)
    factors = fleet.jitter.astype(np.float64)
    assert np.allclose(factors.mean(axis=0), 1, atol=5 * jitter / 100_000**0.5 * 1.2)
    assert np.allclose(np.log(factors).std(axis=0), jitter, rtol=0.02)
    assert np.abs(np.corrcoef(np.log(factors), rowvar=False) - np.eye(3)).max() < 0.02
    speeds = np.array([fleet.profile(client).flops_per_s for client in range(500)])
    assert np.allclose(speeds / DEVICES["phone"].flops_per_s, factors[:500, 0])


def test_availability_is_each_clients_own_and_cannot_be_written():
    fleet = draw(100, {"phone": 1, "server": 1}, seed=3)
    assert fleet.availability.dtype == np.float32 and fleet.availability.shape == (100,)
    assert np.allclose(fleet.availability, [fleet.profile(k).availability for k in range(100)])
    with pytest.raises(ValueError, match="read-only"):
        fleet.availability[0] = 1.0


def test_a_million_clients_are_a_few_megabytes_and_no_second():
    start = time.process_time()
    fleet = draw(1_000_000, {**MIX, "phone@3g": 0.5}, seed=4)
    availability = fleet.availability
    assert time.process_time() - start < 1
    assert fleet.index.nbytes + fleet.jitter.nbytes + availability.nbytes == 17_000_000
    start = time.process_time()
    for client in range(0, 1_000_000, 10_000):
        fleet.profile(client)
    assert time.process_time() - start < 0.1


def test_a_fleet_travels():
    fleet = draw(50, MIX, seed=5)
    again = pickle.loads(pickle.dumps(fleet))
    assert [again.profile(k) for k in range(50)] == [fleet.profile(k) for k in range(50)]


@pytest.mark.parametrize("client", [-1, 10])
def test_no_such_client(client):
    with pytest.raises(IndexError, match=f"client {client}: the fleet has clients 0 to 9"):
        draw(10, MIX, seed=0).profile(client)


@pytest.mark.parametrize(
    ("population", "mix", "jitter", "message"),
    [
        (0, MIX, 0.2, "clients.population: got 0"),
        (10, MIX, -0.1, "clients.jitter: got -0.1"),
        (10, MIX, float("nan"), "clients.jitter: got nan"),
        (10, {}, 0.2, "clients.devices: got {}"),
        (10, {"phone": 0.0}, 0.2, "clients.devices: got {'phone': 0.0}"),
        (10, {"phone": 1.0, "laptop": -1.0}, 0.2, "weights must be finite, at least 0"),
        (10, {"phone": float("inf")}, 0.2, "weights must be finite, at least 0"),
        (10, {"fone": 1.0}, 0.2, "unknown device 'fone'; did you mean 'phone'?"),
    ],
)
def test_a_fleet_that_cannot_be(population, mix, jitter, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        draw(population, mix, seed=0, jitter=jitter)


# --- docs/costs.md ------------------------------------------------------------------------------------------


def rows(columns: int) -> dict[str, list[str]]:
    """Return name → the cells beside it, of the tables with this many columns."""
    found = {}
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == columns:
            found[cells[0].strip("`")] = cells[1:]
    return found


def test_the_table_of_devices_in_the_docs_is_the_one_in_the_code():
    documented = rows(columns=11)
    assert list(documented) == list(HARDWARE)
    for name, (stands_for, link, *numbers) in documented.items():
        hardware = HARDWARE[name]
        assert (stands_for, link) == (hardware.stands_for, f"`{hardware.link}`")
        assert [float(number) for number in numbers] == pytest.approx(
            [
                hardware.flops_per_s / 1e9,
                1e3 * hardware.step_s,
                hardware.round_s,
                hardware.memory_bytes / GIB,
                hardware.compute_w,
                hardware.idle_w,
                hardware.availability,
                hardware.dropout,
            ]
        )


def test_the_table_of_links_in_the_docs_is_the_one_in_the_code():
    documented = rows(columns=6)
    assert list(documented) == list(LINKS)
    for name, numbers in documented.items():
        link = LINKS[name]
        speeds = (link.downlink_bytes_per_s * 8 / 1e6, link.uplink_bytes_per_s * 8 / 1e6)
        assert [float(number) for number in numbers] == pytest.approx(
            [*speeds, link.latency_s * 1e3, 1e6 * link.down_j_per_byte, 1e6 * link.up_j_per_byte], rel=1e-5
        )


@pytest.mark.parametrize("table", [HARDWARE, LINKS])
def test_the_docs_give_the_source_of_every_number(table):
    section, listed = "", set()
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"\*\*\w+\*\* \(`(\w+)`\)", line):
            section = heading[1]
        elif section and line.startswith("* `"):
            names, _, text = line.removeprefix("* ").partition(": ")
            listed |= {(name.strip("`"), section, text) for name in names.split(", ")}
    for name, entry in table.items():
        for number, text in entry.sources.items():
            assert (name, number, text) in listed


def test_the_docs_are_right_about_jitter_in_the_world():
    path = Path(os.environ.get("FEDRAY_DATA", "missing")) / "devices" / "flash_network_speed.csv"
    if not path.is_file():
        pytest.skip("the FLASH network trace is not in FEDRAY_DATA")
    with path.open() as file:
        clients = list(csv.DictReader(file))
    logs = np.array([[log(float(row[key])) for key in ("down_mean", "up_mean")] for row in clients])
    down, up = logs.std(axis=0, ddof=1)
    correlation = np.corrcoef(logs, rowvar=False)[0, 1]
    stated = f"{down:.2f} down and {up:.2f} up, with a correlation of {correlation:.2f}"
    assert stated in " ".join(DOCS.read_text(encoding="utf-8").split())
