"""The live page in a real browser, as a user meets it: `vitrail serve` beside a finished run."""

import base64
import functools
import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitrail
from test_serve import serving
from vitrail.config.settings import Config
from vitrail.training.run import Run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

CAT = Path(__file__).parents[1] / "examples" / "cat.jpg"
DROP = """content => {
    const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], "cat.jpg", {type: "image/jpeg"}));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true}));
}"""
READ_HEAT = """([view]) => {
    const {width, height} = document.querySelectorAll(".heat")[view];
    const copy = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
    copy.drawImage(document.querySelectorAll(".heat")[view], 0, 0);
    return [...copy.getImageData(0, 0, width, height).data];
}"""
sync_api.expect.set_options(timeout=30_000)
Page = Any
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def address(
    browser: Any,
    tiny_run: Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """`vitrail serve` in a folder with one finished run, `short`."""
    folder = tmp_path_factory.mktemp("served")
    for _ in Run.start(tiny_run, folder / "output" / "short").train():
        pass
    with serving(cwd=folder) as (_, line):
        found = re.search(r"serving short, cifar10, cifar10-vit, reference at (\S+)", line)
        assert found is not None
        yield found[1]


@pytest.fixture
def open_page(browser: Any, address: str, tmp_path: Path) -> Iterator[Open]:
    """Open the page; check at the end that nothing was logged, and no other host asked."""
    noises: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_it(url: str = address, width: int = 1280, **settings: Any) -> Page:
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, **settings)
        contexts.append(context)
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on("console", lambda message: noises.append(message.text))
        page.on("pageerror", lambda error: noises.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert noises == []
    allowed = address, "data:", f"blob:{address}", tmp_path.as_uri()
    assert [url for url in requests if not url.startswith(allowed)] == []


def expect(locator: Any) -> Any:
    return sync_api.expect(locator)


def verdict(page: Page, pattern: str = "", view: int = 0) -> str:
    """Wait until the verdict of a view matches, and return it."""
    found = page.locator(".verdict").nth(view)
    expect(found).to_have_text(re.compile(pattern or "%"))
    return str(found.inner_text())


def heat(page: Page, view: int = 0) -> list[int]:
    found: list[int] = page.evaluate(READ_HEAT, [view])
    return found


def drop(page: Page, picture: bytes) -> None:
    page.evaluate(DROP, base64.b64encode(picture).decode())


def choose_method(page: Page, title: str, view: int = 0) -> None:
    """Choose a method and wait for its map."""
    with page.expect_response(re.compile("/api/explain")) as answered:
        page.locator(".view").nth(view).locator(".methods label", has_text=title).first.click()
    assert answered.value.ok
    page.wait_for_timeout(200)


def open_cat(open_page: Open, **settings: Any) -> Page:
    """Open the page with the bundled model on the photograph."""
    page = open_page(**settings)
    verdict(page)
    page.select_option(".model", "cifar10")
    expect(page.locator("#examples img")).to_have_count(10)
    drop(page, CAT.read_bytes())
    verdict(page, "^cat")
    return page


def test_a_dropped_photograph_its_map_and_hidden_patches(open_page: Open) -> None:
    page = open_cat(open_page)
    classifier = vitrail.load("cifar10")
    expected = classifier.predict(CAT)[0]
    assert verdict(page) == f"cat, {expected[0].probability:.1%}"
    assert page.locator(".bars li").count() == 5
    assert len(set(heat(page))) > 20
    for patch in (27, 28, 35):
        page.locator(".cell").nth(patch).click()
    expect(page.locator("#hide-now")).to_have_text("3 of 64 patches hidden")
    raw_1HWC = classifier.read(CAT)
    hidden_1HWC = raw_1HWC.copy()
    for row, column in ((12, 12), (12, 16), (16, 12)):
        hidden_1HWC[:, row : row + 4, column : column + 4] = raw_1HWC.mean((1, 2)).round()
    after = classifier.predict_raw(hidden_1HWC)[0]
    assert after[0].probability != expected[0].probability
    wanted = [f"{each.name} {each.probability:.1%}" for each in after]
    expect(page.locator(".bars li").first).to_have_text(re.compile(wanted[0].split()[1]))
    assert page.locator(".track b").count() == 5
    page.keyboard.press("Escape")
    assert verdict(page, f"{expected[0].probability:.1%}")


def test_method_layer_class_and_contrast_change_the_map(open_page: Open) -> None:
    page = open_cat(open_page)
    balanced = heat(page)
    choose_method(page, "Attention")
    assert heat(page) != balanced
    expect(page.locator(".layers output")).to_have_text("4 of 4")
    last = heat(page)
    page.locator(".layers input").fill("1")
    expect(page.locator(".layers output")).to_have_text("1 of 4")
    assert heat(page) != last
    page.select_option("#class", "dog")
    expect(page.locator("#against-hint")).to_have_text("This map is the same for every class.")
    choose_method(page, "Balanced gradient")
    expect(page.locator(".meaning")).to_contain_text("“dog”")
    dog = heat(page)
    assert dog != balanced
    page.select_option("#against", "cat")
    expect(page.locator(".meaning")).to_contain_text("“dog” rather than “cat”")
    assert heat(page) != dog


def test_the_slider_hides_what_the_map_calls_important(open_page: Open) -> None:
    page = open_cat(open_page)
    expect(page.locator("#curve path")).to_have_count(3)
    before = verdict(page)
    page.locator("#hide").fill("20")
    expect(page.locator(".cell[aria-selected=true]")).to_have_count(20)
    expect(page.locator(".verdict")).not_to_have_text(before)
    page.click("#show-all")
    expect(page.locator(".verdict")).to_have_text(before)


def test_drawing_is_answered_stroke_by_stroke(open_page: Open) -> None:
    page = open_cat(open_page)
    page.click("#draw")
    # The canvas is what the model sees: cropping it again would move the strokes.
    with page.expect_request(re.compile("prepared=1&seen=1")):
        page.click("#blank")
    box = page.locator(".base").bounding_box()
    places = [(0.2, 0.7), (0.5, 0.3), (0.8, 0.7), (0.2, 0.7)]
    answers = set[str]()
    for x, y in places:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=3)
        page.mouse.down()
        page.wait_for_timeout(400)
        answers.add(page.locator(".bars").inner_text())
    page.mouse.up()
    assert len(answers) > 2
    page.click("#undo")
    page.locator("#examples button").nth(1).click()
    verdict(page, "^car")
    assert page.locator("#brushes").is_hidden()


def test_two_models_share_the_picture_and_the_cursor(open_page: Open) -> None:
    page = open_cat(open_page)
    page.click("#compare")
    verdict(page, view=1)
    assert page.locator(".model").nth(1).input_value() == "short"
    page.locator(".view").nth(0).locator(".cell").nth(0).hover()
    expect(page.locator(".linked")).to_have_count(2)
    page.locator(".view").nth(0).locator(".cell").nth(63).click()
    expect(page.locator(".cell[aria-selected=true]")).to_have_count(2)
    page.click("#compare")
    expect(page.locator(".view")).to_have_count(1)


def test_a_cell_of_the_confusion_matrix_opens_its_pictures(open_page: Open) -> None:
    page = open_page()
    verdict(page)
    page.click("#tab-mistakes")
    state = page.locator("#mistakes-state")
    expect(state).to_have_text(re.compile(r"^([\d,]+) of \1 "), timeout=60_000)
    numbers = page.locator("#matrix button").all_inner_texts()
    counts = [0 if text == "·" else int(text) for text in numbers]
    assert sum(counts) == int(state.inner_text().split()[0].replace(",", ""))
    wrong = next(i for i, count in enumerate(counts) if count and i // 10 != i % 10)
    page.locator("#matrix button").nth(wrong).click()
    expect(page.locator("#cell-title")).to_contain_text("predicted as")
    expect(page.locator("#cell button")).to_have_count(min(60, counts[wrong]))
    page.locator("#cell button").first.click()
    assert "✗ label:" in verdict(page, "label")
    assert page.locator("#look").is_visible()
    page.click("#tab-training")
    expect(page.locator("#training-state")).to_have_text(re.compile("^epoch 3 of 3"))
    expect(page.locator("#watched button")).to_have_count(10)


def test_the_view_is_saved_as_png_and_as_a_page_that_opens_offline(
    open_page: Open, tmp_path: Path
) -> None:
    page = open_cat(open_page)
    with page.expect_download() as waiting:
        page.click("#save-png")
    assert waiting.value.suggested_filename == "cat-balanced.png"
    pixels = np.asarray(Image.open(io.BytesIO(waiting.value.path().read_bytes())))
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 1000
    with page.expect_download(timeout=90_000) as waiting:
        page.click("#save-html")
    saved = tmp_path / "cat.html"
    saved.write_bytes(waiting.value.path().read_bytes())
    alone = open_page(saved.as_uri(), offline=True)
    expect(alone.locator("#verdict")).to_have_text(re.compile("^cat"))
    expect(alone.locator(".cell")).to_have_count(64)
    for title in ("Balanced gradient", "Occlusion"):
        alone.get_by_role("radio", name=title).check()


@pytest.mark.slow
def test_ten_pages_at_once_stay_live(open_page: Open) -> None:
    pages = [open_page() for _ in range(10)]
    answers = [0] * len(pages)

    def count(number: int, response: Any) -> None:
        answers[number] += "/api/explain" in response.url and response.ok

    for number, page in enumerate(pages):
        page.on("response", functools.partial(count, number))
        verdict(page)
        page.click("#draw")
        box = page.locator(".base").bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20)
        page.mouse.down()
    for step in range(5):  # strokes on all pages at once
        before = answers[:]
        for page in pages:
            page.mouse.move(box["x"] + 40 * step, box["y"] + 200 - 30 * step, steps=3)
        deadline = time.monotonic() + 30
        while any(after <= count for after, count in zip(answers, before, strict=True)):
            assert time.monotonic() < deadline, answers
            pages[0].wait_for_timeout(20)
    for page in pages:
        page.mouse.up()
        assert page.locator("#problem").inner_text() == ""


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_everyone_can_use_it(open_page: Open, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    page = open_page(width=width, color_scheme=scheme)
    verdict(page)
    drop(page, CAT.read_bytes())
    page.click("#compare")
    verdict(page, "^cat", view=1)
    page.click("#draw")
    page.locator("details summary").click()
    problems = []
    for tab in ("look", "mistakes", "training"):
        page.click(f"#tab-{tab}")
        expect(page.locator(f"#{tab}")).to_be_visible()
        if tab == "mistakes":
            expect(page.locator("#matrix button")).to_have_count(100)
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        found = axe.Axe().run(page).response["violations"]
        problems += [(tab, each["id"], each["nodes"][0]["html"]) for each in found]
    assert problems == []
