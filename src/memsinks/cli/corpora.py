"""prepare: text -> a corpus on disk."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memsinks.cli.options import SAME_AGAIN, Commands, add_changes, add_command, changes_of, count

FIELDS = ("text", "key", "source", "copies", "isolation", "cluster")


def add_prepare(commands: Commands) -> None:
    parser = add_command(
        commands,
        "prepare",
        run_prepare,
        "make a corpus on disk, or the data of a comparison",
        "Read documents, encode them, give them ids and write a folder of shards that train reads without loading it: streaming, "
        "in parallel, and resumed when it was interrupted. Near copies get one cluster each. Of a comparison: make the folders "
        "that all arms of a seed train on.",
        again=lambda _: SAME_AGAIN,
    )
    parser.add_argument(
        "source", help="documents (jsonl, parquet, txt, folder, data set name), or a YAML recipe or comparison"
    )
    parser.add_argument("--out", help="folder of the corpus; required but for a comparison")
    parser.add_argument("--workers", type=count, help="processes (one a core)")
    parser.add_argument("--tokenizer", help="folder, file or name; a recipe names its own")
    _add_fields(parser)
    _add_clusters(parser)
    parser.add_argument("--shard-characters", type=count, help="characters of a shard at least (16777216)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="of a comparison: only these")
    add_changes(parser)


def _add_fields(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("how documents are read (a recipe says it itself)")
    for name in FIELDS:
        group.add_argument(f"--{name}-field", help=f"field of the {name}")
    group.add_argument("--separator", help="cuts .txt files into documents")
    group.add_argument("--split", help="of a data set")
    group.add_argument(
        "--by", choices=("content", "key", "source", "cluster"), help="what gives a document its id (content)"
    )
    group.add_argument(
        "--carry", nargs="+", default=[], metavar="COLUMN", help="columns kept beside each document: license"
    )


def _add_clusters(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("near copies")
    group.add_argument("--near-copies", action="store_true", help="look for near copies, and give them a cluster")
    group.add_argument("--threshold", type=float, help="least Jaccard similarity of their runs of five words (0.3)")
    group.add_argument("--clusters", metavar="FILE", help="clusters of keys, or pairs of keys, that another tool found")


def run_prepare(arguments: Namespace) -> None:
    from memsinks.errors import ConfigError
    from memsinks.runs.recipe import parse_recipe, read_sections

    path = Path(arguments.source)
    if path.suffix not in (".yaml", ".yml"):
        if arguments.set or arguments.scale:
            raise ConfigError("--set and --scale are for a recipe; give options instead")
        _prepare(arguments, _data_of(arguments), _tokenizer_of(arguments))
        return
    values = read_sections(path, **changes_of(arguments))
    names = ("separator", "split", "by", "tokenizer", "threshold", "clusters", "near_copies")
    given = _given(arguments, (*(f"{name}_field" for name in FIELDS), *names))
    if given:
        raise ConfigError(f"{', '.join(given)}: the recipe says this itself; change it with --set")
    if "arms" in values:
        _prepare_comparison(arguments)
        return
    if arguments.seeds:
        raise ConfigError("--seeds is for a comparison")
    recipe = parse_recipe(values, str(path))
    _prepare(arguments, recipe.data, recipe.tokenizer)


def _given(arguments: Namespace, names: Iterable[str]) -> list[str]:
    """Those of some options that were given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) not in (None, False, [])]


def _prepare_comparison(arguments: Namespace) -> None:
    from memsinks.errors import ConfigError
    from memsinks.research.compare.compare import prepare_data
    from memsinks.research.compare.comparison import read_comparison

    others = _given(arguments, ("out", "workers", "carry", "shard_characters"))
    if others:
        raise ConfigError(
            f"{', '.join(others)}: a comparison names its own output and makes it in its own way; leave it out"
        )
    comparison = read_comparison(Path(arguments.source), **changes_of(arguments))
    for seed in arguments.seeds or comparison.seeds:
        print(prepare_data(comparison, seed))


def _data_of(arguments: Namespace) -> Any:
    from memsinks.data.clusters import NearCopies
    from memsinks.errors import ConfigError
    from memsinks.runs.data_recipe import DataRecipe

    if arguments.threshold is not None and not arguments.near_copies:
        raise ConfigError("--threshold is for --near-copies")
    values = {f"{name}_field": getattr(arguments, f"{name}_field") for name in FIELDS}
    values |= {name: getattr(arguments, name) for name in ("separator", "split", "by", "clusters")}
    if arguments.near_copies:
        values["near_copies"] = NearCopies(
            **({} if arguments.threshold is None else {"threshold": arguments.threshold})
        )
    return DataRecipe(path=arguments.source, **{name: value for name, value in values.items() if value is not None})


def _tokenizer_of(arguments: Namespace) -> Any:
    from memsinks.errors import ConfigError
    from memsinks.runs.recipe import TokenizerRecipe

    if arguments.tokenizer is None:
        raise ConfigError("give --tokenizer: a folder, a file or a name")
    return TokenizerRecipe(path=arguments.tokenizer)


def _prepare(arguments: Namespace, data: Any, tokenizer: Any) -> None:
    from memsinks.data.near_copies import said
    from memsinks.data.preparation import SHARD_CHARACTERS
    from memsinks.errors import ConfigError
    from memsinks.runs.stored import prepare_data

    if arguments.out is None:
        raise ConfigError("give --out, the folder of the corpus")
    corpus = prepare_data(
        data,
        tokenizer,
        arguments.out,
        carry=arguments.carry,
        workers=arguments.workers,
        shard_characters=arguments.shard_characters or SHARD_CHARACTERS,
    )
    facts = corpus.manifest
    print(
        f"{corpus.path}: {facts['documents']:,} documents ({facts['trained']:,} to train on), {facts['tokens']:,} tokens, "
        f"{facts['tokens_with_copies']:,} with copies, in {len(facts['shards'])} shards"
    )
    if facts["near_copies"]:
        print(f"near copies: {said(facts['near_copies'])}")
    print(f'read it: ms.open_corpus("{corpus.path}"), or data: {{path: {corpus.path}}} in a recipe')
