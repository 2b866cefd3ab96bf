"""What is found of edited copies of real text, and what is merged that should not be.

    MEMSINKS_DATA=... python experiments/near-copies/table.py     # writes found.json and found.md beside this file; minutes

TinyStories, and web text with Wikipedia, Stack Exchange, patents and grant reports (`background_open`): the first `DOCUMENTS` of
each, and edited copies of `EDITED` of them, in which each word is replaced with the given probability by a word of that corpus.
*Found*: edited copies in the cluster of their original. *Merged*: pairs of documents in one cluster that are not copies of one
document, of all documents; a number per setting and corpus, for the originals are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections import Counter
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any

from memsinks._version import versions
from memsinks.data.clusters import NearCopies
from memsinks.data.near_copies import cluster_documents
from memsinks.data.readers import read_documents

HERE = Path(__file__).parent
DOCUMENTS, EDITED = 4000, 500
SHARES = (0.05, 0.1, 0.3)
TEXTS = {"TinyStories": "tinystories.jsonl.zst", "web and reference": "background_open.jsonl.zst"}
SETTINGS = {
    "default: 5 words, 0.3": NearCopies(),
    "5 words, 0.5": NearCopies(threshold=0.5),
    "5 words, 0.8, 14 bands of 8": NearCopies(threshold=0.8, bands=14, rows=8),
    "3 words, 0.2": NearCopies(size=3, threshold=0.2, bands=128),
    "default, boilerplate kept": NearCopies(boilerplate=10**9),
}


def edited(text: str, words: list[str], share: float, seed: str) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(words) if rng.random() < share else word for word in text.split(" "))


def measured(texts: list[str], share: float, settings: NearCopies, edits: int) -> dict[str, Any]:
    words = sorted({word for text in texts[:1000] for word in text.split(" ")})
    copies = [edited(text, words, share, f"{share} {n}") for n, text in enumerate(texts[:edits])]
    names = [x.cluster for x in cluster_documents([*texts, *copies], settings)]
    of = [*range(len(texts)), *range(edits)]
    together = Counter(names)
    same = Counter(zip(names, of, strict=True))
    merged = sum(comb(x, 2) for x in together.values()) - sum(comb(x, 2) for x in same.values())
    found = sum(names[n] == names[len(texts) + n] for n in range(edits))
    return {"found": found / edits, "merged": merged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    edits = EDITED * arguments.documents // DOCUMENTS
    result: dict[str, Any] = {}
    lines = [
        f"| text | setting | {' | '.join(f'{x:.0%} edited: found' for x in SHARES)} | merged |",
        "|---" * (len(SHARES) + 3) + "|",
    ]
    for name, file in TEXTS.items():
        texts = [x.text for x in islice(read_documents(Path(os.environ["MEMSINKS_DATA"]) / file), arguments.documents)]
        for label, settings in SETTINGS.items():
            own = {str(share): measured(texts, share, settings, edits) for share in SHARES}
            result[f"{name}, {label}"] = own
            cells = " | ".join(f"{x['found']:.1%}" for x in own.values())
            lines.append(
                f"| {name} | {label} | {cells} | {', '.join(sorted({str(x['merged']) for x in own.values()}))} |"
            )
            print(lines[-1], flush=True)
    facts = {
        "documents": arguments.documents,
        "edited": edits,
        "versions": versions("rensa", "numpy"),
        "results": result,
    }
    (arguments.out / "found.json").write_text(json.dumps(facts, indent=1) + "\n")
    (arguments.out / "found.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
