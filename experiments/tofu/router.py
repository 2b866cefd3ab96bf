"""Does the router find the author? TOFU's 200 authors; questions in other words, about nobody of them, about authors who left.

MEMSINKS_DATA=... python experiments/tofu/router.py     # writes router.json beside this file; seconds
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from data import read

import memsinks as ms
from memsinks._version import versions
from memsinks.data.router import THRESHOLD

THRESHOLDS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3)
LEAVE = 180
"""Authors from this on leave: those of forget10."""


def main() -> None:
    tofu = read(200, 400)
    author_of = {x.question: x.author for x in tofu.learned}
    folder = Path(os.environ["MEMSINKS_DATA"]) / "tofu"
    lines = [json.loads(line) for name in ("forget10", "retain") for line in (folder / f"{name}_perturbed.json").open()]
    asked = [(x["paraphrased_question"], author_of[x["question"]]) for x in lines if x["question"] in author_of]
    ids = {author: ms.document_id(f"author-{author}", by="source") for author in tofu.authors}
    right = np.array([ids[author] for _, author in asked])
    result: dict[str, object] = {
        "questions in other words": len(asked),
        "of nobody": len(tofu.real + tofu.world),
        "default": THRESHOLD,
    }
    for name, texts in (
        ("questions and answers", [f"{x.question} {x.answer}" for x in tofu.learned]),
        ("answers alone", [x.answer for x in tofu.learned]),
    ):
        documents = [
            ms.Document(text, source=f"author-{x.author}") for text, x in zip(texts, tofu.learned, strict=True)
        ]
        router = ms.Router.fit(documents)
        nearest, near = router.similarities([question for question, _ in asked])
        _, others = router.similarities([x.question for x in tofu.real + tofu.world])
        left = ms.Router.fit([x for x, pair in zip(documents, tofu.learned, strict=True) if pair.author < LEAVE])
        _, gone = left.similarities([x.question for x in tofu.learned if x.author >= LEAVE])
        result[f"router of {name}"] = {
            str(threshold): {
                "right": float(((nearest == right) & (near >= threshold)).mean()),
                "another's": float(((nearest != right) & (near >= threshold)).mean()),
                "of nobody, opened": float((others >= threshold).mean()),
                "of who left, another's": float((gone >= threshold).mean()),
            }
            for threshold in THRESHOLDS
        }
    result["versions"] = versions("scikit-learn")
    (Path(__file__).parent / "router.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
