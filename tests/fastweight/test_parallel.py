"""Context parallelism: rows spread over ranks give what the whole rows give, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.fastweight import StateError, fast_weight_linear_parallel, fast_weight_linear_reference
from inlay.fastweight.parallel import part_layout, refuse_unnamed_documents
from tests.closeness import assert_close
from tests.fastweight.families import BY_NAME
from tests.processes import in_processes

CHUNK = 4
ONE = [8, 12, 7]
"""Tokens on each rank."""
SEVERAL = [
    [[0] * 8, [-1, -1, 0, 0, 0, 0, -1, -1]],  # padding does not count: a whole chunk of either row
    [[0] * 4 + [1] * 5, [0] * 4 + [1] * 4 + [-1]],
    [[2] * 4, [-1] * 4],
    [[2] * 2 + [3] * 4, [1] * 3 + [2] * 3],  # the second row's document 1 goes on from two ranks before
]
"""Document ids of two rows on each rank; −1 is padding."""


def work_in(count: int, work: Callable[[int], object]) -> None:
    def begun(rank: int) -> None:
        dist.init_process_group("gloo")
        work(rank)

    in_processes(count, begun)


def part(whole: Tensor, lengths: list[int], rank: int) -> Tensor:
    return torch.split(whole, lengths, dim=1)[rank]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("exposure", [0.0, 0.5])
@pytest.mark.parametrize("case", ["one document", "several, padded"])
def test_outputs_and_gradients_are_those_of_the_whole_rows(case: str, exposure: float, dtype: torch.dtype) -> None:
    documents = None
    lengths = ONE
    if case != "one document":
        documents = torch.cat([torch.tensor(rows) for rows in SEVERAL], dim=1)
        lengths = [len(rows[0]) for rows in SEVERAL]
    generator = torch.Generator().manual_seed(0)
    z, v, out_gradient = (torch.randn(2, sum(lengths), n, generator=generator, dtype=dtype) for n in (6, 5, 5))
    weight = torch.randn(5, 6, generator=generator, dtype=dtype)
    settings: dict[str, Any] = {"eta": 0.1, "chunk_size": CHUNK, "exposure": exposure}
    wholes = [x.clone().requires_grad_() for x in (z, v, weight)]
    expected, _ = fast_weight_linear_reference(*wholes, documents=documents, **settings)
    (expected * out_gradient).sum().backward()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5

    def work(rank: int) -> None:
        parts = [part(x, lengths, rank).clone().requires_grad_() for x in (z, v)]
        own = weight.clone().requires_grad_()
        ids = None if documents is None else part(documents, lengths, rank)
        out = fast_weight_linear_parallel(*parts, own, documents=ids, **settings)
        (out * part(out_gradient, lengths, rank)).sum().backward()
        assert own.grad is not None
        dist.all_reduce(own.grad)
        assert_close(out, part(expected, lengths, rank), tolerance, f"out of rank {rank}")
        for name, ours, whole in zip("zv", parts, wholes, strict=False):
            assert whole.grad is not None
            assert_close(ours.grad, part(whole.grad, lengths, rank), tolerance, f"d{name} of rank {rank}")
        assert_close(own.grad, wholes[2].grad, tolerance, "dW0")

    work_in(len(lengths), work)


def test_a_rank_may_have_no_token() -> None:
    z, v = torch.randn(1, 8, 4), torch.randn(1, 8, 3)
    weight = torch.randn(3, 4)
    settings: dict[str, Any] = {"eta": 1.0, "chunk_size": 4}
    expected, _ = fast_weight_linear_reference(z, v, weight, **settings)
    lengths = [4, 0, 4]

    def work(rank: int) -> None:
        for ids in (None, torch.zeros(1, lengths[rank], dtype=torch.long)):
            own = (part(x, lengths, rank) for x in (z, v))
            out = fast_weight_linear_parallel(*own, weight, documents=ids, **settings)
            assert out.shape == (1, lengths[rank], 3)
            if lengths[rank]:
                assert_close(out, part(expected, lengths, rank), 1e-5, f"rank {rank}")

    work_in(3, work)


def test_a_border_within_a_chunk_is_refused_by_every_rank() -> None:
    def work(rank: int) -> None:
        z, v = torch.randn(1, 6, 4), torch.randn(1, 6, 3)
        for ids in (None, torch.zeros(1, 6, dtype=torch.long)):
            with pytest.raises(
                ValueError, match=r"goes on on rank 1, 2 tokens into a chunk: .* multiple of chunk_size=4"
            ):
                fast_weight_linear_parallel(z, v, torch.zeros(3, 4), eta=1.0, chunk_size=4, documents=ids)
        ids = torch.full((1, 6), rank)  # another document: the chunk is over
        fast_weight_linear_parallel(z, v, torch.zeros(3, 4), eta=1.0, chunk_size=4, documents=ids)

    work_in(2, work)


def tiny(**changes: Any) -> tuple[Any, inlay.Memory]:
    """A model whose tokens meet in the memory alone: its attention adds nothing."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.3, **size)).double()
    for block in model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    config: dict[str, Any] = {"layers": [0, 2], "chunk_size": CHUNK, "eta": 0.05, "init": "next_token"}
    return model, inlay.attach(model, inlay.FastWeightConfig(**config | changes))


MODELS: dict[str, dict[str, Any]] = {
    "embeddings": {},
    "hidden, clipped": {"target": "hidden", "max_update_ratio": 0.2},
    "carried": {"boundary": "carry"},
}


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("case", MODELS)
def test_a_model_trains_on_parts_as_on_whole_sequences(case: str, checkpointing: str) -> None:
    lengths = [8, 8, 11]
    ids = torch.randint(32, (2, sum(lengths)), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[7] * 27, [3] * 8 + [4] * 12 + [5] * 7])

    def trained(model: Any, ids: Tensor, documents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model.train()(input_ids=ids, document_ids=documents, use_cache=False).logits
        logits.square().sum().backward()
        used = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "self_attn" not in n}
        return logits, used

    model, _ = tiny(**MODELS[case])
    logits, gradients = trained(model, ids, documents)
    assert any(".target." in name for name in gradients)

    def work(rank: int) -> None:
        model, memory = tiny(**MODELS[case])
        if checkpointing != "none":
            reentrant = checkpointing == "reentrant"
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with memory.context_parallel():
            own, parts = trained(model, part(ids, lengths, rank), part(documents, lengths, rank))
        assert_close(own, part(logits, lengths, rank), 1e-10, f"logits of rank {rank}")
        assert parts.keys() == gradients.keys()
        for name, gradient in parts.items():
            dist.all_reduce(gradient)
            assert_close(gradient, gradients[name], 1e-10, name)

    work_in(3, work)


def test_what_context_parallelism_cannot_do_is_refused() -> None:
    def work(rank: int) -> None:
        model, memory = tiny()
        ids = torch.zeros(1, 8, dtype=torch.long)
        packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
        with memory.context_parallel():
            with pytest.raises(StateError, match="use_cache=False"):
                model.eval()(input_ids=ids)
            # A document that begins within a part, on one rank alone, and exactly where the other's part ends.
            count_on = torch.arange(8).unsqueeze(0) + 8 * rank
            goes_on = torch.arange(4, 12).unsqueeze(0) if rank else packed
            for positions in (packed, packed if rank else count_on, goes_on, torch.arange(8).unsqueeze(0)):
                with pytest.raises(ValueError, match="document_ids"):
                    model(input_ids=ids, position_ids=positions, use_cache=False)
            model(input_ids=ids, position_ids=count_on, use_cache=False)
            left = torch.tensor([[0] * 4 + [1] * 4 if rank == 0 else [1] * 8])  # padding has no position
            counted = torch.tensor([[1] * 4 + [*range(4)] if rank == 0 else [*range(4, 12)]])
            model(input_ids=ids, position_ids=counted, attention_mask=left, use_cache=False)
        model(input_ids=ids, position_ids=packed)

    work_in(2, work)
    _, memory = tiny()
    with pytest.raises(RuntimeError, match="torchrun"), memory.context_parallel():
        pass


def test_each_process_of_data_parallelism_keeps_its_own_counts() -> None:
    """DDP puts the first one's buffers over all others' at each forward."""

    def work(rank: int) -> None:
        memory = inlay.attach(
            BY_NAME["llama"].make().train(), inlay.FastWeightConfig(layers=[0], chunk_size=4, max_update_norm=1.0)
        )
        replica = torch.nn.parallel.DistributedDataParallel(memory.train_only("all").model)
        layer, tokens = memory.layers[0], 12 + 8 * rank
        for _ in range(2):
            replica(torch.ones(1, tokens, dtype=torch.long), use_cache=False).logits.sum().backward()
        assert int(layer.statistics.updates) == 2 * (tokens // 4)
        layer.statistics.nonfinite.fill_(rank == 1)
        replica(torch.ones(1, tokens, dtype=torch.long), use_cache=False)
        assert bool(layer.statistics.nonfinite) == (rank == 1)

    work_in(2, work)


class Questions(TorchDispatchMode):
    """Counts numbers that are fetched one by one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_device_is_not_asked_once_for_each_rank(ranks: int) -> None:
    def work(rank: int) -> None:
        device = torch.device("cpu")
        ids = torch.full((2, CHUNK), 7)
        with Questions() as asked:
            part_layout(2, CHUNK, CHUNK, documents=ids, group=None, device=device)
        assert asked.count == 1  # how many chunks there are
        with Questions() as asked:
            places = torch.arange(CHUNK * rank, CHUNK * (rank + 1)).repeat(2, 1)
            refuse_unnamed_documents(places, torch.zeros_like(ids), None)
        assert asked.count == 1

    work_in(ranks, work)
