"""demo, train, estimate: one run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from memsinks.cli.options import Commands, add_changes, add_command, changes_of, count


def add_demo(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        run_demo,
        "train, remove and show, on the built-in corpus",
        "Train an ordinary model and the same model with sinks on invented stories and personal records, remove the sinks, "
        "and show what each model recites. Two to three minutes on two cores.",
    )
    parser.add_argument(
        "--pretrained",
        nargs="?",
        const="",
        metavar="MODEL",
        help="fine-tune a finished chat model on three invented customers instead, take one out and export another: a folder or "
        "a name on the Hugging Face hub (SmolLM2-135M-Instruct, 270 MB, which is then downloaded)",
    )
    parser.add_argument("--out", help="folder for all results (runs/demo, or runs/demo-pretrained)")


def run_demo(arguments: Namespace) -> None:
    if arguments.pretrained is not None:
        from memsinks.runs.demo_pretrained import MODEL, demo_pretrained, format_pretrained

        out = Path(arguments.out or "runs/demo-pretrained")
        print(format_pretrained(demo_pretrained(arguments.pretrained or MODEL, out), out))
        return
    from memsinks.runs.forked import start_importing

    start_importing()
    from memsinks.runs.demo import demo, format_result

    out = Path(arguments.out or "runs/demo")
    print(format_result(demo(out), out))


def add_train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        run_train,
        "run a recipe",
        "Train as a YAML recipe says. The run folder holds the recipe, versions, metrics, checkpoints and the model.",
        again=lambda _: "the same command with --resume continues from the last checkpoint",
    )
    parser.add_argument("recipe", help="YAML file; its keys are checked before anything starts")
    add_changes(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint")


def run_train(arguments: Namespace) -> None:
    from memsinks.runs.recipe import read_recipe
    from memsinks.runs.run import train

    recipe = read_recipe(arguments.recipe, **changes_of(arguments))
    folder, by = train(recipe, resume=arguments.resume), recipe.data.by
    run = folder.parent
    ids = "" if by == "content" else f" --by {by} --{by}-field {by}"
    print(
        f"\nmodel: {folder}\naudit: memsinks audit {folder} --documents {run}/members.jsonl --copies-field copies "
        f"--controls {run}/controls.jsonl{ids} --state closed"
    )


def add_estimate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "estimate",
        run_estimate,
        "what a recipe needs, before it runs",
        "Print parameters, tokens, FLOPs, memory by part, time and checkpoint sizes of a recipe or of each arm of a "
        "comparison, what does not fit, and widths that serving tools dislike. No model is allocated; the corpus is read "
        "where its rows cannot be counted otherwise.",
    )
    parser.add_argument("recipe", help="YAML file: a recipe or a comparison")
    parser.add_argument("--gpu", default="H100", help="A100, H100 or H200 (%(default)s)")
    parser.add_argument(
        "--gpus", type=count, default=1, help="a recipe's rows are spread over them, arms run one a GPU (%(default)s)"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak (%(default)s)")
    add_changes(parser)


def run_estimate(arguments: Namespace) -> None:
    from memsinks.research.compare.arm import recipe_of_arm
    from memsinks.research.compare.comparison import read_comparison
    from memsinks.runs.estimate_table import format_estimate
    from memsinks.runs.recipe import read_recipe, read_sections

    path, changes = Path(arguments.recipe), changes_of(arguments)
    card = {name: getattr(arguments, name) for name in ("gpu", "gpus", "mfu")}
    if "arms" in read_sections(path):
        comparison = read_comparison(path, **changes)
        arms = {arm.name: recipe_of_arm(comparison.recipe, arm) for arm in comparison.arms}
        print(format_estimate(comparison.recipe, arms, len(comparison.seeds), **card))
    else:
        print(format_estimate(read_recipe(path, **changes), **card))
