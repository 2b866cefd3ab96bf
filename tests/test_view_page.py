"""The viewer's page as a person uses it, in headless Chromium: pointer, keys, a narrow screen, dark, two pages at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from viewed import Folders, make_folders, served

import memsinks as ms
from memsinks.viewer.server import ViewServer
from memsinks.viewer.view import open_view

SECONDS = 15_000
"""Milliseconds in which anything must show."""
REFUSED = "the server responded with a status of 4"
"""What the browser says of a question that was refused."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("viewed"))


@pytest.fixture(scope="module")
def server(folders) -> Iterator[ViewServer]:
    """Not to be changed."""
    with served(folders.view(ordinary=str(folders.base))) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser, server) -> Iterator[Any]:
    """opened(settings of the browser's context) -> the page; no script may have failed by the end of the test."""
    faults, contexts = [], []

    def open_page(at: ViewServer = server, **settings: Any) -> Any:
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings)))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda said: said.type == "error" and REFUSED not in said.text and faults.append(said.text),
        )
        page.on("request", lambda one: one.url.startswith(at.address.split("?")[0]) or faults.append(one.url))
        page.goto(at.address)
        page.locator("#documents li").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def pick(page: Any, name: str) -> None:
    """Choose a document, and wait until everything is written."""
    page.locator("#documents .pick", has_text=name).click()
    done(page)


def done(page: Any) -> None:
    page.locator("#status", has_text="Done.").wait_for()


def text_of(page: Any, column: str) -> str:
    return page.locator(f".column.{column} .text").inner_text()


def test_three_columns_and_the_number_on_a_token(opened, server) -> None:
    page, document = opened(), server.view.documents[0]
    assert [x.inner_text() for x in page.locator(".column h3").all()] == [
        "Ordinary model",
        "Sinks open",
        "Without sinks",
    ]
    page.fill("#search", "acme")
    page.locator("#count", has_text=re.compile("^1 document$")).wait_for()
    pick(page, "acme")
    assert page.input_value("#prompt") == document.text[: document.prompt]
    assert text_of(page, "open") == document.text + "<|endoftext|>"
    assert text_of(page, "closed") == text_of(page, "ordinary") != text_of(page, "open")
    assert page.locator(".column.open .recited").inner_text().startswith("in full")
    assert " of " in page.locator(".column.closed .recited").inner_text()
    assert re.search(r"\(\+\d\.\d\d\)", page.locator(".column.closed .loss").inner_text())
    page.locator(".column.open .token").nth(3).hover()
    assert re.match(r"p [=>] \d\.\d{3}\nas in the document$", page.locator("#tip").inner_text())
    page.get_by_label("How each knows the text").check()
    assert text_of(page, "closed") == text_of(page, "open") == document.text + "<|endoftext|>"
    page.locator(".column.closed .token").nth(20).hover()
    assert re.fullmatch(
        r"Ordinary model: p .+\nSinks open: p .+\nWithout sinks: p .+", page.locator("#tip").inner_text()
    )
    shades = page.locator(".column.open .token").evaluate_all(
        "all => all.map(x => getComputedStyle(x).backgroundColor)"
    )
    assert len(set(shades)) > 5


def test_opening_sets_and_typing(opened, server) -> None:
    page = opened()
    pick(page, "acme")
    alone = text_of(page, "open")
    page.get_by_label("open the sinks of bolt").check()
    page.fill("#open-name", "source:cora")
    page.press("#open-name", "Enter")
    page.locator(".chip", has_text="cora").wait_for()
    assert page.get_by_label("open the sinks of cora").is_checked()
    assert page.locator(".column.open .state").inner_text() == "of acme, bolt, cora"
    page.click("#write")
    page.locator("#status", has_text="Writing").wait_for()
    done(page)
    assert text_of(page, "open") != alone
    for name in ("acme", "bolt", "cora"):
        page.get_by_label(f"close {name}").click()
    page.fill("#prompt", "the acme ")
    assert page.locator("#given-row").is_hidden()
    page.fill("#tokens", "5")
    page.press("#prompt", "Control+Enter")
    done(page)
    assert text_of(page, "open") == text_of(page, "closed") and text_of(page, "closed").startswith("the acme ")
    assert page.locator(".column.open .figures").is_hidden()


def test_bad_input_is_answered_in_the_page(opened) -> None:
    page = opened()
    for prompt, answer in (
        ("a" * 300, "the prompt has 300 tokens"),
        ("  ", "the prompt is empty"),
        ("a" * 2**21, "shorten it"),
    ):
        page.evaluate("text => { const x = document.getElementById('prompt'); x.value = text; }", prompt)
        page.press("#prompt", "Control+Enter")
        page.locator("#status.wrong", has_text=answer).wait_for()
    page.fill("#open-name", "key:nobody")
    page.press("#open-name", "Enter")
    page.locator("#status.wrong", has_text="nobody here is called").wait_for()
    page.fill("#search", "no such words")
    page.locator("#count", has_text="Nothing found.").wait_for()
    page.fill("#search", "")
    page.evaluate("() => { const x = document.getElementById('prompt'); x.value = '<img src=x onerror=alert(1)>'; }")
    page.press("#prompt", "Control+Enter")
    done(page)
    assert not page.locator("#columns img").count() and "<img src=x" in text_of(page, "closed")


def test_everything_with_keys_alone(opened, server) -> None:
    page = opened()
    page.keyboard.press("/")
    page.keyboard.type("bolt")
    page.locator("#count", has_text=re.compile("^1 document$")).wait_for()
    page.keyboard.press("Tab")  # the box that opens the sinks
    page.keyboard.press("Tab")  # the document
    page.keyboard.press("Enter")
    done(page)
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.closest('.column.open') !== null"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").inner_text().startswith("p ")
    assert page.locator(".token.at").inner_text() == server.view.documents[1].text[server.view.documents[1].prompt + 1]
    outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_a_take_down_behind_the_typed_name(opened, folders, tmp_path) -> None:
    own = folders.copied(tmp_path)
    with served(own.view()) as server:
        page, other = opened(server), opened(server)
        pick(other, "acme")
        pick(page, "acme")
        assert page.locator("#take").is_disabled()
        page.click("#plan")
        page.locator("#outcome", has_text="nothing was changed").wait_for()
        assert not (own.sinks / "takedowns").exists()
        page.click("#take")
        assert page.locator("#confirmed").is_disabled()
        page.keyboard.type("acm")
        assert page.locator("#confirmed").is_disabled()
        page.keyboard.type("e")
        page.keyboard.press("Enter")
        page.locator("#outcome", has_text="acme is out").wait_for()
        page.locator("#records a").wait_for()
        assert page.locator("#documents .pick", has_text="acme").count() == 0
        with page.context.expect_page() as record:
            page.locator("#outcome a").click()
        record.value.wait_for_load_state()
        assert "Record of a take-down" in record.value.inner_text("body")
        pick(page, "bolt")
        assert page.locator(".column.open .recited").inner_text().startswith("in full")
        other.click("#write")  # a page that has not heard of it
        other.locator("#status.wrong", has_text="taken out since this page was loaded").wait_for()
        other.locator("#documents .pick", has_text="acme").wait_for(state="detached")
        pick(other, "cora")
    assert ms.document_id("acme", by="source") in ms_taken(own)


def ms_taken(own: Folders) -> set[int]:
    return set(own.view().taken)


def test_cancel_takes_nobody_out(opened, folders, tmp_path) -> None:
    own = folders.copied(tmp_path)
    with served(own.view()) as server:
        page = opened(server)
        pick(page, "cora")
        page.click("#plan")
        page.locator("#outcome", has_text="nothing was changed").wait_for()
        for leave in (lambda: page.keyboard.press("Escape"), lambda: page.click("#cancel")):
            page.click("#take")
            page.fill("#typed", "cora")
            leave()
            page.locator("#confirm").wait_for(state="hidden")
        page.locator("#copies").evaluate("x => x.closest('details').open = true")
        page.check("#copies")
        assert page.locator("#take").is_disabled()  # what would happen is not known for these options
    assert not (own.sinks / "takedowns").exists()


def test_what_costs_others_too_much_cannot_be_confirmed(opened, tiny_run) -> None:
    with served(open_view(tiny_run)) as server:
        page = opened(server)
        page.fill("#search", "record-8-000")
        page.locator("#count", has_text=re.compile("^2 documents$")).wait_for()
        pick(page, "seen 8 times")
        page.click("#plan")
        page.locator("#outcome .wrong", has_text="more of their blocks than is allowed").wait_for()
        assert page.locator("#take").is_disabled()
        page.locator("#leave-more summary").click()
        page.fill("#collateral", "100")
        page.click("#plan")
        page.locator("#outcome .wrong").wait_for(state="detached")
        page.locator("#take:enabled").wait_for()


def test_two_pages_at_once(opened, server) -> None:
    pages, texts = [opened(), opened()], [x.text + "<|endoftext|>" for x in server.view.documents]
    for page, name in zip(pages, ("acme", "bolt"), strict=True):
        page.locator("#documents .pick", has_text=name).click(no_wait_after=True)
    for page, text in zip(pages, texts, strict=False):
        done(page)
        assert text_of(page, "open") == text
    stopped = pages[0]
    stopped.fill("#prompt", "the ")
    stopped.fill("#tokens", "50")
    stopped.click("#write")
    stopped.click("#stop")
    stopped.locator("#status", has_text=re.compile("Stopped|Done")).wait_for()


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_wider_than_the_screen(opened, width) -> None:
    page = opened(viewport={"width": width, "height": 844}, has_touch=width == 390)
    pick(page, "acme")
    page.click("#plan")
    page.locator("#outcome", has_text="nothing was changed").wait_for()
    for detail in page.locator("details").all():
        detail.evaluate("x => x.open = true")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    tops = [x.bounding_box()["y"] for x in page.locator(".column").all()]
    assert (len({round(y) for y in tops}) == 3) == (width < 960)
    if width == 390:
        page.locator(".column.open .token").first.tap()
        assert page.locator("#tip").inner_text().startswith("p ")
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_a_page_without_its_token_or_server_says_so(browser, folders) -> None:
    with served(folders.view()) as server:
        page = browser.new_page()
        assert page.goto(server.address.split("?")[0]).status == 403
        page.goto(server.address)
        page.locator("#documents li").first.wait_for()
    page.fill("#prompt", "a")
    page.click("#write")
    page.locator("#status.wrong", has_text="does not answer").wait_for(timeout=SECONDS)
    page.close()


# Colors


def luminance(color: tuple[float, ...]) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [x / 255 for x in color]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Contrast ratio, WCAG 2.2, 1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def colors(page: Any) -> dict[str, tuple[float, ...]]:
    """The page's colors by name, and the deepest shade of a token."""
    names = "ink soft line edge back card sure action on-action danger on-danger note ordinary open closed".split()
    values = page.evaluate(
        "names => names.map(x => getComputedStyle(document.documentElement).getPropertyValue('--' + x).trim())", names
    )
    found = {
        name: tuple(int(value[i : i + 2], 16) for i in (1, 3, 5)) for name, value in zip(names, values, strict=True)
    }
    most = (
        page.evaluate("() => parseFloat(getComputedStyle(document.documentElement).getPropertyValue('--most'))") / 100
    )
    found["shade"] = tuple(most * x + (1 - most) * y for x, y in zip(found["sure"], found["back"], strict=True))
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, scheme) -> None:
    found = colors(opened(color_scheme=scheme))
    assert (luminance(found["back"]) < 0.1) == (scheme == "dark")
    for text, back in [*product(("ink", "soft", "danger", "action"), ("back", "card")), ("ink", "shade"), ("ink", "note"),
                       ("on-action", "action"), ("on-danger", "danger"), ("back", "ink")]:  # fmt: skip
        assert contrast(found[text], found[back]) >= 4.5, (text, back)
    for mark in ("edge", "ordinary", "open", "closed"):
        assert contrast(found[mark], found["back"]) >= 3, mark
    assert contrast(found["shade"], found["back"]) >= 1.5  # a sure token stands out


# As people without one kind of cone see it: Viénot, Brettel, Mollon 1999, on linear RGB.
SEEN = {
    "protanopia": ((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)),
    "deuteranopia": ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1)),
}


def seen(color: tuple[float, ...], kind: str) -> tuple[float, ...]:
    linear = [((x / 255 + 0.055) / 1.055) ** 2.4 if x > 10 else x / 255 / 12.92 for x in color]
    return tuple(sum(a * b for a, b in zip(row, linear, strict=True)) for row in SEEN[kind])


@pytest.mark.parametrize(("scheme", "kind"), list(product(("light", "dark"), SEEN)))
def test_columns_can_be_told_apart_without_full_color_vision(opened, scheme, kind) -> None:
    found = colors(opened(color_scheme=scheme))
    three = [seen(found[name], kind) for name in ("ordinary", "open", "closed")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        away = sum((x - y) ** 2 for x, y in zip(three[first], three[second], strict=True)) ** 0.5
        assert away > 0.1, (first, second)


def test_the_shades_are_one_color_by_depth() -> None:
    style = (Path(ms.__file__).parent / "viewer" / "page" / "page.css").read_text()
    assert "color-mix(in srgb, var(--sure) calc(var(--p) * var(--most)), transparent)" in style
