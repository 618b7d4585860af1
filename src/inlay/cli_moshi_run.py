"""``inlay moshi run``: a recording in, Moshi's answer out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from inlay.moshi.duplex import Reply
    from inlay.moshi.run import Run

MOSHI = "kyutai/moshiko-pytorch-bf16"
"""Whose files are taken when nothing else is said."""
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)


def hear(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="The user's voice; of a stereo file the right channel.", exists=True, dir_okay=False
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.wav", help="Moshi's answer, as long as IN.", dir_okay=False)],
    run: Annotated[
        Path | None,
        typer.Option(
            help="A finished run of `inlay train`: its checkpoint, what was trained, its window.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help=f"Moshi's weights: a hub repository, or a folder with its files. [default: {MOSHI}]",
            show_default=False,
        ),
    ] = None,
    finetuned: Annotated[
        Path | None,
        typer.Option(
            help="What was trained on top: adapters and memory, or a memory alone.", metavar="DIR", show_default=False
        ),
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(
            help="The whole conversation: loaded first if the file exists, saved afterwards.",
            metavar="FILE",
            dir_okay=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write report.html, run.json and commits.jsonl there.", metavar="DIR", file_okay=False),
    ] = None,
    stereo: Annotated[bool, typer.Option("--stereo", help="Put the user's voice on the right of OUT.")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Whether a trained memory is used.")] = True,
    temperature: Annotated[
        float | None, typer.Option(help="Of the voice; 0 takes the likeliest tokens.", min=0.0, show_default=False)
    ] = None,
    text_temperature: Annotated[
        float | None, typer.Option(help="Of the words; 0 takes the likeliest.", min=0.0, show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For the same answer again.", show_default=False)] = None,
    device: Annotated[
        str | None, typer.Option(help="Where Moshi runs; a GPU if there is one.", show_default=False)
    ] = None,
) -> None:
    """Let Moshi hear a recording and answer, full duplex, at any length.

    The transcript is printed as Moshi speaks. A session file keeps the whole
    conversation in a constant size, and the next call goes on bit for bit.
    """
    from inlay.devices import chosen_device
    from inlay.fastweight import find_memory
    from inlay.moshi.duplex import DuplexError, Voice, load_moshi
    from inlay.moshi.run import require_place, run_file
    from inlay.moshi.run_report import write_run
    from inlay.report.numbers import short

    if run is not None and (checkpoint is not None or finetuned is not None):
        raise DuplexError("a run has a checkpoint and trained weights of its own; give --run alone")
    for what, path in (("answer", target), ("session", session), ("report", report)):
        if path is not None:
            require_place(path, what, source)
    if target.suffix.lower() != ".wav":
        raise DuplexError(f"the answer is written as WAV; call it {target.with_suffix('.wav')}")
    where = chosen_device(device)
    with errors.status("loading Moshi"):
        if run is not None:
            from inlay.train.moshi import load_moshi_run

            moshi = load_moshi_run(run, device=where).moshi
        else:
            moshi = load_moshi(checkpoint or MOSHI, finetuned=finetuned, device=where)
    attached = find_memory(moshi.lm)
    if attached is not None and not memory:
        attached.detach()
    voice = Voice(temp=temperature, temp_text=text_temperature, seed=seed)
    with _Listening() as listening:
        done = run_file(moshi, source, target, voice=voice, session=session, stereo=stereo, on_frame=listening.frame)
        listening.lines(done)
    pace = f"{done.real_time_factor:.2f} of real time, {done.late_frames:,} of {done.frames:,} frames late"
    console.print(f"heard {done.audio_seconds:,.1f} s at {pace}", highlight=False)
    if done.chunk_size is not None:
        size = short(100 * done.largest_sum, 2)
        told = f"{done.chunks:,} chunks of {done.chunk_size} frames; ‖ηS‖ up to {size} % of ‖W0‖"
        console.print(f"memory: {told}", highlight=False)
    console.print(f"answer: {target}", soft_wrap=True)
    if session is not None:
        console.print(f"session: {session}", soft_wrap=True)
    if report is not None:
        console.print(f"report: {write_run(done, report)}", soft_wrap=True)


class _Listening:
    """The transcript, line by line as it is spoken, above what is being said and how far and how fast it goes."""

    def __init__(self) -> None:
        from inlay.terminal import printable

        self._printable = printable
        columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[pace]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=errors, transient=True)
        self._task = self._bar.add_task("listening", total=None, pace="")
        self._printed = 0

    def __enter__(self) -> _Listening:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def frame(self, run: Run, total: int, reply: Reply) -> None:
        """Take what a frame brought."""
        self.lines(run)
        pace = f"{run.audio_seconds:.1f} s at {run.real_time_factor:.2f} of real time"
        said = self._printable(run.saying).strip()[-40:] or "listening"
        self._bar.update(self._task, completed=run.frames, total=total, pace=pace, description=said)

    def lines(self, run: Run) -> None:
        """Print the lines of the transcript that are new."""
        for second, line in run.transcript[self._printed :]:
            minutes, rest = divmod(second, 60)
            console.print(
                f"{minutes:3.0f}:{rest:04.1f}  {self._printable(line)}", markup=False, highlight=False, soft_wrap=True
            )
        self._printed = len(run.transcript)
