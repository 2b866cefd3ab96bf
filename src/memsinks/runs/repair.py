"""Repairing what a take-down of hashed blocks costs others: the erased blocks learn the texts of those who stay.

Nothing but the erased blocks learns, so whoever opens none of them keeps every bit, and nothing of the owner comes back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks.checks import int_at_least
from memsinks.data.chat import encode_documents
from memsinks.data.documents import Document
from memsinks.data.packing import pack
from memsinks.data.tokens import pad_token
from memsinks.errors import ConfigError, refuse
from memsinks.removal.erase import Erased, together
from memsinks.runs.recipe import Recipe, read_recipe
from memsinks.training.last import sinks_last

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repair:
    """What is repaired with.

    Args:
        passes: times each text is met; 0 = no repair.
        recipe: of the run, by which its sinks learned; None = there is none.
    """

    passes: int
    recipe: Recipe | None

    @classmethod
    def of(cls, run: Path, passes: int) -> Repair:
        """The repair of a run.

        Raises:
            ConfigError: `passes` is no number of passes, or the folder does not say how its sinks learned.
        """
        refuse(int_at_least("repair_passes", passes, 0), "cannot repair")
        recipe = read_recipe(run / "recipe.yaml") if passes and (run / "recipe.yaml").is_file() else None
        found = cls(passes, recipe)
        if recipe is None:
            found.refuse(f"there is no recipe.yaml in {run}")
        return found

    def refuse(self, why: str) -> None:
        """ConfigError if a repair is asked for."""
        if self.passes:
            raise ConfigError(
                f"{why}, so others cannot be repaired; take down without, and call memsinks.sinks_last(model, rows, "
                "lr=..., only=erased.blocks) yourself"
            )

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        others: Sequence[tuple[int, Document]],
        erased: Sequence[Erased],
    ) -> None:
        """Train the erased blocks on the texts of others who open them, in place.

        Args:
            model: from which the owner was erased.
            others: (document id, document), those who lost blocks.
        """
        assert self.recipe is not None
        settings = self.recipe.training
        texts = list({(one, document.text): (one, document) for one, document in others}.values())
        tokens, targets = encode_documents(tokenizer, [document for _, document in texts])
        rows = pack(
            tokens,
            np.array([one for one, _ in texts], np.int64),
            np.ones(len(texts), np.int64),
            targets=targets,
            length=settings.length,
            pad_id=pad_token(tokenizer),
            one_document_per_row=True,
            long=self.recipe.data.long,
        )
        result = sinks_last(
            model,
            rows,
            lr=settings.lr * settings.sink_lr_factor,
            passes=self.passes,
            batch_rows=settings.batch_rows,
            micro_rows=settings.micro_rows,
            max_norm=settings.max_grad_norm,
            only=together(erased),
            seed=settings.seed,
        )
        logger.info("repaired: %s", result)
