"""Whatever texts a page is given: it is well-formed, needs nothing else, and shows them as they are."""

from collections.abc import Callable

import pytest
from html_page import HtmlPage
from hypothesis import given
from hypothesis import strategies as st
from pages import full_page, routing_map

from polyglu.interpretability.plotting import curves
from polyglu.interpretability.plotting_pages import page_figure
from polyglu.page import Column, Page, Paragraph, Section, Table, clean, render

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # with halves of surrogate pairs
EVIL = (
    *("</script><script>x()</script>", "</style>", "\"'><img src=x onerror=x()>", "<!--", "]]>", "&lt;&amp", "{{ 1 }}"),
    *("\x00", "\r\n", "\ud800", "\udc00\ud800", "\x1b[31m", "\uffff", "\u202e", "javascript:x()"),
)


def structure(page: HtmlPage) -> list[tuple[str, set[str]]]:
    """Elements and names of their attributes, without line breaks."""
    return [(tag, set(values)) for tag, values in page.attributes if tag != "br"]


@pytest.fixture(scope="module")
def make_page() -> Callable[[Callable[[str], str]], str]:
    figure = page_figure(curves({"a": ([0, 1], [1.0, 2.0])}, "A", ""), "a")
    assert figure.dark is not None
    return lambda text: render(full_page(figure.png, figure.dark or b"", text))


def test_a_page_shows_what_it_was_given(make_page: Callable[[Callable[[str], str]], str]) -> None:
    page = HtmlPage(make_page(lambda usual: usual))
    for shown in ("A run", "What it is.", "Losses", "10.000", "-3.000", "–", "nan", "a: 1\n  b: 2", "cell\n  one"):
        assert shown in page.texts, shown
    assert page.texts.count("A run") == 2 and "left out" not in page.texts
    assert [image["alt"] for image in page.images] == ["A map", "A curve that falls", "A curve that falls"]
    assert page.tags.count("source") == 2  # the dark pictures
    scopes = [values.get("scope") for tag, values in page.attributes if tag in ("th", "td")]
    columns, rows = scopes[:3], [scopes[index : index + 3] for index in range(3, 27, 3)]
    assert columns == ["col"] * 3 and rows == [["row", None, None]] * 8
    values = [float(value) for value in page.all("data-value")]
    assert values[:5] == [10, 9.5, 9.5, 1e-7, -3]
    assert page.classes["high"] == "text good" and page.classes["–"] == "number empty"
    marks, other_marks, routing = page.data
    assert marks == other_marks == [[0.5, 0.25, "step 7"]]
    assert routing["names"] == ["ReLU", "Tanh", "SiLU"] and routing["layers"] == 5
    assert routing["shares"][:6] == [1000, 0, 0, 0, 1000, 0] and routing["shares"][15:18] == [100, 800, 100]
    assert routing["dominant"][:5] == [0, 1, 2, 0, 1] and routing["dominant"][20:25] == [3] * 5


@pytest.mark.parametrize("text", EVIL)
def test_markup_in_a_text_is_shown_not_obeyed(text: str, make_page: Callable[[Callable[[str], str]], str]) -> None:
    usual = HtmlPage(make_page(lambda usual: usual))
    page = HtmlPage(make_page(lambda usual: usual + text))
    assert structure(page) == structure(usual)
    assert f"Words.{clean(text)}" in "".join(page.raw)
    assert page.data[0][0][2] == f"step 7{clean(text)}"


@given(ANY_TEXT)
def test_any_text_comes_back(text: str) -> None:
    page = render(Page("the title", sections=[Section(text, [Paragraph(text), Table([Column(text)], [[text]])])]))
    assert page == page.encode().decode()  # no half of a surrogate pair is left
    found = HtmlPage(page)
    shown = clean(text).strip()
    assert found.texts.count(shown) == (4 if shown else 0)


@given(ANY_TEXT)
def test_clean_leaves_what_can_be_shown(text: str) -> None:
    cleaned = clean(text)
    assert len(cleaned) == len(text) and clean(cleaned) == cleaned
    for before, after in zip(text, cleaned, strict=True):
        assert before == after or not before.isprintable()
    assert not set(cleaned) & {chr(code) for code in range(32) if chr(code) not in "\t\n"}


@given(st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_tokens_stand_in_their_order(tokens: list[str]) -> None:
    page = HtmlPage(render(Page("title", blocks=[routing_map(tokens, 2)])))
    shown = clean("".join(tokens).replace("\n", "↵").replace("\t", "⇥"))
    assert shown in "".join(page.raw)
    assert page.tags.count("br") == sum("\n" in token for token in tokens)


def test_the_same_content_is_the_same_page(make_page: Callable[[Callable[[str], str]], str]) -> None:
    assert make_page(str) == make_page(str)


def test_few_sections_need_no_links_to_them() -> None:
    sections = [Section("one", [Paragraph("x")]), Section("two", [Paragraph("x")]), Section("three", [Paragraph("x")])]
    assert "nav" not in HtmlPage(render(Page("title", sections=sections[:2]))).tags
    page = HtmlPage(render(Page("title", sections=sections)))
    assert page.all("href")[1:] == ["#section-1", "#section-2", "#section-3"]
