"""Take one out of a finished run: found, shown, erased everywhere in its folder, verified, recorded.

    memsinks takedown RUN --key alice [--dry-run]

All of it happens or nothing does: new versions of files are staged beside and put in place together (`staging`); what a kill
leaves is finished, or dropped, by the next take-down there.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memsinks.checks import int_at_least, share
from memsinks.data.documents import Document, load_documents
from memsinks.data.identity import By, identify
from memsinks.data.tokens import load_tokenizer
from memsinks.errors import CheckpointError, DataError, refuse
from memsinks.removal.erase import Erased, collateral_in, together
from memsinks.removal.erase_files import SinksFile, changed_blocks
from memsinks.removal.record import RECORDS, write_record
from memsinks.removal.signature import load_signer
from memsinks.removal.tombstone import Tombstone, make_tombstone
from memsinks.runs.artifacts import Fates, Wanted, fates_of, files_below, sinks_below
from memsinks.runs.elsewhere import elsewhere
from memsinks.runs.owners import (
    Owner,
    asked,
    called_in_lines,
    find_owner,
    others_with_sinks,
    read_members,
    require_sinks_of,
    with_copies,
)
from memsinks.runs.repair import Repair
from memsinks.runs.staging import at_work, bind, finish, pending, staged
from memsinks.runs.takedown_audit import audit_takedown, figures_of
from memsinks.runs.takedown_result import Takedown, predicate_of
from memsinks.runs.text_search import His, texts_called
from memsinks.runs.unfinished import require_finished
from memsinks.sinks.checkpoint import load
from memsinks.sinks.state import SinkState, named_sinks
from memsinks.training.complete import MARKER as COMPLETE

logger = logging.getLogger(__name__)

MOST_COLLATERAL = 0.05
"""Share of anybody else's open blocks that may be erased unless told otherwise."""
AUDITED = 64
"""Documents of others, and controls, that are audited at most."""


def take_down(
    run: str | os.PathLike[str],
    *,
    key: str | None = None,
    id: int | None = None,
    source: str | None = None,
    text: str | None = None,
    dry_run: bool = False,
    copies: bool = False,
    most_collateral: float = MOST_COLLATERAL,
    repair_passes: int = 0,
    documents: Sequence[Document] | None = None,
    by: By | None = None,
    epochs: int = 1,
    also: Sequence[str | os.PathLike[str]] = (),
    signing_key: str | os.PathLike[str] | None = None,
) -> Takedown:
    """Take one owner out of a run.

    Args:
        run: the folder that `train` wrote; or any folder with checkpoints of `save_pretrained`, then with `documents` and `by`.
        key, id, source, text: who: give one.
        dry_run: only find, and say what would happen.
        copies: take out those too who have copies of his texts (`Takedown.owner.copies`).
        most_collateral: largest share of somebody else's open sink blocks that may go; 0 for own blocks.
        repair_passes: passes over the texts of others who lose hashed blocks, which these blocks of the run's model learn anew.
        documents, by, epochs: all documents that were trained on, what gave them their ids, and how often they were gone through,
            where the folder does not say.
        also: folders of exports and copies of the model, which are looked through, not changed.
        signing_key: signs the record, see `write_record`.

    Returns:
        What was done; a record lies in ``run/takedowns/``.

    Raises:
        ConfigError: none or several of key, id, source, text; a share that is none; no recipe to repair by. DataError: nobody of
            that name, no sinks of his own, taken out already; hashed blocks that too many share. CheckpointError: a run that is
            not finished; a folder that is damaged, locked, read-only or full; nothing was changed.
    """
    folder = Path(run)
    name, asked_by = asked(key, id, source, text)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    wrong = share("most_collateral", most_collateral) + int_at_least("repair_passes", repair_passes, 0)
    refuse(wrong, "cannot take out")
    if signing_key is not None:
        load_signer(signing_key)
    require_finished(folder)
    with at_work(folder):
        record = f"{asked_by}-{hashlib.sha256(str(name).encode()).hexdigest()[:12]}"
        _finish_pending(folder, record, dry_run)
        if documents is None:
            if (folder / RECORDS / record).is_dir():
                raise DataError(f"{asked_by} {str(name)[:60]!r} was taken out already, see {folder / RECORDS / record}")
            documents, by, epochs = read_members(folder)
        documents, by = [x for x in documents if x.text.strip()], by or "content"
        sinks = sinks_below(folder)
        owner = find_owner(documents, by, name, asked_by, [x.state.table for x in sinks.values()])
        owner = with_copies(owner, documents, by) if copies else owner
        repair, record = Repair.of(folder, repair_passes), _unused(folder, record)
        plan, others, tombstone = _planned(folder, sinks, owner, documents, by, epochs, record, also)
        if dry_run:
            return plan
        worst = max(plan.collateral.values(), default=0.0)
        if worst > most_collateral:
            raise DataError(
                f"{asked_by} {str(name)[:60]!r} has no blocks of its own: {len(plan.collateral)} other documents would lose "
                f"up to {worst:.0%} of theirs, allowed are {most_collateral:.0%}; give a higher most_collateral (--collateral), "
                "or train with own blocks"
            )
        audit, same = _audit(folder, plan, others, by, record, repair)
        done = replace(plan, audit=audit, same_blocks=same, record=folder / RECORDS / record)
        with staged(folder) as files:
            _stage(done, files)
            predicate = predicate_of(done, folder, files, by, tombstone, repair.passes)
            write_record(files / RECORDS / record, predicate, tombstone=tombstone, key=signing_key)
            bind(folder, record, [fate.path for fate in done.fates.files if fate.fate == "deleted"])
        return done


def _planned(
    folder: Path,
    below: dict[str, SinksFile],
    owner: Owner,
    documents: list[Document],
    by: By,
    epochs: int,
    record: str,
    also: Sequence[str | os.PathLike[str]],
) -> tuple[Takedown, list[tuple[int, Document]], Tombstone | None]:
    """The take-down of an owner, erased in memory; (id, document) of the others with sinks; the tombstone of his texts."""
    his = _his_lines(folder, owner, documents, by)
    tombstone = make_tombstone(sorted(his.texts), record=record) if his.texts else None
    fates = fates_of(folder, Wanted(owner.ids, record, his, tombstone), below)
    if not fates.sinks:
        raise CheckpointError(f"there is no checkpoint with sinks below {folder}")
    main = _main(fates)
    erased, sinks = fates.erased[main], fates.sinks[main]
    if not any(fates.erased.values()):
        raise DataError(f"{owner.by} {owner.name[:60]!r} was taken out already, see {folder / RECORDS}")
    if not any(one.own for one in erased):
        require_sinks_of(owner, documents, by, sinks.state.config, epochs)
    others = others_with_sinks(owner, documents, by, sinks.state, epochs)
    hit = _collateral(sinks.before, erased, others)
    there = elsewhere(also, _everyone(owner, erased), erased, sinks)
    return Takedown(owner, documents, fates.erased, fates, hit, there), others, tombstone


def _his_lines(folder: Path, owner: Owner, documents: list[Document], by: By) -> His:
    """Which lines are his, those of texts that were never trained on too."""
    chosen = [documents[index] for index in owner.documents]
    called = called_in_lines(owner, chosen, by)
    texts = {x.text for x in chosen}
    if called is not None:
        texts |= texts_called((x for x in files_below(folder) if x.suffix == ".jsonl"), *called)
    if by == "content":
        return His(frozenset(texts), called=called, exact=True)
    return His(frozenset(texts), frozenset((x.key, x.source) for x in chosen), called)


def _unused(folder: Path, record: str) -> str:
    """The name of a record that is not there yet: somebody who came back and is taken out again gets another number."""
    names = itertools.chain([record], (f"{record}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not (folder / RECORDS / name).exists())


def _main(fates: Fates) -> str:
    """The checkpoint whose sinks stand for the model's; DataError if there are only sinks of others."""
    if all(sinks.of_owners for sinks in fates.sinks.values()) and not any(fates.erased.values()):
        raise DataError(f"the sinks below {fates.folder} are those of others alone; give the folder of his")
    if "model" in fates.sinks:
        return "model"
    return min(fates.sinks, key=lambda name: (fates.sinks[name].of_owners, not fates.erased[name]))


def _finish_pending(folder: Path, record: str, dry_run: bool) -> None:
    """Finish what an interrupted take-down has left; a dry run only says that there is something."""
    if dry_run:
        if pending(folder):
            raise DataError(f"a take-down was interrupted in {folder}; run it again to finish it, then ask anew")
        return
    finished = finish(folder)
    if finished is not None:
        logger.info("finished the take-down %s, which was interrupted", finished)
        if finished == record or finished.startswith(f"{record}-"):
            raise TakedownFinished(folder / RECORDS / finished)


class TakedownFinished(DataError):
    """What an interrupted run of the same command had begun is finished now; there is nothing left to do."""

    def __init__(self, record: Path) -> None:
        super().__init__(f"the take-down was interrupted before and is finished now: {record}")
        self.record = record


def _collateral(state: SinkState, erased: Sequence[Erased], others: Sequence[tuple[int, Document]]) -> dict[int, float]:
    ids = sorted({one for one, _ in others})
    if not ids or not erased or all(one.own for one in erased):
        return {}
    shares = collateral_in(state, Erased([], together(erased), False), ids)
    return {one: float(share) for one, share in zip(ids, shares, strict=True) if share}


def _everyone(owner: Owner, erased: Sequence[Erased]) -> set[int]:
    """The owner's ids and those of the documents within him."""
    return set(owner.ids).union(*(one.ids for one in erased))


def _kept_blocks(main: str, plan: Takedown, before: SinksFile) -> int:
    """How many sink blocks of the model keep every bit; CheckpointError if one would change that is not the owner's."""
    moved, same = changed_blocks(before.tensors, plan.fates.sinks[main].tensors)
    allowed = together(plan.erased[main])
    for layer, blocks in moved.items():
        if others := sorted(set(blocks) - set(allowed.get(layer, ()))):
            raise CheckpointError(f"layer {layer}: blocks {others} would change, which are others'")
    return same


def _audit(
    folder: Path, plan: Takedown, others: Sequence[tuple[int, Document]], by: By, record: str, repair: Repair
) -> tuple[dict[str, Any], int]:
    """Figures before and after, and how many blocks keep every bit; the files to be written must be the erased model's."""
    main = _main(plan.fates)
    checkpoint, sinks = folder / main, plan.fates.sinks[main]
    before = SinksFile(checkpoint)
    same = _kept_blocks(main, plan, before)
    whole = not before.stored.get("alone") and (checkpoint / "tokenizer_config.json").is_file()
    if not plan.erased[main] or not whole or not plan.owner.documents:
        lacking = "he has no documents here" if whole else f"{checkpoint} is no whole model with a tokenizer"
        repair.refuse(f"{lacking}, or he is not taken out of it")
        logger.info("no audit: %s, or he is not taken out of it", lacking)
        return {}, same
    model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
    owner = plan.owner
    documents = [plan.documents[x] for x in owner.documents]
    ids = identify(documents, by)[0].tolist()
    close = sorted(others, key=lambda x: -plan.collateral.get(x[0], 0.0))[:AUDITED]
    theirs = [document for _, document in close], [one for one, _ in close]
    kinds = {plan.documents[x].kind for x in owner.documents}
    controls = load_documents(folder / "controls.jsonl") if (folder / "controls.jsonl").is_file() else []
    controls = sorted(controls, key=lambda document: document.kind not in kinds)[:AUDITED]
    audit = audit_takedown(
        model,
        tokenizer,
        owner.ids,
        plan.erased[main],
        (documents[:AUDITED], ids[:AUDITED]),
        theirs,
        controls,
        record,
    )
    for name, value in named_sinks(model).items():
        written = sinks.tensors[name]
        if not torch.equal(value.detach().cpu().to(written.dtype), written):
            raise CheckpointError(
                f"{name} of the erased model and of the file to be written differ; nothing was changed"
            )
    if repair.passes and plan.collateral:
        repair.run(model, tokenizer, [x for x in others if x[0] in plan.collateral], plan.erased[main])
        audit["after"]["others, repaired"] = figures_of(model, tokenizer, *theirs)
        learned = {name: value.detach().cpu() for name, value in named_sinks(model).items()}
        sinks.tensors.update({name: value.to(sinks.tensors[name].dtype) for name, value in learned.items()})
        same = _kept_blocks(main, plan, before)
    return audit, same


def _stage(plan: Takedown, files: Path) -> None:
    """Write the new versions of files, markers with the hashes of others after those."""
    for fate in sorted(plan.fates.files, key=lambda fate: Path(fate.path).name == COMPLETE):
        if fate.write is not None:
            fate.write(files / fate.path)
