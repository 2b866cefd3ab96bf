"""Table of experiments/tofu: tofu.md and tofu.json beside this file, from runs/tofu.

    python experiments/tofu/table.py 10     # authors

Arms and seeds that stand in tofu.json and are not in runs/tofu stay as they are. Forget quality: p of the KS test against the
oracle of the same way, the model that never met the two authors (of sinks and of a LoRA an author: the base model, on whose
answers nothing else of them can bear).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from evaluate import figures, ratios

from memsinks.research.tofu import forget_quality

HERE = Path(__file__).parent
OUT = HERE / "tofu.json"
ORDER = {
    "base": ("base model", "base"),
    "full": ("full fine-tuning", "full, oracle"),
    "full, oracle": ("full, never met them (oracle)", "full, oracle"),
    "lora": ("one LoRA", "lora, oracle"),
    "lora, oracle": ("one LoRA, never met them (oracle)", "lora, oracle"),
    "lora-author": ("a LoRA an author", "base"),
    "lora-author, one left": ("a LoRA an author, theirs deleted", "base"),
    "ours": ("sinks an author", "base"),
    "ours, one left": ("sinks an author, theirs erased", "base"),
    "ours, router": ("sinks an author, opened by the router", "base"),
    "ours, router, one left": ("sinks an author, theirs erased, opened by the router", "base"),
}
COLUMNS = {
    "utility": "model utility",
    "retained rouge": "ROUGE-L, retained",
    "retained recited": "recited, retained",
    "present rouge": "ROUGE-L, all who are present",
    "forgotten rouge": "ROUGE-L, forgotten",
    "forgotten probability": "probability, forgotten",
    "forget quality": "forget quality (p)",
    "error zone": "EZ-MIA, AUC",
}

PRESENT = ("full", "lora", "lora-author", "ours", "ours, router")
"""Arms in which nobody has left, so that the questions about those who will leave are about present authors too."""
BESIDE = (".facts", ".attacks")
"""Files that stand beside an arm's results."""
ATTACKS = {
    "before": "answers of the other half, before (nats)",
    "relearned": "after 10 steps on one half",
    "rounded": "all, at 4 bits",
    "blimp": "BLiMP",
    "blimp open": "BLiMP, one author open",
    "base": "base bit for bit",
}
"""Of the model that is handed over, see attacks.py."""
ALL_OPEN = ", all open"
Found = dict[str, list[dict[str, Any]]]
"""Figures of each arm, a dict a seed."""


def oracle_of(arm: str) -> str:
    return ORDER[arm][1] if arm in ORDER else f"{arm.partition(', ')[0]}, oracle"


def lines(folder: Path) -> Found:
    """Figures of each arm and state in `folder`."""
    found: Found = {}
    for seed in sorted(x for x in folder.iterdir() if x.is_dir()):
        results = {x.stem: json.loads(x.read_text()) for x in seed.glob("*.json") if not x.stem.endswith(BESIDE)}
        for arm, result in results.items():
            for state in ("as it is", "all open"):
                if state not in result:
                    continue
                one = result[state]
                values: dict[str, Any] = figures(one["asked"])
                if arm in PRESENT and state == "as it is":
                    present = [x for name in ("retained", "forgotten") for x in one["asked"][name]["rouge"]]
                    values["present rouge"] = statistics.mean(present)
                values |= {
                    "error zone": one.get("EZ-MIA on answers", float("nan")),
                    "truth ratios": [round(x, 6) for x in ratios(one["asked"])],
                    "facts": result["facts"],
                    "seed": int(seed.name),
                }
                found.setdefault(arm if state == "as it is" else f"{arm}{ALL_OPEN}", []).append(values)
    return found


def joined(found: Found, before: Found) -> Found:
    """What was found, and of `before` the arms and seeds that were not."""
    arms = dict.fromkeys([*before, *found])
    kept = {arm: {x["seed"]: x for x in [*before.get(arm, []), *found.get(arm, [])]} for arm in arms}
    return {arm: [seeds[x] for x in sorted(seeds)] for arm, seeds in kept.items()}


def compare_with_oracles(found: Found) -> None:
    """Add forget quality where both the arm's and its oracle's truth ratios are at hand."""
    for arm, seeds in found.items():
        oracles = {x["seed"]: x for x in found.get(oracle_of(arm.removesuffix(ALL_OPEN)), [])}
        for values in seeds:
            oracle = oracles.get(values["seed"], {})
            if "truth ratios" in values and "truth ratios" in oracle:
                values["forget quality"] = forget_quality(values["truth ratios"], oracle["truth ratios"])


def attacked(folder: Path) -> Found:
    """What attacks found in the models of each arm."""
    found: Found = {}
    for path in sorted(folder.glob("*/*.attacks.json")):
        one = json.loads(path.read_text())
        before, after = one["loss, relearned"]
        values = {"before": before, "relearned": after, "rounded": one["loss at 4 bits"], "blimp": one["BLiMP"]}
        if "BLiMP, one author open" in one:
            values["blimp open"] = one["BLiMP, one author open"]
        values["base"] = one.get("is the base bit for bit", True)
        found.setdefault(path.name.removesuffix(".attacks.json"), []).append(values | {"seed": int(path.parent.name)})
    return found


def title(arm: str) -> str:
    if arm.endswith(ALL_OPEN):
        whole = arm.removesuffix(ALL_OPEN)
        return f"{title(whole)}, all {'who are left ' if whole.endswith('left') else ''}open"
    way, _, method = arm.partition(", ")
    return ORDER[arm][0] if arm in ORDER else f"{ORDER[way][0]}, {method}"


def mean(values: list[dict[str, Any]], name: str) -> str:
    known = [x[name] for x in values if name in x and x[name] == x[name]]
    if not known:
        return "-"
    if isinstance(known[0], bool):
        return "yes" if all(known) else "no"
    middle, half = statistics.mean(known), (max(known) - min(known)) / 2
    text = f"{middle:.1e}" if name == "forget quality" and 0 < middle < 0.01 else f"{middle:.2f}"
    return text if len(known) == 1 else f"{text} ± {half:.2f}"


def table(found: Found, columns: dict[str, str]) -> list[str]:
    """Lines of a table, an arm each."""
    order = [*ORDER, *(x for x in found if x not in ORDER)]
    order.sort(key=lambda x: [*ORDER].index(next(y for y in reversed(ORDER) if x.startswith(y))))
    head = ["| | " + " | ".join(columns.values()) + " |", "|" + "---|" * (len(columns) + 1)]
    known = [arm for arm in order if arm in found]
    return head + [f"| {title(arm)} | " + " | ".join(mean(found[arm], x) for x in columns) + " |" for arm in known]


def kept(path: Path, before: Any) -> Any:
    """What a search has found, or what stood in tofu.json."""
    return json.loads(path.read_text()) if path.is_file() else before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("authors", type=int)
    folder = Path("runs") / "tofu" / f"{parser.parse_args().authors}-authors"
    settings = json.loads((folder / "settings.json").read_text())
    before = {"settings": settings, "search": {}, "arms": {}, "attacks": {}}
    if OUT.is_file():
        before = json.loads(OUT.read_text())
    searched = kept(folder / "search.json", before["search"])
    if before["settings"] != settings:
        raise SystemExit(f"{OUT} was made with {before['settings']}, the runs with {settings}; move it away")
    unlearning = kept(folder / "unlearning.json", before.get("unlearning", {}))
    found, attacks = joined(lines(folder), before["arms"]), joined(attacked(folder), before["attacks"])
    compare_with_oracles(found)
    lines_of = [
        *table(found, COLUMNS),
        "",
        "What an attacker gets out of the model that is handed over:",
        "",
        *table(attacks, ATTACKS),
    ]
    (HERE / "tofu.md").write_text("\n".join(lines_of) + "\n")
    result = {"settings": settings, "search": searched, "unlearning": unlearning, "arms": found, "attacks": attacks}
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines_of))


if __name__ == "__main__":
    main()
