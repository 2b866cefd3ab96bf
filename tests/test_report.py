"""The report: one page, nothing loaded from anywhere, no script; looked at by a browser where there is one."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from browser import chromium, overflow, watched

import memsinks as ms
from memsinks.auditing.pictures import drawn, keys, styles
from memsinks.auditing.report import write_report
from memsinks.auditing.result import HEADLINES, recited, verdict
from memsinks.data.tokens import encode

WORDS = 'otter mill road bridge gate chalk lane oak baker clock hen Sunday <b>&amp; "quoted" é漢'.split()
VOID = {"meta", "img", "br", "link", "input", "hr"}


def text(number: int) -> str:
    return " ".join(WORDS[(number * 7 + place * place * 3 + place) % len(WORDS)] for place in range(14)) + f" {number}."


MEMBERS = [ms.Document(text(x), key=f"</td><script>alert({x})</script>", copies=(1, 4, 16)[x % 3]) for x in range(12)]
CONTROLS = [ms.Document(text(x), copies=0) for x in range(100, 112)]


@pytest.fixture(scope="module")
def shown(tiny_llama, tmp_path_factory):
    """(folder, audit) with every part of the report: sinks, twin, seen once, another model, changed copies."""
    tokenizer = ms.train_tokenizer([x.text for x in MEMBERS + CONTROLS], 280)
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=128)
    twin = copy.deepcopy(model)
    ordinary = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(ordinary.parameters(), lr=1e-2)
    batch = [torch.from_numpy(x)[None] for x in encode(tokenizer, [x.text for x in MEMBERS if x.copies > 1])]
    ordinary.train()
    for _ in range(40):
        for row in batch:
            (ordinary(input_ids=row, labels=row).loss / len(batch)).backward()
        optimizer.step(), optimizer.zero_grad()
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=16, block_size=8))
    folder = tmp_path_factory.mktemp("report") / "out"
    found = ms.audit(
        model, MEMBERS, CONTROLS, tokenizer, state="closed", against=ordinary.eval(), twin=twin, seen_once=twin,
        others=[ms.Subject(model, "open", "with <sinks> open")], out=folder,
        settings=ms.AuditSettings(prefix=6, continuation=6, prefixes=(4, 6), offsets=(0, 2), resamples=100, shown=3,
                                  attacks="all", beginning=4),
    )  # fmt: skip
    return folder, found


class Page(HTMLParser):
    """Collects tags, attributes that load something, and text; fails on tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.alt: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "href" and (value or "").startswith("#"):
                self.links.append((value or "")[1:])
            elif name in ("src", "href", "srcset", "data", "action"):
                self.loads.append(value or "")
            if name == "alt":
                self.alt.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.text += data


@pytest.fixture(scope="module")
def page(shown) -> Page:
    return Page((shown[0] / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_whole_and_opens_offline(page) -> None:
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert page.loads and all(x.startswith("data:image/svg+xml;base64,") for x in page.loads)
    pictures, models = 6, 5
    assert len(page.loads) == len(page.alt) == pictures + models and sum(map(bool, page.alt)) == pictures


def test_the_contents_name_every_section(page, shown, tmp_path) -> None:
    assert page.links == page.ids and len(page.ids) == page.tags.count("section") == 12
    bare = dataclasses.replace(shown[1], examples=(), notes=())
    bare = dataclasses.replace(
        bare, models=(dataclasses.replace(bare.models[0], equivalences=(), sinks=None, forgetting=None),)
    )
    write_report(dataclasses.replace(bare, measured=bare.measured[:1]), tmp_path / "bare.html")
    less = Page((tmp_path / "bare.html").read_text())
    assert less.links == less.ids and not {"limits", "equivalence", "sinks", "examples"} & set(less.ids)


def test_the_summary_has_the_four_figures(shown, page) -> None:
    audit, flat = shown[1], " ".join(page.text.split())
    model, before = audit.audited, audit.model("against")
    hits, asked = recited(audit, model)
    assert f"{hits} of {asked} {recited(audit, before)[0]} in ordinary model; none is best" in flat
    assert f"{model.gap.value:+.2f} nats {before.gap.value:+.2f} in ordinary model; 0 = no" in flat
    assert (
        f"AUC {model.strongest.auc.value:.2f} {before.strongest.auc.value:.2f} in ordinary model; 0.5 = chance" in flat
    )
    assert f"What did it cost? {model.forgetting.price.value:+.2f} nats" in flat


def test_one_legend_serves_all_pictures(shown, page) -> None:
    audit = shown[1]
    assert [name for name, *_ in keys(audit)] == [model.name for model in audit.models]
    assert len({svg for *_, svg in keys(audit)}) == len(audit.models)
    inside = [base64.b64decode(x.partition(",")[2]) for x in page.loads[len(audit.models) :]]
    alone = {title: svg for title, _, svg in drawn(audit)}
    assert len(inside) == len(alone)
    assert all(len(b) < len(svg) for b, (title, svg) in zip(inside, alone.items(), strict=True) if title != "Loss")


def test_the_page_says_what_the_verdict_says(shown, page) -> None:
    flat = " ".join(page.text.split())
    for sentence in verdict(shown[1]):
        assert " ".join(sentence.split()) in flat
    assert "removed" not in flat.lower()
    assert next(iter(verdict(shown[1]))) in HEADLINES.values()


def test_text_of_documents_is_shown_as_text(shown, page) -> None:
    """Markup in a document, a key or a model's name is not markup of the page; the pieces give back the document."""
    assert "<b>&amp;" in page.text and "</td><script>alert(" in page.text and "with <sinks> open" in page.text
    for example in shown[1].examples:
        assert "".join(example.pieces) == MEMBERS[example.index].text + "<|endoftext|>"
        assert {len(x) for x in example.probabilities.values()} == {len(example.pieces)}
        assert len(example.probabilities) == 3


def test_json_has_what_an_auditor_asks_for(shown) -> None:
    folder, found = shown
    values = json.loads((folder / "audit.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    assert [x["state"] for x in values["models"]] == ["closed", "absent", "absent", "absent", "open"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", x["facts"]["weights_sha256"]) for x in values["models"])
    assert re.fullmatch(r"[0-9a-f]{64}", values["data"]["texts_sha256"])
    assert {"memsinks", "torch", "transformers"} <= set(values["versions"])
    assert values["settings"]["prefix"] == 6 and len(values["models"][0]["probes"]) == 7
    assert MEMBERS[0].text[:20] not in json.dumps(values, ensure_ascii=False)
    lines = [json.loads(x) for x in (folder / "documents.jsonl").read_text().splitlines()]
    assert [x["copies"] for x in lines] == [x.copies for x in MEMBERS + CONTROLS]
    assert lines[1]["models"]["audited model"]["loss"] == pytest.approx(float(found.measured[0].loss[1]))


def test_no_text_is_shown_if_none_is_asked_for(shown, tmp_path) -> None:
    write_report(dataclasses.replace(shown[1], examples=()), tmp_path / "x.html")
    assert MEMBERS[0].text.split("<")[0] not in Page((tmp_path / "x.html").read_text()).text


def test_lines_can_be_told_apart_without_color(shown) -> None:
    looks = list(styles(shown[1]).values())
    assert len({color for color, *_ in looks}) == len({(marker, dash) for _, marker, dash in looks}) == len(looks)


def test_a_browser_shows_it_without_errors(shown, tmp_path) -> None:
    with chromium() as browser:
        for scheme, width in (("light", 1440), ("dark", 1440), ("light", 360)):
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
            wrong = watched(page)
            page.goto((shown[0] / "report.html").as_uri())
            assert overflow(page) <= 0, f"wider than {width} pixels by {overflow(page)}"
            assert width < 1000 or page.locator(".tile").last.bounding_box()["y"] < 400, (
                "the summary is on the first screen"
            )
            page.get_by_role("link", name="Membership attacks").click()
            assert page.locator("#attacks").is_visible()
            page.emulate_media(media="print")
            assert not page.locator("nav").is_visible()
            assert page.locator("#settings pre").evaluate("x => x.getBoundingClientRect().height") > 0, (
                "opened in print"
            )
            assert overflow(page) <= 0 or width < 1000
            page.close()
            assert not wrong
