"""Debian's Chromium, without a window, on a page from the disk."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-color-profile=srgb"),
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
MISSING = "chromium and chromedriver are not here: apt-get install -y --no-install-recommends chromium chromium-driver"


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with a fresh profile, which logs its console and its requests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(service=Service(executable_path=DRIVER), options=options)
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """A page in a browser, with what tests want to do and to know.

    Args:
        driver: of the browser.
        file: of the page.
        size: of the window, in pixels.
        dark: what the system prefers.
    """

    def __init__(self, driver: Any, file: Path, size: tuple[int, int] = (1366, 768), dark: bool = False) -> None:
        self.driver = driver
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get_log("performance")
        began = time.perf_counter()
        driver.get(file.resolve().as_uri())
        self.seconds = time.perf_counter() - began

    def js(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """The first element."""
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """The text of each element that can be seen."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent).map(e => e.textContent)"
        )
        return self.js(script, selector)

    def see(self, section: str) -> None:
        """Bring a section on the screen, and wait until its plots are drawn."""
        self.js("document.getElementById(arguments[0]).scrollIntoView()", section)
        self.settle()

    def settle(self) -> None:
        """Wait until everything that is due is drawn."""
        self.timed("")

    def choose(self, select: str, text: str) -> None:
        """Choose by what is read."""
        from selenium.webdriver.support.ui import Select

        Select(self.find(select)).select_by_visible_text(text)
        self.settle()

    def set(self, selector: str, value: Any) -> None:
        """Give an input a value, as a hand would."""
        self.js(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            selector,
            value,
        )
        self.settle()

    def traces(self, plot: str) -> list[dict[str, Any]]:
        """Name, points and colour of the lines that are drawn."""
        script = (
            "return (document.getElementById(arguments[0]).data || []).filter(t => t.hoverinfo !== 'skip')"
            ".map(t => ({name: t.name, x: [...t.x], y: [...t.y], color: t.line && t.line.color}))"
        )
        return self.js(script, plot)

    def drawn(self, plot: str) -> int:
        """How many lines there are on the screen."""
        return self.js("return document.querySelectorAll(`#${arguments[0]} .scatterlayer .trace`).length", plot)

    def slowness(self) -> float:
        """How many times slower the machine is now than a quiet one of 2025, by a loop that takes 0.1 s there; at least 1."""
        loop = "let x = 1; for (let k = 0; k < 5e6; k++) x = (x * 16807) % 2147483647; window.x = x"
        taken = self.js(f"const began = performance.now(); {loop}; return performance.now() - began") / 1000
        return max(1.0, taken / 0.1, os.getloadavg()[0] / (os.cpu_count() or 1))

    def until(self, holds: Callable[[], Any], seconds: float = 10.0) -> Any:
        """Wait for something, longer on a slow machine."""
        end = time.monotonic() + seconds * self.slowness()
        while not (found := holds()):
            assert time.monotonic() < end, "did not come about"
            time.sleep(0.05)
        return found

    def timed(self, script: str) -> float:
        """Seconds from a script's start until what it has caused is painted."""
        whole = (
            f"const done = arguments[0]; const began = performance.now(); {script};"
            "const frame = then => requestAnimationFrame(() => setTimeout(then));"
            "const wait = left => left ? frame(() => wait(left - 1)) : done(performance.now() - began); wait(3)"
        )
        return self.driver.execute_async_script(whole) / 1000

    def complaints(self) -> list[str]:
        """Everything in the console but what is mere information."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

    def requests(self) -> list[str]:
        """The addresses that were asked for, but those of the page's own memory."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("data:", "blob:"))]
