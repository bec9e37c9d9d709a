"""A page in a real browser: it is quiet, sorts, tells details, is legible in light and dark, fits a phone.

Needs Chromium (Debian: ``apt-get install chromium``); skipped without it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import full_page, routing_map

from polyglu.interpretability.plotting import curves
from polyglu.interpretability.plotting_pages import page_figure
from polyglu.page import Page, Section, render

sync_api = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome", "microsoft-edge")
"""What Chromium and its kin are called."""

CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const luminance = (colour) => {
    const linear = colour.slice(0, 3).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = (node) => {
    const colour = rgba(getComputedStyle(node).backgroundColor);
    if (colour[3] === 1) return colour;
    if (colour[3] !== 0) throw Error('half-transparent background');
    return behind(node.parentElement);
  };
  const found = {};
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || ['SCRIPT', 'STYLE'].includes(node.tagName)) continue;
    const [low, high] = [luminance(rgba(getComputedStyle(node).color)), luminance(behind(node))].sort((a, b) => a - b);
    found[texts.currentNode.data.trim()] = (high + 0.05) / (low + 0.05);
  }
  return found;
}"""
"""Text -> contrast to what is behind it (WCAG 2.2)."""

INTRUSION = """() => new Promise((done) => {
  const refused = [];
  addEventListener('securitypolicyviolation', (event) => {
    refused.push(event.effectiveDirective);
    if (refused.length === 4) done(refused.sort());
  });
  setTimeout(() => done(refused), 5000);
  const [script, style, image] = ['script', 'style', 'img'].map((name) => document.createElement(name));
  script.textContent = 'window.intruded = true';
  style.textContent = 'body { color: red }';
  image.src = 'http://127.0.0.1:9/x.png';
  document.body.append(script, style, image);
  fetch('http://127.0.0.1:9/').catch(() => null);
})"""
"""Try what a page must not do; gives the rules that refused."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    figure = page_figure(curves({"a": ([0, 1], [1.0, 2.0])}, "A", ""), "a")
    assert figure.dark is not None
    return write(tmp_path_factory.mktemp("page"), full_page(figure.png, figure.dark))


def write(folder: Path, page: Page) -> str:
    (folder / "page.html").write_text(render(page), encoding="utf-8")
    return (folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def wide(browser: Any, address: str) -> Iterator[Any]:
    """The page on a large light screen, with all that the browser said and asked for since it was opened."""
    tab = browser.new_context(viewport={"width": 1200, "height": 800}, color_scheme="light").new_page()
    tab.said = []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("request", lambda request: request.url.startswith("data:") or tab.said.append(request.url))
    tab.context.set_offline(True)
    tab.goto(address)
    yield tab
    tab.context.close()


@pytest.fixture
def tab(wide: Any) -> Any:
    """The large page as it was when opened, but for sorted tables."""
    wide.keyboard.press("Escape")
    wide.mouse.move(1, 1)
    return wide


def test_it_is_quiet_and_all_figures_are_seen(tab: Any, address: str) -> None:
    assert tab.said == [address]
    sizes = tab.eval_on_selector_all("img", "all => all.map(one => [one.complete, one.naturalWidth, one.offsetWidth])")
    assert len(sizes) == 3 and all(complete and natural > 100 and shown > 100 for complete, natural, shown in sizes)


def column(tab: Any, index: int) -> list[str]:
    cells: list[str] = tab.eval_on_selector_all(
        f"table:first-of-type >> nth=0 >> tbody tr > :nth-child({index + 1})", "all => all.map(one => one.textContent)"
    )
    return cells


def test_tables_sort_by_click_and_by_keyboard(tab: Any) -> None:
    table = tab.locator("table").first
    name, loss, verdict = table.get_by_role("button").all()
    heading = table.locator("th").nth(1)
    loss.click()
    assert heading.get_attribute("aria-sort") == "ascending"
    # Numbers by their value, equal ones in their order, what is no number last: as it was.
    assert column(tab, 0) == ["h", "f", "e", "a", "c", "b", "d", "g"]
    loss.focus()
    tab.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(tab, 0) == ["b", "a", "c", "e", "f", "h", "d", "g"]
    tab.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") is None
    assert column(tab, 0) == ["b", "a", "d", "c", "e", "f", "g", "h"]
    name.click()
    assert column(tab, 0) == sorted("badcefgh") and table.locator("[aria-sort]").count() == 1
    verdict.click()  # all alike
    assert column(tab, 0) == ["b", "a", "d", "c", "e", "f", "g", "h"] and heading.get_attribute("aria-sort") is None
    assert "high" in column(tab, 2)


def test_a_field_of_the_routing_map_tells_its_shares(tab: Any) -> None:
    tip = tab.locator("#tip")
    token = tab.locator(".tokens span").nth(3)
    token.scroll_into_view_if_needed()
    assert tip.is_hidden()
    box = token.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 15)  # the last layer but one
    text = tip.inner_text()
    assert "“<b>”" in text and "token 4 of 6, layer 3" in text
    assert text.split()[-6:] == ["ReLU", "80.0%", "Tanh", "10.0%", "SiLU", "10.0%"]
    bars = [bar.bounding_box()["width"] for bar in tip.locator(".share span i").all()]
    assert bars[0] == pytest.approx(8 * bars[1], rel=0.05) and bars[1] == bars[2] > 0
    tab.mouse.move(1, 1)
    assert tip.is_hidden() and tab.locator(".field").is_hidden()


def test_the_routing_map_is_explored_by_keys(tab: Any) -> None:
    tip, tokens = tab.locator("#tip"), tab.locator(".tokens")
    tokens.focus()
    tab.keyboard.press("Home")
    assert "token 1 of 6, layer" in tip.inner_text()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home", "ArrowRight", *["ArrowUp"] * 5, "ArrowDown"):
        tab.keyboard.press(key)
    assert "“↵”" in tip.inner_text() and "token 2 of 6, layer 1" in tip.inner_text()
    for _ in range(9):
        tab.keyboard.press("ArrowDown")
    assert "layer 4" in tip.inner_text()
    assert tip.get_attribute("role") == "status" and tokens.get_attribute("aria-label")
    tab.keyboard.press("Escape")
    assert tip.is_hidden()


def test_fields_have_the_colour_of_the_dominant_activation(tab: Any) -> None:
    shown = tab.eval_on_selector_all(".tokens span", "all => all.map(one => one.style.backgroundImage)")
    assert shown[0].startswith("linear-gradient(rgb(209, 73, 91) 0px") and "rgb(46, 134, 171) 11px" in shown[0]
    assert shown[1].startswith("linear-gradient(rgba(46, 134, 171, 0.7")  # 80% of three: fainter
    assert shown[4].startswith("linear-gradient(var(--none) 0px")


def test_a_point_of_a_figure_tells_its_numbers(tab: Any) -> None:
    tip, image = tab.locator("#tip"), tab.locator(".gallery img").first
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2 + 5, box["y"] + box["height"] / 4 - 5)
    assert tip.inner_text() == "step 7"
    dot = tab.locator(".dot").first.bounding_box()
    assert dot["x"] + dot["width"] / 2 == pytest.approx(box["x"] + box["width"] / 2, abs=1)
    assert dot["y"] + dot["height"] / 2 == pytest.approx(box["y"] + box["height"] / 4, abs=1)
    tab.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
    assert tip.is_hidden()
    tab.locator(".plot").nth(1).focus()
    tab.keyboard.press("ArrowRight")
    assert tip.inner_text() == "step 7"


def test_light_and_dark_differ_and_are_legible(browser: Any, address: str) -> None:
    papers, pictures = [], []
    for scheme in ("light", "dark"):
        tab = browser.new_context(color_scheme=scheme).new_page()
        tab.goto(address)
        tab.locator(".tokens").focus()
        tab.keyboard.press("Home")  # so that its details are legible too
        contrasts = tab.evaluate(CONTRASTS)
        assert len(contrasts) > 40 and {"A run", "high", "nan", "warn", "“ the”", "100.0%"} <= set(contrasts)
        assert {text: round(contrast, 2) for text, contrast in contrasts.items() if contrast < 4.5} == {}
        papers.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        pictures.append(tab.eval_on_selector_all("img", "all => all.map(one => one.currentSrc)"))
        tab.context.close()
    assert papers == ["rgb(252, 252, 251)", "rgb(19, 21, 26)"]
    light, dark = pictures
    assert light[0] == dark[0] and light[1] != dark[1] and light[1] == light[2] and dark[1] == dark[2]


def test_a_phone_needs_no_scrolling_to_the_side(browser: Any, address: str) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    tab = browser.new_context(**phone).new_page()
    tab.goto(address)
    assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    scrolling = tab.locator(".scroll[tabindex='0']")
    assert scrolling.count() == 2  # the wide table, the wide figure
    caption = tab.locator("caption span").nth(1)
    for area in scrolling.all():
        assert area.evaluate("one => [one.scrollLeft = 50, one.scrollLeft][1]") == 50
        assert area.get_attribute("role") == "group" and area.get_attribute("aria-label")
    box = caption.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and "stays in sight" in caption.inner_text()
    tab.locator(".tokens span").nth(3).tap()
    tip = tab.locator("#tip").bounding_box()
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 360
    tab.context.close()


def test_the_policy_refuses_what_is_not_its_own(browser: Any, address: str) -> None:
    tab = browser.new_context().new_page()
    tab.goto(address)
    assert tab.evaluate(INTRUSION) == ["connect-src", "img-src", "script-src-elem", "style-src-elem"]
    assert tab.evaluate("window.intruded") is None
    tab.context.close()


def test_a_long_text_of_many_layers_can_be_explored(browser: Any, tmp_path: Path) -> None:
    page = Page("long", sections=[Section("text", [routing_map([" word"] * 1500, 28)])])
    tab = browser.new_context().new_page()
    tab.goto(write(tmp_path, page))
    tab.locator(".tokens").focus()
    for key in ("Home", "End", "ArrowLeft", "ArrowDown"):
        tab.keyboard.press(key)
    assert "token 1499 of 1500, layer 1" in tab.locator("#tip").inner_text()
    field, tip = tab.locator(".field").bounding_box(), tab.locator("#tip").bounding_box()
    assert 0 <= field["y"] < tab.viewport_size["height"] and 0 <= tip["y"] < tab.viewport_size["height"]
    tab.context.close()
