"""The ``inlay`` command: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from inlay import __version__

app = typer.Typer(
    help="A fixed-size memory for long context, inlaid into a pretrained transformer.", no_args_is_help=True
)
console = Console()
errors = Console(stderr=True)

RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)]
Runs = Annotated[Path, typer.Option(help="Where runs are kept.")]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """A fixed-size memory for long context, inlaid into a pretrained transformer."""
    if show:
        console.print(f"inlay {__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: RecipePath,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. trainer.max_steps=100")] = None,
    runs: Runs = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
) -> None:
    """Train what a recipe says; everything about the run lands in RUNS/NAME."""
    from inlay.train import load_recipe, train, write_run_report

    loaded = load_recipe(recipe, overrides or ())
    directory = runs / loaded.name
    train(loaded, directory, resume=resume, console=console)
    console.print(f"report: {write_run_report(directory)}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's directory.", show_default=False)],
) -> None:
    """Measure a finished run with its memory on and with η = 0: loss by position, growing context, recall."""
    from inlay.data import load_data
    from inlay.evaluate import evaluate_model
    from inlay.train import load_run, write_run_report

    loaded = load_run(run)
    evaluation = evaluate_model(loaded.model, load_data(loaded.data_config), **loaded.recipe.evaluate.model_dump())
    figures = evaluation.write(run / "evaluation.json")
    for table in evaluation.tables():
        console.print(table)
    console.print(f"figures: {figures}")
    console.print(f"report: {write_run_report(run, evaluation.sections())}")


@app.command()
def demo(
    runs: Runs = Path("runs"),
) -> None:
    """Train with and without a memory, on recall and on real text, evaluate both, and write one report."""
    from inlay.demo import run_demo

    run_demo(runs / "demo", console)


def main() -> None:
    """Run the command; what was done wrong is told without a traceback."""
    from inlay.data import DataError
    from inlay.fastweight import InlayError

    try:
        app(standalone_mode=True)
    except (InlayError, DataError) as error:
        errors.print(f"[bold red]error:[/] {error}", highlight=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
