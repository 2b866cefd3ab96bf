"""Train one arm of a recipe and audit it, in one command, because its checkpoint is too large to be fetched.

    memsinks prepare recipes/paper/tinystories-344m.yaml --seeds 0        # where there is a network
    PYTHONPATH=src python benchmarks/gpu/arm.py recipes/paper/tinystories-344m.yaml ours --out FOLDER

The tokens lie in the recipe's output, ``seed-N/data``, where `memsinks prepare` put them with the same --set and --scale.
FOLDER gets run.json (loss curve, speed, memory) and in report/ the audit: report.html, audit.json, documents.jsonl with the
loss of every document, pictures. Arms that this machine still holds from earlier commands are audited beside it, in their roles.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from memsinks.auditing.audit import audit
from memsinks.auditing.measure import AuditSettings
from memsinks.auditing.result import Audit
from memsinks.auditing.subjects import Subject
from memsinks.research.compare.arm import RUN, Arm
from memsinks.research.compare.compare import train_arm
from memsinks.research.compare.comparison import Comparison, read_comparison
from memsinks.research.compare.seed_audit import audited_corpus
from memsinks.runs.shrink import parse_scale


def subject(comparison: Comparison, arm: Arm, seed: int) -> Subject:
    state = "closed" if arm.training.sinks else None
    return Subject(comparison.folder(arm, seed) / "model", state, arm.name)


def audit_arm(comparison: Comparison, arm: Arm, seed: int, out: Path) -> Audit:
    """The audit of one arm, beside the arms that are there already."""
    folder = comparison.folder(arm, seed)
    documents, controls, ids = audited_corpus(comparison.recipe, folder)
    there = {x.name: x for x in comparison.arms if x.name != arm.name and comparison.finished(x, seed) is not None}
    roles = {role: name for role, name in comparison.roles.items() if role != "audited" and name in there}
    others = [subject(comparison, x, seed) for name, x in there.items() if name not in roles.values()]
    return audit(
        subject(comparison, arm, seed), documents, controls, others=others, document_ids=ids, out=out,
        settings=AuditSettings(collateral=0, end=False, seed=seed),
        **{role: subject(comparison, there[name], seed) for role, name in roles.items()},
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="what comes back")
    parser.add_argument("--scale")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(argv)
    changes = dict(text.split("=", 1) for text in given.set)
    comparison = read_comparison(given.recipe, changes, parse_scale(given.scale) if given.scale else None)
    arm = next((arm for arm in comparison.arms if arm.name == given.arm), None)
    if arm is None:
        parser.error(f"{given.recipe} has no arm {given.arm!r}, only {', '.join(arm.name for arm in comparison.arms)}")
    start = time.perf_counter()
    if comparison.finished(arm, given.seed) is None:
        train_arm(comparison, arm, given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(comparison.folder(arm, given.seed) / RUN, given.out / RUN)
    print(f"trained after {time.perf_counter() - start:.0f} s", flush=True)
    print(audit_arm(comparison, arm, given.seed, given.out / "report"))
    facts = json.loads((given.out / RUN).read_text())
    print(f"{arm.name}: {facts['tokens_per_second']:,} tokens/s, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
