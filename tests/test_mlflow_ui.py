"""MLflow's UI in a real browser: the address that `fedray ui` prints opens the comparison of a sweep.

    python -m tests.test_mlflow_ui docs/mlflow_comparison.png docs/mlflow_charts.png

makes the screenshots of the documentation.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.sweeps.space import Sweep
from fedray.sweeps.sweep import sweep

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")

NAMES = ("fedavg", "staged density=0.3", "prunefl", "frlp")
LOADED_S = 60.0
"""Seconds that a page of MLflow may take on a busy machine."""
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1500,1100",
)

FILE: dict[str, Any] = {
    "base": {
        "rounds": 4,
        "model": "mlp",
        "data": {"name": "digits", "server_fraction": 0.1},
        "clients": {"population": 8, "cohort": 4, "actors": 0},
    },
    "space": {
        "method": {
            "grid": [
                {"name": "fedavg"},
                {"name": "staged", "density": 0.3},
                {"name": "prunefl"},
                {"name": "frlp", "prune_rounds": [2]},
            ]
        }
    },
}


def make_sweep(folder: Path) -> Path:
    """Make a sweep over four methods in `folder`, where the store is too."""
    tree = {**FILE, "base": {**FILE["base"], "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}}
    (folder / "four.yaml").write_text(yaml_text.dump(tree), encoding="utf-8")
    return sweep(Sweep.load(folder / "four.yaml"), out=folder / "four").path


@contextmanager
def served(directory: Path, cwd: Path) -> Iterator[list[str]]:
    """Run `fedray ui` as a user does; yield the addresses that it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fedray.cli", "ui", str(directory), "--port", str(port)]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    log = cwd / "ui.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=subprocess.DEVNULL, env=env)
    try:
        deadline = time.monotonic() + LOADED_S
        while time.monotonic() < deadline:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield re.findall(rf"http://127\.0\.0\.1:{port}/\S+", log.read_text())
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Yield a headless Chromium with a fresh profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def text_of(driver: Any) -> str:
    return str(driver.execute_script("return document.body.textContent"))


SCROLL = """
for (const part of document.querySelectorAll('*')) {
    if (part.scrollHeight > part.clientHeight + 5 && part.clientHeight > 50) {
        const end = part.scrollTop + part.clientHeight + 5 >= part.scrollHeight;
        part.scrollTop = end ? 0 : part.scrollTop + part.clientHeight / 2;
    }
}
"""
"""Scrolls each part of a page by half of its height: MLflow draws only the rows of a table in view."""


def wait_for(driver: Any, *texts: str) -> str:
    """Wait until a page has shown all of `texts`, scrolling it; return all that it showed."""
    deadline = time.monotonic() + LOADED_S
    shown = text_of(driver)
    while missing := [text for text in texts if text not in shown]:
        assert time.monotonic() < deadline, f"missing {missing} in {shown[-3000:]}"
        driver.execute_script(SCROLL)
        time.sleep(0.3)
        shown += text_of(driver)
    return shown


def close_assistant(driver: Any) -> None:
    for button in driver.find_elements("css selector", "button[aria-label*='lose']"):
        if button.is_displayed():
            button.click()


def test_the_printed_address_opens_the_comparison_of_the_trials(ray_local, tmp_path):
    path = make_sweep(tmp_path)
    with served(path, tmp_path) as addresses, browser(tmp_path / "profile") as driver:
        comparison, charts = addresses
        assert "/#/compare-runs?runs=%5B%22" in comparison and "&experiments=%5B%22" in comparison
        assert comparison.endswith("workflowType=machine_learning")
        driver.get(comparison)
        page = wait_for(
            driver, "Comparing 4 Runs from 1 Experiment", *NAMES, "val/accuracy", "total/bytes/up"
        )
        assert "null" not in page  # no parameter without a value
        # the second address has accuracy over bytes and over seconds: no click
        driver.get("about:blank")
        driver.get(charts)
        costs = "total/bytes/up", "total/time/simulated_s", "total/flops/clients"
        page = wait_for(driver, "Accuracy against costs", *NAMES, "val/accuracy", *costs)
        assert "4 matching runs" in page  # the trials, not folded under their sweep


def screenshots(comparison: Path, charts: Path) -> None:
    """Make the pictures of the documentation."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        home = Path(folder)
        with served(make_sweep(home), home) as addresses, browser(home / "profile") as driver:
            for address, picture, text in zip(
                addresses, (comparison, charts), ("Metrics", "total/bytes/up"), strict=True
            ):
                driver.get("about:blank")
                driver.get(address)
                wait_for(driver, *NAMES, text)
                close_assistant(driver)
                time.sleep(3)
                driver.save_screenshot(str(picture))


if __name__ == "__main__":
    screenshots(*map(Path, sys.argv[1:]))
