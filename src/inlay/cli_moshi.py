"""``inlay moshi``: conversations checked, made and encoded for Kyutai's Moshi."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from inlay import cli_moshi_run

app = typer.Typer(help="Kyutai's Moshi with a memory: long conversations.", no_args_is_help=True)
app.command("run")(cli_moshi_run.hear)
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)

DataPaths = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="path:weight,path:weight; a path is a .jsonl file of moshi-finetune's format or a folder of them.",
        show_default=False,
    ),
]


@app.command()
def check(data: DataPaths) -> None:
    """Look at every conversation of DATA and tell all that is wrong with it, with file and line.

    Exit code 0: all sound, 1: there are problems.
    """
    from inlay.data.audio_check import check_audio

    with _progress("checking") as progress:
        report = check_audio(data, progress=progress)
    for table in report.tables():
        console.print(table)
    raise typer.Exit(report.exit_code)


@app.command()
def encode(
    data: DataPaths,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The codes' folder.", show_default=False)],
    weights: Annotated[
        str, typer.Option(help="Moshi's weights: a hub repository, or a folder with its files.")
    ] = cli_moshi_run.MOSHI,
    workers: Annotated[int, typer.Option(help="Processes that encode; they share a GPU.", min=1)] = 1,
    device: Annotated[
        str | None, typer.Option(help="Where Mimi runs; a GPU if there is one.", show_default=False)
    ] = None,
    on_error: Annotated[
        Literal["raise", "skip"],
        typer.Option(help="raise: encode nothing until DATA is sound. skip: leave problems out."),
    ] = "raise",
    keep_and_shift: Annotated[
        bool, typer.Option("--keep-and-shift", help="Keep word pieces that are late, and shift the words behind them.")
    ] = False,
) -> None:
    """Turn conversations into Mimi's codes and a text stream, once, for training.

    A call that was stopped, by whatever, goes on when it is given again.
    """
    from inlay.devices import chosen_device
    from inlay.moshi.encode import encode_data
    from inlay.moshi.weights import load_checkpoint

    checkpoint = load_checkpoint(weights, device=chosen_device(device))
    with _progress("seconds of audio") as progress:
        summary = encode_data(
            data,
            out,
            checkpoint,
            workers=workers,
            on_error=on_error,
            keep_and_shift=keep_and_shift,
            progress=progress,
        )
    console.print(
        f"{out}: {summary.files:,} conversations, {summary.frames:,} frames ({summary.hours:.2f} h); "
        f"{summary.encoded:,} encoded now, {summary.skipped:,} skipped",
        soft_wrap=True,
    )


@app.command()
def synthesise(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The conversations' folder.", show_default=False)],
    conversations: Annotated[int, typer.Option(help="How many.", min=1)] = 32,
    duration: Annotated[float, typer.Option(help="Seconds of each.")] = 120.0,
    return_after: Annotated[float, typer.Option(help="Seconds until a phrase returns, at least.")] = 30.0,
    style: Annotated[
        Literal["talk", "quiz"], typer.Option(help="talk: sentences. quiz: catchwords, with many more returns.")
    ] = "talk",
    seed: Annotated[int, typer.Option(help="Another seed makes other conversations.")] = 0,
) -> None:
    """Make conversations with espeak-ng in which phrases return, with exact word alignments."""
    from inlay.data.speech import SpeechConfig, synthesise

    config = SpeechConfig(
        conversations=conversations, duration=duration, return_after=return_after, seed=seed, style=style
    )
    with _progress("conversations") as progress:
        manifest = synthesise(config, out, progress=progress)
    console.print(f"conversations: {manifest}", soft_wrap=True)


@app.command()
def demo(runs: Annotated[Path, typer.Option(help="Where the demo's folder is made.")] = Path("runs")) -> None:
    """Make conversations, train a toy Moshi with and without a memory, stream; one report. About 6 minutes."""
    from inlay.moshi_demo import run_moshi_demo

    run_moshi_demo(runs / "moshi-demo", console)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float, float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def told(done: float, total: float) -> None:
            bar.update(task, completed=round(done), total=round(total))

        yield told
