"""The error types of the library, and `refuse`, which raises one for everything that is wrong at once."""

from __future__ import annotations


class MemsinksError(Exception):
    """Base of all errors raised on purpose by this library."""


class ConfigError(MemsinksError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(MemsinksError, ValueError):
    """Documents, ids, exposures or rows are not what is needed."""


class ArchitectureError(MemsinksError, TypeError):
    """The model cannot carry sinks, or not in the state it is in."""


class CheckpointError(MemsinksError, OSError):
    """A checkpoint is missing, damaged or does not belong to this model."""


def refuse(problems: list[str], what: str, error: type[MemsinksError] = ConfigError) -> None:
    """Raise one `error` that lists all `problems`; do nothing when there are none."""
    if problems:
        raise error(f"{what}: " + ("; ".join(problems)))
