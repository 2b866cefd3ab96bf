"""The version, readable without importing anything that takes time."""

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """Versions of memsinks, Python and `packages`, for results files."""
    import platform
    from importlib.metadata import version

    return {"memsinks": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
