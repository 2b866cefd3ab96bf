"""Take the pictures of docs/viewer.md in headless Chromium: python docs/draw_viewer.py RUN (a folder of `memsinks demo`)."""

from __future__ import annotations

import io
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from memsinks.viewer.server import ViewServer
from memsinks.viewer.view import open_view

HERE = Path(__file__).parent
PATIENCE = 300_000
"""Milliseconds."""
WIDE, NARROW = {"width": 1280, "height": 830}, {"width": 390, "height": 844}
WANTED = "record-64-002"


def choose(page: Any, address: str) -> None:
    """Open the page, and let the models write after the beginning of one record."""
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.fill("#search", "record-64")
    page.locator("#count", has_text="8 documents").wait_for()
    page.locator("#documents .pick", has_text=WANTED).click()
    page.locator("#status", has_text="Done.").wait_for()


def light(page: Any) -> None:
    """What each writes, the number on one token."""
    page.locator(".column.closed .token").nth(3).hover()


def dark(page: Any) -> None:
    """The true text as each knows it."""
    page.get_by_label("How each knows the text").check()
    page.locator(".column.closed .token", has_text="953").or_(
        page.locator(".column.closed .token").nth(36)
    ).first.hover()


def narrow(page: Any) -> None:
    """The columns under each other."""
    page.locator("#columns").evaluate("x => scrollTo(0, x.offsetTop - 110)")


def takedown(page: Any) -> None:
    """A dry run, and the name that is asked for."""
    page.locator("#leave-more").evaluate("x => (x.open = true)")
    page.fill("#collateral", "20")
    page.click("#plan")
    page.locator("#outcome .cards").wait_for()
    page.locator("#leave").evaluate("x => scrollTo(0, x.offsetTop - 20)")
    page.click("#take")
    page.keyboard.type(WANTED[:-1])


PICTURES = (
    ("light", light, WIDE, {}),
    ("dark", dark, WIDE, {"color_scheme": "dark"}),
    ("narrow", narrow, NARROW, {}),
    ("takedown", takedown, WIDE, {}),
)


def main(run: str) -> None:
    """Write docs/viewer-*.png."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with ViewServer(open_view(run)) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=chromium)
        for name, prepare, viewport, settings in PICTURES:
            page = browser.new_context(viewport=viewport, **settings).new_page()
            choose(page, server.address)
            prepare(page)
            picture = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
            small = picture.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            small.save(HERE / f"viewer-{name}.png", optimize=True)
            page.close()
        browser.close()
        server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
