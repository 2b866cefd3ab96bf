"""Whether the training in a folder has come to its end, so that nothing it still writes brings an owner back."""

from __future__ import annotations

import logging
from pathlib import Path

from memsinks.checks import is_int
from memsinks.errors import CheckpointError
from memsinks.files import read_json
from memsinks.runs.folder import FACTS, RECIPE, RunFolder

logger = logging.getLogger(__name__)


def require_finished(folder: Path) -> None:
    """Refuse a run of `memsinks train` that is not finished; of one's own training say where its last checkpoint is.

    A run is finished when its run.json says how long it took, which is written last. A folder of the Trainer never says that it
    is: its last checkpoint may lie before the last step because training stopped early, or because it goes on.

    Raises:
        CheckpointError: a run that was interrupted, or is still trained by another process.
    """
    if (folder / RECIPE).is_file():
        if not RunFolder(folder).finished:
            raise CheckpointError(
                f"{folder} is a run that is not finished ({FACTS} does not say how long it took): what it still writes would "
                "hold the owner. Wait, if it is being trained; if it was interrupted, finish it (memsinks train RECIPE "
                "--resume), then take the owner out. Or remove the folder, and train again without the owner's texts"
            )
        return
    states = folder.glob("checkpoint-*/trainer_state.json")
    last = max(states, key=lambda x: (len(x.parent.name), x.parent.name), default=None)  # by number
    if last is None:
        return
    state = read_json(last, "restore it, or remove that checkpoint")
    step, total = (state.get(name, 0) if isinstance(state, dict) else 0 for name in ("global_step", "max_steps"))
    if is_int(step) and is_int(total) and step < total:
        logger.warning(
            "%s is of step %d of %d: if that training goes on, stop it and take the owner out again, for what it writes later "
            "holds the owner",
            last.parent,
            step,
            total,
        )
