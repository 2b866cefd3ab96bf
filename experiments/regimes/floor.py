"""How low can the loss of a recited text be, if the shared weights may not move?

    MEMSINKS_DATA=... OMP_NUM_THREADS=2 python experiments/regimes/floor.py --bases 5 wikitext2     # floor.json; minutes

Sinks write into the residual stream alone. What comes out of it goes through the final RMSNorm, which fixes its length, and the
output embedding, which is a shared weight: so no sink can make a token more likely than the best vector of that length does. Of
each token that vector is sought by gradient descent, from the token's own embedding on; the *floor* is the mean of the losses
that are left over the tokens of a text, and over the repeated texts, nats. Models and texts: those of last.py, first seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from last import BASES, trained
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from memsinks._version import versions
from memsinks.batch import NO_SINKS

HERE = Path(__file__).parent
STEPS = 1000


def floors(model: Any) -> Tensor:
    """The least loss of each token that any last hidden state gives, float32 [vocabulary], nats."""
    embedding, gain = model.lm_head.weight.detach(), model.model.norm.weight.detach()
    wanted = torch.arange(len(embedding))
    state = embedding.clone().requires_grad_()
    optimizer = torch.optim.Adam([state], lr=0.02)

    def losses() -> Tensor:
        logits = normalize(state) * embedding.shape[1] ** 0.5 * gain @ embedding.T
        return cross_entropy(logits, wanted, reduction="none")

    for _ in range(STEPS):
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()
    return losses().detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["5", "wikitext2"], choices=list(BASES))
    found = {}
    for base in parser.parse_args().bases:
        model, texts, _, _ = trained(base, 0)
        least = floors(model)
        rows = [texts[index] for index in range(len(texts))]
        tokens = [row["input_ids"][row["document_ids"] != NO_SINKS][1:] for row in rows]
        floor = torch.stack([least[x].mean() for x in tokens]).mean()
        found[base] = {"floor": round(float(floor), 3), "texts": len(tokens)}
        print(base, found[base], flush=True)
    facts = {"steps": STEPS, "bases": found, "versions": versions("torch", "transformers")}
    (HERE / "floor.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
