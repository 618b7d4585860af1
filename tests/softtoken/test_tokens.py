from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay.softtoken.errors import SoftTokenError
from inlay.softtoken.tokens import SoftTokens, embed_text
from tests.softtoken.local import llama

LENGTHS = [2, 0, 3]


def ragged(lengths: list[int] = LENGTHS, width: int = 4, slots: int = 3) -> SoftTokens:
    """Slots that hold 100·row + 10·slot + channel; -1 behind them."""
    mask = torch.arange(slots) < torch.tensor(lengths).unsqueeze(1)
    rows = 100 * torch.arange(len(lengths)).view(-1, 1, 1) + 10 * torch.arange(slots).view(1, -1, 1)
    return SoftTokens((rows + torch.arange(width)).float().masked_fill(~mask.unsqueeze(-1), -1), mask)


def as_kv(tokens: SoftTokens, layers: int = 2) -> SoftTokens:
    """Keys and values of two heads that hold the slots' channels, other numbers in each layer."""
    assert tokens.embeddings is not None
    heads = tokens.embeddings.unflatten(-1, (2, -1)).transpose(1, 2)
    return SoftTokens(None, tokens.mask, tuple((heads + layer, -heads - layer) for layer in range(layers)))


def used(tokens: SoftTokens, row: int) -> Tensor:
    """Every number of a row's slots, `[slots in use, numbers]`, whatever the form."""
    if tokens.embeddings is not None:
        return tokens.embeddings[row, tokens.mask[row]]
    assert tokens.kv is not None
    return torch.cat([t[row][:, tokens.mask[row]].transpose(0, 1).flatten(1) for pair in tokens.kv for t in pair], 1)


@pytest.fixture(params=["embeddings", "kv"])
def tokens(request: pytest.FixtureRequest) -> SoftTokens:
    return ragged() if request.param == "embeddings" else as_kv(ragged())


def test_rows_selected_are_those_rows_in_that_order_twice_where_asked(tokens: SoftTokens) -> None:
    selected = tokens.select([2, 0, 2])
    assert selected.lengths.tolist() == [3, 2, 3]
    for row, source in enumerate([2, 0, 2]):
        assert torch.equal(used(selected, row), used(tokens, source))


def test_one_row_is_a_batch_of_one_without_padding(tokens: SoftTokens) -> None:
    for row, length in enumerate(LENGTHS):
        alone = tokens.row(row)
        assert (alone.rows, alone.slots) == (1, length)
        assert torch.equal(used(alone, 0), used(tokens, row))
    assert torch.equal(used(tokens.row(-1), 0), used(tokens, 2))
    with pytest.raises(IndexError):
        tokens.row(3)


def test_rows_put_below_one_another_are_the_rows_they_were(tokens: SoftTokens) -> None:
    again = SoftTokens.cat([tokens.row(row) for row in range(3)])
    assert again.slots == 3
    assert again.mask.tolist() == tokens.mask.tolist()
    for row in range(3):
        assert torch.equal(used(again, row), used(tokens, row))


def test_bytes_count_the_slots_in_use_alone() -> None:
    tokens = ragged()  # 5 slots of 4 numbers
    assert tokens.nbytes == 5 * 4 * 4
    assert tokens.to(dtype=torch.bfloat16).nbytes == 5 * 4 * 2
    assert as_kv(tokens, layers=3).nbytes == 5 * 3 * 2 * 4 * 4
    assert ragged([0, 0]).nbytes == 0


def test_segments_stand_one_behind_the_other_without_gaps_and_pass_gradients_on() -> None:
    first, second = ragged([2, 0, 3]), ragged([1, 2, 0])
    assert first.embeddings is not None
    leaf = first.embeddings.clone().requires_grad_()
    joined = SoftTokens.concatenate([SoftTokens(leaf, first.mask), second])
    assert joined.embeddings is not None
    assert joined.lengths.tolist() == [3, 2, 3]
    assert joined.slots == 3
    assert joined.embeddings[0, :, 0].tolist() == [0, 10, 0]
    assert joined.embeddings[1, :2, 0].tolist() == [100, 110]
    assert joined.embeddings[2, :, 0].tolist() == [200, 210, 220]
    joined.embeddings[joined.mask].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[..., 0].tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


def test_detached_tokens_have_no_graph_and_the_same_numbers(tokens: SoftTokens) -> None:
    assert tokens.form == ("kv" if tokens.kv else "embeddings")
    tracked = SoftTokens(ragged().embeddings.requires_grad_(), ragged().mask)  # type: ignore[union-attr]
    assert as_kv(tracked).kv[0][0].requires_grad  # type: ignore[index]
    assert not as_kv(tracked).detach().kv[0][0].requires_grad  # type: ignore[index]
    assert not tracked.detach().embeddings.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_text_is_a_memory_whose_slots_are_the_rows_of_the_embedding_table(side: str) -> None:
    model = llama(50)
    texts = [[7, 8, 9], [], [5]]
    padding = [[0] * (4 - len(text)) for text in texts]
    ids = [[*pad, *text] if side == "left" else [*text, *pad] for text, pad in zip(texts, padding, strict=True)]
    marks = [
        [*pad, *[1] * len(t)] if side == "left" else [*[1] * len(t), *pad]
        for t, pad in zip(texts, padding, strict=True)
    ]
    memory = embed_text(model, torch.tensor(ids), torch.tensor(marks))
    assert memory.lengths.tolist() == [3, 0, 1]
    assert memory.slots == 3
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    for row, text in enumerate(texts):
        assert torch.equal(used(memory, row), table[text])


@pytest.mark.parametrize(
    ("embeddings", "mask", "kv", "says"),
    [
        (None, torch.ones(1, 2, dtype=torch.bool), None, "give one of them"),
        (
            torch.zeros(1, 2, 3),
            torch.ones(1, 2, dtype=torch.bool),
            ((torch.zeros(1, 1, 2, 3),) * 2,),
            "give one of them",
        ),
        (torch.zeros(1, 2, 3), torch.ones(1, 2), None, "bool"),
        (torch.zeros(1, 2, 3), torch.ones(1, 3, dtype=torch.bool), None, r"\[1, 2, 3\] with mask \[1, 3\]"),
        (None, torch.ones(1, 2, dtype=torch.bool), ((torch.zeros(1, 1, 3, 3),) * 2,), "layer 0"),
        (torch.zeros(1, 2, 3), torch.tensor([[False, True]]), None, "without a gap"),
    ],
)
def test_what_is_no_memory_is_refused(
    embeddings: Tensor, mask: Tensor, kv: tuple[tuple[Tensor, Tensor], ...], says: str
) -> None:
    with pytest.raises(SoftTokenError, match=says):
        SoftTokens(embeddings, mask, kv)


def test_what_does_not_belong_together_is_not_joined() -> None:
    with pytest.raises(SoftTokenError, match="no soft tokens"):
        SoftTokens.cat([])
    with pytest.raises(SoftTokenError, match="one form"):
        SoftTokens.cat([ragged(), as_kv(ragged())])
    with pytest.raises(SoftTokenError, match="one form"):
        SoftTokens.cat([ragged(), ragged(width=6)])
    with pytest.raises(SoftTokenError, match="different rows"):
        SoftTokens.concatenate([ragged(), ragged([1])])
    with pytest.raises(SoftTokenError, match="rotated"):
        SoftTokens.concatenate([as_kv(ragged())])
