"""The ``inlay`` command: parses, calls, prints."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from inlay import __version__, cli_compress, cli_moshi, cli_plan

app = typer.Typer(
    help="A fixed-size memory for long context, inlaid into a pretrained transformer.", no_args_is_help=True
)
app.add_typer(cli_compress.app, name="compress")
app.add_typer(cli_moshi.app, name="moshi")
app.add_typer(cli_plan.app, name="plan")
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)

RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. trainer.max_steps=100")]
Runs = Annotated[Path, typer.Option(help="Where runs are kept.")]
RunPath = Annotated[Path, typer.Argument(help="A finished run's directory.", show_default=False)]
SessionPath = Annotated[
    Path | None, typer.Option(help="Loaded first if the file exists, saved afterwards.", metavar="FILE", dir_okay=False)
]
MaxNewTokens = Annotated[int, typer.Option(help="An answer's most tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that sum to this.")]
Seed = Annotated[int | None, typer.Option(help="For the same answer again.", show_default=False)]
Window = Annotated[
    int | None,
    typer.Option(help="Tokens attention sees at most, if fewer than the model's own window.", show_default=False),
]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """A fixed-size memory for long context, inlaid into a pretrained transformer."""
    if show:
        console.print(f"inlay {__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
) -> None:
    """Train what a recipe says; everything about the run lands in RUNS/NAME."""
    from accelerate import PartialState

    from inlay.train.kinds import recipe_kind

    kind = recipe_kind(recipe)
    if kind == "compress":
        cli_compress.train(recipe, overrides, runs, resume)
        return
    if kind == "moshi":
        from inlay.train.moshi import train_moshi
        from inlay.train.moshi_recipe import load_moshi_recipe
        from inlay.train.moshi_report import write_moshi_report

        moshi = load_moshi_recipe(recipe, overrides or ())
        directory = moshi.run_dir or runs / moshi.name
        train_moshi(moshi, directory, resume=resume, console=console)
        if not PartialState().is_main_process:
            return
        console.print(f"report: {write_moshi_report(directory)}", soft_wrap=True)
        return
    from inlay.train import load_recipe, train, write_run_report

    loaded = load_recipe(recipe, overrides or ())
    directory = runs / loaded.name
    train(loaded, directory, resume=resume, console=console)
    if not PartialState().is_main_process:
        return
    console.print(f"report: {write_run_report(directory)}", soft_wrap=True)


@app.command()
def evaluate(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run's directory; with --memories also a recipe of the comparison.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    memories: Annotated[
        bool, typer.Option("--memories", help="Compare fast weights with soft tokens at equal bytes.")
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Measure a finished run with its memory on and with η = 0: loss by position, growing context, recall.

    Of a run on text, evaluate.KEY=VALUE measures with other settings than its
    recipe's. With --memories: train both memories from one decoder, as a recipe says
    (recipes/memories.yaml when none is given), and ask both the same
    questions. What was trained before is only asked.
    """
    if memories:
        from inlay.memories import evaluate_memories

        evaluate_memories(run, overrides or (), runs, console, errors)
        return
    if run is None:
        raise typer.BadParameter("give a run's directory", param_hint="RUN")
    from inlay.report.console import print_section, progress_bar
    from inlay.train.kinds import recipe_kind

    kind = recipe_kind(run / "recipe.yaml")
    changes = overrides or []
    if other := [change for change in changes if kind not in ("text", None) or not change.startswith("evaluate.")]:
        raise typer.BadParameter(
            f"{other[0]}: of a finished run only evaluate.KEY=VALUE can be given, and of one on text",
            param_hint="OVERRIDES",
        )
    if kind == "compress":
        cli_compress.evaluate(run)
        return
    if kind == "moshi":
        from inlay.train.moshi_report import evaluate_moshi_run

        with progress_bar(errors, "evaluating") as shown:
            moshi, page = evaluate_moshi_run(run, progress=shown)
        for section in moshi.sections():
            print_section(console, section)
        console.print(f"figures: {run / 'evaluation.json'}\nreport: {page}", soft_wrap=True)
        return
    from inlay.data import load_data
    from inlay.evaluate import evaluate_model
    from inlay.train import load_recipe, load_run, write_run_report

    loaded = load_run(run)
    settings = load_recipe(run / "recipe.yaml", changes).evaluate.model_dump()
    data = load_data(loaded.data_config)
    with progress_bar(errors, "evaluating") as shown:
        evaluation = evaluate_model(loaded.model, data, **settings, progress=shown)
    figures, sections = evaluation.write(run / "evaluation.json"), evaluation.sections()
    for section in sections:
        print_section(console, section)
    console.print(f"figures: {figures}", soft_wrap=True)
    console.print(f"report: {write_run_report(run, sections)}", soft_wrap=True)


@app.command()
def doctor(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the report goes; runs/doctor/NAME when not given.", metavar="DIR")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Memory of the device in GB; this machine's when not given.", min=0.0, show_default=False),
    ] = None,
) -> None:
    """Say before training why a memory will learn or not, and what fits.

    Loads the recipe's model and one batch of its data, measures, and writes
    report.html and diagnosis.json. Exit code 0: healthy, 1: warnings, 2: it
    will not learn. Takes recipes of either memory: fast weights (inlay train;
    text or Moshi) and soft tokens (inlay compress train).
    """
    from inlay.doctor.compress_recipes import examine_compress_recipe
    from inlay.doctor.recipes import examine_recipe
    from inlay.train import load_recipe
    from inlay.train.compress_recipe import load_compress_recipe
    from inlay.train.kinds import recipe_kind

    with console.status("") as status:

        def progress(name: str) -> None:
            status.update(f"examining: {name}")

        kind = recipe_kind(recipe)
        if kind == "compress":
            if budget is not None:
                raise typer.BadParameter("memory is planned for recipes of fast weights alone", param_hint="--budget")
            diagnosis = examine_compress_recipe(load_compress_recipe(recipe, overrides or ()), progress=progress)
        elif kind == "moshi":
            from inlay.doctor.moshi_recipes import examine_moshi_recipe
            from inlay.train.moshi_recipe import load_moshi_recipe

            loaded = load_moshi_recipe(recipe, overrides or ())
            diagnosis = examine_moshi_recipe(loaded, source=recipe, budget_gb=budget, progress=progress)
        else:
            text = load_recipe(recipe, overrides or ())
            diagnosis = examine_recipe(text, source=recipe, budget_gb=budget, progress=progress)
    diagnosis.print(console)
    figures, report = diagnosis.write(output or Path("runs") / "doctor" / diagnosis.subject)
    console.print(f"figures: {figures}\nreport: {report}", soft_wrap=True)
    raise typer.Exit(diagnosis.exit_code)


@app.command()
def generate(
    run: RunPath,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read first, however long.", metavar="FILE", exists=True, dir_okay=False)
    ] = None,
    prompt: Annotated[str, typer.Option(help="Read after the file.", show_default=False)] = "",
    session: SessionPath = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = None,
    window: Window = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the answer there, not to the terminal.", metavar="FILE", dir_okay=False),
    ] = None,
) -> None:
    """Read a prompt of any length and go on with it.

    A session file keeps the memory between calls, in a bounded size, and
    nothing else: attention begins anew with each call, so of earlier calls the
    model knows what its memory holds.
    """
    from inlay.chat import Conversation, Sampling
    from inlay.terminal import generate, read_prompt
    from inlay.train import load_run

    sampling = Sampling(max_new_tokens, temperature, top_p)
    text = read_prompt(prompt_file, prompt)
    conversation = Conversation(load_run(run), session, window=window, seed=seed)
    generate(conversation, text, sampling, output=output, status=errors)
    if session is not None:
        conversation.save(session)


@app.command()
def chat(
    run: RunPath,
    session: SessionPath = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = None,
    window: Window = None,
) -> None:
    """Talk with a run; /help tells the commands.

    Within a chat attention and the memory both go on. A session file keeps the
    memory alone, so of earlier chats the model knows what its memory holds.
    """
    from inlay.chat import Conversation, Sampling
    from inlay.terminal import Chat
    from inlay.train import load_run

    sampling = Sampling(max_new_tokens, temperature, top_p)
    conversation = Conversation(load_run(run), session, window=window, seed=seed)
    Chat(conversation, console, sampling, session_path=session).run()


@app.command()
def demo(
    runs: Runs = Path("runs"),
) -> None:
    """Train with and without a memory, on recall and on real text, evaluate both, and write one report."""
    from inlay.demo import run_demo

    run_demo(runs / "demo", console)


_PLACE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR}
"""What is wrong with the place that was to be written to or read: the error says which."""


def main() -> None:
    """Run the command; what was done wrong is told without a traceback."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        from inlay.data import DataError
        from inlay.fastweight import InlayError

        place = isinstance(error, OSError) and error.errno in _PLACE_ERRORS
        if not (place or isinstance(error, InlayError | DataError)):
            raise
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
