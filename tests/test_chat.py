"""Talking with a run: what is read, what is answered, what is kept from one process to the next."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import inlay.chat
from inlay.chat import ChatError, Conversation, PieceDecoder, Sampling
from inlay.cli import app, main
from inlay.data import ByteTokenizer, load_tokenizer
from inlay.fastweight import CheckpointError
from inlay.terminal import Chat, memory_table, printable
from inlay.train import Recipe, Run, check_recipe, load_run, train

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MEMORY = {"layers": [1], "chunk_size": 8, "eta": 0.1, "init": "next_token"}
GREEDY = Sampling(max_new_tokens=12, temperature=0)
TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny runs: two with a memory (of two seeds), one with a sliding window, one without a memory, one recall."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "corpus"
    corpus.mkdir()
    for index in range(8):
        (corpus / f"{index}.txt").write_text(f"file {index} says " + "abc " * (5 + index))
    text = {
        "task": "text",
        "source": "files",
        "path": str(corpus),
        "sequence_length": 48,
        "packing": "concatenate",
        "eval_fraction": 0.3,
        "tokenizer": {"kind": "bytes"},
    }
    recall = {"task": "recall", "sequence_length": 32, "pairs": 4, "keys": 8, "values": 8, "eval_examples": 8}
    sliding = MODEL | {"model_type": "mistral", "sliding_window": 16}
    made: dict[str, dict[str, Any]] = {
        "memory": {},
        "other": {"seed": 7},
        "sliding": {"model": {"config": sliding}},
        "plain": {"memory": None},
        "recall": {"data": recall},
    }
    for name, sections in made.items():
        trainer = {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True, "use_cpu": True}
        raw = {"name": name, "model": {"config": MODEL}, "memory": MEMORY, "data": text, "mode": "all"}
        train(check_recipe(Recipe, raw | {"trainer": trainer} | sections), folder / name)
    return folder


@pytest.fixture(scope="module")
def run(runs: Path) -> Run:
    return load_run(runs / "memory")


def answer(conversation: Conversation, text: str, sampling: Sampling = GREEDY) -> str:
    return "".join(conversation.say(text, sampling))


@pytest.mark.parametrize("name", ["memory", "plain", "sliding"])
def test_a_greedy_answer_is_what_generate_gives(runs: Path, name: str) -> None:
    run = load_run(runs / name)
    conversation = Conversation(run)
    ids = conversation.tokenizer(TEXT, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": conversation.tokenizer.eos_token_id}
    expected = run.model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], pad_token_id=0, **options)
    text = conversation.tokenizer.decode(expected[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer(conversation, TEXT) == text


def test_a_prompt_read_in_pieces_gives_the_same_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(Conversation(run), TEXT)
    monkeypatch.setattr(inlay.chat, "PIECE", 7)
    told: list[tuple[int, int]] = []
    conversation = Conversation(run)
    pieces = list(conversation.say(TEXT, GREEDY, progress=lambda done, total: told.append((done, total))))
    assert "".join(pieces) == whole
    assert told == [(at, 43) for at in (7, 14, 21, 28, 35, 42, 43)]


@pytest.mark.parametrize(("name", "most"), [("memory", 64), ("plain", 64), ("sliding", 16)])
def test_attention_is_bounded_and_the_memory_reads_every_token_once(runs: Path, name: str, most: int) -> None:
    conversation = Conversation(load_run(runs / name))
    lengths = []
    for _ in conversation.say("abcd " * 60, Sampling(max_new_tokens=100, temperature=0)):
        lengths += [layer.keys.shape[-2] for layer in conversation._cache.layers]
    assert max(lengths) <= most
    if conversation.session is not None:
        assert conversation.session.tokens_read.tolist() == [400]
        assert conversation.session.chunks_committed.tolist() == [49]


def test_a_smaller_window_can_be_asked_for(run: Run) -> None:
    conversation = Conversation(run, window=16)
    answer(conversation, TEXT)
    assert conversation._cache.get_seq_length() <= 16
    with pytest.raises(ChatError, match="window must be at least 2"):
        Conversation(run, window=1)


def test_with_a_seed_sampling_gives_the_same_answer_again(run: Run) -> None:
    drawn = [answer(Conversation(run, seed=seed), TEXT, Sampling(max_new_tokens=40)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_top_p_and_temperature_narrow_the_choice() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def seen(**options: float) -> set[int]:
        return {Sampling(**options).choose(logits, generator) for _ in range(300)}

    assert seen(temperature=1.0, top_p=1.0) == {0, 1, 2, 3}
    assert seen(temperature=1.0, top_p=0.8) == {0, 1}
    assert seen(temperature=1.0, top_p=0.01) == {0}
    assert seen(temperature=0) == {0}
    for options, message in (({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p")):
        with pytest.raises(ChatError, match=f"{message} must be"):
            Sampling(**options)


def test_after_a_reset_the_conversation_is_as_new(run: Run) -> None:
    conversation = Conversation(run)
    first = answer(conversation, TEXT)
    second = answer(conversation, TEXT)
    conversation.reset()
    assert (answer(conversation, TEXT), answer(conversation, TEXT)) == (first, second)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that answers choose from here on."""
    tokens: list[int] = []
    choose = Sampling.choose

    def noted(self: Sampling, *given: Any) -> int:
        tokens.append(choose(self, *given))
        return tokens[-1]

    monkeypatch.setattr(Sampling, "choose", noted)
    return tokens


def test_an_answer_that_is_left_is_part_of_the_conversation(run: Run, tmp_path: Path, chosen: list[int]) -> None:
    conversation = Conversation(run)
    pieces = conversation.say(TEXT, GREEDY)
    assert conversation.is_new
    assert next(pieces) + next(pieces)
    pieces.close()
    conversation.save(tmp_path / "session")
    assert conversation.session is not None
    assert conversation.session.tokens_read.tolist() == [43 + len(chosen)]


def test_reading_stops_between_pieces(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inlay.chat, "PIECE", 7)
    conversation = Conversation(run)
    assert list(conversation.say(TEXT, GREEDY, stopped=lambda: True)) == []
    assert conversation.session is not None
    assert conversation.session.tokens_read.tolist() == [7]
    assert answer(conversation, "")


def test_an_empty_prompt_continues(run: Run, chosen: list[int]) -> None:
    half = Sampling(max_new_tokens=6, temperature=0)
    conversation = Conversation(run)
    answer(conversation, TEXT, half)
    answer(conversation, "", half)
    answer(Conversation(run), TEXT)
    assert chosen[:12] == chosen[12:]


def test_a_saved_conversation_goes_on_with_the_memory_alone(runs: Path, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "alice"
    first = Conversation(run, path)
    answer(first, TEXT)
    first.save(path)
    size = path.stat().st_size
    second = Conversation(load_run(runs / "memory"), path)
    assert not second.is_new
    assert second._cache.get_seq_length() == 0
    given = answer(second, "and then?")
    first._begin()  # as a new process: no KV cache
    assert answer(first, "and then?") == given
    assert second._logits is not None
    assert not torch.equal(second._logits, _fresh_logits(run))
    second.save(path)
    assert path.stat().st_size < 2 * size


def _fresh_logits(run: Run) -> torch.Tensor:
    conversation = Conversation(run)
    answer(conversation, "and then?")
    assert conversation._logits is not None
    return conversation._logits


def test_what_cannot_be_had_is_refused(runs: Path, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "alice"
    conversation = Conversation(run)
    answer(conversation, TEXT)
    conversation.save(path)
    with pytest.raises(CheckpointError, match="another training"):
        Conversation(load_run(runs / "other"), path)
    with pytest.raises(ChatError, match="has no memory, so it has no session"):
        Conversation(load_run(runs / "plain"), path)
    with pytest.raises(ChatError, match="has no memory, so there is nothing to save"):
        Conversation(load_run(runs / "plain")).save(path)
    with pytest.raises(ChatError, match="of task recall, whose symbols are no text"):
        Conversation(load_run(runs / "recall"))
    assert run.memory is not None
    run.memory.session(3).save(path)
    with pytest.raises(ChatError, match="holds 3 conversations"):
        Conversation(run, path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=20))
def test_pieces_make_up_the_text_and_no_character_is_cut(text: str) -> None:
    tokenizer = load_tokenizer(ByteTokenizer(kind="bytes"), [])
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.add(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join([*pieces, decoder.rest()]) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_bytes_that_are_no_character_do_not_wait_for_ever() -> None:
    tokenizer = load_tokenizer(ByteTokenizer(kind="bytes"), [])
    decoder = PieceDecoder(tokenizer)
    (half,) = tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    pieces = [decoder.add(half) for _ in range(20)]
    assert sum(bool(piece) for piece in pieces) == 2
    assert decoder.rest() == "\ufffd" * 4


TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_with_a_chat_template_two_turns_are_read_as_the_template_writes_them(run: Run) -> None:
    conversation = Conversation(run)
    conversation.tokenizer.chat_template = TEMPLATE
    first = conversation.tokenizer.decode(conversation._encode("hello"))
    assert first == "<s>[user]hello[end]\n[assistant]"
    answer(conversation, "hello")
    second = conversation.tokenizer.decode(conversation._encode("more"))
    assert second == "[end]\n[user]more[end]\n[assistant]"


def test_what_steers_a_terminal_is_not_passed_on() -> None:
    assert printable("a\x1b[2Jb\r\n\tc\x9b é") == "a\ufffd[2Jb\ufffd\n\tc\ufffd é"


def chat(conversation: Conversation, *lines: str | type[BaseException], session_path: Path | None = None) -> str:
    """What the terminal shows when these lines are typed, at 80 columns."""
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    typed: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

    def read_line(prompt: str) -> str:
        line = next(typed)
        if not isinstance(line, str):
            raise line
        console.print(prompt + line, markup=False)
        return line

    with console.file:
        Chat(conversation, console, GREEDY, session_path=session_path, read_line=read_line).run()
        return console.export_text()


def test_a_chat_answers_and_obeys(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "alice"
    expected = answer(Conversation(run), TEXT)
    shown = chat(Conversation(run), "", TEXT, "/memory", "/help", "/save", KeyboardInterrupt, "/save " + str(path))
    assert printable(expected) in shown
    assert "it continues what you write" in shown
    assert re.search(r"tokens read: 55", shown)
    assert re.search(r"chunks committed: 6 of 8 tokens", shown)
    assert "/reset" in shown
    assert "/save needs a file" in shown
    assert "Ctrl-D or /quit leaves" in shown
    assert path.is_file()

    again = chat(Conversation(run, path), "/reset", "/memory", "/nonsense", "/quit", session_path=path)
    assert "remembers 55 tokens" in again
    assert "tokens read: 0" in again
    assert "/nonsense is no command; there are /memory, /reset, /save, /help, /quit" in again
    assert Conversation(run, path).is_new  # saved on leaving
    assert max(map(len, (shown + again).splitlines())) <= 80 + len(str(path))


def test_ctrl_c_interrupts_the_answer_and_the_conversation_goes_on(
    request: pytest.FixtureRequest, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a process of the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    conversation, choose, calls = Conversation(run), Sampling.choose, 0

    def pressed(self: Sampling, logits: torch.Tensor, generator: torch.Generator) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return choose(self, logits, generator)

    monkeypatch.setattr(Sampling, "choose", pressed)
    shown = chat(conversation, TEXT, TEXT)
    assert shown.count("interrupted") == 1
    assert calls == 3 + GREEDY.max_new_tokens
    assert conversation.session is not None
    assert not conversation.session.state.interrupted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_without_a_memory_chats_and_says_that_it_has_none(runs: Path) -> None:
    shown = chat(Conversation(load_run(runs / "plain")), TEXT, "/memory", "/save x")
    assert "without a memory" in shown
    assert shown.count("error:") == 2
    with pytest.raises(ChatError, match="has no memory"):
        memory_table(Conversation(load_run(runs / "plain")))


def test_generate_reads_a_file_goes_on_with_a_session_and_writes_the_answer(runs: Path, tmp_path: Path) -> None:
    prompt, session, output = tmp_path / "prompt.txt", tmp_path / "alice", tmp_path / "new" / "answer.txt"
    prompt.write_text(TEXT)
    common = [str(runs / "memory"), "--session", str(session), "--temperature", "0", "--max-new-tokens", "12"]
    first = CliRunner().invoke(app, ["generate", *common, "--prompt-file", str(prompt)], catch_exceptions=False)
    run = load_run(runs / "memory")
    assert first.stdout == answer(Conversation(run), TEXT)
    second = [*common, "--prompt-file", str(prompt), "--prompt", " and", "--output", str(output)]
    assert CliRunner().invoke(app, ["generate", *second], catch_exceptions=False).stdout == ""
    assert len(output.read_text()) >= 1
    conversation = Conversation(run, session)
    assert conversation.session is not None
    assert conversation.session.tokens_read.tolist() == [43 + 12 + 47 + 12]


def test_a_finished_run_is_evaluated_with_settings_of_the_command_line(runs: Path) -> None:
    def said(*overrides: str) -> str:
        result = CliRunner().invoke(app, ["evaluate", str(runs / "memory"), *overrides])
        return " ".join(result.output.split())

    assert "Not measured" in said()
    assert "on the final 4 tokens" in said("evaluate.block=4", "evaluate.contexts=[2, 8]")
    assert "only evaluate.KEY=VALUE" in said("trainer.max_steps=3").replace("│ ", "")
    wrong = CliRunner().invoke(app, ["evaluate", str(runs / "memory"), "evaluate.blocks=4"])
    assert "unknown key; did you mean 'block'?" in str(wrong.exception)


def test_chat_is_a_command(runs: Path, tmp_path: Path) -> None:
    session = tmp_path / "alice"
    command = ["chat", str(runs / "memory"), "--session", str(session)]
    shown = CliRunner().invoke(app, command, input="hello\n/memory\n", catch_exceptions=False)
    assert "tokens read" in shown.output
    assert session.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recall", "--prompt", "x"], "of task recall"),
        (["plain", "--prompt", "x", "--session", "s"], "has no memory"),
        (["memory"], "there is nothing to read: give --prompt-file FILE, --prompt TEXT, or both"),
        (["memory", "--prompt", " \n"], "there is nothing to read"),
        (["memory", "--prompt", "x", "--top-p", "2"], "top_p must be above 0 and at most 1; got 2.0"),
        (["nowhere", "--prompt", "x"], "is no run"),
        (["memory", "--prompt", "x", "--output", "."], "is a directory"),
    ],
)
def test_errors_are_told_without_a_traceback(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["inlay", "generate", str(runs / arguments[0]), *arguments[1:]])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
