"""The files below a folder of texts: all of them, or a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from memsinks.errors import DataError


def names_below(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, as paths in it, sorted; links are followed, but to what is read anyway.

    Raises:
        DataError: a folder that cannot be listed or is a link to one that it lies in; a link to nothing.
    """
    real = {file.relative_to(folder): file.resolve() for file in _below(folder, ())}
    plain = {name for name, file in real.items() if file == folder.resolve() / name}  # no link leads there
    known = {real[name] for name in plain}
    return sorted((name for name, file in real.items() if name in plain or file not in known), key=Path.as_posix)


def _below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """See `names_below`; `above` are the folders that this one lies in, links resolved."""
    try:
        above = (*above, folder.resolve())
        if above[-1] in above[:-1]:
            raise DataError(f"{folder} is a link to a folder that it lies in; remove the link")
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from _below(path, above)
            elif path.is_file():
                yield path
            elif path.is_symlink():
                raise DataError(f"{path} is a link to nothing; restore what it leads to, or remove it")
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error}; make it readable, or move it away") from None
