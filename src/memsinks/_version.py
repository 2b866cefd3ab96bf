"""The version, readable without importing torch."""

import platform
from importlib.metadata import version

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """Versions of memsinks, Python and `packages`, for results files."""
    return {"memsinks": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
