"""The page in a real browser. Each test ends by checking that nothing was logged or loaded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from test_large_page import SMALL, make_page_data
from test_page import HOSTILE, make_data
from vitrail.explain.page import PageData, make_page
from vitrail.explain.stored_scores import Badge

Open = Callable[..., Any]
NAMES = ["attention", "rollout", "relevance", "gradcam"]
"""The methods of make_data's page: two from the attention, two given."""

READ_HEAT = """() => {
    const copy = new OffscreenCanvas(3, 2).getContext("2d", {willReadFrequently: true});
    copy.drawImage(document.querySelector("#heat"), 0, 0);
    return [...copy.getImageData(0, 0, 3, 2).data];
}"""


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a page with its table of numbers expanded; check at the end that nothing was logged."""
    noises: list[str] = []
    requests: list[str] = []
    path = tmp_path / "page.html"
    contexts = []

    def open_it(data: PageData, **settings: Any) -> Any:
        path.write_bytes(make_page(data))
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | settings)
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("console", lambda message: noises.append(message.text))
        page.on("pageerror", lambda error: noises.append(str(error)))
        page.on("dialog", lambda dialog: (noises.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.evaluate("document.querySelector('#numbers').open = true")
        page.wait_for_selector("#table td")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert noises == []
    assert {url for url in requests if not url.startswith("data:")} == {path.as_uri()}


def shown_map(page: Any) -> np.ndarray:
    """The map in numbers, (G, J); fractions where the page shows percentages."""
    rows = page.eval_on_selector_all(
        "#table tr:not(:first-child)",
        "rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => cell.textContent))",
    )
    return np.array([[read_number(text) for text in row] for row in rows])


def read_number(text: str) -> float:
    return float(text.strip("< \u202f%")) / (100 if "%" in text else 1)


def hover(page: Any, patch: int) -> None:
    page.locator(".cell").nth(patch).hover()


def checked(page: Any, name: str) -> str:
    value: str = page.eval_on_selector(f"input[name={name}]:checked", "input => input.value")
    return value


def choose(page: Any, text: str) -> None:
    page.get_by_role("radio", name=text, exact=True).check()


def assert_shows(page: Any, expected_N: np.ndarray) -> None:
    """The page rounds to a tenth of a per cent, and keeps attention in a byte an entry."""
    assert shown_map(page).ravel() == pytest.approx(expected_N, abs=6e-3)


def rollout_of(attention_LATT: np.ndarray, layers: int) -> np.ndarray:
    flow_TT = np.eye(attention_LATT.shape[-1])
    for attention_ATT in attention_LATT[:layers]:
        flow_TT = (attention_ATT.mean(0) + np.eye(len(flow_TT))) / 2 @ flow_TT
    return flow_TT


def test_the_page_opens_on_the_best_method_that_passes_every_test(open_page: Open) -> None:
    good = {"beats_controls": True, "depends_on_model": True, "depends_on_class": True}
    badges = (
        Badge("rollout", 0.5, 0.4, 0.6, **good | {"depends_on_class": False}),
        Badge("relevance:gradients=balanced", 0.5, 0.4, 0.6, **good),
        Badge("relevance", 0.4, 0.3, 0.5, **good),
        Badge("gradcam", 0.3, 0.2, 0.4, **good),
    )
    checked = "document.querySelector('input[name=method]:checked').value"
    assert open_page(make_data(badges=badges)).evaluate(checked) == "relevance"
    assert open_page(make_data(badges=badges[:1])).evaluate(checked) == "attention"
    assert open_page(make_data()).evaluate(checked) == "attention"


def test_the_standard_errors_of_a_map_are_beside_its_values(open_page: Open) -> None:
    values_GJ = np.array([[0.1, 0.2, -0.3], [0.4, 0.0, 0.25]])
    data = make_data(maps={"shapley": values_GJ[None]}, errors={"shapley": values_GJ / 100})
    page = open_page(data)
    page.evaluate("document.querySelector('input[value=shapley]').click()")
    text = page.inner_text("#answer")
    assert "row 2, column 1: 0.4 ± 0.004 (± standard error)" in text


def test_it_opens_on_the_prediction_and_the_class_token(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    assert page.title() == "a picture"
    assert page.inner_text("#verdict").startswith("dog, 7")
    assert page.locator("#bars .name").all_inner_texts() == ["dog", "cat", "eel"]
    assert page.locator(".cell").count() == 6
    assert_shows(page, data.attention_LATT[3].mean(0)[0, 1:])
    assert page.inner_text("#answer").startswith("The class token")


def test_with_mean_pooling_all_patches_are_queried(open_page: Open) -> None:
    data = make_data(class_token=False)
    page = open_page(data)
    assert_shows(page, data.attention_LATT[3].mean(0).mean(0))
    page.keyboard.press("d")
    assert_shows(page, data.attention_LATT[3].mean(0).mean(0))
    assert page.inner_text("#answer").endswith("Select a patch to see what attends to it.")


def test_a_mean_beside_a_class_token_leaves_it_out(open_page: Open) -> None:
    data = make_data(mean_pool=True)
    page = open_page(data)
    assert_shows(page, data.attention_LATT[3].mean(0)[1:, 1:].mean(0))
    assert page.inner_text("#answer").startswith("The mean of all patches")


def test_hovering_selects_a_patch_until_the_pointer_leaves(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    hover(page, 4)
    assert_shows(page, data.attention_LATT[3].mean(0)[5, 1:])
    assert page.inner_text("#answer").startswith("The patch at row 2, column 2 attends most to")
    page.hover("h1")
    assert_shows(page, data.attention_LATT[3].mean(0)[0, 1:])


def test_clicking_keeps_a_patch_until_it_is_clicked_again(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    page.locator(".cell").nth(2).click()
    page.hover("h1")
    assert_shows(page, data.attention_LATT[3].mean(0)[3, 1:])
    page.locator(".cell").nth(2).click()
    page.hover("h1")
    assert_shows(page, data.attention_LATT[3].mean(0)[0, 1:])


def test_the_other_direction_shows_which_patches_attend_to_the_query(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    choose(page, "attended to by")
    hover(page, 1)
    assert_shows(page, data.attention_LATT[3].mean(0)[1:, 2])
    assert "receives the most attention from" in page.inner_text("#answer")


def test_layers_and_heads_by_slider_choice_row_and_thumbnail(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    page.locator("#layer").fill("2")
    assert page.inner_text("#layer-now") == "2 of 4"
    assert_shows(page, data.attention_LATT[1].mean(0)[0, 1:])
    choose(page, "3")
    assert_shows(page, data.attention_LATT[1, 2, 0, 1:])
    page.locator(".end").nth(0).click()
    assert_shows(page, data.attention_LATT[0, 2, 0, 1:])
    page.locator("#all button").nth(2 * 6 + 5).click()
    assert_shows(page, data.attention_LATT[2, 4, 0, 1:])


def test_the_row_shows_the_prediction_after_each_layer(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    best_L = data.early_logits_LY.argmax(1)
    expected = [data.classes[best] for best in best_L]
    assert page.locator(".end .name").all_inner_texts() == expected
    page.locator(".end").nth(1).click()
    assert page.inner_text("#bars-title") == "If the network ended after layer 2"
    assert page.locator("#bars .name").first.inner_text() == expected[1]
    assert page.locator(".end[aria-current]").count() == 1


def test_rollout_of_any_patch_both_ways(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    choose(page, "Rollout")
    assert_shows(page, rollout_of(data.attention_LATT, 4)[0, 1:])
    page.keyboard.press("[")
    hover(page, 3)
    assert_shows(page, rollout_of(data.attention_LATT, 3)[4, 1:])
    page.keyboard.press("d")
    assert_shows(page, rollout_of(data.attention_LATT, 3)[1:, 4])


def test_given_maps_are_shown_as_given(open_page: Open) -> None:
    rollout_LGJ = np.random.default_rng(8).random((4, 2, 3)) / 6
    data = make_data(maps=dict(make_data().maps) | {"rollout": rollout_LGJ})
    page = open_page(data)
    choose(page, "Relevance")
    page.locator("#layer").fill("3")
    assert shown_map(page) == pytest.approx(data.maps["relevance"][2], rel=6e-3)
    assert page.get_by_role("radio", name="Mean").is_disabled()
    assert page.locator("#all-box").is_hidden()
    assert "dog" in page.inner_text("#meaning")
    choose(page, "Grad-CAM")
    assert np.array_equal(shown_map(page), np.ones((2, 3)))
    choose(page, "Rollout")
    assert_shows(page, rollout_LGJ[2].ravel())


def test_every_key(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    press = page.keyboard.press
    for key in ("[", "[", "]", "."):
        press(key)
    assert_shows(page, data.attention_LATT[2, 0, 0, 1:])
    press(",")
    press(",")
    assert checked(page, "head") == "5"
    seen = []
    for _ in NAMES:
        seen.append(checked(page, "method"))
        press("m")
    assert seen == NAMES
    press("c")
    assert checked(page, "colors") == "viridis"
    for key, box in (("s", "smooth"), ("g", "lines"), ("h", "shown")):
        before = page.is_checked(f"#{box}")
        press(key)
        assert page.is_checked(f"#{box}") is not before
    assert page.locator("#heat").is_hidden()


def test_arrows_move_the_patch_and_stop_at_the_edge(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    for key in ("ArrowDown", "ArrowUp", "ArrowUp", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.inner_text("#answer").startswith("The patch at row 1, column 2")
    assert page.evaluate("document.activeElement.ariaLabel") == "Patch at row 1, column 2"
    assert_shows(page, data.attention_LATT[3].mean(0)[2, 1:])
    page.keyboard.press("Escape")
    assert_shows(page, data.attention_LATT[3].mean(0)[0, 1:])


def test_the_tab_key_reaches_the_patches_and_every_control(open_page: Open) -> None:
    page = open_page(make_data())
    reached = set()
    for _ in range(24):
        page.keyboard.press("Tab")
        active = "document.activeElement"
        reached.add(page.evaluate(f"{active}.id || {active}.name || {active}.classList[0]"))
        if reached == {"cell"}:
            assert page.inner_text("#answer").startswith("The patch at row 2, column 2")
    assert {"cell", "layer", "play", "end", "method", "head", "way", "colors"} <= reached
    assert {"strength", "shown", "smooth", "lines", "shared"} <= reached


def test_sliders_keep_their_arrows_and_keys_can_be_switched_off(open_page: Open) -> None:
    page = open_page(make_data())
    page.focus("#layer")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#layer-now") == "3 of 4"
    assert page.inner_text("#answer").startswith("The class token")
    page.evaluate("document.querySelector('#keys').open = true")
    page.uncheck("#shortcuts")
    page.keyboard.press("m")
    page.keyboard.press("Control+c")
    assert (checked(page, "method"), checked(page, "colors")) == ("attention", "magma")


def test_the_strongest_patch_has_the_color_maps_brightest_color(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    map_N = data.attention_LATT[3].mean(0)[0, 1:]
    for name in ("viridis", "cividis", "magma"):
        choose(page, name)
        pixels = page.evaluate(READ_HEAT)
        colors_N3 = np.array(pixels).reshape(6, 4)[:, :3]
        for patch, level in ((map_N.argmax(), 255), (map_N.argmin(), 0)):
            exact_3 = np.array(matplotlib.colormaps[name](level)[:3]) * 255
            assert np.abs(colors_N3[patch] - exact_3).max() <= 1


def test_one_scale_for_all_layers_spans_them_all(open_page: Open) -> None:
    data = make_data()
    page = open_page(data)
    page.check("#shared")
    maps_LN = data.attention_LATT.mean(1)[:, 0, 1:]
    low, high = (read_number(page.inner_text(f"#{end}")) for end in ("low", "high"))
    assert (low, high) == pytest.approx((maps_LN.min(), maps_LN.max()), abs=6e-3)


def test_play_goes_through_the_layers(open_page: Open) -> None:
    page = open_page(make_data())
    page.click("#play")
    page.wait_for_selector("li:nth-child(2) > .end[aria-current]")
    page.keyboard.press("p")
    assert page.inner_text("#play") == "Play"


@pytest.mark.parametrize(("scheme", "grid_GJ"), [("light", (2, 3)), ("dark", (14, 13))])
def test_on_a_phone_nothing_scrolls_sideways_and_taps_select(
    open_page: Open, scheme: str, grid_GJ: tuple[int, int]
) -> None:
    data = make_data(grid_GJ=grid_GJ, maps={}, classes=("cat", HOSTILE * 3, "eel"), title="x" * 90)
    size = {"width": 360, "height": 740}
    page = open_page(data, viewport=size, color_scheme=scheme, has_touch=True, is_mobile=True)
    page.evaluate("document.querySelectorAll('details').forEach(box => box.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator(".cell").nth(5).tap()
    assert "row" in page.inner_text("#answer")
    assert page.inner_text("#answer").startswith("The patch at")
    page.tap("#whole")
    assert page.inner_text("#answer").startswith("The class token")


def test_dark_and_light_differ_and_text_stands_out(open_page: Open) -> None:
    for scheme in ("light", "dark"):
        page = open_page(make_data(), color_scheme=scheme)
        colors = page.evaluate(
            "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])"
        )
        ink, paper = (np.array([int(n) for n in c[4:-1].split(",")]).mean() for c in colors)
        assert (ink < 60 and paper > 220) if scheme == "light" else (ink > 220 and paper < 60)


def test_hostile_names_are_shown_as_text(open_page: Open) -> None:
    data = make_data(classes=("cat", HOSTILE, "eel"), title=HOSTILE)
    page = open_page(data)
    assert page.title().startswith("</script><img")
    assert page.locator("#bars .name").first.inner_text().startswith("</script><img")
    assert page.locator("img").count() == 1


def test_cropped_margins_are_gray_and_padding_is_ignored(open_page: Open) -> None:
    page = open_page(make_data(box=(4, 0, 24, 20)))
    assert page.locator(".unseen").count() == 2
    seen, stage = (page.locator(f"#{name}").bounding_box() for name in ("seen", "stage"))
    assert seen["x"] - stage["x"] == pytest.approx(stage["width"] * 4 / 28, abs=1)
    assert seen["width"] == pytest.approx(stage["width"] * 20 / 28, abs=1)
    page = open_page(make_data(box=(0, -4, 28, 24)))
    assert page.locator(".unseen").count() == 0
    stage, picture = (page.locator(f"#{name}").bounding_box() for name in ("stage", "picture"))
    assert stage["height"] / stage["width"] == pytest.approx(1, abs=0.01)
    assert picture["y"] - stage["y"] == pytest.approx(stage["height"] * 4 / 28, abs=1)


def test_views_of_the_tokens(open_page: Open) -> None:
    random = np.random.default_rng(9)
    colors_LGJC, norms_LGJ = random.random((4, 2, 3, 3)), 1 + random.random((4, 2, 3))
    cosines_LNN = random.uniform(-1, 1, (4, 6, 6))
    maps = dict(make_data().maps) | {"features": colors_LGJC, "norms": norms_LGJ}
    page = open_page(make_data(maps=maps, similarity_LNN=cosines_LNN))
    page.locator("#layer").fill("2")
    choose(page, "Similarity")
    assert shown_map(page).ravel() == pytest.approx(cosines_LNN[1, 4], abs=6e-3)  # the central one
    hover(page, 2)
    assert shown_map(page).ravel() == pytest.approx(cosines_LNN[1, 2], abs=6e-3)
    best = max((patch for patch in range(6) if patch != 2), key=lambda n: cosines_LNN[1, 2, n])
    row, column = divmod(best, 3)
    assert f"most similar to the patch at row {row + 1}, column {column + 1}:" in page.inner_text(
        "#answer"
    )
    page.mouse.move(0, 0)
    choose(page, "Norms")
    assert shown_map(page) == pytest.approx(norms_LGJ[1], rel=6e-3)
    assert "times the median" in page.inner_text("#answer")
    choose(page, "Features")
    shown_NC = np.array(page.evaluate(READ_HEAT)).reshape(6, 4)[:, :3]
    assert np.abs(shown_NC - 255 * colors_LGJC[1].reshape(6, 3)).max() <= 1
    texts = page.eval_on_selector_all("#table td", "cells => cells.map(cell => cell.textContent)")
    read_NC = np.array([[int(part) for part in text.split()] for text in texts])
    assert np.abs(read_NC - 100 * colors_LGJC[1].reshape(6, 3)).max() <= 0.51
    assert page.locator(".cell.peak").count() == 0


def test_the_choices_of_colors_show_them(open_page: Open) -> None:
    ends = open_page(make_data()).eval_on_selector_all(
        "#colors canvas",
        "all => all.map(c => [...c.getContext('2d').getImageData(255, 0, 1, 1).data].slice(0, 3))",
    )
    last = [np.array(matplotlib.colormaps[name](255)[:3]) for name in ("magma", "viridis")]
    assert np.abs(np.array(ends[:2]) - 255 * np.array(last)).max() < 6


def test_a_page_without_tokens_has_no_views(open_page: Open) -> None:
    page = open_page(make_data())
    assert page.get_by_role("radio", name="Similarity").count() == 0
    assert page.get_by_role("radio", name="Norms").count() == 0


def test_a_large_network_without_classes(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    data, attention_LATT = make_page_data(monkeypatch, SMALL, layers=(2,))
    attention_LTT = attention_LATT.mean(1).numpy()
    page = open_page(data)
    first, patches = 3, slice(3, None)  # after the class token and two registers
    for name in ("prediction", "bars-box", "ends-title", "ends"):
        assert not page.locator(f"#{name}").is_visible()
    assert page.locator("#methods").inner_text().split("\n") == [
        "Attention", "Rollout", "Features", "Similarity", "Norms",
    ]  # fmt: skip
    choose(page, "Attention")
    assert_shows(page, attention_LTT[2, 0, patches])
    hover(page, 8)  # the last layer has the class token's row only
    assert_shows(page, attention_LTT[2, 0, patches])
    assert "the page allows it in layer 2." in page.inner_text("#partly")
    page.locator("#layer").fill("2")
    hover(page, 8)
    assert_shows(page, attention_LTT[1, first + 8, patches])
    choose(page, "2")
    hover(page, 8)
    assert_shows(page, attention_LATT[1, 1, first + 8, patches].numpy())
    page.keyboard.press("d")
    assert_shows(page, attention_LATT[1, 1, patches, first + 8].numpy())
    choose(page, "Similarity")
    page.hover("h1")
    middle = data.maps["similarity"][1].ravel()
    assert shown_map(page).ravel() == pytest.approx(middle, abs=0.015)
    choose(page, "Attention")
    assert "head 2" in page.inner_text("#unit")
    choose(page, "Rollout")  # stored as the mean
    assert "mean of all heads" in page.inner_text("#unit")
    assert_shows(page, data.maps["rollout"][1].ravel())
