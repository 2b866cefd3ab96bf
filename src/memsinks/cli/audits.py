"""audit, lm-eval-task: what a model remembers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from memsinks.cli.options import SAME_AGAIN, Commands, add_command, add_documents, count


def add_audit(commands: Commands) -> None:
    parser = add_command(
        commands,
        "audit",
        run_audit,
        "what a model remembers of documents",
        "Score documents against controls the model never saw: loss, verbatim extraction, membership, by number of copies. "
        "A model is [NAME=]PATH[@open|@closed]; the state of its sinks is required where it has them.",
        again=lambda arguments: SAME_AGAIN if arguments.out else "",
    )
    parser.add_argument("model", help="a checkpoint folder or name, with or without sinks")
    add_documents(parser)
    parser.add_argument(
        "--out", help="folder for report.html, audit.json, documents.jsonl; continues an interrupted audit"
    )
    parser.add_argument("--state", choices=("open", "closed"), help="of MODEL's sinks, instead of @open or @closed")
    _add_other_models(parser)
    _add_questions(parser)
    _add_reading(parser)


def _add_other_models(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("other models")
    group.add_argument("--against", metavar="MODEL", help="the ordinary model, or the one before removal")
    group.add_argument("--twin", metavar="MODEL", help="a model trained without the documents")
    group.add_argument("--seen-once", metavar="MODEL", help="a model that saw each document once")
    group.add_argument("--also", metavar="MODEL", action="append", default=[], help="one more, for table and pictures")


def _add_questions(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument("--prefixes", type=int, nargs="+", default=[8, 16, 32, 64], help="also these (%(default)s)")
    group.add_argument("--offsets", type=int, nargs="+", default=[0], help="from these tokens on (%(default)s)")
    group.add_argument("--no-end", action="store_true", help="documents were trained on without an end token")
    group.add_argument("--generate", type=int, default=16, help="documents also generated, as a check (%(default)s)")
    group.add_argument("--shown", type=int, default=6, help="documents whose text is in the report (%(default)s)")
    group.add_argument(
        "--attacks",
        choices=("forward", "all"),
        default="forward",
        help="forward: those that need forward passes alone; all: also those that train copies (%(default)s)",
    )
    group.add_argument("--harmless", metavar="FILE", help="other texts to train on; default: a third of the controls")
    group.add_argument("--attack-lr", type=float, default=3e-4, help="of attacks that train (%(default)s)")
    group.add_argument("--margin-loss", type=float, default=0.03, help="of equivalence, nats per token (%(default)s)")
    group.add_argument("--margin-auc", type=float, default=0.03, help="of equivalence, AUC (%(default)s)")


def _add_reading(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("how files are read")
    group.add_argument(
        "--by",
        "--identity",
        choices=("content", "key", "source", "cluster"),
        default="content",
        help="what ids were made of",
    )
    group.add_argument("--key-field", help="field that holds the key")
    group.add_argument("--source-field", help="field that holds the source")
    group.add_argument("--cluster-field", help="field that holds the cluster")
    group.add_argument("--tokenizer", help="folder, file or name; default: beside MODEL")
    group.add_argument("--limit", type=count, help="score at most so many documents of each side")


def run_audit(arguments: Namespace) -> None:
    from itertools import islice

    from memsinks.auditing.audit import audit
    from memsinks.auditing.settings import AuditSettings
    from memsinks.auditing.subjects import Subject
    from memsinks.data.readers import read_documents
    from memsinks.data.tokens import load_tokenizer

    settings = AuditSettings(
        prefix=arguments.prefix,
        continuation=arguments.continuation,
        prefixes=tuple(arguments.prefixes),
        offsets=tuple(arguments.offsets),
        by=arguments.by,
        end=not arguments.no_end,
        shown=arguments.shown,
        generate=arguments.generate,
        margin_loss=arguments.margin_loss,
        margin_auc=arguments.margin_auc,
        attacks=arguments.attacks,
        attack_lr=arguments.attack_lr,
    )
    fields = {name: getattr(arguments, name) for name in ("text_field", "key_field", "source_field", "cluster_field")}
    documents = list(
        islice(read_documents(arguments.documents, copies_field=arguments.copies_field, **fields), arguments.limit)
    )
    controls = list(islice(read_documents(arguments.controls, **fields), arguments.limit))
    harmless = list(read_documents(arguments.harmless, **fields)) if arguments.harmless else None
    against, twin, seen_once = (
        Subject.parse(text) if text else None for text in (arguments.against, arguments.twin, arguments.seen_once)
    )
    result = audit(
        Subject.parse(arguments.model),
        documents,
        controls,
        load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None,
        state=arguments.state,
        against=against,
        twin=twin,
        seen_once=seen_once,
        others=[Subject.parse(text) for text in arguments.also],
        settings=settings,
        harmless=harmless,
        out=arguments.out,
    )
    print(result)
    if arguments.out:
        print(f"\n{arguments.out}/report.html")


def add_lm_eval_task(commands: Commands) -> None:
    parser = add_command(
        commands,
        "lm-eval-task",
        run_lm_eval_task,
        "write a task for lm-evaluation-harness",
        "Write a folder with a task for lm-evaluation-harness that measures verbatim extraction and loss gap, and print the "
        "command that runs it. It needs no memsinks and reads a checkpoint with its sinks closed.",
    )
    parser.add_argument("model", help="the model, or its tokenizer alone: texts are cut at its tokens")
    add_documents(parser)
    parser.add_argument("--out", required=True, help="an empty or new folder")


def run_lm_eval_task(arguments: Namespace) -> None:
    from shlex import join

    from memsinks.auditing.harness import write_lm_eval_task
    from memsinks.data.readers import read_documents
    from memsinks.data.tokens import load_tokenizer

    field = arguments.text_field
    folder = write_lm_eval_task(
        list(read_documents(arguments.documents, text_field=field, copies_field=arguments.copies_field)),
        list(read_documents(arguments.controls, text_field=field)),
        load_tokenizer(arguments.model),
        arguments.out,
        prefix=arguments.prefix,
        continuation=arguments.continuation,
    )
    model = "MODEL" if Path(arguments.model).is_file() else arguments.model
    print(
        join(
            [
                "lm_eval",
                "--model",
                "hf",
                "--model_args",
                f"pretrained={model},softmax_dtype=float32",
                "--include_path",
                str(folder),
                "--tasks",
                "memsinks",
            ]
        )
    )
