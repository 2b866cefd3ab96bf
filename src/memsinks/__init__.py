"""Memorization sinks: train language models whose memorization can be taken out again.

A document enters as text and leaves as a model without it. The rooms stand in that order; each looks only up in this list:

errors      the error types                         checks    numbers in range, as a list of problems
files       written beside and renamed, hashes      batch     the contract of a batch, and its collator
provenance  what was made with which settings
data        text -> rows: documents, readers, chats, identity, tokens, packing, rows (all in one call), sampling, the built-in
            corpus; matching, which finds copies of a text; near copies and clusters; a corpus on disk: shards, stored,
            preparation; imports no model
sinks       the mechanism, for any decoder: config, routing, table, plan, layer, kernels, families, host classes, attach,
            opening, caches, storage, reading, owner files, checkpoint
training    the one loop, its settings, its processes and what they exchange, sinks first, optimizer, evaluation, the Trainer
removal     expected losses, settle, export, sinks that stay in it, the check in a fresh process, the model card; of a take-down
            erasing in a model and in files, the tombstone and the record: statement, page, signature
auditing    what a model remembers: scores -> attacks -> figures -> report
runs        a recipe in YAML, its corpus, its run folder, its estimate, the demo; taking one owner out of a run
viewer      a local page on a run: what its models write, whose sinks are open, taking one owner out
research    rivals, comparisons, the paper's study: nothing above imports it
cli         the command line

Public names are loaded when they are first used, so that ``import memsinks`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memsinks._version import __version__

if TYPE_CHECKING:
    from memsinks.auditing.audit import audit
    from memsinks.auditing.result import Audit
    from memsinks.auditing.settings import AuditSettings
    from memsinks.auditing.subjects import Subject
    from memsinks.batch import NO_SINKS, blank_batch, collate, target_count
    from memsinks.data.chat import encode_documents
    from memsinks.data.clusters import NearCopies
    from memsinks.data.documents import Document, load_documents, require_unique_keys, write_documents
    from memsinks.data.identity import document_id, equal_repetition, exposures, identify, training_order
    from memsinks.data.isolation import isolate
    from memsinks.data.matching import find_copies
    from memsinks.data.near_copies import cluster_documents
    from memsinks.data.packing import Rows, pack
    from memsinks.data.preparation import prepare_corpus
    from memsinks.data.readers import read_documents
    from memsinks.data.router import Router
    from memsinks.data.rows import make_rows
    from memsinks.data.sampling import refuse_shuffling
    from memsinks.data.stored import StoredCorpus, open_corpus
    from memsinks.data.tokens import encode, load_tokenizer, train_tokenizer
    from memsinks.errors import ArchitectureError, CheckpointError, ConfigError, DataError, MemsinksError
    from memsinks.removal.erase import Erased, blocks_of, collateral, erase
    from memsinks.removal.export import export
    from memsinks.removal.record import verify_record
    from memsinks.removal.settle import SettleConfig, Settled, SettleResult, repeated_and_once, settle, settling_texts
    from memsinks.runs.recipe import Recipe, parse_recipe, read_recipe
    from memsinks.runs.run import train
    from memsinks.runs.takedown import take_down
    from memsinks.runs.takedown_result import Takedown
    from memsinks.sinks.attach import Added, SinkReport, add_sinks, remove_sinks
    from memsinks.sinks.checkpoint import load, load_any, load_sinks, save_sinks
    from memsinks.sinks.config import SinkConfig
    from memsinks.sinks.exact import without_rows_alone
    from memsinks.sinks.gradient import shared_weight
    from memsinks.sinks.opening import sinks_closed, sinks_open
    from memsinks.sinks.own import assign, free_blocks, grow
    from memsinks.sinks.owners import add_owners
    from memsinks.sinks.state import assign_blocks, has_sinks, shared_hash
    from memsinks.sinks.storage import fingerprint
    from memsinks.sinks.table import AssignmentTable
    from memsinks.training.callback import SinkCallback
    from memsinks.training.exchange import send_open_blocks
    from memsinks.training.first import sinks_first
    from memsinks.training.last import SinksLastResult, sinks_last
    from memsinks.training.optim import AdamW, GradientNorms, clip_grad_norm_, param_groups
    from memsinks.training.prefix import KeptPrefix, prefix_kept
    from memsinks.training.shadow import shadow_rows
    from memsinks.training.trainer import SinkTrainer

_HOMES = {
    "memsinks.auditing.audit": "audit",
    "memsinks.auditing.settings": "AuditSettings",
    "memsinks.auditing.result": "Audit",
    "memsinks.auditing.subjects": "Subject",
    "memsinks.batch": "NO_SINKS blank_batch collate target_count",
    "memsinks.data.chat": "encode_documents",
    "memsinks.data.clusters": "NearCopies",
    "memsinks.data.documents": "Document load_documents require_unique_keys write_documents",
    "memsinks.data.identity": "document_id equal_repetition exposures identify training_order",
    "memsinks.data.isolation": "isolate",
    "memsinks.data.matching": "find_copies",
    "memsinks.data.near_copies": "cluster_documents",
    "memsinks.data.packing": "Rows pack",
    "memsinks.data.preparation": "prepare_corpus",
    "memsinks.data.readers": "read_documents",
    "memsinks.data.router": "Router",
    "memsinks.data.rows": "make_rows",
    "memsinks.data.sampling": "refuse_shuffling",
    "memsinks.data.stored": "StoredCorpus open_corpus",
    "memsinks.data.tokens": "encode load_tokenizer train_tokenizer",
    "memsinks.errors": "ArchitectureError CheckpointError ConfigError DataError MemsinksError",
    "memsinks.removal.erase": "Erased blocks_of collateral erase",
    "memsinks.removal.export": "export",
    "memsinks.removal.record": "verify_record",
    "memsinks.removal.settle": "SettleConfig SettleResult Settled repeated_and_once settle settling_texts",
    "memsinks.runs.recipe": "Recipe parse_recipe read_recipe",
    "memsinks.runs.run": "train",
    "memsinks.runs.takedown": "take_down",
    "memsinks.runs.takedown_result": "Takedown",
    "memsinks.sinks.attach": "Added SinkReport add_sinks remove_sinks",
    "memsinks.sinks.checkpoint": "load load_any load_sinks save_sinks",
    "memsinks.sinks.config": "SinkConfig",
    "memsinks.sinks.gradient": "shared_weight",
    "memsinks.sinks.exact": "without_rows_alone",
    "memsinks.sinks.opening": "sinks_closed sinks_open",
    "memsinks.sinks.own": "assign free_blocks grow",
    "memsinks.sinks.owners": "add_owners",
    "memsinks.sinks.state": "assign_blocks has_sinks shared_hash",
    "memsinks.sinks.storage": "fingerprint",
    "memsinks.sinks.table": "AssignmentTable",
    "memsinks.training.callback": "SinkCallback",
    "memsinks.training.exchange": "send_open_blocks",
    "memsinks.training.first": "sinks_first",
    "memsinks.training.last": "SinksLastResult sinks_last",
    "memsinks.training.prefix": "KeptPrefix prefix_kept",
    "memsinks.training.shadow": "shadow_rows",
    "memsinks.training.optim": "AdamW GradientNorms clip_grad_norm_ param_groups",
    "memsinks.training.trainer": "SinkTrainer",
}
"""Where each public name is defined; the list for type checkers above says the same."""

_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "NO_SINKS",
    "AdamW",
    "Added",
    "ArchitectureError",
    "AssignmentTable",
    "Audit",
    "AuditSettings",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Document",
    "Erased",
    "GradientNorms",
    "KeptPrefix",
    "MemsinksError",
    "NearCopies",
    "Recipe",
    "Router",
    "Rows",
    "SettleConfig",
    "SettleResult",
    "Settled",
    "SinkCallback",
    "SinkConfig",
    "SinkReport",
    "SinkTrainer",
    "SinksLastResult",
    "StoredCorpus",
    "Subject",
    "Takedown",
    "__version__",
    "add_owners",
    "add_sinks",
    "assign",
    "assign_blocks",
    "audit",
    "blank_batch",
    "blocks_of",
    "clip_grad_norm_",
    "cluster_documents",
    "collate",
    "collateral",
    "document_id",
    "encode",
    "encode_documents",
    "equal_repetition",
    "erase",
    "export",
    "exposures",
    "find_copies",
    "fingerprint",
    "free_blocks",
    "grow",
    "has_sinks",
    "identify",
    "isolate",
    "load",
    "load_any",
    "load_documents",
    "load_sinks",
    "load_tokenizer",
    "make_rows",
    "open_corpus",
    "pack",
    "param_groups",
    "parse_recipe",
    "prefix_kept",
    "prepare_corpus",
    "read_documents",
    "read_recipe",
    "refuse_shuffling",
    "remove_sinks",
    "repeated_and_once",
    "require_unique_keys",
    "save_sinks",
    "send_open_blocks",
    "settle",
    "settling_texts",
    "shadow_rows",
    "shared_hash",
    "shared_weight",
    "sinks_closed",
    "sinks_first",
    "sinks_last",
    "sinks_open",
    "take_down",
    "target_count",
    "train",
    "train_tokenizer",
    "training_order",
    "verify_record",
    "without_rows_alone",
    "write_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'memsinks' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
