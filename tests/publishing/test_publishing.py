"""A directory in S3: generations are whole, whatever dies; one process publishes; damage is refused."""

import json
import logging
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedray.config.places import Place
from fedray.errors import RunError
from fedray.publishing import claims, objects, publisher
from fedray.publishing.claims import Claim
from fedray.publishing.fetching import bring_newer, fetch, place_of, readable_copy, refresh, working_copy
from fedray.publishing.manifest import MANIFEST, NOTHING
from fedray.publishing.manifest import read as read_manifest
from fedray.publishing.objects import Missing, Objects, StoreError
from fedray.publishing.publisher import PUBLISHED, Publisher, is_published
from tests.publishing.s3 import S3


def filled(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_text() for path in files}
    return {name: text for name, text in found.items() if Path(name).name not in (PUBLISHED, ".lock")}


def published(folder: Path, address: str) -> None:
    with Publisher(folder, Place.parse(address)):
        pass


def test_another_node_fetches_what_was_published(s3: S3, tmp_path: Path):
    here, there = filled(tmp_path / "here", a="one", b="two"), tmp_path / "there"
    filled(here / "checkpoints", c="three" * 5_000_000)  # more than one piece
    filled(here / "trials", d="published by itself")
    filled(here, **{".lock": "of this process"})
    address = s3.new()
    published(here, address)
    there.mkdir()
    assert fetch(s3.objects(address), there).generation == 1
    expected = {"a": "one", "b": "two", "checkpoints/c": "three" * 5_000_000}
    assert contents(there) == expected
    assert is_published(here) and is_published(there)


def test_a_generation_sends_what_has_changed_and_removes_what_no_reader_needs(s3: S3, tmp_path: Path):
    folder, address = filled(tmp_path / "run", a="1", same="always"), s3.new()
    store = s3.objects(address)
    with Publisher(folder, Place.parse(address)) as publishing:
        sent: list[str] = []
        put = publishing.objects.put
        publishing.objects.put = lambda name, *more: (sent.append(name), put(name, *more))[1]  # type: ignore
        counts = []
        for number in range(1, 6):
            (folder / "a").write_text(str(number))
            sent.clear()
            assert publishing.publish()
            counts.append((len(sent), len(store.listed("objects"))))
        sent.clear()
        assert publishing.publish()
        assert sent == []  # nothing has changed
    assert counts == [(3, 2), (2, 3), (2, 3), (2, 3), (2, 3)]  # a, and `same` once; the manifest
    assert read_manifest(store).generation == 5
    assert store.listed("claims") == []


def test_files_that_were_removed_are_removed_everywhere(s3: S3, tmp_path: Path):
    here, there, address = filled(tmp_path / "here", a="1", b="2"), tmp_path / "there", s3.new()
    published(here, address)
    there.mkdir()
    fetch(s3.objects(address), there)
    (here / "b").unlink()
    published(here, address)
    assert bring_newer(s3.objects(address), there)
    assert contents(there) == {"a": "1"}
    assert not bring_newer(s3.objects(address), there)


DIES = """
    import os, sys
    from pathlib import Path
    from fedray.config.places import Place
    from fedray.publishing import objects
    from fedray.publishing.publisher import Publisher

    last, after = int(sys.argv[3]), sys.argv[4] == "after"
    calls = 0

    def dying(method):
        def call(self, *args):
            global calls
            calls += 1
            if calls == last and not after:
                os._exit(9)
            done = method(self, *args)
            if calls == last:
                os._exit(9)
            return done
        return call

    objects.Objects.put = dying(objects.Objects.put)
    objects.Objects.remove = dying(objects.Objects.remove)
    with Publisher(Path(sys.argv[1]), Place.parse(sys.argv[2])):
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_dies_at_any_write_leaves_a_whole_generation(s3: S3, tmp_path: Path, when: str):
    old, new = {"a": "1", "b": "2", "same": "x"}, {"a": "3", "c": "4", "same": "x"}
    seen = []
    for last in range(1, 20):
        folder, address = filled(tmp_path / f"{last}", **old), s3.new()
        published(folder, address)
        (folder / "b").unlink()
        filled(folder, **new)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(DIES), str(folder), address, str(last), when]
        )
        copy = tmp_path / f"{last}-copy"
        copy.mkdir()
        fetch(s3.objects(address), copy)
        seen.append(contents(copy))
        assert seen[-1] in (old, new)
        published(folder, address)  # the next process needs no help, and no other node's files
        assert bring_newer(s3.objects(address), copy) == (seen[-1] == old)
        assert contents(copy) == new == contents(folder)
        assert len(s3.objects(address).listed("claims")) == 0
        if done.returncode == 0:
            break
        assert done.returncode == 9
    assert done.returncode == 0 and len(seen) >= 5
    assert seen.count(old) in range(3, len(seen) - 1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_object_is_refused_by_the_name_of_its_file(s3: S3, tmp_path: Path, damage: str):
    folder, address = filled(tmp_path / "run", a="one", b="two"), s3.new()
    published(folder, address)
    store = s3.objects(address)
    name = f"objects/{read_manifest(store).files['b'].sha256}"
    if damage == "gone":
        store.remove(name)
    else:
        store.put(name, b"twO" if damage == "flipped" else b"tw")
    copy = filled(tmp_path / "copy")
    with pytest.raises(RunError, match=r"b is damaged in the store|objects/\w+: is not there.*not whole"):
        fetch(store, copy)
    assert "b" not in contents(copy)
    store.put(name, b"two")
    fetch(store, copy)  # it knows that it is not whole
    assert contents(copy) == {"a": "one", "b": "two"}


def test_a_manifest_that_is_cut_or_changed_is_refused(s3: S3, tmp_path: Path):
    folder, address = filled(tmp_path / "run", a="one"), s3.new()
    published(folder, address)
    store = s3.objects(address)
    text = store.get(MANIFEST)
    for cut in range(0, len(text) - 1, 7):
        store.put(MANIFEST, text[:cut])
        with pytest.raises(RunError, match=r"manifest\.json is damaged"):
            read_manifest(store)
    for at in range(0, len(text), 7):
        store.put(MANIFEST, text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        with pytest.raises(RunError, match=r"manifest\.json"):
            assert read_manifest(store) == NOTHING
    with pytest.raises(RunError, match=r"manifest\.json"):
        published(folder, address)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_name_a_file_outside(s3: S3, tmp_path: Path, name: str):
    folder, address = filled(tmp_path / "run", a="one"), s3.new()
    published(folder, address)
    store = s3.objects(address)
    current = read_manifest(store)
    store.put(MANIFEST, current.next({name: current.files["a"]}).write())
    with pytest.raises(RunError, match="not below a directory"):
        fetch(store, filled(tmp_path / "copy"))


# ── two processes
# ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_process_is_refused(s3: S3, tmp_path: Path):
    folder, address = filled(tmp_path / "run", a="one"), s3.new()
    said = rf"process \d+ on {socket.gethostname()}, since .*, publishes"
    with Publisher(folder, Place.parse(address)), pytest.raises(RunError, match=said):
        Publisher(folder, Place.parse(address), waits=False).__enter__()
    published(folder, address)


def claimed_elsewhere(store: Objects, **who: object) -> None:
    text = {"pid": 1, "host": "elsewhere", "since": "2026-01-31 12:00:00 UTC"} | who
    store.put("claims/other.json", json.dumps(text).encode())


def test_a_dead_process_of_this_host_does_not_matter(s3: S3, tmp_path: Path):
    folder, address = filled(tmp_path / "run", a="one"), s3.new()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    claimed_elsewhere(s3.objects(address), pid=child.pid, host=socket.gethostname())
    published(folder, address)
    assert read_manifest(s3.objects(address)).generation == 1


def test_a_silent_process_of_another_host_is_waited_for(s3: S3, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(claims, "LEASE_S", 3.0)
    monkeypatch.setattr(claims, "BEAT_S", 1.0)
    folder, address = filled(tmp_path / "run", a="one"), s3.new()
    claimed_elsewhere(s3.objects(address))
    with caplog.at_level(logging.WARNING):
        published(folder, address)
    assert "process 1 on elsewhere" in caplog.text and "waiting up to" in caplog.text
    assert s3.objects(address).listed("claims") == []


def test_a_process_of_another_host_that_is_alive_is_seen_at_its_next_beat(s3: S3, monkeypatch):
    store = s3.objects(s3.new())
    monkeypatch.setattr(claims, "LEASE_S", 30.0)
    monkeypatch.setattr(claims, "_pause", lambda s: claimed_elsewhere_later(store))
    claimed_elsewhere(store)
    with pytest.raises(RunError, match="process 1 on elsewhere"):
        Claim(store, waits=True).__enter__()
    assert [one.name for one in store.listed("claims")] == ["other.json"]


def claimed_elsewhere_later(store: Objects) -> None:
    import threading

    threading.Event().wait(1.1)  # moto's clock has seconds
    claimed_elsewhere(store)


def test_a_process_that_was_taken_over_publishes_no_more(s3: S3, tmp_path: Path):
    folder, address = filled(tmp_path / "run", a="one"), s3.new()
    store = s3.objects(address)
    taken = pytest.raises(RunError, match="another process has taken over")
    with taken, Publisher(folder, Place.parse(address)) as publishing:
        publishing.publish()
        for claim in store.listed("claims"):
            store.remove(f"claims/{claim.name}")
        filled(folder, a="two")
    assert read_manifest(store).generation == 1


def test_a_directory_that_lacks_a_generation_does_not_publish(s3: S3, tmp_path: Path):
    here, address = filled(tmp_path / "here", a="one"), s3.new()
    published(here, address)
    with pytest.raises(RunError, match=r"holds generation 1, which .* lacks"):
        published(filled(tmp_path / "other", a="mine"), address)
    there = filled(tmp_path / "there")
    fetch(s3.objects(address), there)
    published(filled(there, a="continued"), address)
    with pytest.raises(RunError, match=r"holds generation 2, which .* lacks"):
        published(filled(here, a="stale"), address)
    assert str(place_of(here, address.replace("/runs?", "?"))) == address  # not …/here
    refresh(here, Place.parse(address))
    assert contents(here) == {"a": "continued"}
    published(filled(here, a="more"), address)
    with pytest.raises(RunError, match=rf"holds something that .* does not come from.*resume {address[:20]}"):
        refresh(tmp_path / "other", Place.parse(address))


# ── stores that do not answer
# ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_outlives_an_outage_and_publishes_later(s3: S3, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(publisher, "PAUSE_S", 0.0)
    folder, address = filled(tmp_path / "run", a="one"), s3.new()
    with Publisher(folder, Place.parse(address)) as publishing, caplog.at_level(logging.WARNING):
        assert publishing.publish()
        s3.stop()
        try:
            filled(folder, a="two")
            assert not publishing.publish()
            assert not publishing.publish()
        finally:
            s3.start()
        assert caplog.text.count("does not answer") == 1 and "published later" in caplog.text
        assert publishing.publish()
    assert "has all files again" in caplog.text
    assert read_manifest(s3.objects(address)).generation == 2


def test_at_the_end_an_outage_is_an_error_that_says_what_is_missing(s3: S3, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(publisher, "PATIENCE_S", 2.0)
    folder, address = filled(tmp_path / "run", a="one", b="same"), s3.new()
    with pytest.raises(StoreError) as refused, Publisher(folder, Place.parse(address)) as publishing:
        publishing.publish()
        filled(folder, a="two" * 100_000)
        s3.stop()
    s3.start()
    text = str(refused.value)
    assert "1 files (0.3 MB)" in text and f"`fedray resume {folder}` sends them" in text
    assert not is_published(folder)
    published(folder, address)
    assert is_published(folder)


def test_an_error_of_the_run_matters_more_than_one_of_the_store(s3: S3, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(publisher, "PATIENCE_S", 1.0)
    folder, address = filled(tmp_path / "run", a="one"), s3.new()
    with pytest.raises(KeyError), Publisher(folder, Place.parse(address)):
        s3.stop()
        raise KeyError("of the run")
    s3.start()
    assert "not published; nothing is lost" in caplog.text


def test_what_a_store_refuses_is_one_error(s3: S3, tmp_path: Path):
    with pytest.raises(Missing, match="there is no bucket 'nowhere'"):
        Objects(Place.parse(f"s3://nowhere/x{s3.query}")).check()
    store = s3.objects(s3.new())
    store.put("file", b"")
    with pytest.raises(StoreError, match="is an object"):
        store.below("file").check()
    store.check()
    s3.stop()
    try:
        with pytest.raises(StoreError, match=r"^s3://fedray/\d+/runs\?.*: the store does not answer"):
            s3.objects(str(store.place)).check()
    finally:
        s3.start()


def test_a_store_that_never_answers_is_given_up(tmp_path: Path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        query = f"?endpoint_override=http://127.0.0.1:{silent.getsockname()[1]}"
        store = Objects(Place.parse(f"s3://bucket/x{query}"), answer_s=1.0)
        with pytest.raises(StoreError, match="no answer within 1 s"):
            store.check()


# ── copies
# ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_working_copy_has_the_trials_of_a_sweep_too(s3: S3, tmp_path: Path):
    address = s3.new("sweep-001")
    here = filled(tmp_path / "sweep-001", **{"sweep.yaml": "points"})
    published(here, address)
    for name in ("a", "b"):
        place = Place.parse(address).below("trials", name)
        published(filled(here / "trials" / name, rounds="1"), str(place))
    copy = working_copy(address, tmp_path / "runs")
    assert copy == tmp_path / "runs" / "sweep-001"
    assert contents(copy) == {"sweep.yaml": "points", "trials/a/rounds": "1", "trials/b/rounds": "1"}
    assert working_copy(address, tmp_path / "runs") == copy
    filled(tmp_path / "others" / "sweep-001", a="of another sweep")
    assert working_copy(address, tmp_path / "others") == tmp_path / "others" / "sweep-001-001"


def test_a_readable_copy_is_in_the_cache_and_has_no_checkpoints(s3: S3, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parent = Place.parse(s3.new("all"))
    here = filled(tmp_path / "run-1", rounds="1")
    filled(here / "checkpoints", c="large")
    published(here, str(parent.below("run-1")))
    published(filled(tmp_path / "run-2", rounds="2"), str(parent.below("run-2")))
    copy = readable_copy(str(parent))
    assert (copy.name, sorted(path.name for path in copy.iterdir())) == ("all", ["run-1", "run-2"])
    assert contents(copy / "run-1") == {"rounds": "1"}
    monkeypatch.setattr(objects.Objects, "pieces", nothing_but_the_manifest(objects.Objects.pieces))
    assert readable_copy(str(parent)) == copy  # nothing is fetched twice


def nothing_but_the_manifest(pieces):
    def only(self, name: str):
        assert name == MANIFEST
        return pieces(self, name)

    return only


@pytest.mark.parametrize("copied", [readable_copy, lambda address: working_copy(address, Path("runs"))])
def test_where_nothing_is_published_the_message_says_what_is_near(
    s3: S3, tmp_path: Path, copied, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="no run or sweep is published there"):
        copied(s3.new())
    assert not (tmp_path / "runs").exists()
