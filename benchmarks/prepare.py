"""How fast is a corpus made on disk, beside a bare `encode_batch`, and how do time and memory grow with it?

    MEMSINKS_DATA=... python benchmarks/prepare.py             # writes prepare.json beside this file; about ten minutes
    MEMSINKS_DATA=... python benchmarks/prepare.py --scale 5   # a fifth of each size, which is what the JSON here is of

*Rate*: web text and Wikipedia (`background_open`), a tokenizer of 8,192 entries, one process, one thread; `encode_batch` alone,
`prepare_corpus` without and with near copies, in turns; ratios of the means. All times are seconds of the processor, of which
others on the machine take none.
*Growth*: 1, 10 and 100 MB of that text, a quarter of it and three copies with 5% of the words replaced, made with near copies by
one worker in a process of its own; seconds, and the most memory, before and after.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from memsinks._version import versions
from memsinks.data.clusters import NearCopies
from memsinks.data.documents import Document
from memsinks.data.preparation import SHARD_CHARACTERS, prepare_corpus
from memsinks.data.readers import read_documents
from memsinks.data.tokens import load_tokenizer

DATA = Path(os.environ.get("MEMSINKS_DATA", "."))
TEXT, TOKENIZER = DATA / "background_open.jsonl.zst", DATA / "tokenizers" / "mixed_bpe_8192.json"
TURNS, RATED = 2, 50_000_000
SIZES = (1_000_000, 10_000_000, 100_000_000)
SHARE, COPIES = 0.05, 4


def edited(characters: int) -> Iterator[Document]:
    """Documents of so many characters in all: a quarter of them as they are, then again and again with words replaced."""
    texts, total = [], 0
    for document in read_documents(TEXT):
        texts.append(document.text)
        total += len(document.text)
        if total >= characters / COPIES:
            break
    words = sorted({word for text in texts[:200] for word in text.split()})
    left = characters
    for version in itertools.count():
        for number, text in enumerate(texts):
            if left <= 0:
                return
            left -= len(text)
            rng = random.Random(f"{version} {number}")
            parts = [rng.choice(words) if version and rng.random() < SHARE else word for word in text.split(" ")]
            yield Document(" ".join(parts), key=f"{number}.{version}")


def rate(characters: int) -> dict:
    """Tokens a second of one process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    documents, tokenizer = list(edited(characters)), load_tokenizer(TOKENIZER)
    texts = [x.text for x in documents]
    tokens = 0
    times: dict[str, list[float]] = {"encode_batch": [], "prepared": [], "prepared, near copies": []}
    for _ in range(TURNS):
        started = time.process_time()
        encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        times["encode_batch"].append(time.process_time() - started)
        tokens = sum(len(x.ids) for x in encoded)
        del encoded
        for name, near in (("prepared", None), ("prepared, near copies", NearCopies())):
            with tempfile.TemporaryDirectory() as folder:
                started = time.process_time()
                prepare_corpus(lambda: documents, tokenizer, Path(folder) / "c", near_copies=near, workers=1)
                times[name].append(time.process_time() - started)
    seconds = {name: statistics.fmean(x) for name, x in times.items()}
    return {
        "characters": sum(map(len, texts)), "tokens": tokens,
        "ratio to encode_batch": {name: round(seconds["encode_batch"] / x, 3) for name, x in seconds.items()},
        "tokens a second of the processor": {name: round(tokens / x) for name, x in seconds.items()},
    }  # fmt: skip


def peak_mb() -> int:
    """The most memory this process has had, MB (Linux)."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def grown(characters: int, folder: str, results: multiprocessing.SimpleQueue) -> None:
    """Make a corpus of this size in this process; (seconds, MB over what was there before, the report)."""
    tokenizer = load_tokenizer(TOKENIZER)
    source = Path(folder) / "text.jsonl"
    with source.open("w") as file:
        for document in edited(characters):
            file.write(json.dumps({"text": document.text, "key": document.key}) + "\n")
    before = peak_mb()
    started = time.process_time()
    corpus = prepare_corpus(
        lambda: read_documents(source, key_field="key"),
        tokenizer,
        Path(folder) / "c",
        near_copies=NearCopies(),
        shard_characters=SHARD_CHARACTERS // 16,
        workers=1,
    )
    seconds = time.process_time() - started
    after = peak_mb()
    found = corpus.manifest["near_copies"]
    stored = sum(x.stat().st_size for x in corpus.path.rglob("*") if x.is_file())
    results.put({
        "characters": characters, "documents": len(corpus), "tokens": corpus.manifest["tokens"], "cpu_seconds": round(seconds, 1),
        "peak_mb_before": before, "peak_mb": after, "mb_stored": round(stored / 1e6, 1),
        "clusters": found["clusters"], "clustered": found["clustered"], "candidate_pairs": found["candidate_pairs"],
        "mostly_boilerplate": found["mostly_boilerplate"],
    })  # fmt: skip


def growth(sizes: list[int]) -> list[dict]:
    context = multiprocessing.get_context("spawn")
    found = []
    for size in sizes:
        folder, results = tempfile.mkdtemp(), context.SimpleQueue()
        process = context.Process(target=grown, args=(size, folder, results))
        process.start()
        process.join()
        shutil.rmtree(folder)
        if process.exitcode:
            raise SystemExit(f"the corpus of {size} characters failed")
        found.append(results.get())
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "prepare.json")
    arguments = parser.parse_args()
    result = {
        "rate": rate(RATED // arguments.scale),
        "growth": growth([size // arguments.scale for size in SIZES]),
        "machine": f"{platform.machine()}, one process, one thread",
        "versions": versions("tokenizers", "transformers", "numpy", "pyarrow", "rensa"),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["rate"], indent=2))


if __name__ == "__main__":
    main()
