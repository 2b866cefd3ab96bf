"""What does removal cost, and what do attacks find, where 5, 20 or 60% of the rows are repeats?

    MEMSINKS_DATA=... python experiments/regimes/run.py tinystories --regimes 5 20 60 --seeds 0 1 2   # train, then audit
    python experiments/regimes/table.py tinystories                                                   # table and picture

Arms, data and steps: recipes/regimes.yaml, which holds the first text and regime; what the others change is
in `REGIMES`. Finished runs are kept in runs/regimes and not made again, nor is what their audits have scored. The arms of
`EVERY_SEED` run with every seed, the others with the first.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from memsinks.research.compare.compare import compare
from memsinks.research.compare.comparison import Comparison, read_comparison

HERE = Path(__file__).parent
RECIPE = HERE.parent.parent / "recipes" / "regimes.yaml"
MIXED = {"data.path": "$MEMSINKS_DATA/background_open.jsonl.zst", "data.cut_characters": "300"}
REGIMES: dict[str, dict[int, dict[str, str]]] = {
    "tinystories": {
        5: {},
        20: {"data.limit": "5704", "data.fresh": "1320", "data.repeat": "{documents: 48, copies: [4, 16, 64]}"},
        60: {"data.limit": "3274", "data.fresh": "3800", "data.repeat": "{documents: 138, copies: [4, 16, 64]}"},
    },
    "mixed": {
        5: MIXED | {"data.limit": "12600", "data.fresh": "600", "data.repeat": "{documents: 64, copies: [4, 16]}"},
        20: MIXED
        | {"data.limit": "10600", "data.fresh": "2640", "data.repeat": "{documents: 96, copies: [4, 16, 64]}"},
    },
    "mixed-twice": {
        20: MIXED
        | {"data.limit": "21200", "data.fresh": "5280", "data.repeat": "{documents: 192, copies: [4, 16, 64]}"}
        | {"roles": '{audited: "exact, fresh text", against: standard, twin: twin, seen_once: "dedup, fresh text"}'},
    },
}
"""Text, share of repeats in percent -> what changes in the recipe; rows and steps of a text stay. Mixed: pieces of Wikipedia,
Stack Exchange, US patents, NIH abstracts and Common Crawl, in the order of that file; 400 steps leave a model on the plateau of
the first steps, so 786; *twice*: 1,611 steps."""
PRICE = {"roles": '{audited: "dedup, fresh text", against: standard}'}
"""For the price of the exact mode alone: its closed model."""
EVERY_SEED = ("standard", "twin", "dedup", "exact, fresh text", "decay", "decay 1, until 0.3")


def regime(text: str, share: int, price: bool = False) -> Comparison:
    """The comparison of one regime, or of the price alone."""
    changes = REGIMES[text][share] | {"output": f"runs/regimes/{text}-{share}"} | (PRICE if price else {})
    return read_comparison(RECIPE, changes)


def run(comparison: Comparison, seeds: list[int], asked: list[str] | None, attacks: str) -> None:
    """Train and audit, a seed after the other."""
    for seed in seeds:
        every = seed != comparison.seeds[0]
        arms = asked or (EVERY_SEED if every else [arm.name for arm in comparison.arms])
        compare(comparison, arms=arms, seeds=[seed], attacks=attacks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", choices=list(REGIMES))
    parser.add_argument("--regimes", nargs="+", type=int, choices=[5, 20, 60], help="default: all of the text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="only these, with every seed")
    parser.add_argument("--price", action="store_true", help='audit "dedup, fresh text" against standard alone')
    parser.add_argument("--attacks", choices=["forward", "all"], default="all")
    arguments = parser.parse_args()
    regimes = arguments.regimes or list(REGIMES[arguments.text])
    if unknown := set(regimes) - set(REGIMES[arguments.text]):
        parser.error(f"{arguments.text} has the regimes {list(REGIMES[arguments.text])}, got {sorted(unknown)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    for share in regimes:
        run(regime(arguments.text, share, arguments.price), arguments.seeds, arguments.arms, arguments.attacks)


if __name__ == "__main__":
    main()
