"""The record of a take-down: one that holds, every kind of tampering, keys, what is wrong."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import memsinks as ms
from memsinks.cli import main
from memsinks.removal.record import Check, write_record
from memsinks.removal.record_page import PAGE, record_page
from memsinks.removal.tombstone import make_tombstone, write_tombstone

TEXT = "Alice Example was born in Bergen in 1987 and keeps the ledger of the harbor."
TOMBSTONE = make_tombstone([TEXT], record="alice")
needs_signing = pytest.mark.skipif(
    importlib.util.find_spec("model_signing") is None, reason="no package model-signing here"
)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


FILES = {"model/model.safetensors": "weights after", "members.jsonl": "members after", "recipe.yaml": "the recipe"}
BEFORE = FILES | {
    "members.jsonl": "members before",
    "model/model.safetensors": "weights before",
    "tokens/0.bin": "tokens",
}
PREDICATE = {
    "asked": {"owner": "alice", "by": "key", "id": 8142679314005912345},
    "matched": {"counts": {"exact": 3, "near": 1}, "ids": [8142679314005912345, 12]},
    "erased": {"layers": [0, 1], "blocks": [3, 17, 40, 99]},
    "files": [
        {"path": "model/model.safetensors", "fate": "rewritten", "why": "held the sink blocks",
         "before": sha("weights before"), "after": sha("weights after")},
        {"path": "members.jsonl", "fate": "rewritten", "why": "held the documents", "before": sha("members before"),
         "after": sha("members after")},
        {"path": "recipe.yaml", "fate": "untouched", "why": "names settings only", "before": sha("the recipe"),
         "after": sha("the recipe")},
        {"path": "tokens/0.bin", "fate": "deleted", "why": "held the tokens", "before": sha("tokens"), "after": None},
    ],
    "audit": {"before": {"its loss": 0.031, "recited": 1.0, "best attack": {"auc": 0.98}},
              "after": {"its loss": 1.42, "recited": 0.0, "best attack": {"auc": 0.51}, "loss of others": 1.201}},
    "settings": {"threshold": 0.8, "kinds": ["exact", "near"], "audit": {"prefix": 32, "offsets": [0]}},
    "versions": {"memsinks": "0.1.0", "torch": "2.13.0"},
    "date": "2026-03-01T12:00:00+00:00",
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as it is after the take-down."""
    for name, text in FILES.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Path]:
    """Two pairs, a and b, and one that needs a password."""
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography.hazmat.primitives import serialization as s

    folder = tmp_path_factory.mktemp("keys")
    for name, curve in (("a", ec.SECP256R1()), ("b", ec.SECP384R1()), ("locked", ec.SECP256R1())):
        key = ec.generate_private_key(curve)
        lock = s.BestAvailableEncryption(b"sesame") if name == "locked" else s.NoEncryption()
        (folder / f"{name}.pem").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, lock))
        public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def record(tmp_path) -> Path:
    """An unsigned record."""
    return write_record(tmp_path / "record", PREDICATE, tombstone=TOMBSTONE)


@pytest.fixture
def signed(tmp_path, keys) -> Path:
    return write_record(tmp_path / "signed", PREDICATE, tombstone=TOMBSTONE, key=keys["a.pem"])


def failing(checks: list[Check]) -> dict[str, str]:
    return {x.name: x.detail for x in checks if x.ok is False}


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


# One that holds


def test_an_unsigned_record_holds_and_says_what_was_not_checked(record, run) -> None:
    assert sorted(x.name for x in record.iterdir()) == ["record.html", "statement.json", "tombstone.json"]
    checks = ms.verify_record(record, run=run)
    files = [f"file {x['path']}" for x in PREDICATE["files"]]
    assert [x.name for x in checks] == ["statement", "page", "tombstone", "signature", *files]
    assert [x.ok for x in checks] == [True, True, True, None, True, True, True, True]
    assert checks[3].detail == "the record is not signed"
    alone = ms.verify_record(record)
    assert (alone[-1].name, alone[-1].ok) == ("files", None)


def test_the_statement_is_one_of_in_toto(record) -> None:
    statement = json.loads((record / "statement.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://github.com/memsinks/memsinks/takedown/v1"
    assert {x["name"]: x["digest"] for x in statement["subject"]} == {x: {"sha256": sha(y)} for x, y in FILES.items()}
    assert statement["predicate"]["asked"]["id"] == "8142679314005912345"  # a float would round it
    assert statement["predicate"]["matched"]["ids"] == ["8142679314005912345", 12]
    assert set(PREDICATE) < set(statement["predicate"])


def test_no_text_is_in_the_record(record) -> None:
    everything = b"".join(path.read_bytes() for path in record.iterdir())
    assert not any(word.encode() in everything for word in TEXT.split() if word[0].isupper())


@needs_signing
def test_a_signed_record_holds(signed, run, keys) -> None:
    checks = ms.verify_record(signed, run=run, public_key=keys["a.pub"])
    assert all(x.ok for x in checks)
    assert "signed with this key" in checks[3].detail
    without = ms.verify_record(signed, run=run)[3]
    assert (without.ok, without.detail) == (None, "record.sig was not checked: no public key was given")


@needs_signing
def test_a_signature_can_be_checked_without_us(signed, keys) -> None:
    """As the page of the module says."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--signature", signed / "record.sig", "--public_key",
               keys["a.pub"], "--ignore_unsigned_files", signed]  # fmt: skip
    assert subprocess.run([str(x) for x in command], capture_output=True, check=False).returncode == 0


@needs_signing
def test_other_curves_and_passwords(tmp_path, keys) -> None:
    folder = write_record(tmp_path / "b", PREDICATE, key=keys["b.pem"])
    assert not failing(ms.verify_record(folder, public_key=keys["b.pub"]))
    folder = write_record(tmp_path / "c", PREDICATE, key=keys["locked.pem"], password=b"sesame")
    assert not failing(ms.verify_record(folder, public_key=keys["locked.pub"]))


def test_a_withheld_tombstone_is_said(record) -> None:
    (record / "tombstone.json").unlink()
    check = ms.verify_record(record)[2]
    assert check.ok is None and "withheld" in check.detail


def test_a_record_without_a_tombstone_or_an_audit(tmp_path) -> None:
    bare = PREDICATE | {"audit": {"before": {}, "after": {}}}
    folder = write_record(tmp_path / "r", bare)
    assert not failing(ms.verify_record(folder))
    assert "No audit was made" in (folder / "record.html").read_text()
    write_tombstone(folder / "tombstone.json", TOMBSTONE)
    assert "names none, but one is there" in failing(ms.verify_record(folder))["tombstone"]


def test_files_that_the_record_does_not_name_are_said(record, run) -> None:
    shutil.move(record, run / "record")
    (run / "notes.txt").write_text("mine")
    *_, last = ms.verify_record(run / "record", run=run)
    assert last == Check("files", None, "the record does not name notes.txt")


# Tampering


TAMPERED = {
    "statement": ("statement.json", lambda x: x["predicate"]["matched"]["counts"].update(exact=2), "page"),
    "hash": ("statement.json", lambda x: x["predicate"]["files"][0].update(after="0" * 64), "statement"),
    "subject": ("statement.json", lambda x: x["subject"].pop(), "statement"),
    "section": ("statement.json", lambda x: x["predicate"].pop("audit"), "statement"),
    "climbing": ("statement.json", lambda x: x["predicate"]["files"][3].update(path="../outside"), "statement"),
    "tombstone hash": ("statement.json", lambda x: x["predicate"].update(tombstone=3), "statement"),
    "tombstone": ("tombstone.json", lambda x: x.update(record="bob"), "tombstone"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_an_edited_part_is_found(record, run, name) -> None:
    file, change, where = TAMPERED[name]
    edit(record / file, change)
    found = failing(ms.verify_record(record, run=run))
    assert file in found[where]


def test_an_edited_page_is_found(record, run) -> None:
    page = record / "record.html"
    page.write_text(page.read_text().replace("alice", "alicia", 1))
    assert "record.html" in failing(ms.verify_record(record, run=run))["page"]
    page.unlink()
    assert failing(ms.verify_record(record)) == {"page": "record.html is missing"}


def test_a_changed_run_is_found(record, run) -> None:
    (run / "model/model.safetensors").write_text("other weights")
    (run / "members.jsonl").write_text(BEFORE["members.jsonl"])
    (run / "recipe.yaml").unlink()
    (run / "tokens").mkdir()
    (run / "tokens/0.bin").write_text("tokens")
    assert failing(ms.verify_record(record, run=run)) == {
        "file model/model.safetensors": "was changed after the take-down",
        "file members.jsonl": "is as it was before the take-down",
        "file recipe.yaml": "is missing",
        "file tokens/0.bin": "was deleted and is back",
    }


def test_a_deleted_file_is_found_under_another_name(record, run) -> None:
    (run / "backup.bin").write_text("tokens")
    found = failing(ms.verify_record(record, run=run))
    assert found == {"file backup.bin": "is tokens/0.bin as it was before the take-down"}


def forged(folder: Path) -> None:
    """Another statement, and everything that follows from it without a key."""
    edit(folder / "statement.json", lambda x: x["predicate"]["matched"]["counts"].update(exact=2))
    data = (folder / "statement.json").read_bytes()
    (folder / "record.html").write_text(record_page(json.loads(data), data))


def test_a_forged_record_holds_unless_it_is_signed(record, run) -> None:
    """What an unsigned record does not protect against, as the page of the module says."""
    forged(record)
    assert not failing(ms.verify_record(record, run=run))


@needs_signing
@pytest.mark.parametrize(
    "change", [forged, lambda x: edit(x / "record.sig", lambda y: y["dsseEnvelope"].update(payload="e30="))]
)
def test_a_forged_signed_record_is_found(signed, keys, change) -> None:
    change(signed)
    assert set(failing(ms.verify_record(signed, public_key=keys["a.pub"]))) == {"signature"}


@needs_signing
@pytest.mark.parametrize("key", [None, "b.pem", "a.pem"])
def test_only_records_of_the_same_key_excuse_a_file_that_changed_later(signed, run, keys, key) -> None:
    change = {"before": sha("weights after"), "after": sha("weights later")}
    later = with_file(**change)
    write_record(run / "takedowns/later", later, key=keys.get(key))
    write_record(run / "elsewhere/later", later, key=keys["a.pem"])  # lies where no take-down writes
    (run / "model/model.safetensors").write_text("weights later")
    found = failing(ms.verify_record(signed, run=run, public_key=keys["a.pub"]))
    assert found == ({} if key == "a.pem" else {"file model/model.safetensors": "was changed after the take-down"})


@pytest.mark.parametrize(
    "content", ["{", '{"predicateType": "https://memsinks/takedown/v1", "predicate": {"files": [{}]}}']
)
def test_another_record_that_is_damaged_says_nothing_of_this_one(record, run, content) -> None:
    (run / "takedowns/other").mkdir(parents=True)
    (run / "takedowns/other/statement.json").write_text(content)
    assert not failing(ms.verify_record(record, run=run))


def test_empty_files_are_nobodys(tmp_path) -> None:
    empty = {"path": "data/fresh.jsonl", "fate": "deleted", "why": "held none", "before": sha(""), "after": None}
    record = write_record(tmp_path / "record", changed(files=[*PREDICATE["files"], empty]))
    run = tmp_path / "run"
    for name, text in (FILES | {"notes.txt": ""}).items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    assert not failing(ms.verify_record(record, run=run))


@needs_signing
def test_signatures_that_are_none_of_this_record(signed, tmp_path, keys) -> None:
    assert failing(ms.verify_record(signed, public_key=keys["b.pub"])) == {"signature": "signed with another key"}
    other = write_record(tmp_path / "other", PREDICATE | {"date": "2026-04-01"}, key=keys["a.pem"])
    mine = (signed / "record.sig").read_bytes()
    shutil.copy(other / "record.sig", signed / "record.sig")
    assert "was changed after signing" in failing(ms.verify_record(signed, public_key=keys["a.pub"]))["signature"]
    (signed / "record.sig").write_bytes(mine[:200])
    assert failing(ms.verify_record(signed, public_key=keys["a.pub"])) == {"signature": "record.sig is damaged"}
    swapped = json.loads(mine)
    swapped["dsseEnvelope"]["signatures"] = json.loads((other / "record.sig").read_text())["dsseEnvelope"]["signatures"]
    (signed / "record.sig").write_text(json.dumps(swapped))
    assert "is no valid signature" in failing(ms.verify_record(signed, public_key=keys["a.pub"]))["signature"]
    (signed / "record.sig").unlink()
    assert "is missing" in failing(ms.verify_record(signed, public_key=keys["a.pub"]))["signature"]


@needs_signing
def test_a_signature_of_other_files_is_none(signed, tmp_path, keys) -> None:
    """Another folder that the same key signed does not vouch for this record."""
    from model_signing import signing

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "record.html").write_text("x")
    signer = signing.Config().use_elliptic_key_signer(private_key=keys["a.pem"])
    signer.sign(tmp_path / "model", signed / "record.sig")
    assert "signs other files: record.html" in failing(ms.verify_record(signed, public_key=keys["a.pub"]))["signature"]


# What is wrong


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"predicateType": "https://slsa.dev/provenance/v1"}'])
def test_what_is_no_record_is_one_clear_error(record, content) -> None:
    path = record / "statement.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ms.CheckpointError, match=r"statement\.json"):
        ms.verify_record(record)


def test_a_newer_record_and_folders_that_are_none(record, tmp_path) -> None:
    with pytest.raises(ms.CheckpointError, match="none is no folder"):
        ms.verify_record(tmp_path / "none")
    with pytest.raises(ms.CheckpointError, match="gone is no folder; give the folder of the run"):
        ms.verify_record(record, run=tmp_path / "gone")
    edit(record / "statement.json", lambda x: x.update(predicateType=x["predicateType"][:-1] + "12"))
    with pytest.raises(ms.CheckpointError, match="version 12, newer than 1; update memsinks"):
        ms.verify_record(record)


def test_a_page_of_another_form_is_not_compared(record) -> None:
    edit(record / "statement.json", lambda x: x["predicate"].update(page=PAGE + 1))
    assert ms.verify_record(record)[1].ok is None


@needs_signing
def test_keys_that_are_none(record, signed, tmp_path, keys) -> None:
    for file, part in ((tmp_path / "none.pem", "there is no file"), (keys["a.pub"], "is no private key"),
                       (keys["locked.pem"], "with its password")):  # fmt: skip
        with pytest.raises(ms.ConfigError, match=part):
            write_record(tmp_path / "new", PREDICATE, key=file)
        assert not (tmp_path / "new").exists()
    for file, part in ((tmp_path / "none.pub", "there is no file"), (keys["a.pem"], "is no public key")):
        with pytest.raises(ms.ConfigError, match=part):
            ms.verify_record(signed, public_key=file)
    assert "not signed" in failing(ms.verify_record(record, public_key=keys["a.pub"]))["signature"]


def test_a_missing_package_is_named(record, tmp_path, monkeypatch) -> None:
    (tmp_path / "key").write_text("")
    for name in ("model_signing.signing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: ms.verify_record(record, public_key=tmp_path / "key"),
                 lambda: write_record(tmp_path / "new", PREDICATE, key=tmp_path / "key")):  # fmt: skip
        with pytest.raises(ms.ConfigError, match=r"install memsinks\[record\]"):
            call()
    assert not failing(ms.verify_record(record))


def test_a_folder_that_is_not_empty_is_refused(record) -> None:
    before = (record / "statement.json").read_bytes()
    with pytest.raises(ms.CheckpointError, match="is not an empty folder"):
        write_record(record, PREDICATE)
    assert (record / "statement.json").read_bytes() == before


def changed(**sections) -> dict:
    return copy.deepcopy(PREDICATE) | sections


def with_file(**values) -> dict:
    found = copy.deepcopy(PREDICATE)
    found["files"][0] |= values
    return found


@pytest.mark.parametrize(
    ("predicate", "part"),
    [([], "must be a mapping"), ({}, "lacks asked, matched, erased"), (changed(asked={"owner": "a"}), "asked must say by, id"),
     (changed(audit={}), "audit must have two tables"), (changed(matched=[3]), "matched must be a mapping, got list"),
     (changed(settings={"x": float("nan")}), "no nan"), (changed(settings={"x": object()}), "what JSON can hold"),
     (changed(date=3), "date must be a str"), (changed(files="x"), "files must be a list"),
     (changed(files=[]), "no file is there"),
     (changed(files=[{"path": "x"}]), "files must be a list of mappings with after, before, fate, path, why"),
     (changed(files=PREDICATE["files"] * 2), "more than once"), (with_file(path="/etc/passwd"), "must lie within the run"),
     (with_file(path="a/../../b"), "must lie within the run"), (with_file(path="C:\\x"), "must lie within the run"),
     (with_file(fate="burnt"), "fate of model/model.safetensors must be one of"), (with_file(after=None), "must be its SHA-256"),
     (with_file(fate="deleted"), "must be None"), (with_file(after="xyz"), "must be its SHA-256"),
     (with_file(why=None), "why of"),
     (with_file(fate="untouched"), "is untouched, but its hashes are two"), (changed(tombstone="x"), "tombstone must hold"),
     (with_file(before=sha("weights after")), "is rewritten, but its hashes are the same"),
     (with_file(why=f"it said: {TEXT[:40]}"), "no text may stand in it")],
)  # fmt: skip
def test_a_predicate_that_is_wrong_is_one_clear_error(tmp_path, predicate, part) -> None:
    with pytest.raises(ms.DataError) as raised:
        write_record(tmp_path / "new", predicate, tombstone=None if "tombstone" in predicate else TOMBSTONE)
    assert part in str(raised.value)
    assert "Bergen" not in str(raised.value)
    assert not (tmp_path / "new").exists()


# The page


def test_the_page_is_one_file_that_says_what_the_statement_says(record) -> None:
    page = (record / "record.html").read_text()
    assert not re.findall(r"<script|<link|<img|url\(|src=|https?://", page)
    for part in ("alice", "4</b>documents matched", "4</b>sink blocks erased", "best attack · auc", "0.51", "held the tokens",
                 "prefers-color-scheme: dark", "@media print", "8142679314005912345"):  # fmt: skip
        assert part in page
    assert hashlib.sha256((record / "statement.json").read_bytes()).hexdigest() in page


def test_what_stands_in_a_statement_cannot_run_in_the_page(tmp_path) -> None:
    folder = write_record(tmp_path / "r", changed(asked={"owner": "<script>alert(1)</script>", "by": "key", "id": 1}))
    assert "<script" not in (folder / "record.html").read_text()


def test_the_form_of_the_page_has_a_number() -> None:
    """A changed page needs a new `PAGE`: records that were written before are compared with what memsinks writes."""
    statement = {"predicate": PREDICATE | {"tombstone": {"sha256": "0" * 64}}}
    form = sha(record_page(statement, b""))
    assert (PAGE, form) == (1, "e19e2948b3fd6ce753cce32b665c76eb03b23f62a0dce80cfea74157d9e074c8")


# The command line


def test_the_command_prints_a_line_a_check(record, run, capsys) -> None:
    assert main(["verify", str(record), "--run", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0] == "ok           statement: statement.json: well formed"
    assert lines[3].startswith("not checked  signature: the record is not signed")
    (run / "recipe.yaml").write_text("x")
    assert main(["verify", str(record), "--run", str(run)]) == 2
    said = capsys.readouterr()
    assert "FAILED       file recipe.yaml: was changed after the take-down" in said.out
    assert said.err == f"memsinks: {record} does not hold: file recipe.yaml: was changed after the take-down\n"


@needs_signing
def test_the_command_with_a_key(signed, record, keys, capsys) -> None:
    assert main(["verify", str(signed), "--public-key", str(keys["a.pub"])]) == 0
    assert main(["verify", str(signed), "--public-key", str(keys["b.pub"])]) == 2
    assert main(["verify", str(record), "--public-key", str(keys["a.pub"])]) == 2
    assert main(["verify", str(record), "--public-key", "nowhere.pub"]) == 2
    assert "there is no file nowhere.pub" in capsys.readouterr().err
