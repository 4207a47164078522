"""The report in a real browser: its script runs under its own policy, and nothing is wider than a phone.

Speaks to chromedriver by its protocol, which is plain HTTP and JSON; without Chromium the test is left out.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report_runs import record, recorded, write_run

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.report.compare import write_comparison
from megatron_deepstack.report.page import write_report

pytestmark = pytest.mark.slow

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


class Browser:
    """A window of a headless Chromium."""

    def __init__(self, address: str) -> None:
        self.address = address
        options = {"binary": BROWSER, "args": list(FLAGS)}
        logs = {"goog:loggingPrefs": {"browser": "ALL"}}
        asked = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, **logs}}}
        self.session = f"/session/{self.send('POST', '/session', asked)['sessionId']}"

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def open(self, file: Path, width: int) -> None:
        """Load a page in a window whose page is `width` pixels wide."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send(
            "POST",
            f"{self.session}/goog/cdp/execute",
            {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics},
        )
        self.send("POST", f"{self.session}/url", {"url": file.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """The value of a script in the page."""
        return self.send("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """What the page's console has of warnings and errors, such as a script that the policy refuses."""
        entries = self.send("POST", f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver here")
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        said = []
        for line in driver.stdout:
            said.append(line)
            if "started successfully on port" in line:
                break
        else:
            pytest.skip(f"chromedriver does not start here: {''.join(said)}")
        window = Browser(f"http://127.0.0.1:{said[-1].rstrip().rstrip('.').rsplit(' ', 1)[1]}")
        yield window
        window.send("DELETE", window.session)
        driver.terminate()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one = write_run(folder / "one", Recipe(name="one"), [record(step, spike=step == 3) for step in range(1, 60)])
    two = write_run(folder / "two", Recipe(name="the other one, with a long name"), [record(1), record(2)])
    (one / "timeline_step_3.json").write_text(json.dumps(recorded()))
    answers = [
        {
            "id": str(n),
            "question": f"Question {n}?",
            "answer": f"{n}",
            "expected": f"{n - n % 2}",
            "correct": n % 2 == 0,
        }
        for n in range(20)
    ]
    (one / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return {"report": write_report(one), "comparison": write_comparison([one, two])}


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("page", ["report", "comparison"])
def test_nothing_is_wider_than_the_page_and_all_charts_are_drawn(
    browser: Browser, pages: dict[str, Path], page: str, width: int
) -> None:
    browser.open(pages[page], width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    places = browser.run("return document.querySelectorAll('.chart').length")
    drawn = "return [...document.querySelectorAll('.chart')].filter((place) => place.childElementCount > 0).length"
    assert browser.run(drawn) == places > 0
    broken = "return [...document.querySelectorAll('.brief, th')].filter((cell) => cell.offsetHeight > 40).length"
    assert browser.run(broken) == 0, "short cells and heads stay on one line"
    assert browser.complaints() == []


def test_answers_sort_and_filter(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 1400)
    rows = "[...document.querySelectorAll('table.sortable tr[data-kind]:not([hidden])')]"
    column = f"return {rows}.map((row) => row.cells[0].textContent)"
    assert browser.run(column)[:2] == ["1", "3"], "wrong ones first"
    browser.run("document.querySelector('table.sortable th button').click()")
    assert browser.run(column)[:3] == ["0", "1", "2"]
    browser.run("document.querySelector('table.sortable th button').click()")
    assert browser.run(column)[:2] == ["19", "18"]
    browser.run(
        "const box = document.querySelector('.filter input'); box.value = 'question 7';"
        "box.dispatchEvent(new Event('input'))"
    )
    assert browser.run(column) == ["7"]
    assert browser.run("return document.querySelector('.filter output').textContent") == "1 of 20"
