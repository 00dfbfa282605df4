"""Record the live page in use: serve.webp and serve-dark.webp, by Chromium and playwright.

python docs/pictures/serve.py    # the bundled model; CIFAR-10 in data/, else it is downloaded
"""

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

PICTURES = Path(__file__).parent
ROOT = PICTURES.parents[1]
SIZE, WIDTH = {"width": 1200, "height": 880}, 900
"""Of the window, and of the recording."""
SHORT, LONG = 300, 1700
"""Milliseconds that a frame is shown."""
HIDDEN = (4, 8, 12, 16, 20, 24, 28, 32)
STROKES = ((0.15, 0.4), (0.3, 0.25), (0.45, 0.4), (0.6, 0.25), (0.75, 0.4), (0.9, 0.25))


@contextmanager
def serving() -> Iterator[str]:
    """Serve the bundled model; yield the address."""
    command = [sys.executable, "-m", "vitrail", "serve", "--no_browser", "--port", "0", "cifar10"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r" at (\S+)", server.stdout.readline())
        assert found is not None
        try:
            yield found[1]
        finally:
            server.terminate()


class Recorder:
    """A page whose screenshots are the frames of an animation."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.durations: list[int] = []
        self.open: set[Any] = set()
        page.on("request", lambda request: self.open.add(request))
        for event in ("requestfinished", "requestfailed"):
            page.on(event, lambda request: self.open.discard(request))

    def wait(self) -> None:
        """Wait until the page has asked for nothing in half a second."""
        quiet = 0
        while quiet < 5:
            self.page.wait_for_timeout(100)
            waiting = [each for each in self.open if "/api/" in each.url]
            quiet = 0 if waiting else quiet + 1

    def take(self, duration: int) -> None:
        """Take a frame once the page is quiet."""
        self.wait()
        self.page.evaluate("scrollTo(0, 0)")
        shot = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        height = round(WIDTH * shot.height / shot.width)
        self.frames.append(shot.resize((WIDTH, height), Image.Resampling.LANCZOS))
        self.durations.append(duration)

    def save(self, path: Path) -> None:
        """Write the animation."""
        first, *others = self.frames
        first.save(
            path, save_all=True, append_images=others, duration=self.durations, loop=0,
            quality=62, method=6,
        )  # fmt: skip


def play(recorder: Recorder) -> None:
    """Use the page as a visitor would."""
    page = recorder.page
    page.set_input_files("#file", ROOT / "examples/cat.jpg")
    expect(page.locator(".verdict")).to_contain_text("cat")
    expect(page.locator("#curve path")).to_have_count(3)
    recorder.take(LONG)
    for count in HIDDEN:
        page.locator("#hide").fill(str(count))
        expect(page.locator("#hide-now")).to_contain_text(f"{count} of")
        recorder.take(SHORT if count < HIDDEN[-1] else LONG)
    page.click("#show-all")
    page.locator(".methods label", has_text="Relevance").click()
    for layer in (1, 2, 3, 4):
        recorder.wait()
        page.locator(".layers input").fill(str(layer))
        recorder.take(2 * SHORT)
    page.locator(".methods label", has_text="Occlusion").click()
    recorder.take(LONG)
    page.locator(".methods label", has_text="Balanced").click()
    page.click("#draw")
    box = page.locator(".base").bounding_box()
    for number, (x, y) in enumerate(STROKES):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if not number:
            page.mouse.down()
        recorder.take(SHORT)
    page.mouse.up()
    recorder.take(LONG)
    page.click("#tab-mistakes")
    expect(page.locator("#mistakes-state")).to_contain_text("5,000 of 5,000", timeout=300_000)
    page.locator("#matrix button").nth(35).click()
    expect(page.locator("#cell button").first).to_be_visible()
    recorder.take(2 * LONG)


def main() -> None:
    """Record it for light and for dark pages."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    expect.set_options(timeout=60_000)
    with serving() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for theme, suffix in (("light", ""), ("dark", "-dark")):
            page = browser.new_page(viewport=SIZE, color_scheme=theme)
            page.set_default_timeout(60_000)
            page.goto(address)
            recorder = Recorder(page)
            play(recorder)
            recorder.save(PICTURES / f"serve{suffix}.webp")
        browser.close()


if __name__ == "__main__":
    main()
