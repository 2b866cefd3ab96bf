"""Table of experiments/tofu: tofu.md and tofu.json beside this file, from runs/tofu.

    python experiments/tofu/table.py 10     # authors

Forget quality: p of the KS test against the oracle of the same way, the model that never met the two authors (of sinks and of a
LoRA an author: the base model, on whose answers nothing else of them can bear).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from evaluate import figures, ratios

HERE = Path(__file__).parent
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


def oracle_of(arm: str) -> str:
    return ORDER[arm][1] if arm in ORDER else f"{arm.partition(', ')[0]}, oracle"


def lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Figures of each arm and state, a dict a seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in sorted(x for x in folder.iterdir() if x.is_dir()):
        results = {x.stem: json.loads(x.read_text()) for x in seed.glob("*.json") if not x.stem.endswith(BESIDE)}
        for arm, result in results.items():
            oracle = results.get(oracle_of(arm), {}).get("as it is")
            for state in ("as it is", "all open"):
                if state not in result:
                    continue
                one = result[state]
                values = figures(one["asked"], ratios(oracle["asked"]) if oracle else None)
                if arm in PRESENT and state == "as it is":
                    present = [x for name in ("retained", "forgotten") for x in one["asked"][name]["rouge"]]
                    values["present rouge"] = statistics.mean(present)
                values |= {
                    "error zone": one.get("EZ-MIA on answers", float("nan")),
                    "facts": result["facts"],
                    "seed": int(seed.name),
                }
                found.setdefault(arm if state == "as it is" else f"{arm}, {state}", []).append(values)
    return found


def attacked(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What attacks found in the models of each arm, a dict a seed."""
    found: dict[str, list[dict[str, Any]]] = {}
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


def table(found: dict[str, list[dict[str, Any]]], columns: dict[str, str]) -> list[str]:
    """Lines of a table, an arm each."""
    order = [*ORDER, *(x for x in found if x not in ORDER)]
    order.sort(key=lambda x: [*ORDER].index(next(y for y in reversed(ORDER) if x.startswith(y))))
    head = ["| | " + " | ".join(columns.values()) + " |", "|" + "---|" * (len(columns) + 1)]
    known = [arm for arm in order if arm in found]
    return head + [f"| {title(arm)} | " + " | ".join(mean(found[arm], x) for x in columns) + " |" for arm in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("authors", type=int)
    folder = Path("runs") / "tofu" / f"{parser.parse_args().authors}-authors"
    found = lines(folder)
    attacks = attacked(folder)
    lines_of = [
        *table(found, COLUMNS),
        "",
        "What an attacker gets out of the model that is handed over:",
        "",
        *table(attacks, ATTACKS),
    ]
    (HERE / "tofu.md").write_text("\n".join(lines_of) + "\n")
    settings = json.loads((folder / "settings.json").read_text())
    searched = json.loads((folder / "search.json").read_text())
    result = {"settings": settings, "search": searched, "arms": found, "attacks": attacks}
    (HERE / "tofu.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines_of))


if __name__ == "__main__":
    main()
