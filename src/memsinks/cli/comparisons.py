"""compare, reproduce: many runs, one table or figure."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from pathlib import Path

from memsinks.cli.options import SAME_AGAIN, Commands, add_changes, add_command, changes_of, count


def add_compare(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        run_compare,
        "arms x seeds -> one table",
        "Train every arm of a comparison with every seed (finished runs are kept), audit each seed, and write one table, "
        "one JSON and the picture of forgetting against price.",
        again=lambda _: SAME_AGAIN,
    )
    parser.add_argument("comparison", help="YAML file: a recipe with arms, seeds and roles")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="only these")
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time, one a GPU (%(default)s)")
    add_changes(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would run and for how long")
    parser.add_argument("--train-only", action="store_true", help="train, and leave the audits for later")
    parser.add_argument(
        "--attacks",
        choices=("forward", "all"),
        default="forward",
        help="of the audits, see memsinks audit (%(default)s)",
    )
    parser.add_argument(
        "--step-times", action="store_true", help="time a step of every arm, in turns, and add it to the table"
    )


def run_compare(arguments: Namespace) -> None:
    from memsinks.research.compare.compare import compare, describe_plan, time_steps
    from memsinks.research.compare.comparison import read_comparison
    from memsinks.research.compare.table import table

    comparison = read_comparison(Path(arguments.comparison), **changes_of(arguments))
    if arguments.dry_run:
        print(describe_plan(comparison, arguments.arms, arguments.seeds, arguments.jobs))
        return
    if arguments.step_times:
        print(table(time_steps(comparison)))
        return
    command = [arguments.comparison, *(x for text in arguments.set for x in ("--set", text))]
    command += ["--scale", arguments.scale] if arguments.scale else []
    result = compare(
        comparison,
        arms=arguments.arms,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        command=command,
        audits=not arguments.train_only,
        attacks=arguments.attacks,
    )
    if result is not None:
        print(f"{table(result)}\n\n{comparison.recipe.output}: table.md, compare.json, pareto.png, a report a seed")


def add_reproduce(commands: Commands) -> None:
    parser = add_command(
        commands,
        "reproduce",
        run_reproduce,
        "the paper's controlled study, figure by figure",
        "Train what a published figure needs (finished runs are kept), and write FIGURE.json and FIGURE.png. "
        "--size small is made for a CPU core, --size paper is the published size and wants a GPU.",
        again=lambda _: SAME_AGAIN,
    )
    parser.add_argument("figures", nargs="+", metavar="FIGURE", help="fig2, fig3, fig4, fig5, fig7, theory or all")
    parser.add_argument("--size", default="small", help="small, paper or tiny (%(default)s)")
    parser.add_argument("--scale", dest="size", default=SUPPRESS, help=SUPPRESS)  # its name before
    parser.add_argument(
        "--data", help="file of stories; default: $MEMSINKS_DATA/tinystories.jsonl.zst, without it the built-in stories"
    )
    parser.add_argument("--out", help="folder for runs, figures and pictures (runs/paper-SIZE)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: those of the size")
    parser.add_argument("--threads", type=count, help="CPU threads; default: torch's choice")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and for how long")
    parser.add_argument("--finished", action="store_true", help="draw what is there and train nothing")


def run_reproduce(arguments: Namespace) -> None:
    import dataclasses
    import os

    import torch

    from memsinks.research.reproduce.reproduce import describe_study, open_study, reproduce

    folder = os.environ.get("MEMSINKS_DATA")
    default = Path(folder) / "tinystories.jsonl.zst" if folder else None
    data = Path(arguments.data) if arguments.data else default
    study = open_study(Path(arguments.out or f"runs/paper-{arguments.size}"), arguments.size, data)
    study.training = not arguments.finished
    if arguments.seeds:
        study.setting = dataclasses.replace(study.setting, seeds=tuple(arguments.seeds))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.dry_run:
        print(describe_study(arguments.figures, study))
        return
    for name in reproduce(arguments.figures, study):
        print(f"{name}: {study.out / name}.json, {name}.png")
