"""How fast are rows made of a corpus on disk, and in how much memory? `python rows.py CORPUS` prints it as JSON.

Time and memory are of runs of their own, since tracing memory takes time. Memory is what Python and numpy ask for; the tokens,
which are mapped, are not in it.
"""

from __future__ import annotations

import json
import sys
import time
import tracemalloc

import memsinks as ms

LENGTHS, EPOCHS = (256, 4096), (1, 10)


def rows(corpus: ms.StoredCorpus, length: int, epochs: int) -> ms.Rows:
    return ms.make_rows(corpus, corpus.tokenizer, length=length, epochs=epochs, by="cluster", apart_from=None)


def measured(corpus: ms.StoredCorpus, length: int, epochs: int) -> dict[str, float]:
    """Of one packing of so many epochs."""
    started = time.process_time()
    segments = len(rows(corpus, length, epochs).segments)
    seconds = time.process_time() - started
    tracemalloc.start()
    found = rows(corpus, length, epochs)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    met = int(corpus.copies.sum()) * epochs
    return {
        "length": length, "epochs": epochs, "meetings": met, "segments": segments, "rows": len(found),
        "cpu_seconds": round(seconds, 2), "meetings_a_second": round(met / seconds),
        "bytes_a_meeting_at_most": round(most / met, 1), "bytes_a_meeting_kept": round(kept / met, 1),
    }  # fmt: skip


if __name__ == "__main__":
    stored = ms.open_corpus(sys.argv[1])
    print(json.dumps([measured(stored, length, epochs) for length in LENGTHS for epochs in EPOCHS]))
