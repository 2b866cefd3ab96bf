"""screenshots/ beside this file: the site's start page and an audit's report, in a headless Chromium.

make docs
memsinks audit HuggingFaceTB/SmolLM2-135M-Instruct --documents docs/tutorials/famous.jsonl \\
    --controls docs/tutorials/unseen.jsonl --prefix 16 --continuation 16 --out runs/famous
python docs/take_screenshots.py runs/famous/report.html
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
SITE = HERE.parent / "build/site/index.html"
SIZE = {"width": 1120, "height": 760}
COLORS = 128
"""Of a picture's palette, so that it stays small."""


def take(browser: Any, page: Path, scheme: str, name: str) -> None:
    """The top of a page, in light or dark, as screenshots/NAME-SCHEME.png."""
    view = browser.new_page(color_scheme=scheme, viewport=SIZE)
    view.goto(page.resolve().as_uri())
    picture = Image.open(io.BytesIO(view.screenshot())).convert("RGB").quantize(COLORS)
    picture.save(HERE / "screenshots" / f"{name}-{scheme}.png", optimize=True)
    view.close()


def main(report: Path) -> None:
    (HERE / "screenshots").mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        for scheme in ("light", "dark"):
            take(browser, SITE, scheme, "site")
            take(browser, report, scheme, "report")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
