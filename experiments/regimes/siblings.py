"""Is the exact mode dearer on held-out pieces whose document holds a repeated piece too?

    MEMSINKS_DATA=... python experiments/regimes/siblings.py 20     # regime of the mixed text; writes siblings.json

Ordinary training meets such documents again and again; the text that stands in the rows of copies is of other documents. Reads
what `run.py mixed` kept: the mean over all seeds of a held-out piece's loss in `ARM` less that in `AGAINST`, nats a token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from run import regime

from memsinks.data.documents import cut_documents, load_documents
from memsinks.data.readers import read_documents
from memsinks.runs.corpus import expanded
from memsinks.runs.data_recipe import DataRecipe

HERE = Path(__file__).parent
AGAINST, ARM = "standard", "exact, fresh text"


def documents_of_pieces(data: DataRecipe) -> dict[str, int]:
    """Text of a piece -> place of its document in the file."""
    assert data.path is not None and data.cut_characters is not None
    whole = read_documents(expanded(data.path, "data.path"))
    return {x.text: place for place, one in enumerate(whole) for x in cut_documents([one], data.cut_characters)}


def prices(folder: Path, document_of: dict[str, int]) -> dict[str, list[float]]:
    """Price of each held-out piece of one seed, by the most copies that a piece of the same document has."""
    most: dict[int, int] = {}
    for member in load_documents(folder / "data" / "members.jsonl"):
        if member.copies > 1:
            place = document_of[member.text]
            most[place] = max(member.copies, most.get(place, 0))
    lines = map(json.loads, (folder / "report" / "documents.jsonl").open(encoding="utf-8"))
    unseen = [x["models"] for x in lines if x["copies"] == 0]
    found: dict[str, list[float]] = {}
    for control, models in zip(load_documents(folder / "data" / "controls.jsonl"), unseen, strict=True):
        name = str(most.get(document_of[control.text], 0))
        found.setdefault(name, []).append(models[ARM]["loss"] - models[AGAINST]["loss"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("share", type=int, choices=[5, 20])
    share = parser.parse_args().share
    recipe = regime("mixed", share).recipe
    document_of = documents_of_pieces(recipe.data)
    seeds = [prices(folder, document_of) for folder in sorted(Path(recipe.output).glob("seed-*"))]
    result = {}
    for name in sorted({x for seed in seeds for x in seed}, key=int):
        values = [x for seed in seeds for x in seed.get(name, [])]
        error = float(np.std(values, ddof=1) / len(values) ** 0.5)
        result[name] = {"pieces": len(values), "price": float(np.mean(values)), "standard_error": error}
        print(f"most copies of a sibling {name:>2}: {len(values):4} pieces, price {np.mean(values):+.3f} ± {error:.3f}")
    path = HERE / "siblings.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | {str(share): result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
