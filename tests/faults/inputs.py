"""Generated inputs for all that reads files: near-valid ones and nonsense, and only errors of ours.

Each reader has a valid file. Its structure is changed (values of other types, keys dropped and added, extreme numbers, odd
text, deep nesting), then in half of the cases its bytes (flipped, cut, doubled, a BOM, CRLF, NULs); one in twenty is nonsense.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import yaml
import zstandard
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import memsinks as ms
from faults.commands import KEY, run
from faults.damage import SCENES
from memsinks.data.clusters_elsewhere import read_clusters
from memsinks.data.documents import load_documents
from memsinks.data.router import COUNTS, Router
from memsinks.data.shards import read_record
from memsinks.data.stored import StoredCorpus
from memsinks.data.tokens import load_tokenizer
from memsinks.errors import MemsinksError
from memsinks.files import file_hash
from memsinks.removal.erase_files import SinksFile
from memsinks.removal.export import whose_sinks
from memsinks.removal.tombstone import find_tombstoned, read_tombstone
from memsinks.research.compare.comparison import read_comparison
from memsinks.research.compare.results import data_sources, reported, reported_run
from memsinks.runs.artifacts import Wanted, fates_of, sinks_below
from memsinks.runs.corpus import source_hashes
from memsinks.runs.folder import RunFolder
from memsinks.runs.owners import read_members
from memsinks.runs.recipe import read_recipe
from memsinks.runs.staging import finish
from memsinks.runs.text_search import His
from memsinks.sinks.checkpoint import describe, load_config
from memsinks.sinks.owner_files import read_owners
from memsinks.sinks.storage import check_files, read_settings
from memsinks.training.checkpoint import Checkpoint, last_checkpoint
from memsinks.training.complete import MARKER, mark_complete, what_is_missing
from memsinks.viewer.answers import ANSWERS
from memsinks.viewer.view import View, open_view

RECIPES = Path(__file__).parents[2] / "recipes"
SECONDS = 5
"""After which an input counts as a hang."""

# Values

TEXTS = st.sampled_from(
    ["", " ", "\0", "\ud800", "a\udfffb", "é", "e\u0301", "ﷺ" * 9, "\u202e", "\ufeff", "../../etc/passwd", "/etc/passwd",
     "-1", "1e999", "NaN", "null", "~", "$HOME", "$NOWHERE/x", "%s{}", "\r\n", "x" * 5000, "🏳️‍🌈", "C:\\x", "nul\0l", "."]
)  # fmt: skip
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 0.5, -0.0, 1e308, float("inf"),
     float("-inf"), float("nan")]
)  # fmt: skip
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.text(max_size=8))
JUNK = st.recursive(
    LEAVES,
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(TEXTS | st.text(max_size=4), x, max_size=3)),
    max_leaves=5,
)
DEEP = 3000


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within a value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which one to three places are changed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = list(_places(value))
        *path, last = [None, *draw(st.sampled_from(places))]
        holder: Any = value
        for key in path[1:]:
            holder = holder[key]
        if len(path) == 0:
            value = draw(JUNK)
            continue
        how = draw(st.sampled_from(["junk", "junk", "junk", "leaf", "drop", "add", "twice", "swap", "wrap"]))
        if how == "drop":
            del holder[last]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(JUNK)
        elif how == "twice" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif how == "swap":
            holder[last] = _swapped(holder[last])
        elif how == "wrap":
            holder[last] = [holder[last]]
        else:
            holder[last] = draw(LEAVES if how == "leaf" else JUNK)
    return value


def _swapped(value: Any) -> Any:
    """The value as another type that says the same."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return [value] if not value.isdecimal() else int(value)
    return list(value.items()) if isinstance(value, dict) else {str(n): x for n, x in enumerate(value)}


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes, changed in a few places."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "double", "bom", "crlf", "nul", "insert", "drop", "deep"]))
        if how == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "double":
            content = content + content[at:]
        elif how == "bom":
            content = draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\0\0\xfe\xff"])) + content
        elif how == "crlf":
            content = content.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8"])))
        elif how == "nul":
            content = content[:at] + b"\0" + content[at:]
        elif how == "insert":
            content = content[:at] + draw(st.binary(max_size=6)) + content[at:]
        elif how == "drop":
            content = content[:at] + content[at + draw(st.integers(1, 20)) :]
        elif how == "deep" and draw(st.integers(0, 9)) == 0:
            content = content[:at] + draw(st.sampled_from([b"[", b'{"a":', b"- ", b"("])) * DEEP + content[at:]
    return content


@st.composite
def contents(draw: st.DrawFn, valid: bytes, parsed: Any, dump: Callable[[Any], bytes] | None) -> bytes:
    """Contents for a reader whose valid file is given; `dump` writes what was `parsed` from it, None = there is no structure."""
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if dump is None or kind < 5:
        return draw(spoiled(valid))
    content = dump(draw(changed(parsed)))
    return draw(spoiled(content)) if kind < 9 else content


# Readers


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_lines(value: Any) -> bytes:
    return "".join(json.dumps(x) + "\n" for x in (value if isinstance(value, list) else [value])).encode()


def as_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


def _rows_of_parquet(content: bytes) -> list[dict[str, Any]]:
    return parquet.read_table(io.BytesIO(content)).to_pylist()


def as_parquet(value: Any) -> bytes:
    """A table, or lines where no table can be made of the value."""
    file = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(value), file)
    except Exception:  # pyarrow raises a dozen types for what is no table
        return as_lines(value)
    return file.getvalue()


def _header(content: bytes) -> Any:
    size = int.from_bytes(content[:8], "little")
    return {"header": json.loads(content[8 : 8 + size]), "body": content[8 + size :].hex()}


def as_safetensors(value: Any) -> bytes:
    """A file with a header and the bytes that follow it."""
    known = isinstance(value, dict)
    header = json.dumps(value.get("header") if known else value).encode()
    body = value.get("body") if known else ""
    try:
        rest = bytes.fromhex(body)
    except (TypeError, ValueError):
        rest = b""
    return len(header).to_bytes(8, "little") + header + rest


def _lines(content: bytes) -> list[Any]:
    return [json.loads(x) for x in content.decode().split("\n") if x]


@dataclass(frozen=True)
class Reader:
    """Something that reads a file.

    Args:
        path: of the file, in the folder of `make_places`. read: it, given that folder.
        parse, dump: what is changed in its structure; None = its bytes alone.
        costly: takes ten times as long as others, and gets a quarter of the inputs.
        mend: makes what else says how the file must be (a hash) agree with it.
    """

    name: str
    path: str
    read: Callable[[Path], Any]
    parse: Callable[[bytes], Any] | None = None
    dump: Callable[[Any], bytes] | None = None
    mend: Callable[[Path], None] | None = None
    costly: bool = False


FIELDS = {"key_field": "key", "source_field": "source", "copies_field": "copies", "isolation_field": "isolation",
          "cluster_field": "cluster", "carry": ["license"]}  # fmt: skip


def _documents(name: str, **more: Any) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for _ in ms.read_documents(folder / name, **more):
            pass

    return read


def _hash_again(folder: Path) -> None:
    path = folder / "run/model/sinks/sinks.json"
    stored = json.loads(path.read_text())
    stored["sha256"]["sinks/sinks.safetensors"] = file_hash(folder / "run/model/sinks/sinks.safetensors")
    path.write_text(json.dumps(stored))


def _sinks(folder: Path) -> None:
    SinksFile(folder / "run/model").erase([ms.document_id(KEY, "key")], "key-0")
    describe(folder / "run/model")


def _owners(folder: Path) -> None:
    saved = read_settings(folder / "alice")
    check_files(folder / "alice", saved)
    read_owners(folder / "alice", saved)


def _corpus(folder: Path) -> None:
    corpus = StoredCorpus(folder / "corpus")
    for tokens in corpus.tokenized().tokens:
        assert len(tokens)
    assert len(corpus.digest) and corpus.controls is not None and repr(corpus)


def _record(folder: Path) -> None:
    ms.verify_record(folder / "record", run=folder / "taken", public_key=folder / "key.pub")


def _resumed(folder: Path) -> None:
    run_folder = RunFolder(folder / "run")
    run_folder.open_again(read_recipe(folder / "now.yaml"))
    run_folder.require_corpus(json.loads((folder / "now.json").read_text()))


def _owners_of_a_run(folder: Path) -> None:
    documents, by, _ = read_members(folder / "run")
    ms.identify(documents, by)
    ms.find_copies(documents[0].text, documents)


def _metrics(folder: Path) -> None:
    RunFolder(folder / "metrics").cut_metrics(3)


def _bound(folder: Path) -> None:
    place = folder / "bound-now"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "bound", place)
    (place / "run.json").write_text("{}")
    finish(place)


def _tombstone(folder: Path) -> None:
    find_tombstoned(["one two three four five six seven"], read_tombstone(folder / "tombstone.json"))


def _fates(folder: Path) -> None:
    fates_of(
        folder / "run",
        Wanted([ms.document_id(KEY, "key")], "key-0", His(frozenset({"some text of his own"}))),
        sinks_below(folder / "run"),
    )


def _compared(folder: Path) -> None:
    comparison = read_comparison(folder / "compare.yaml", {"output": str(folder / "compare")})
    reported_run(comparison.arms[0], 0, reported(comparison)["runs"])
    data_sources(comparison)


def _viewed(view: list[View], name: str) -> Callable[[Path], None]:
    def answer(folder: Path) -> None:
        if not view:
            view.append(open_view(folder / "taken"))
        try:
            body = json.loads((folder / "question.json").read_bytes())
        except (ValueError, RecursionError):  # as the server does
            return
        if isinstance(body, dict):
            json.dumps(ANSWERS[name](view[0], body))

    return answer


NOTHING = {"source": None, "copies": 1, "isolation": None, "cluster": None, "license": None}
CHAT = NOTHING | {
    "messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "nobody"}],
    "key": "k3",
}
ROWS = [
    {"text": "one text of some words", "key": "k1", "source": "s1", "copies": 2, "isolation": "exact", "cluster": "c1",
     "license": "MIT"},
    {"text": "another\ntext", "key": 7, "source": None, "copies": 0, "isolation": None, "cluster": -1, "license": None},
    CHAT,
    NOTHING | {"prompt": "what", "completion": "that", "key": "k4"},
]  # fmt: skip
PAIRS = [{"id": "k1", "cluster": "a"}, {"id": "k2", "cluster": "a"}, {"id": "k3", "cluster": "-1"}]
OTHER_KEY = "record-8-002"
QUESTION = {"text": "a word", "document": 0, "given": 3, "name": f"key:{OTHER_KEY}", "id": str(ms.document_id(OTHER_KEY, "key")),
            "do": False, "copies": True,
            "collateral": 0.5, "repair": 0, "version": 0, "typed": OTHER_KEY}  # fmt: skip
MODEL = "run/model"


def readers() -> list[Reader]:
    """All readers; a new list, because one of them keeps what it has read."""
    view: list[View] = []
    return [
        Reader("documents .jsonl", "d.jsonl", _documents("d.jsonl", **FIELDS), _lines, as_lines),
        Reader("documents .jsonl.gz", "d.jsonl.gz", _documents("d.jsonl.gz", **FIELDS)),
        Reader("documents .jsonl.gz, whole", "d.jsonl.gz", _documents("d.jsonl.gz", **FIELDS),
               lambda x: _lines(gzip.decompress(x)), lambda x: gzip.compress(as_lines(x), 1)),
        Reader("documents .jsonl.zst", "d.jsonl.zst", _documents("d.jsonl.zst")),
        Reader("documents .parquet", "d.parquet", _documents("d.parquet", **FIELDS), _rows_of_parquet, as_parquet),
        Reader("documents .txt", "d.txt", _documents("d.txt", separator="---")),
        Reader("members.jsonl", "members.jsonl", lambda x: load_documents(x / "members.jsonl"), _lines, as_lines),
        Reader("members.jsonl of a run", "run/members.jsonl", _owners_of_a_run, _lines, as_lines),
        Reader("recipe.yaml of a run", "run/recipe.yaml", lambda x: (_resumed(x), _owners_of_a_run(x)),
               yaml.safe_load, as_yaml, costly=True),
        Reader("run.json", "run/run.json", _resumed, json.loads, as_json, costly=True),
        Reader("metrics.jsonl", "metrics/metrics.jsonl", _metrics, _lines, as_lines),
        Reader("recipe", "owners.yaml", lambda x: read_recipe(x / "owners.yaml"), yaml.safe_load, as_yaml),
        Reader("recipe, shrunk", "owners.yaml", lambda x: read_recipe(x / "owners.yaml", {"training.lr": "1e-3"}, Fraction(1, 4)),
               yaml.safe_load, as_yaml),
        Reader("comparison", "compare.yaml", lambda x: read_comparison(x / "compare.yaml"), yaml.safe_load, as_yaml, costly=True),
        Reader("clusters .csv", "c.csv", lambda x: read_clusters(x / "c.csv")),
        Reader("clusters .jsonl", "c.jsonl", lambda x: read_clusters(x / "c.jsonl"), _lines, as_lines),
        Reader("clusters .parquet", "c.parquet", lambda x: read_clusters(x / "c.parquet"), _rows_of_parquet, as_parquet),
        Reader("manifest of a corpus", "corpus/manifest.json", _corpus, json.loads, as_json),
        Reader("index of a shard", "corpus/shards/00000/index.npy", _corpus),
        Reader("record of a shard", "corpus/shards/00000/shard.json", lambda x: read_record(x / "corpus/shards/00000"),
               json.loads, as_json),
        Reader("sidecar of a shard", "corpus/shards/00000/documents.parquet", lambda x: list(StoredCorpus(x / "corpus")),
               _rows_of_parquet, as_parquet, costly=True),
        Reader("sinks.json", f"{MODEL}/sinks/sinks.json", _sinks, json.loads, as_json),
        Reader("sinks.safetensors", f"{MODEL}/sinks/sinks.safetensors", _sinks, _header, as_safetensors, _hash_again),
        Reader("sinks.json of owners", "alice/sinks/sinks.json", _owners, json.loads, as_json),
        Reader("config.json", f"{MODEL}/config.json", lambda x: load_config(x / MODEL), json.loads, as_json),
        Reader("tokenizer.json", f"{MODEL}/tokenizer.json", lambda x: load_tokenizer(x / MODEL), json.loads, as_json),
        Reader("marker of a checkpoint", "run/checkpoints/checkpoint-8/checkpoint.json",
               lambda x: last_checkpoint(x / "run/checkpoints"), json.loads, as_json),
        Reader("state of a checkpoint", "run/checkpoints/checkpoint-2/state.pt",
               lambda x: Checkpoint(x / "run/checkpoints/checkpoint-2", 2, {}).load()),
        Reader("marker of a Trainer's checkpoint", f"trainer/{MARKER}", lambda x: what_is_missing(x / "trainer"),
               json.loads, as_json),
        Reader("tombstone", "tombstone.json", _tombstone, json.loads, as_json),
        Reader("statement of a record", "record/statement.json", _record, json.loads, as_json, costly=True),
        Reader("signature of a record", "record/record.sig", _record, json.loads, as_json, costly=True),
        Reader("plan of a take-down", "bound/.takedown.bound/plan.json", _bound, json.loads, as_json, costly=True),
        Reader("memsinks.json of an export", "open/memsinks.json", lambda x: whose_sinks(x / "open"), json.loads, as_json),
        Reader("router.json", "router/router.json", lambda x: Router.load(x / "router"), json.loads, as_json),
        Reader("counts of a router", f"router/{COUNTS}", lambda x: Router.load(x / "router"), _header, as_safetensors),
        Reader("notes in a run", "run/notes.jsonl", _fates, _lines, as_lines, costly=True),
        Reader("audit.json in a run", "run/report/audit.json", _fates, json.loads, as_json, costly=True),
        Reader("compare.json", "compare/compare.json", _compared, json.loads, as_json, costly=True),
        *(Reader(f"question to the viewer: {name}", "question.json", _viewed(view, name), json.loads, as_json)
          for name in ("search", "begin", "named", "takedown")),
    ]  # fmt: skip


def shares(readers: Sequence[Reader], count: int) -> list[int]:
    """How many of all inputs each reader gets; their sum is `count` or a few more."""
    weights = [1 if x.costly else 4 for x in readers]
    return [-(-count * weight // sum(weights)) for weight in weights]


def make_places(base: Path, folder: Path) -> Path:
    """A valid file for each reader, from the folder that `make_base` made."""
    shutil.copytree(base, folder)
    for name, step in (("corpus", SCENES["prepare"]), ("alice", SCENES["sinks of owners"])):
        for asked in step.steps if name == "corpus" else step.steps[:-1]:
            assert run(folder, asked).code == 0, name
    (folder / "d.jsonl").write_bytes(as_lines(ROWS))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS)))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(as_lines([{"text": x} for x in "abc"])))
    (folder / "d.parquet").write_bytes(as_parquet([x for x in ROWS if "text" in x and x["key"] != 7]))
    (folder / "d.txt").write_text("one text---another\n---\na third", newline="")
    ms.write_documents(
        folder / "members.jsonl", [ms.Document("a b c", key="k", extra={"license": "MIT"}), ms.Document("d")]
    )
    (folder / "c.csv").write_text("id,cluster\n" + "".join(f"{x['id']},{x['cluster']}\n" for x in PAIRS))
    (folder / "c.jsonl").write_bytes(as_lines(PAIRS))
    (folder / "c.parquet").write_bytes(as_parquet(PAIRS))
    shutil.copy(RECIPES / "compare-tinystories.yaml", folder / "compare.yaml")
    shutil.copy(folder / "run/recipe.yaml", folder / "now.yaml")
    shutil.copy(folder / "run/run.json", folder / "now.json")
    for name in ("metrics", "trainer"):
        (folder / name).mkdir()
    shutil.copy(folder / "run/metrics.jsonl", folder / "metrics")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / "trainer" / name).write_text("{}")
    mark_complete(folder / "trainer")
    _taken_down(folder)
    members = load_documents(folder / "run/members.jsonl")[:20]
    Router.fit(members, by="key").save(folder / "router")
    (folder / "open").mkdir()
    (folder / "open/memsinks.json").write_text(json.dumps({"open": {"1": "alice"}, "fingerprint": "0"}))
    (folder / "run/notes.jsonl").write_bytes(as_lines([{"text": "a note", "key": None}, {"text": "b"}]))
    (folder / "run/report").mkdir()
    (folder / "run/report/audit.json").write_text(
        json.dumps({"text": "of somebody", "rows": [{"key": "k", "loss": 1.5}]})
    )
    (folder / "run/report/documents.jsonl").write_bytes(as_lines([{"text": "of somebody"}]))
    (folder / "question.json").write_text(json.dumps(QUESTION))
    recipe = read_comparison(folder / "compare.yaml").recipe
    (folder / "compare").mkdir()
    runs = [{"arm": "standard", "seed": 0, "rival": "standard", "settings": {}}]
    values = {
        "recipe": recipe.to_dict(),
        "seeds": [0],
        "runs": runs,
        "rows": [],
        "audits": {},
        "sources": source_hashes(recipe) or {"data.path": "0"},  # of files that are there
    }
    (folder / "compare/compare.json").write_text(json.dumps(values))
    return folder


def _taken_down(folder: Path) -> None:
    """A run after a take-down, its signed record, a tombstone, and a take-down that is bound and not in place."""
    bound, place = SCENES["takedown, bound"], folder / "bound-run"
    shutil.copytree(folder / "run", place / "run")
    assert run(place, bound.steps[0], kill_once=place / bound.kill_once).killed
    (folder / "bound").mkdir()
    (place / "run/.takedown.bound").rename(folder / "bound/.takedown.bound")
    shutil.rmtree(place)
    shutil.copytree(folder / "run", folder / "taken")
    for name, content in zip(("key.pem", "key.pub"), _keys(), strict=True):
        (folder / name).write_bytes(content)
    assert run(folder, ("takedown", "taken", "--key", KEY, "--signing-key", "key.pem")).code == 0
    [record] = (folder / "taken/takedowns").iterdir()
    shutil.copytree(record, folder / "record")
    shutil.copy(record / "tombstone.json", folder)


def _keys() -> tuple[bytes, bytes]:
    """A private key and its public one, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)


# Trying them


@dataclass
class Tried:
    """What came of the inputs of a reader: how many were read, refused by an error of ours; other errors with an input each."""

    reader: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)


class Hang(BaseException):
    """A reader took longer than `SECONDS`."""


def try_inputs(reader: Reader, folder: Path, count: int) -> Tried:
    """Give a reader so many generated inputs; its valid file is there again at the end."""
    path, tried = folder / reader.path, Tried(reader.name)
    valid = path.read_bytes()
    parsed = None if reader.parse is None else reader.parse(valid)

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(contents(valid, parsed, reader.dump))
    def one(content: bytes) -> None:
        path.write_bytes(content)
        kind = _outcome(reader, folder)
        tried.counts[kind if kind in ("read", "refused") else "FAULT"] += 1
        if kind not in ("read", "refused"):
            tried.faults.setdefault(kind, repr(content[:300]))

    try:
        reader.read(folder)
        one()
    finally:
        path.write_bytes(valid)
        if reader.mend is not None:
            reader.mend(folder)
    return tried


def _outcome(reader: Reader, folder: Path) -> str:
    """ "read", "refused", or the error that is not ours and where it comes from."""
    with _limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if reader.mend is not None:
                reader.mend(folder)
            reader.read(folder)
        except MemsinksError:
            return "refused"
        except Hang:
            return f"hangs for {SECONDS} s"
        except Exception as error:
            frames = [x for x in traceback.extract_tb(error.__traceback__) if "/memsinks/" in x.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the test itself"
            return f"{type(error).__name__} at {where}: {str(error)[:100]!r}"
        return "read"


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
