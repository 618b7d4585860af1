"""The two ways to hold a conversation at a terminal: ``inlay generate`` for one answer, ``inlay chat`` for many."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from inlay.chat import ChatError, Conversation, Sampling
from inlay.fastweight import FastWeightProjection, InlayError
from inlay.files import write_whole

HELP = {
    "/memory": "what the memory has read and how much it holds",
    "/reset": "forget everything that was said",
    "/save [FILE]": "write the memory to FILE, or to the one given with --session",
    "/help": "these commands",
    "/quit": "leave (Ctrl-D too); with --session the memory is saved first",
}

_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Text without what would steer the terminal: control characters other than line feed and tab."""
    return text.translate(_CONTROLS)


def read_prompt(file: Path | None, text: str) -> str:
    """The text of ``file``, if there is one, and then ``text``.

    Raises:
        ChatError: Both are blank, or the file is not UTF-8.
    """
    try:
        prompt = ("" if file is None else file.read_text(encoding="utf-8")) + text
    except UnicodeDecodeError as error:
        raise ChatError(f"{file} is not UTF-8 text: {error}") from error
    if not prompt.strip():
        raise ChatError("there is nothing to read: give --prompt-file FILE, --prompt TEXT, or both")
    return prompt


def generate(
    conversation: Conversation, prompt: str, sampling: Sampling, *, output: Path | None, status: Console
) -> None:
    """Answer ``prompt`` once: to the file ``output``, or piece by piece to standard output.

    Args:
        conversation: Goes on from where it stands.
        prompt: Read in pieces, however long.
        sampling: How tokens are chosen.
        output: Where the answer goes, in a folder that is made if missing; None for standard output.
        status: Where reading is shown while it lasts.
    """
    with _reading(status) as progress:
        pieces = conversation.say(prompt, sampling, progress=progress)
        if output is not None:
            write_whole(output, "".join(pieces))
            return
        for piece in pieces:
            sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
        if sys.stdout.isatty():
            sys.stdout.write("\n")


@contextmanager
def _reading(status: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar that is gone when all is read; nothing where ``status`` is no terminal."""
    if not status.is_terminal:
        yield lambda done, total: None
        return
    with Progress(console=status, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done == total:
                bar.stop()  # before the first piece of the answer

        yield progress


class Chat:
    """A conversation line by line, with commands that begin with a slash.

    Attributes:
        conversation: What was said.
        session_path: Where ``/save`` and leaving write to; None for nowhere.
    """

    def __init__(
        self,
        conversation: Conversation,
        console: Console,
        sampling: Sampling,
        *,
        session_path: Path | None = None,
        read_line: Callable[[str], str] = input,
    ) -> None:
        self.conversation = conversation
        self.session_path = session_path
        self._console = console
        self._sampling = sampling
        self._read_line = read_line

    def run(self) -> None:
        """Until ``/quit`` or the end of the input. Ctrl-C interrupts an answer, never the program."""
        with suppress(ImportError):  # with it, input() edits lines and remembers them
            import readline  # noqa: F401
        self._console.print(self._greeting())
        while True:
            try:
                line = self._read_line("> ").strip()
            except KeyboardInterrupt:
                self._console.print("\n[dim]Ctrl-D or /quit leaves[/]")
                continue
            except EOFError:
                self._console.print()
                break
            if line == "/quit":
                break
            if not line:
                continue
            try:
                self._command(line) if line.startswith("/") else self._answer(line)
            except (InlayError, OSError) as error:
                self._console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        if self.session_path is not None:
            self._save(self.session_path)

    def _greeting(self) -> str:
        conversation = self.conversation
        lines = [f"[bold]{escape(conversation.run.recipe.name)}[/] answers"]
        if conversation.session is None:
            lines[0] += ", without a memory"
        elif read := int(conversation.session.tokens_read):
            lines[0] += f", and remembers {read:,} tokens from {escape(str(self.session_path))}"
        if not conversation.tokenizer.chat_template:
            lines.append("This model was not trained to chat: it continues what you write.")
        return "\n".join([*lines, "[dim]/help for commands, Ctrl-C interrupts an answer, Ctrl-D leaves[/]"])

    def _answer(self, text: str) -> None:
        with _interrupts() as interrupted:
            for piece in self.conversation.say(text, self._sampling, stopped=interrupted):
                self._console.print(printable(piece), end="", markup=False, highlight=False, soft_wrap=True)
            self._console.print("\n[dim]interrupted[/]" if interrupted() else "")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/memory":
            self._console.print(memory_table(self.conversation))
        elif name == "/reset":
            self.conversation.reset()
            self._console.print("[dim]everything is forgotten[/]")
        elif name == "/save":
            path = Path(rest.strip()) if rest.strip() else self.session_path
            if path is None:
                raise ChatError("/save needs a file, /save FILE, unless the chat was begun with --session FILE")
            self._save(path)
        elif name == "/help":
            self._console.print(self._help())
        else:
            known = ", ".join(command.split()[0] for command in HELP)
            raise ChatError(f"{name} is no command; there are {known}")

    def _save(self, path: Path) -> None:
        self.conversation.save(path)
        self._console.print(f"[dim]memory saved to {escape(str(path))}[/]", highlight=False, soft_wrap=True)

    @staticmethod
    def _help() -> Table:
        table = Table.grid(padding=(0, 2))
        for command, meaning in HELP.items():
            table.add_row(f"[bold]{escape(command)}[/]", meaning)
        return table


def memory_table(conversation: Conversation) -> Table:
    """What the memory has read, and how large its sums are beside the weights they are added to.

    Raises:
        ChatError: The run has no memory.
    """
    session, memory = conversation.session, conversation.run.memory
    if session is None or memory is None:
        raise ChatError(f"the run in {conversation.run.directory} has no memory")
    table = Table(title="Memory", title_justify="left", caption_justify="left")
    for heading in ("block", "norm of the sum", "η · sum / W0"):
        table.add_column(heading, justify="right")
    for index, norm in session.sum_norms().items():
        share = _share(memory.layers[index], float(norm) * memory.config.eta)
        table.add_row(str(index), f"{float(norm):.4g}", share)
    table.caption = (
        f"tokens read: {int(session.tokens_read):,}\n"
        f"chunks committed: {int(session.chunks_committed):,} of {memory.config.chunk_size:,} tokens\n"
        f"size: {session.nbytes / 2**20:,.2f} MiB"
    )
    return table


def _share(layer: FastWeightProjection, norm: float) -> str:
    return f"{norm / float(layer.base_norm()):.2%}" if layer.weight.is_floating_point() else "W0 is quantized"


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C only sets a flag, so that no forward, and with it the memory, is cut off half-way."""
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
