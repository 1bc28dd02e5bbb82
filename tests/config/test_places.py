"""`storage`: which addresses are taken, and that a login stays in none."""

import os
from pathlib import Path

import pytest

from fedray.config.places import KEY, SECRET, SESSION, Place, absolute_place, folder_of, is_place
from fedray.errors import ConfigError


@pytest.fixture(autouse=True)
def no_login(monkeypatch):
    for name in (KEY, SECRET, SESSION):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "given, written",
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3://bucket/a", "s3://bucket/a"),
        ("s3a://bucket/a", "s3://bucket/a"),
        ("gcs://bucket/a", "gs://bucket/a"),
        ("s3://bucket/a%20b", "s3://bucket/a%20b"),
        (
            "s3://b/a?scheme=http&endpoint_override=127.0.0.1:9000",
            "s3://b/a?endpoint_override=127.0.0.1:9000&scheme=http",
        ),
        (
            "s3://b?endpoint_override=http%3A%2F%2Flocalhost%3A9000",
            "s3://b?endpoint_override=http://localhost:9000",
        ),
        ("s3://AKIA:se%2Fcret@bucket/a?region=eu-west-1", "s3://bucket/a?region=eu-west-1"),
    ],
)
def test_an_address_is_written_one_way_and_means_the_same_again(given: str, written: str):
    assert absolute_place(given) == written
    assert absolute_place(written) == written


def test_a_login_goes_to_the_environment_and_stays_in_no_text(monkeypatch):
    monkeypatch.setenv(SESSION, "of another login")
    place = Place.parse("s3://AKIA:s%2Fe%40cret@bucket/runs")
    assert "AKIA" not in str(place) and "AKIA" not in repr(place)
    assert (os.environ[KEY], os.environ[SECRET]) == ("AKIA", "s/e@cret")
    assert SESSION not in os.environ


@pytest.mark.parametrize(
    "given, said",
    [
        ("s4://bucket", "unknown scheme 's4'; did you mean 's3'?"),
        ("hdfs://bucket", "unknown scheme 'hdfs'"),
        ("https://bucket.s3.amazonaws.com/x", "unknown scheme 'https'"),
        ("s3:///x", "names no bucket"),
        ("s3://localhost:9000/bucket", "endpoint_override=http://HOST:PORT"),
        ("s3://bucket/x?end_point=localhost", "did you mean 'endpoint_override'?"),
        ("s3://bucket/x?region", "NAME=VALUE"),
        ("s3://bucket/x?region=", "NAME=VALUE|no value"),
        ("s3://bucket/x?scheme=ftp", "http or https"),
        ("s3://bucket/x?region=a&region=b", "twice"),
        ("s3://bucket/../x", "no part that is"),
        ("s3://bucket/x#y", "no #"),
        ("file://host/x", "three slashes"),
        ("s3:/bucket/x", "two slashes"),
        ("", "is not a path"),
    ],
)
def test_anything_else_is_refused_with_what_is_allowed(given: str, said: str):
    with pytest.raises(ConfigError) as refused:
        absolute_place(given)
    assert any(part in str(refused.value) for part in said.split("|"))
    assert "Allowed: " in str(refused.value) or not given


@pytest.mark.parametrize(
    "given",
    [
        "s3://AKIA:geheim/part@bucket/x",
        "s3://AKIA:geheim#@bucket/x",
        "s3://AKIA:geheim?@bucket/x",
        "s3://:geheim@bucket/x",
        "s3://geheim:@bucket/x",
        "gs://user:geheim@bucket/x",
        "s4://user:geheim@bucket/x",
        "s3://bucket/x?endpoint_override=http://user:geheim@host:9000",
        "s3://user:geheim@bucket:9000/x",
    ],
)
def test_no_refusal_shows_a_login(given: str):
    with pytest.raises(ConfigError) as refused:
        absolute_place(given)
    assert "geheim" not in str(refused.value)
    assert KEY not in os.environ


def test_a_folder_is_a_path_or_a_file_address(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_place("results") == str(tmp_path / "results")
    assert folder_of(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert not is_place(f"file://{tmp_path}") and not is_place("results") and is_place("s3://b")


def test_places_below_a_place():
    place = Place.parse("s3://bucket/runs?region=eu-west-1")
    assert str(place.below("a", "trials")) == "s3://bucket/runs/a/trials?region=eu-west-1"
    assert (place.name, Place.parse("s3://bucket").name) == ("runs", "bucket")
    assert Place.parse("s3://bucket").below("x").key == "bucket/x"
