"""``inlay compress``: a compressor trained, evaluated, and put to use on documents."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="A long context as a few soft tokens before a frozen language model.", no_args_is_help=True)
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)

RunPath = Annotated[
    Path, typer.Argument(help="A finished compression run's directory.", metavar="RUN", show_default=False)
]
Runs = Annotated[Path, typer.Option(help="Where runs are kept.")]
BatchSize = Annotated[int, typer.Option(help="How many at a time.", min=1)]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A compression recipe in YAML.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. trainer.max_steps=100")] = None,
    runs: Runs = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
) -> None:
    """Train the compressor of a recipe; everything about the run lands in RUNS/NAME."""
    from accelerate import PartialState

    from inlay.train.compress import train_compressor
    from inlay.train.compress_recipe import load_compress_recipe
    from inlay.train.compress_report import write_compress_report

    loaded = load_compress_recipe(recipe, overrides or ())
    directory = runs / loaded.name
    train_compressor(loaded, directory, resume=resume, console=console)
    if not PartialState().is_main_process:
        return
    console.print(f"report: {write_compress_report(directory)}", soft_wrap=True)


@app.command()
def evaluate(directory: RunPath) -> None:
    """Answer a run's held-out questions from soft tokens and from every baseline, and look for collapse."""
    from inlay.report.console import print_section, progress_bar
    from inlay.train.compress_report import measure_compress_run, write_compress_report

    suite = measure_compress_run(directory, shown=partial(progress_bar, errors))
    for section in suite.sections():
        print_section(console, section)
    console.print(f"figures: {suite.write(directory / 'evaluation.json')}", soft_wrap=True)
    console.print(f"report: {write_compress_report(directory, suite.sections())}", soft_wrap=True)


@app.command()
def demo(runs: Runs = Path("runs")) -> None:
    """Teach a small model to answer from text, then a compressor to say it in a quarter and an eighth of the tokens."""
    from inlay.compress_demo import run_compress_demo

    run_compress_demo(runs / "compress-demo", console)


@app.command()
def encode(
    documents: Annotated[
        str,
        typer.Argument(metavar="DOCS", help="Text files or JSON lines: a file, folder or glob.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The store's own folder.", show_default=False)],
    directory: Annotated[
        Path, typer.Option("--run", help="The finished run whose compressor writes.", show_default=False)
    ],
    ratio: Annotated[
        int | None, typer.Option(help="Tokens per soft token; the run's when not given.", min=1, show_default=False)
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Soft tokens per document, in place of a ratio.", min=1, show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a store that is there, and leave out what it holds.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Likewise, and encode anew the documents that have changed.")
    ] = False,
    batch_size: BatchSize = 8,
    text_field: Annotated[str, typer.Option(help="Key of the text in JSON lines.")] = "text",
    id_field: Annotated[str, typer.Option(help="Key of the id in JSON lines; without it, file and line.")] = "id",
) -> None:
    """Write documents into soft tokens and keep them in a store.

    A document is called by its path within DOCS, a line by its id. A call that
    was stopped, by whatever, goes on with --resume.
    """
    from inlay.report.console import progress_bar
    from inlay.softtoken.document_files import read_documents
    from inlay.softtoken.documents import encode_documents
    from inlay.train.compress import load_compress_run

    texts = read_documents(documents, text_field=text_field, id_field=id_field)
    run = load_compress_run(directory)
    with progress_bar(errors, "encoding") as progress:
        report = encode_documents(
            run,
            texts,
            out,
            ratio=ratio,
            slots=slots,
            batch_size=batch_size,
            resume=resume,
            replace=replace,
            progress=progress,
        )
    console.print(str(report), highlight=False, soft_wrap=True)


@app.command()
def answer(
    path: Annotated[
        Path, typer.Argument(metavar="STORE", help="What inlay compress encode wrote.", show_default=False)
    ],
    questions: Annotated[
        list[str], typer.Option("--question", help="Asked of the document; may be given again.", show_default=False)
    ],
    document: Annotated[
        str | None, typer.Option("--doc", help="Its id; not needed where there is one.", show_default=False)
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--run", help="The run that wrote it, if it has moved.", show_default=False)
    ] = None,
    batch_size: BatchSize = 8,
) -> None:
    """Answer questions about a stored document, one answer a line."""
    from inlay.softtoken.documents import answer
    from inlay.softtoken.store import SoftTokenStore
    from inlay.terminal import printable
    from inlay.train.compress import load_compress_run

    store = SoftTokenStore.open(path)
    name = store.only_document() if document is None else store.find(document).id
    run = load_compress_run(directory or store.run())
    for question in questions:
        if unknown := run.layout.unknown(run.layout.context_ids(question)):
            words = f"{unknown} of the tokens of {question!r} are unknown to the decoder's tokenizer"
            errors.print(f"warning: {printable(words)}", markup=False, highlight=False, soft_wrap=True)
    for text in answer(run, store, [(name, question) for question in questions], batch_size=batch_size):
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
