from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from inlay.softtoken.errors import LayoutError
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.pieces import tokenise
from tests.softtoken.local import CHATML, SPECIAL, byte_level, metaspace, words

Tokenizer = transformers.PreTrainedTokenizerFast
KINDS = pytest.mark.parametrize("make", [byte_level, metaspace, words])


@KINDS
@pytest.mark.parametrize("question", ["Question: {question} ", "Question: {question}\n", None])
@pytest.mark.parametrize("anchor", ["Answer: ", "Answer:", "Answer:\n", ""])
def test_pieces_together_are_the_tokens_of_the_whole_text(
    make: Callable[[], Tokenizer], question: str | None, anchor: str
) -> None:
    tokenizer = make()
    layout = PromptLayout(bos=False, question=question, anchor=anchor, eos=False).bind(tokenizer)
    text = (question or "").replace("{question}", "Who lives in Paris?") + anchor
    for answer in ["Ada", "Bob lives in Paris"]:
        ids = layout.prompt("Who lives in Paris?").after + layout.answer_ids(answer)
        assert ids == tokenizer(text + answer, add_special_tokens=False)["input_ids"]


def test_the_space_of_the_anchor_begins_the_answer() -> None:
    layout = PromptLayout(question=None, anchor="Answer: ").bind(byte_level())
    spell = byte_level().convert_ids_to_tokens
    assert spell(layout.prompt().after) == ["Answer", ":"]
    assert spell(layout.answer_ids("Paris")) == ["ĠParis", "</s>"]
    cut_behind_the_space = byte_level()("Answer: ", add_special_tokens=False)["input_ids"]
    assert spell(cut_behind_the_space) == ["Answer", ":", "Ġ"]  # what the rule avoids


def test_a_tokenizer_that_brings_its_own_space_gets_no_second_one() -> None:
    spell = metaspace().convert_ids_to_tokens
    spaced = PromptLayout(question=None, anchor="Answer: ").bind(metaspace())
    assert spell(spaced.answer_ids("Paris")) == ["▁Paris", "</s>"]
    unspaced = PromptLayout(question=None, anchor="Answer:\n").bind(metaspace())
    assert spell(unspaced.answer_ids("Ada"))[0] == "A"  # and none where there is none
    assert spell(metaspace()("Ada", add_special_tokens=False)["input_ids"])[0].startswith("▁")


@pytest.mark.parametrize("merge", [(":", "▁"), (":", "P")])
def test_where_tokens_merge_across_the_cut_the_piece_is_what_it_is_elsewhere_in_a_text(merge: tuple[str, str]) -> None:
    symbols = [*SPECIAL, ":", "\n", "▁", "P", "a", "Pa", "▁Pa", "".join(merge)]
    merges = [merge, ("P", "a"), ("▁", "Pa")]
    tokenizer = tokenizers.Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, merges, unk_token="<unk>"))
    # The first SentencePiece normaliser of Llama: a space before everything, and ▁ for a space.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    spell = wrapped.convert_ids_to_tokens
    assert "".join(merge) in spell(wrapped(": Pa:Pa")["input_ids"])
    assert spell(tokenise(wrapped, " Pa", after=":")) == ["▁Pa"]
    assert spell(tokenise(wrapped, "Pa", after=":")) == ["Pa"]


@given(answer=st.text(min_size=1).map(str.strip).filter(bool), question=st.text(min_size=1).filter(str.strip))
def test_whatever_the_text_the_prompt_ignores_the_answer_and_the_answer_reads_back_and_ends_once(
    answer: str, question: str
) -> None:
    layout = PromptLayout().bind(byte_level())
    ids = layout.answer_ids(answer)
    assert layout.decode(ids) == answer
    assert [index for index in ids if index in layout.stop_ids] == ids[-1:]
    text = byte_level().decode(layout.prompt(question).after + ids[:-1])
    assert text == f"\nQuestion: {question.strip()}\nAnswer: {answer}"


def test_a_text_that_spells_an_end_token_does_not_end_anything() -> None:
    layout = PromptLayout(chat=True).bind(byte_level())
    assert layout.answer_ids("a </s> b <|im_end|>").count(layout.stop_ids[0]) == 1
    assert layout.stop_ids[1] not in layout.answer_ids("a </s> b")
    assert not set(layout.prompt("</s>?").after) & {byte_level().eos_token_id}

    vocabulary = {"</s>": 0, "<unk>": 1, "a": 2}
    split = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    whole_words = transformers.PreTrainedTokenizerFast(tokenizer_object=split, eos_token="</s>", unk_token="<unk>")
    forgeable = PromptLayout(question=None, anchor="a ").bind(whole_words)
    with pytest.raises(LayoutError, match="reads </s> in the answer 'a </s> a' as its end"):
        forgeable.answer_ids("a </s> a")


@KINDS
def test_no_reference_is_the_unanswerable_text_and_of_several_the_first_is_taught(
    make: Callable[[], Tokenizer],
) -> None:
    layout = PromptLayout(anchor="Answer: ", question="{question} ").bind(make())
    assert layout.answer_ids([]) == layout.answer_ids("unanswerable")
    assert layout.answer_ids(["Paris", "in Paris"]) == layout.answer_ids("Paris")
    other = PromptLayout(anchor="Answer: ", question="{question} ", unanswerable="Bob").bind(make())
    assert other.answer_ids([]) == layout.answer_ids("Bob")


def test_bos_is_the_tokenizers_own_habit_unless_said() -> None:
    def before(tokenizer: Tokenizer, bos: bool | None) -> list[int]:
        return PromptLayout(bos=bos, question="{question} ").bind(tokenizer).prompt("Who").before

    bos = byte_level().bos_token_id
    assert [before(byte_level(), flag) for flag in (None, True, False)] == [[], [bos], []]
    assert [before(metaspace(), flag) for flag in (None, True, False)] == [[bos], [bos], []]


def with_template(template: str | None) -> Tokenizer:
    tokenizer = Tokenizer(tokenizer_object=byte_level().backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_is_what_the_tokenizers_template_writes_with_the_memory_at_its_place() -> None:
    tokenizer = byte_level()
    layout = PromptLayout(chat=True, question="\nQuestion: {question}", anchor="Answer: ").bind(tokenizer)
    prompt, context = layout.prompt("Who?"), "Ada lives in Paris."
    memory = tokenizer(context, add_special_tokens=False)["input_ids"]
    turn = [
        {"role": "user", "content": f"{context}\nQuestion: Who?"},
        {"role": "assistant", "content": "Answer: Ada Lovelace"},
    ]
    whole = tokenizer.apply_chat_template(turn, tokenize=True, return_dict=False)
    ids = prompt.before + memory + prompt.after + layout.answer_ids("Ada Lovelace")
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]) == "\n"  # behind the end of turn, where generation has stopped
    assert layout.stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("assistant", "prompt_ends", "end"),
    [
        # Llama 2: a space before the answer, and EOS behind it.
        ("{{ ' ' + message.content + ' ' + eos_token }}", "[/INST] Answer:", "</s>"),
        # Qwen 3: an empty block for thinking before the last answer.
        ("<think>\n\n</think>\n\n{{ message.content }}<|im_end|>", "</think>\n\nAnswer:", "<|im_end|>"),
        # No end of turn at all: EOS has to do.
        ("{{ message.content }}\n", "[/INST]Answer:", "</s>"),
    ],
)
def test_what_a_template_writes_around_an_answer_is_in_the_prompt_and_in_the_end(
    assistant: str, prompt_ends: str, end: str
) -> None:
    user = "[INST]{{ message.content | trim }}[/INST]"
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}" + user
        + "{% else %}" + assistant + "{% endif %}{% endfor %}"
    )  # fmt: skip
    layout = PromptLayout(chat=True).bind(with_template(template))
    assert byte_level().decode(layout.prompt("Who?").after).endswith(prompt_ends)
    ids = layout.answer_ids("Ada")
    assert byte_level().convert_ids_to_tokens(ids) == ["ĠAda", end]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        ("{{ messages[0].role }}", "the user's message cannot be found .* drops or escapes"),
        (CHATML.replace("message.content", "message.content | escape"), "the user's message .* drops or escapes"),
        (CHATML + "{{ messages[0].content }}", "the user's message .* repeats it 2 times"),
        (CHATML.replace("{% endfor %}", "{% endfor %}{{ messages[1].content }}"), "assistant's .* repeats it 2 times"),
        ("{{ messages[1].content }}{{ messages[0].content }}", "the assistant's message .* moves it"),
        ("{{ raise_exception('no turns here') }}", "cannot write one turn: no turns here"),
    ],
)
def test_a_template_that_loses_the_place_of_memory_question_or_answer_is_refused(
    template: str | None, says: str
) -> None:
    with pytest.raises(LayoutError, match=says):
        PromptLayout(chat=True).bind(with_template(template))


def test_a_question_that_a_template_escapes_is_missed_too() -> None:
    template = CHATML.replace("message.content", "message.content | replace('<<inlay:question>>', '&lt;')")
    with pytest.raises(LayoutError, match="the question cannot be found"):
        PromptLayout(chat=True).bind(with_template(template))


def test_what_the_tokenizer_lacks_is_named_with_the_fix() -> None:
    plain = Tokenizer(tokenizer_object=byte_level().backend_tokenizer)
    with pytest.raises(LayoutError, match="no EOS token"):
        PromptLayout().bind(plain)
    no_bos = Tokenizer(tokenizer_object=byte_level().backend_tokenizer, eos_token="</s>")
    with pytest.raises(LayoutError, match=r"bos: .* set bos: false"):
        PromptLayout(bos=True).bind(no_bos)
    with pytest.raises(LayoutError, match=r"bos_after: .* set bos_after: false"):
        PromptLayout(bos_after=True).bind(no_bos)
    with pytest.raises(LayoutError, match="does not know all of 'Réponse: '"):
        PromptLayout(question=None, anchor="Réponse: ").bind(words())


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must hold .* once"):
        PromptLayout(question="Question: ")
    with pytest.raises(ValueError, match="a chat begins as its template says"):
        PromptLayout(chat=True, bos=True)
    with pytest.raises(LayoutError, match="missing or blank"):
        PromptLayout().bind(byte_level()).prompt(" ")


def test_a_text_that_was_read_before_is_read_again_when_the_tokenizer_has_learnt_a_token() -> None:
    tokenizer = byte_level()
    before = tokenise(tokenizer, "Paris", after="\n")
    before.append(0)  # the caller's own
    assert tokenise(tokenizer, "Paris", after="\n") == before[:-1]
    tokenizer.add_tokens(["Par"])
    assert tokenizer.convert_ids_to_tokens(tokenise(tokenizer, "Paris", after="\n"))[0] == "Par"


@KINDS
def test_what_the_tokenizer_was_told_before_changes_nothing(make: Callable[[], Tokenizer]) -> None:
    """A call of the tokenizer leaves truncation, padding and the reading of special tokens behind in its backend."""
    tokenizer = copy.deepcopy(make())  # the others share it
    tokenizer.pad_token = "</s>"
    text = "Ada lives in Paris </s>"
    for plain in (True, False):
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        tokenizer([text, "Ada"], truncation=True, max_length=2, padding="max_length", split_special_tokens=not plain)
        assert tokenise(tokenizer, text, plain=plain) == expected
        assert (tokenizer.eos_token_id in expected) == (not plain)
