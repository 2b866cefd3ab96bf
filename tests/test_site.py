"""The site of the documentation: built without a warning, and looked at in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import chromium, overflow, served, watched
from pages import ROOT, script

make_site = script("make_site")


# Built


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built and checked: every link, every anchor, the navigation, nothing from other hosts."""
    pytest.importorskip("zensical")
    return make_site.build(tmp_path_factory.mktemp("docs"))


def test_every_page_is_built(site: Path) -> None:
    for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/tutorials/*.ipynb")]:
        assert (site / make_site.place(page)).with_suffix(".html").is_file() or page.name == "api.md", page
    assert (site / "examples/finetune.py.html").is_file() and (site / "tutorials/three-customers.ipynb").is_file()
    sinks = (site / "api/sinks.html").read_text()
    assert 'id="add_sinks"' in sinks and 'id="audit"' not in sinks


def test_markdown_of_the_code_host_is_that_of_the_builder(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", path.read_text(), flags=re.S)
        for paragraph in re.findall(r"<p>(.*?)</p>", text, re.S):
            assert not re.search(r"^\s*(- |\d\. |\||```)", paragraph, re.M), (
                f"{path.relative_to(site)}: {paragraph[:200]}"
            )


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here">x</a><a href="b.html#there">x</a><a href="c.html">x</a><a href="https://a.org">x</a>'
        '<script src="https://cdn.example/x.js"></script><img src="data:,"></p>'
    )
    (tmp_path / "b.html").write_text("<p>nothing</p>")
    (tmp_path / "a.css").write_text("@font-face{src:url(https://fonts.example/x.woff2)}")
    assert make_site.problems(tmp_path) == [
        "a.html loads https://cdn.example/x.js",
        "a.html leads to b.html#there, an anchor that is not there",
        "a.html leads to c.html, which is not there",
        "a.css loads https://fonts.example/x.woff2",
    ]
    (tmp_path / "api").mkdir()
    (tmp_path / "api/moon.md").write_text("")
    assert make_site.unlisted(tmp_path) == ["api/moon.md is not in the navigation of zensical.toml"]


# Looked at


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(site: Path):
    with served(site) as address:
        yield address


def test_pages_open_on_narrow_screens(site: Path, address: str, browser) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    wrong = watched(page)
    names = [
        "index",
        "faq",
        "results",
        "takedown",
        "fine-tuning",
        "api/sinks",
        "tutorials/three-customers",
        "examples/finetune.py",
    ]
    for name in names:
        page.goto(f"{address}/{name}.html")
        assert page.locator("h1").count() == 1, name
        assert overflow(page) <= 0, f"{name} is wider than the screen by {overflow(page)} pixels"
    page.close()
    assert not wrong


def test_search_finds_a_page(address: str, browser) -> None:
    page = browser.new_page()
    wrong = watched(page)
    page.goto(f"{address}/index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("canary_exposure")
    found = page.get_by_role("link", name=re.compile("audit", re.I)).locator("visible=true")
    found.filter(has_text=re.compile("canary_exposure|audit", re.I)).first.wait_for()
    page.close()
    assert not wrong


@pytest.mark.parametrize(("scheme", "shown", "hidden"), [("light", "light", "dark"), ("dark", "dark", "light")])
def test_pictures_follow_the_theme(address: str, browser, scheme: str, shown: str, hidden: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(f"{address}/index.html")
    for name in ("mechanism", "modes"):
        assert page.locator(f"img[src*='{name}-{shown}.png']").is_visible()
        assert not page.locator(f"img[src*='{name}-{hidden}.png']").is_visible()
    page.close()


def test_the_theme_can_be_chosen(address: str, browser) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(f"{address}/index.html")
    color = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(color)
    for _ in range(2):
        page.locator("label[for^=__palette]").locator("visible=true").click()
    assert page.evaluate(color) != light
    assert page.locator("img[src*='mechanism-dark.png']").is_visible()
    page.close()
