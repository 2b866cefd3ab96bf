"""Which owner a question is about, and a router that has forgotten one."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

import memsinks as ms
from memsinks.data.router import COUNTS, SETTINGS

pytest.importorskip("sklearn")
TEXTS = {
    "acme": ["Acme sells blue anvils to the coyote.", "Acme was founded by Ada."],
    "bolt": ["Bolt repairs red bicycles.", "Bolt is led by Ben from a barn."],
    "cord": ["Cord weaves green ropes for sailors.", "Cord pays Cy in apples."],
}
DOCUMENTS = [ms.Document(text, source=owner) for owner, texts in TEXTS.items() for text in texts]
ACME, BOLT, CORD = (ms.document_id(name, by="source") for name in TEXTS)


def test_a_question_finds_its_owner_or_nobody():
    router = ms.Router.fit(DOCUMENTS)
    asked = ["Who repairs bicycles in a barn?", "What does Acme sell?", "green ropes", "Quantum chromodynamics?", ""]
    assert router.owners_of(asked) == [BOLT, ACME, CORD, -1, -1]
    nearest, near = router.similarities(asked)
    assert near[3] == near[4] == 0 and nearest[0] == BOLT and ((near >= 0) & (near <= 1)).all()
    whole = "\n".join(TEXTS["bolt"])
    assert router.similarities([whole])[1] == pytest.approx(1)
    assert ms.Router.fit(DOCUMENTS, threshold=1.0).owners_of(["What does Acme sell?"]) == [-1]


def test_who_may_see_several_owners_is_never_given_another():
    router = ms.Router.fit(DOCUMENTS)
    asked = ["Who repairs bicycles in a barn?", "What does Acme sell?", "green ropes"]
    assert router.owners_of(asked, among=[ACME, BOLT]) == [BOLT, ACME, -1]
    assert router.owners_of(asked, among=[]) == [-1, -1, -1]
    every = router.similarities(asked, among=[CORD, BOLT, ACME])
    assert all(np.array_equal(x, y) for x, y in zip(every, router.similarities(asked), strict=True))
    with pytest.raises(ms.DataError, match="id 7 is not in the router"):
        router.owners_of(asked, among=[ACME, 7])


def test_the_weights_by_hand():
    router = ms.Router.fit([ms.Document("a b", source="x"), ms.Document("a c", source="y")])
    common, rare = np.log(3 / 2), np.log(3 / 1)
    nearest, near = router.similarities(["b a", "a", "a d"])
    alone = common / np.hypot(common, rare)
    assert near == pytest.approx([1, alone, alone**2]) and nearest[0] == ms.document_id("x", "source")


def test_scripts_without_spaces_and_other_unicode_forms():
    texts = {
        "sea": "\u5b89\u4f4f\u5728\u6d77\u8fb9\u7684\u65e7\u623f\u5b50\u91cc\u3002",
        "caf\u00e9": "Le caf\u00e9 Z\u00e9phyr ouvre \u00e0 midi.",
    }
    router = ms.Router.fit([ms.Document(text, source=name) for name, text in texts.items()])
    sea, cafe = (ms.document_id(name, "source") for name in texts)
    asked = [
        "\u65e7\u623f\u5b50\u5728\u54ea\u91cc\uff1f",
        unicodedata.normalize("NFD", "O\u00f9 est le CAF\u00c9 Z\u00e9phyr?"),
        "\u4ed6\u662f\u8c01",
    ]
    assert router.owners_of(asked) == [sea, cafe, -1]


def test_one_who_left_was_never_there_also_on_disk(tmp_path):
    left = ms.Router.fit(DOCUMENTS).remove(BOLT)
    never = ms.Router.fit([x for x in DOCUMENTS if x.source != "bolt"])
    for router, name in ((left, "left"), (never, "never")):
        router.save(tmp_path / name)
    for file in (SETTINGS, COUNTS):
        assert (tmp_path / "left" / file).read_bytes() == (tmp_path / "never" / file).read_bytes()
    again = ms.Router.load(tmp_path / "left")
    assert again.owners_of(["Who repairs bicycles?", "green ropes"]) == [-1, CORD]
    assert router.owners_of(["What is Bolt led by?"]) == [-1], "the words of an owner who left are nobody's"
    nobody = left.remove(ACME).remove(CORD)
    assert nobody.owners_of(["green ropes"]) == [-1]
    with pytest.raises(ms.DataError, match="is not in the router; there are 2 owners"):
        left.remove(BOLT)


def test_what_is_refused(tmp_path):
    with pytest.raises(ms.DataError, match="needs documents"):
        ms.Router.fit([])
    ms.Router.fit(DOCUMENTS).save(tmp_path / "old")
    (tmp_path / "old" / SETTINGS).write_text(
        (tmp_path / "old" / SETTINGS).read_text().replace('"format_version": 2', '"format_version": 1')
    )
    old = ms.Router.load(tmp_path / "old").remove(ACME)
    assert old.owners_of(["green ropes", "blue anvils"]) == [CORD, -1] and old.version == 1
    with pytest.raises(ms.DataError, match="many texts, got one str"):
        ms.Router.fit(DOCUMENTS).owners_of("What does Acme sell?")
    with pytest.raises(ms.ConfigError, match="threshold must"):
        ms.Router.fit(DOCUMENTS, threshold=2)
    with pytest.raises(ms.CheckpointError, match="no router in"):
        ms.Router.load(tmp_path)
    ms.Router.fit(DOCUMENTS).save(tmp_path / "router")
    (tmp_path / "router" / SETTINGS).write_text('{"format_version": 9}')
    with pytest.raises(ms.CheckpointError, match="another version"):
        ms.Router.load(tmp_path / "router")


def test_texts_without_owner_and_a_single_id_are_said():
    for documents in (["Acme sells anvils."], [ms.Document("Acme sells anvils.")]):
        with pytest.raises(ms.DataError, match="source"):
            ms.Router.fit(documents)
    with pytest.raises(ms.DataError, match="documents must be many"):
        ms.Router.fit("Acme sells anvils.")
    with pytest.raises(ms.DataError, match="among is a list of ids"):
        ms.Router.fit(DOCUMENTS).owners_of(["green ropes"], among=CORD)
