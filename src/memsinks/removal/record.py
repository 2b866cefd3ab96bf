"""The record of a take-down: a folder that says what was done, and that others can check.

    statement.json    what was asked, found, erased, rewritten: an in-toto Statement v1, see `removal.statement`
    record.html       the same to read, made from the statement alone
    tombstone.json    hashes that keep the texts from coming back; may be withheld, the statement holds its SHA-256
    record.sig        the signature of the first two, where a key was given

What a record shows. *Signed*, and checked with a public key that the reader got from somewhere else: the holder of the key has
stated this, and not a byte of it was changed since. *Unsigned*: its parts fit together, and the files of the run are those that
it names. Whoever can write the folder can write another record that fits as well, so an unsigned one protects against
accidents, not against its author or an intruder. Either way it is a statement about files: that the model does not know the
text any more is for an audit to show, and that no other copy of the files exists nobody can.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memsinks.errors import CheckpointError
from memsinks.files import file_hash, write_json, written_beside
from memsinks.removal import signature
from memsinks.removal.record_page import PAGE, record_page
from memsinks.removal.statement import is_within, make_statement, problems, read_statement
from memsinks.removal.tombstone import Tombstone, read_tombstone, write_tombstone

STATEMENT, RECORD_PAGE, TOMBSTONE, SIGNATURE = "statement.json", "record.html", "tombstone.json", "record.sig"
RECORDS = "takedowns"
"""Where the records of take-downs lie in the folder of a run; no other take-down touches them."""
SIGNED = (STATEMENT, RECORD_PAGE)
EMPTY = hashlib.sha256().hexdigest()
"""Of a file in which nothing stands."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked of a record.

    Args:
        name: what: "statement", "page", "tombstone", "signature", "files", or "file " and its path in the run.
        ok: whether it holds; None where it was not checked.
        detail: what was found; of a check that failed, which file was changed.
    """

    name: str
    ok: bool | None
    detail: str


def write_record(
    folder: str | os.PathLike[str],
    predicate: Mapping[str, Any],
    *,
    tombstone: Tombstone | None = None,
    key: str | os.PathLike[str] | None = None,
    password: bytes | None = None,
) -> Path:
    """Write the record of a take-down; the folder is there whole or not at all.

    Args:
        folder: must not exist or be empty.
        predicate: JSON-ready; numbers, names and hashes, no text of a document:
            ``asked``: {"owner": name, "by": "content", "key" or "source", "id": document id};
            ``matched``: {"counts": {kind: documents}, "ids": [...]};
            ``erased``: {"layers": [...], "blocks": [...] or {layer: [...]}};
            ``files``: [{"path": within the run, "fate": "rewritten", "deleted", "untouched" or "added", "why": a few words,
            "before": SHA-256 or None, "after": SHA-256 or None}], each file of the run once;
            ``audit``: {"before": figures, "after": figures}, nested mappings of numbers, empty where no audit was made;
            ``settings``, ``versions``: mappings; ``date``: ISO 8601, now (UTC) if it is left out. More may stand beside these.
        tombstone: of the texts. Its hash gets into the statement, and the predicate is searched for words of the texts.
        key: a private key of a curve P-256, P-384 or P-521, PEM; signs the record (needs ``memsinks[record]``).
        password: of the key.

    Returns:
        The folder.

    Raises:
        DataError: the predicate is not as above; lists everything that is wrong.
        ConfigError: `key` is none, or the package that signs is missing.
        CheckpointError: the folder is not empty or cannot be written.
    """
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} is not an empty folder; write the record into a new one")
    signer = None if key is None else signature.load_signer(key, password)
    whole: Any = predicate
    if isinstance(predicate, Mapping):
        tomb = {} if tombstone is None else {"tombstone": {"sha256": _json_hash(tombstone.as_json())}}
        whole = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **predicate, "page": PAGE, **tomb}
    statement = make_statement(whole, tombstone)
    with written_beside(target) as part:
        if tombstone is not None:
            write_tombstone(part / TOMBSTONE, tombstone)
        write_json(part / STATEMENT, statement)
        page = record_page(statement, (part / STATEMENT).read_bytes())
        (part / RECORD_PAGE).write_text(page, encoding="utf-8", newline="\n")
        if signer is not None:
            signature.sign(signer, part, SIGNED, part / SIGNATURE)
    return target


def _json_hash(value: Any) -> str:
    """SHA-256 of the file that `write_json` makes of a value."""
    return hashlib.sha256((json.dumps(value, indent=2) + "\n").encode()).hexdigest()


def verify_record(
    folder: str | os.PathLike[str],
    *,
    run: str | os.PathLike[str] | None = None,
    public_key: str | os.PathLike[str] | None = None,
) -> list[Check]:
    """Check a record, offline: that its parts fit together, who signed it, and that the run is as it says.

    Without `public_key` a signature is not checked, and without a signature only the agreement of the parts with each other and
    with the run is shown: see the head of this module. With a key, a record without a signature fails.

    Args:
        folder: that `write_record` wrote.
        run: the run folder: every file must have the hash that is recorded, every deleted one must be gone, and none of what was
            rewritten or deleted may lie there under another name.
        public_key: PEM; from whoever signs, not from the record.

    Returns:
        Checks in a fixed order: statement, page, tombstone, signature, files. The record holds where no ``ok`` is False.

    Raises:
        CheckpointError: there is no record, its statement is no JSON of ours, or it is of a newer version; `run` is no folder.
        ConfigError: `public_key` is none, or the package that checks signatures is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the folder of a record")
    if run is not None and not Path(run).is_dir():
        raise CheckpointError(f"{run} is no folder; give the folder of the run that the record is of")
    verifier = None if public_key is None else signature.load_verifier(public_key)
    statement = read_statement(folder / STATEMENT)
    wrong = problems(statement)
    checks = [Check("statement", not wrong, f"{STATEMENT}: {'; '.join(wrong) or 'well formed'}")]
    if wrong:
        checks.append(Check("page", None, f"{RECORD_PAGE} cannot be compared with a damaged statement"))
    else:
        checks.append(_check_page(folder, statement))
    checks += [_check_tombstone(folder, statement), _check_signature(folder, verifier)]
    if run is None or wrong:
        why = "no run was given" if run is None else "the statement is damaged"
        return [*checks, Check("files", None, f"files of the run were not compared: {why}")]
    return checks + _check_files(folder, Path(run), statement["predicate"]["files"], verifier)


def _check_page(folder: Path, statement: Mapping[str, Any]) -> Check:
    form = statement["predicate"].get("page")
    if not (folder / RECORD_PAGE).is_file():
        return Check("page", False, f"{RECORD_PAGE} is missing")
    if form != PAGE:
        return Check("page", None, f"{RECORD_PAGE} has form {form!r}, this memsinks writes {PAGE}: not compared")
    wanted = record_page(statement, (folder / STATEMENT).read_bytes())
    same = (folder / RECORD_PAGE).read_bytes() == wanted.encode()
    says = (
        "says what the statement says"
        if same
        else f"or {STATEMENT} was changed: it does not say what the statement says"
    )
    return Check("page", same, f"{RECORD_PAGE} {says}")


def _check_tombstone(folder: Path, statement: Mapping[str, Any]) -> Check:
    named, path = statement["predicate"].get("tombstone"), folder / TOMBSTONE
    wanted = named.get("sha256") if isinstance(named, Mapping) else None
    if wanted is None:
        return Check(
            "tombstone",
            False if path.exists() else None,
            f"the statement names none{', but one is there' * path.exists()}",
        )
    if not path.is_file():
        return Check(
            "tombstone", None, f"{TOMBSTONE} is not in the folder: it may be withheld, and nothing else needs it"
        )
    if file_hash(path) != wanted:
        return Check("tombstone", False, f"{TOMBSTONE} was changed: its hash is not the one in the statement")
    try:
        count = len(read_tombstone(path).digests)
    except CheckpointError as error:
        return Check("tombstone", False, str(error))
    return Check("tombstone", True, f"{TOMBSTONE} belongs to the statement, {count} text{'s' * (count != 1)}")


def _check_signature(folder: Path, verifier: Any) -> Check:
    there = (folder / SIGNATURE).is_file()
    if verifier is None:
        says = f"{SIGNATURE} was not checked: no public key was given" if there else "the record is not signed"
        return Check("signature", None, says)
    if not there:
        return Check("signature", False, f"{SIGNATURE} is missing: the record is not signed")
    missing = [name for name in SIGNED if not (folder / name).is_file()]
    if missing:
        return Check("signature", False, f"{missing[0]}, which is signed, is missing")
    fault = signature.fault(verifier, folder, SIGNED, folder / SIGNATURE)
    return Check("signature", not fault, fault or f"{', '.join(SIGNED)} were signed with this key")


def _check_files(record: Path, run: Path, files: list[dict[str, Any]], verifier: Any) -> list[Check]:
    """Each file of the statement, then what else lies in the run."""
    changes = _of_other_records(record, run, verifier)
    checks = [_check_file(run, x, changes) for x in files]
    named = {x["path"] for x in files}
    gone = {x["before"]: x["path"] for x in files if x["fate"] in ("rewritten", "deleted")}
    gone = {digest: path for digest, path in gone.items() if digest not in {EMPTY, *(x["after"] for x in files)}}
    others = [
        path
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and path.relative_to(run).as_posix() not in named
        and record.resolve() not in path.resolve().parents
    ]
    back = [(path, gone[digest]) for path in others if (digest := file_hash(path)) in gone]
    for path, before in back:
        checks.append(
            Check(f"file {path.relative_to(run).as_posix()}", False, f"is {before} as it was before the take-down")
        )
    rest = [path.relative_to(run).as_posix() for path in others if path not in {x for x, _ in back}]
    if rest:
        shown = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
        checks.append(Check("files", None, f"the record does not name {shown}"))
    return checks


def _of_other_records(record: Path, run: Path, verifier: Any) -> dict[str, list[tuple[str, str | None]]]:
    """What other take-downs of the run made of each file: {path: (SHA-256 before, after; None = deleted)}.

    Those that are damaged count for nothing, and with a public key those that it did not sign.
    """
    found: dict[str, list[tuple[str, str | None]]] = {}
    for path in run.glob(f"{RECORDS}/*/{STATEMENT}"):
        if path.parent.resolve() == record.resolve():
            continue
        if verifier is not None and not _check_signature(path.parent, verifier).ok:
            continue
        try:
            statement = read_statement(path)
        except CheckpointError:
            continue
        if not problems(statement):
            for file in statement["predicate"]["files"]:
                if file["fate"] != "untouched":
                    found.setdefault(file["path"], []).append((file["before"], file["after"]))
    return found


def _later(digest: str, changes: Sequence[tuple[str, str | None]]) -> set[str | None]:
    """What became of a file with this SHA-256 by take-downs that came after it."""
    found: set[str | None] = {digest}
    while more := {after for before, after in changes if before in found} - found:
        found |= more
    return found


def _check_file(run: Path, file: Mapping[str, Any], changes: Mapping[str, list[tuple[str, str | None]]]) -> Check:
    name, path = f"file {file['path']}", run / file["path"]
    if file["after"] is None:
        there = path.exists() or path.is_symlink()
        return Check(name, not there, "was deleted and is back" if there else "is gone")
    others = _later(file["after"], changes.get(file["path"], []))
    if None in others and not path.exists():
        return Check(name, True, "was deleted by another take-down")
    if not is_within(file["path"]) or not path.is_file():
        return Check(name, False, "is missing")
    try:
        found = file_hash(path)
    except OSError as error:
        return Check(name, False, f"cannot be read: {error.strerror}")
    if found == file["after"]:
        return Check(name, True, "as recorded")
    old = found == file["before"]
    if found in others and not old:
        return Check(name, True, "as another take-down left it")
    return Check(name, False, "is as it was before the take-down" if old else "was changed after the take-down")
