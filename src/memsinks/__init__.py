"""Memorization sinks: train language models whose memorization can be taken out again.

Read the modules in the order in which a document passes through them:

config      every setting, validated and versioned; the error types
documents   a document and its readers: jsonl, parquet, txt, folders, Hugging Face datasets
synthetic   the built-in corpus: stories, invented persons, near copies, canaries, controls
identity    document -> 63-bit id; training order; exposure numbers
tokens      texts -> tokens
stored      tokens on disk
packing     documents -> rows; the collator
routing     id -> open sink blocks; the plan of one forward
sinks       the sink module
kernels     what it computes, and by which path: masked, tiled (CPU), grouped (GPU)
families    reading a decoder: where its MLPs are and what they compute
objective   w(c) at the logits and back in the sinks; the exact mode; the divisor
hosts       what the classes of a model with sinks do
attach      add_sinks, remove_sinks, sinks_open, sinks_closed
optim       parameter groups, separate clipping, lazy AdamW
sinks_first one update of the sinks alone before each step
training    the Hugging Face Trainer: a callback, and a Trainer whose sinks learn first
losses      the loss of each row
expected    what the loss of a text should be
settle      levels what closed sinks leave behind
checkpoint  save, load, fingerprint
export      the plain checkpoint, checked in a fresh process; the model card
audit       what a model remembers of documents, against controls, other models, a twin
rivals      ways of training, and of editing a trained model, to compare with: one file each
sections    YAML -> dataclasses, everything wrong at once
recipe      the YAML of a run
shrink      a recipe made smaller in every direction
prepared    the corpus of a run: documents -> tokens -> rows, in memory or on disk
run         one run of a recipe
estimate    parameters, FLOPs, memory and time of a recipe before it runs
arm         one arm of a comparison, run to its end
edited      an arm that edits the trained model of another
comparison  the YAML of a comparison
compare     arms x seeds of rivals: one table
reproduce   the paper's controlled study, a file a figure
demo        the whole journey in minutes
cli         the command line
"""

from ._version import __version__
from .attach import Added, add_sinks, has_sinks, remove_sinks, sinks_closed, sinks_open
from .audit import Audit, AuditSettings, Subject, audit
from .checkpoint import fingerprint, load, load_any, load_sinks
from .config import ArchitectureError, CheckpointError, ConfigError, DataError, MemsinksError, SinkConfig
from .documents import Document, read_documents, require_unique_keys
from .export import export
from .identity import NO_SINKS, document_id, equal_repetition, exposures, identify, training_order
from .objective import shared_weight, target_count
from .optim import AdamW, GradientNorms, clip_grad_norm_, param_groups
from .packing import Rows, collate, pack, refuse_shuffling
from .recipe import Recipe, parse_recipe, read_recipe
from .routing import AssignmentTable
from .run import train
from .settle import Settled, repeated_and_once, settle, settling_texts
from .sinks_first import sinks_first
from .tokens import encode, load_tokenizer, train_tokenizer
from .training import SinkCallback, SinkTrainer

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
    "GradientNorms",
    "MemsinksError",
    "Recipe",
    "Rows",
    "Settled",
    "SinkCallback",
    "SinkConfig",
    "SinkTrainer",
    "Subject",
    "__version__",
    "add_sinks",
    "audit",
    "clip_grad_norm_",
    "collate",
    "document_id",
    "encode",
    "equal_repetition",
    "export",
    "exposures",
    "fingerprint",
    "has_sinks",
    "identify",
    "load",
    "load_any",
    "load_sinks",
    "load_tokenizer",
    "pack",
    "param_groups",
    "parse_recipe",
    "read_documents",
    "read_recipe",
    "refuse_shuffling",
    "remove_sinks",
    "repeated_and_once",
    "require_unique_keys",
    "settle",
    "settling_texts",
    "shared_weight",
    "sinks_closed",
    "sinks_first",
    "sinks_open",
    "target_count",
    "train",
    "train_tokenizer",
    "training_order",
]
