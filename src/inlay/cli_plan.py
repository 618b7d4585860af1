"""``inlay plan``: lengths and memory, before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="How long sequences must be, and what a training step needs.", no_args_is_help=True)
console = Console(emoji=False)


@app.command()
def reach(
    chunk_size: Annotated[int, typer.Option(help="Tokens per chunk.", min=1)] = 256,
    chunks: Annotated[int | None, typer.Option(help="Chunks wanted.", show_default=False)] = None,
    ever_read: Annotated[
        float | None, typer.Option(help="Share of the chunks that should be read at all, e.g. 0.9.", show_default=False)
    ] = None,
    mean_reach: Annotated[
        float | None, typer.Option(help="Mean share of a document that should read a chunk.", show_default=False)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="A length that is given, in tokens.", show_default=False)] = None,
    seconds: Annotated[
        float | None, typer.Option(help="A length that is given, in seconds of audio.", show_default=False)
    ] = None,
    frame_rate: Annotated[
        float | None, typer.Option(help="Tokens per second of audio (Moshi: 12.5).", show_default=False)
    ] = None,
) -> None:
    """Tokens or seconds that a wanted number of chunks takes, or what a length gives.

    Without a wish: what is often said of 7, 15, 20, 25 and 125 chunks, checked.
    """
    from inlay.doctor.reach_plan import plan_reach, plan_table, retention_section
    from inlay.report.console import print_section, rich_table

    wishes = {"chunks": chunks, "ever_read": ever_read, "mean_reach": mean_reach, "tokens": tokens, "seconds": seconds}
    if all(wish is None for wish in wishes.values()):
        print_section(console, retention_section())
        return
    try:
        plan = plan_reach(chunk_size=chunk_size, frame_rate=frame_rate, **wishes)  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(rich_table(plan_table([plan])))


@app.command()
def memory(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. mode=memory")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Memory of the device in GB; the GPU's when not given.", min=0.0, show_default=False),
    ] = None,
) -> None:
    """Peak memory of a recipe's training step, and the longest sequence that fits; nothing is built or trained."""
    from inlay.doctor.plan import plan_recipe
    from inlay.report.console import print_section
    from inlay.train import load_recipe
    from inlay.train.kinds import recipe_kind

    with console.status("running the step without its numbers") as status:

        def progress(what: str) -> None:
            status.update(f"running the step without its numbers: {what}")

        if recipe_kind(recipe) == "moshi":
            from inlay.doctor.plan_moshi import plan_moshi_recipe
            from inlay.train.moshi_recipe import load_moshi_recipe

            plan = plan_moshi_recipe(load_moshi_recipe(recipe, overrides or ()), budget_gb=budget, progress=progress)
        else:
            plan = plan_recipe(load_recipe(recipe, overrides or ()), budget_gb=budget, progress=progress)
    print_section(console, plan.section())
    for finding in plan.findings():
        console.print(f"{finding.says}. {finding.fix}")
