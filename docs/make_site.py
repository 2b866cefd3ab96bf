"""The site of the documentation, in build/site: `make docs`.

The pages are those of docs/ and what they link to: other pages of this repository, code, pictures, results. The notebooks of
docs/tutorials become pages, docs/api.md a page a room. A warning of the builder is an error; every link and anchor leads
somewhere, and nothing is loaded from another host.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CODE = {".py": "python", ".yaml": "yaml"}
"""Files that are shown as pages, by the language of their code."""
MOST_LINKED = 20
"""Files of a folder that is linked to; of a larger one the names alone are shown."""
LINK = re.compile(r"(?P<before>\]\(|(?:src|srcset|href)=\")(?P<target>[^)\s\"]+)(?P<after>[)\"])")
PICTURE = re.compile(
    r"<picture>\s*<source [^>]*srcset=\"([^\"]+)\"[^>]*>\s*<img alt=\"([^\"]+)\" src=\"([^\"]+)\">\s*</picture>"
)
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
COMMENT = re.compile(r"^ *<!-- snippet: .* -->\n", re.M)


# Pages


def place(path: Path) -> Path:
    """Where a file of the repository lies in the site's pages: docs/ is the top, everything else below its own path."""
    found = path.relative_to(DOCS) if path.is_relative_to(DOCS) else path.relative_to(ROOT)
    if path.is_dir():
        return found / "index.md"
    if found.suffix in CODE:
        return found.with_name(found.name + ".md")
    if path == ROOT / "README.md":
        return Path("readme.md")  # README.md would be the start page
    return found.with_suffix(".md") if found.suffix == ".ipynb" else found


def page_of(path: Path) -> str:
    """A file as Markdown."""
    if path.is_dir():
        files = sorted(x.name for x in path.iterdir() if x.suffix in CODE or x.name == "README.md")
        names = [f"[{x}]({x})" for x in files] if len(files) <= MOST_LINKED else [f"`{x}`" for x in files]
        return f"# {path.relative_to(ROOT)}/\n\n" + "".join(f"- {x}\n" for x in names)
    if path.suffix in CODE:
        hidden = "---\nsearch:\n  exclude: true\n---\n\n"
        return f"{hidden}# {path.relative_to(ROOT)}\n\n````{CODE[path.suffix]}\n{path.read_text()}````\n"
    if path.suffix == ".ipynb":
        return notebook_page(path)
    text = COMMENT.sub("", path.read_text())
    return PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", text)


def notebook_page(path: Path) -> str:
    """A notebook as Markdown; its pictures stay in it."""
    blocks = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
        else:
            blocks += [f"```python\n{source}\n```", *map(shown, cell["outputs"])]
    return "\n\n".join(blocks) + f"\n\n---\n\nThis page as a notebook: [{path.name}]({path.name}?file).\n"


def shown(output: dict[str, Any]) -> str:
    """One output of a notebook's cell."""
    if output["output_type"] == "stream":
        return "``` { .text .output }\n" + "".join(output["text"]).strip("\n") + "\n```"
    data = output["data"]
    if "image/png" in data:
        png = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
        return f'<p><img alt="Picture drawn by the code above" src="data:image/png;base64,{png}"></p>'
    if "text/html" in data:
        return f'<div class="output">{" ".join("".join(data["text/html"]).splitlines())}</div>'
    return "``` { .text .output }\n" + "".join(data["text/plain"]) + "\n```"


# Links


def linked(text: str, page: Path, at: Path) -> tuple[str, set[Path]]:
    """The text of `page` with its links as seen from `at` in the site, and the files of the repository that they lead to."""
    wanted: set[Path] = set()

    def follow(match: re.Match[str]) -> str:
        target, mark, anchor = match["target"].partition("#")
        target, _, as_file = target.partition("?")
        if not target or ":" in target:
            return match[0]
        path = ((page if page.is_dir() else page.parent) / target).resolve()
        if not path.exists():
            raise SystemExit(f"{page.relative_to(ROOT)} links to {target}, which does not exist")
        if path.is_dir() and (path / "README.md").is_file():
            path = path / "README.md"
        wanted.add(path)
        to = path.relative_to(DOCS) if as_file else place(path)
        return match["before"] + os.path.relpath(to, at.parent) + mark + anchor + match["after"]

    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        pieces += [LINK.sub(follow, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(follow, text[end:])]), wanted


def gather(target: Path) -> None:
    """Every page of docs/ and what they lead to, as the builder reads them, in the folder `target`."""
    shutil.rmtree(target, ignore_errors=True)
    left, done = [*DOCS.glob("*.md"), *DOCS.glob("tutorials/*.ipynb"), DOCS / "site.css"], set[Path]()
    while left:
        path = left.pop()
        if path in done:
            continue
        done.add(path)
        at = place(path)
        (target / at).parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and (at.suffix != ".md" or path.suffix == ".ipynb"):
            shutil.copy(path, target / (path.relative_to(DOCS) if path.is_relative_to(DOCS) else at))
        if at.suffix == ".md":
            text, wanted = (page_of(path), set()) if path.suffix in CODE else linked(page_of(path), path, at)
            (target / at).write_text(text)
            left += wanted
    split_api(target)


def split_api(target: Path) -> None:
    """api.md as a page a room, and everybody's links to its names with it."""
    head, *sections = re.split(r"^## ", (target / "api.md").read_text(), flags=re.M)
    (target / "api.md").unlink()
    (target / "api").mkdir()
    home, names = {}, []
    for section in sections:
        room = section.partition("\n")[0].lower()
        found = re.findall(r"^### (\w+)$", section, re.M)
        home |= {name.lower(): room for name in [*found, room]}
        home |= {x.lower().replace(".", ""): room for x in re.findall(r"^#### ([\w.]+)$", section, re.M)}
        names.append(f"| [{room}]({room}.md) | {', '.join(f'[{x}]({room}.md#{x.lower()})' for x in found)} |")
        text = "# " + re.sub(r"^#(##+) ", r"\1 ", section, flags=re.M)
        (target / "api" / f"{room}.md").write_text(text)
    (target / "api/index.md").write_text(head + "| room | names |\n|---|---|\n" + "\n".join(names) + "\n")
    for page in target.rglob("*.md"):
        base = os.path.relpath(target / "api", page.parent)
        inside = page.parent == target / "api"

        def follow(match: re.Match[str], base: str = base, inside: bool = inside) -> str:
            api, anchor = match["api"], match["anchor"]
            if not (api or (inside and anchor)):
                return match[0]
            room = home[anchor] if anchor else "index"
            return f"]({base}/{room}.md{f'#{anchor}' if anchor and anchor != room else ''})"

        page.write_text(re.sub(r"\]\((?P<api>[./]*api\.md)?(?:#(?P<anchor>[\w-]+))?\)", follow, page.read_text()))


# The check


class Page(HTMLParser):
    """What a built page names and leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[x] for x in ("id", "name") if x in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(values.get("href", ""))
        else:
            self.loaded += [values["src"]] if "src" in values else []


def problems(site: Path) -> list[str]:
    """Dead links and anchors of a built site, and what its pages load from other hosts."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = Page()
        pages[path].feed(path.read_text())
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        if name.name == "404.html":
            continue
        found += [f"{name} loads {x}" for x in page.loaded if re.match(r"(https?:)?//", x)]
        for link in [*page.links, *page.loaded]:
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"\w+:|//", target):
                continue
            to = (path.parent / target.partition("?")[0]).resolve() if target else path
            to = to / "index.html" if to.is_dir() else to
            if not to.is_file():
                found.append(f"{name} leads to {link}, which is not there")
            elif anchor and to in pages and anchor not in pages[to].anchors | {"only-light", "only-dark"}:
                found.append(f"{name} leads to {link}, an anchor that is not there")
    for style in site.rglob("*.css"):
        found += [
            f"{style.relative_to(site)} loads {x}"
            for x in re.findall(r"url\([\"']?(https?:[^)\"']+)", style.read_text())
        ]
    return found


def unlisted(pages: Path) -> list[str]:
    """Pages of docs/ that the navigation leaves out."""
    listed = (ROOT / "zensical.toml").read_text()
    names = [str(place(x)) for x in (*DOCS.glob("*.md"), *DOCS.glob("tutorials/*.ipynb")) if x.name != "api.md"]
    names += [str(x.relative_to(pages)) for x in pages.glob("api/*.md")]
    return [f"{name} is not in the navigation of zensical.toml" for name in names if f'"{name}"' not in listed]


def build(folder: Path) -> Path:
    """Gather the pages in ``folder/pages``, build ``folder/site`` and check it.

    Raises:
        SystemExit: the builder warns, or a link or the navigation is wrong; says each.
    """
    pages, site = folder / "pages", folder / "site"
    gather(pages)
    shutil.copy(ROOT / "zensical.toml", folder)
    shutil.rmtree(site, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=folder)
    found = unlisted(pages) + problems(site) if made.returncode == 0 else ["zensical warns of the above"]
    if found:
        raise SystemExit("\n".join(found))
    return site


if __name__ == "__main__":
    build(ROOT / "build")
