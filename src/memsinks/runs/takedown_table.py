"""A take-down in lines of text: who, what else there is, what happens to each file, before and after."""

from __future__ import annotations

from collections import Counter

from memsinks.runs.takedown_result import Takedown

MOST_SHOWN = 10
"""Copies and files of a kind that are listed one by one."""


def format_takedown(done: Takedown) -> str:
    """The take-down for a terminal; of one that is planned, what would happen."""
    owner = done.owner
    lines = [f"{owner.by} {owner.name}: {len(owner.documents)} documents, ids {', '.join(map(str, owner.ids[:5]))}"]
    lines += _copies(done)
    for checkpoint, erased in done.erased.items():
        lines += [f"{checkpoint}: {one}" for one in erased] or [
            f"{checkpoint}: taken out before, or the sinks of others alone"
        ]
    worst = max(done.collateral.values(), default=0.0)
    lines.append(
        f"collateral: {len(done.collateral)} other documents lose up to {worst:.0%} of their sink blocks"
        if done.collateral
        else "collateral: none, no block is anybody else's"
    )
    lines += ["", *_files(done)]
    lines += [f"elsewhere: {folder}: {what}" for folder, what in done.elsewhere.items()]
    if done.audit:
        lines += ["", *_audit(done)]
    if done.same_blocks:
        lines.append(f"{done.same_blocks:,} sink blocks of others and all shared weights keep every bit")
    lines.append(
        "nothing was changed (dry run)"
        if done.record is None
        else f"record: {done.record}  (memsinks verify {done.record} --run {done.record.parent.parent})"
    )
    return "\n".join(lines)


def _copies(done: Takedown) -> list[str]:
    copies = done.owner.copies
    if not copies:
        return ["no copies of the texts among the documents of others"]
    lines = [f"{len(copies)} copies among the documents of others (taken out too with --copies):"]
    for copy in copies[:MOST_SHOWN]:
        document = done.documents[copy.index]
        lines.append(f"  document {copy.index}, key {document.key}: {copy.kind}, {copy.differences}")
    return lines + ([f"  and {len(copies) - MOST_SHOWN} more"] if len(copies) > MOST_SHOWN else [])


def _files(done: Takedown) -> list[str]:
    lines = []
    for fate in ("rewritten", "deleted", "untouched"):
        chosen = [x for x in done.fates.files if x.fate == fate]
        if not chosen:
            continue
        lines.append(f"{fate}: {len(chosen)} files")
        if fate != "untouched" or len(chosen) <= MOST_SHOWN:
            lines += [f"  {x.path}  ({x.why})" for x in chosen]
        else:
            lines += [f"  {x.path}  ({x.why})" for x in chosen if x.look]
            rest = Counter(x.why for x in chosen if not x.look)
            lines += [f"  {count} x {why}" for why, count in rest.most_common()]
    return lines


def _audit(done: Takedown) -> list[str]:
    lines = [
        f"{'':28}{'loss (nats)':>22}{'recited':>20}",
        f"{'':28}{'before':>11}{'after':>11}{'before':>10}{'after':>10}",
    ]
    for name, before in done.audit["before"].items():
        after = done.audit["after"].get(name)
        cells = [f"{before['loss']:.3f}", "-" if after is None else f"{after['loss']:.3f}"]
        cells += [f"{before['recited']:.0%}", "-" if after is None else f"{after['recited']:.0%}"]
        lines.append(f"{name:28}{cells[0]:>11}{cells[1]:>11}{cells[2]:>10}{cells[3]:>10}")
    more = {name: x for name, x in done.audit["after"].items() if name not in done.audit["before"]}
    for name, x in (more | {"owner, placebo blocks closed": done.audit["placebo"]["owner"]}).items():
        loss, recited = f"{x['loss']:.3f}", f"{x['recited']:.0%}"
        lines.append(f"{name:28}{'':>11}{loss:>11}{'':>10}{recited:>10}")
    return lines
