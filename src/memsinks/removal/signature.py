"""The signature of a record, by a local elliptic-curve key, as the OpenSSF Model Signing specification has it.

The package ``model-signing`` makes and checks it (a Sigstore bundle around an in-toto statement of the files' hashes); anyone
can check it without us: ``model_signing verify key --signature RECORD/record.sig --public_key FILE --ignore_unsigned_files
RECORD``. Nothing is asked of the network.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from memsinks.errors import ConfigError
from memsinks.files import file_hash


def load_signer(key: str | os.PathLike[str], password: bytes | None = None) -> Any:
    """What signs with a private key, a PEM file; it is read now, so that nothing is done in vain.

    Raises:
        ConfigError: the package is missing; the file is, or holds no private key of a curve P-256, P-384 or P-521, or the
            password is not that of the key.
    """
    config = _config("signing", "to sign a record")
    return _keyed(key, "private", lambda: config.use_elliptic_key_signer(private_key=key, password=password))


def load_verifier(public_key: str | os.PathLike[str]) -> Any:
    """What checks signatures with a public key, a PEM file.

    Raises:
        ConfigError: as `load_signer`.
    """
    config = _config("verifying", "to check a signature")
    return _keyed(public_key, "public", lambda: config.use_elliptic_key_verifier(public_key=public_key))


def _config(module: str, why: str) -> Any:
    try:
        return import_module(f"model_signing.{module}").Config()
    except ImportError as error:
        raise ConfigError(
            f"the package model-signing is needed {why} and cannot be imported ({error}); install memsinks[record]"
        ) from None


def _keyed(path: str | os.PathLike[str], kind: str, load: Any) -> Any:
    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path}; give the {kind} key, a PEM file")
    try:
        return load()
    except (
        OSError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # what `cryptography` raises, by the kind of fault
        wanted = "of a curve P-256, P-384 or P-521, PEM, with its password if it has one"
        raise ConfigError(f"{path} is no {kind} key that can be used ({error}); give one {wanted}") from error


def sign(signer: Any, folder: Path, names: Iterable[str], signature: Path) -> None:
    """Sign files of a folder, and nothing else that lies there."""
    with _alone(folder, names) as copy:
        signer.sign(copy, signature)


def fault(verifier: Any, folder: Path, names: Iterable[str], signature: Path) -> str:
    """Why a signature is not one of these files by this key; "" where it is."""
    wanted = sorted(names)
    try:
        payload = json.loads(base64.b64decode(json.loads(signature.read_bytes())["dsseEnvelope"]["payload"]))
        signed = {x["name"]: x["digest"] for x in payload["predicate"]["resources"]}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{signature.name} is damaged"
    if sorted(signed) != wanted:
        return f"{signature.name} signs other files: {', '.join(sorted(map(str, signed)))[:80] or 'none'}"
    try:
        with _alone(folder, wanted) as copy:
            verifier.verify(copy, signature)
    except Exception as error:  # the packages below raise a dozen unrelated types for bytes that are not theirs
        if "Key mismatch" in str(error):
            return "signed with another key"
        if "Signature mismatch" in str(error):
            return (
                f"the signature is not of these files: {', '.join(_changed(folder, signed))} was changed after signing"
            )
        return f"{signature.name} is no valid signature of this key ({type(error).__name__})"
    return ""


def _changed(folder: Path, signed: dict[str, str]) -> list[str]:
    return [name for name, digest in signed.items() if file_hash(folder / name) != digest]


@contextmanager
def _alone(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder with copies of these files alone: the signature says what the folder is called, and covers all of it."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "record"
        copy.mkdir()
        for name in names:
            shutil.copyfile(folder / name, copy / name)
        yield copy
