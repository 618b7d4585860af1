"""What holds for a memory in every family of models."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay import AttachError, FastWeightConfig
from inlay.fastweight import TrainMode
from inlay.fastweight.families import find_decoder
from tests.closeness import assert_close, relative_error
from tests.fastweight.families import (
    BLOCKS,
    BY_NAME,
    MODELS,
    Model,
    enable_checkpointing,
    hook_counts,
    modules_of,
    moshi_config,
    qwen3_moe,
    snapshot,
)

CHUNK = 4
TOKENS = 22  # five chunks and a rest

every_family = pytest.mark.parametrize("family", MODELS, ids=lambda family: family.name)
checkpointed_families = pytest.mark.parametrize(
    "family", [family for family in MODELS if family.checkpointing], ids=lambda family: family.name
)


def train(family: Model, model: nn.Module, memory: inlay.Memory, steps: int = 3) -> None:
    """A few real training steps of the memory alone."""
    memory.train_only("memory")
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, weight_decay=0.0)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        family.loss(model, family.tokens(2, TOKENS, seed=step)).backward()
        optimizer.step()
    model.eval()


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_fresh_zero_memory_changes_no_bit(family: Model, training: bool, dtype: torch.dtype) -> None:
    model, ids = family.make().to(dtype).train(training), family.tokens(2, TOKENS)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :3] = 0
    plain, masked = family.logits(model, ids), family.logits(model, ids, attention_mask=mask)
    inlay.attach(model, family.config(init="zero", eta=1.0))
    assert torch.equal(family.logits(model, ids), plain)
    assert torch.equal(family.logits(model, ids, attention_mask=mask), masked)


@every_family
def test_the_replaced_module_is_the_down_projection_alone(family: Model) -> None:
    model = family.make()
    before = dict(model.named_modules())
    inlay.attach(model, family.config())
    changed = {name for name, module in model.named_modules() if before.get(name) is not module}
    sites = {f"{family.blocks}.{i}.{family.projection}" for i in family.memory_blocks}
    assert {name for name in changed if not name.endswith((".target", ".statistics"))} == sites


@every_family
def test_training_steps_change_the_output(family: Model) -> None:
    model, ids = family.make(), family.tokens(2, TOKENS)
    memory = inlay.attach(model, family.config(init="zero"))
    base = family.logits(model, ids)
    train(family, model, memory)
    assert relative_error(family.logits(model, ids), base) > 1e-3


@every_family
@pytest.mark.parametrize("target", ["embeddings", "hidden"])
def test_gradient_reaches_the_convolution_from_the_first_step_and_the_projection_after(
    family: Model, target: str
) -> None:
    model, ids = family.make().train(), family.tokens(2, TOKENS)
    memory = inlay.attach(model, family.config(init="zero", target=target)).train_only("memory")
    family.loss(model, ids).backward()
    first = {name: p.grad.clone() for name, p in memory.named_parameters()}
    torch.optim.SGD(memory.parameters(), lr=1.0).step()
    model.zero_grad()
    family.loss(model, ids).backward()
    for index in family.memory_blocks:
        assert first[f"{index}.conv"].abs().max() > 0
        assert first[f"{index}.projection"].abs().max() == 0
        assert dict(memory.named_parameters())[f"{index}.projection"].grad.abs().max() > 0


@every_family
def test_training_the_memory_alone_lowers_the_loss_and_touches_nothing_else(family: Model) -> None:
    model, ids = family.make(), family.tokens(4, TOKENS, seed=9)
    memory = inlay.attach(model, family.config(init="zero")).train_only("memory")
    base = {name: p.clone() for name, p in memory.base_parameters().items()}
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.02, weight_decay=0.0)
    losses = []
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        loss = family.loss(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[name]) for name, p in memory.base_parameters().items())
    assert all(p.grad is None for p in memory.base_parameters().values())


@every_family
def test_no_forward_in_any_mode_changes_a_parameter(family: Model) -> None:
    model, ids = family.make(), family.tokens(2, TOKENS)
    inlay.attach(model, family.config(max_update_ratio=0.1))
    before = snapshot(model)
    for training in (True, False):
        model.train(training)
        family.logits(model, ids)
        with torch.no_grad():
            family.logits(model, ids)
        with torch.inference_mode():
            family.logits(model, ids)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@every_family
def test_disabled_is_the_base_model_bit_for_bit(family: Model) -> None:
    model, ids = family.make(), family.tokens(2, TOKENS)
    base = family.logits(model, ids)
    memory = inlay.attach(model, family.config())
    assert relative_error(family.logits(model, ids), base) > 0.01
    with memory.disabled():
        assert torch.equal(family.logits(model, ids), base)
    assert relative_error(family.logits(model, ids), base) > 0.01


@every_family
@pytest.mark.parametrize("target", ["embeddings", "hidden"])
def test_detach_gives_the_very_model_back(family: Model, target: str) -> None:
    model, ids = family.make(), family.tokens(2, TOKENS)
    base, projections = family.logits(model, ids), family.projections(model)
    modules, keys, hooks = modules_of(model), list(model.state_dict()), hook_counts(model)
    memory = inlay.attach(model, family.config(target=target, init="zero"))
    train(family, model, memory)
    assert memory.detach() is model
    assert all(now is then for now, then in zip(family.projections(model), projections, strict=True))
    assert modules_of(model) == modules
    assert list(model.state_dict()) == keys
    assert hook_counts(model) == hooks
    assert inlay.find_memory(model) is None
    assert torch.equal(family.logits(model, ids), base)


def alone(family: Model, model: nn.Module, ids: Tensor, memory: inlay.Memory) -> Tensor:
    """Logits of one unpadded row; fails if the memory makes no difference to them."""
    with torch.no_grad():
        logits = family.logits(model, ids)
        with memory.disabled():
            base = family.logits(model, ids)
    assert relative_error(logits, base) > 0.02
    return logits


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("target", ["embeddings", "hidden"])
@pytest.mark.parametrize("given", ["mask", "mask and positions"])
def test_a_padded_row_is_the_row_alone(family: Model, given: str, target: str, side: str) -> None:
    model = family.make()
    memory = inlay.attach(model, family.config(target=target))
    lengths = [TOKENS, 17, 9]
    rows = [family.tokens(1, length, seed=length) for length in lengths]
    batch = family.tokens(3, TOKENS, seed=5)
    mask = torch.zeros(3, TOKENS, dtype=torch.long)
    where = [slice(TOKENS - n, None) if side == "left" else slice(n) for n in lengths]
    for i, row in enumerate(rows):
        batch[i, where[i]] = row[0]
        mask[i, where[i]] = 1
    # GPT-2 counts padding on the left as positions unless it is told otherwise.
    if given == "mask and positions" or (family.name == "gpt2" and side == "left"):
        extra = {"position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)}  # as ``generate`` makes them
    else:
        extra = {}
    with torch.no_grad():
        together = family.logits(model, batch, attention_mask=mask, **extra)
    for i, row in enumerate(rows):
        assert_close(together[i : i + 1, where[i]], alone(family, model, row, memory), 1e-5, f"row {i}")


DOCUMENTS = [6, 1, 10, 5]


@every_family
@pytest.mark.parametrize("target", ["embeddings", "hidden"])
def test_a_packed_document_is_the_document_alone(family: Model, target: str) -> None:
    """Packed as transformers does it: ``position_ids`` restart, and no attention mask."""
    model = family.make()
    memory = inlay.attach(model, family.config(target=target))
    documents = [family.tokens(1, length, seed=length) for length in DOCUMENTS]
    packed = torch.cat(documents, dim=1)
    restart = torch.cat([torch.arange(n) for n in DOCUMENTS]).unsqueeze(0)
    with torch.no_grad(), memory.disabled():
        base, first = family.logits(model, packed, position_ids=restart), family.logits(model, documents[2])
    if family.blocks == "model.layers" and "fc2" in family.projection and relative_error(base[:, 7:17], first) > 1e-5:
        pytest.skip("older transformers let Moshi attend across documents, with or without a memory")
    with torch.no_grad():
        together = family.logits(model, packed, position_ids=restart)
    at = 0
    for document in documents:
        length = document.shape[1]
        with torch.no_grad():
            expected = family.logits(model, document)
        assert_close(together[:, at : at + length], expected, 1e-5, f"document of {length}")
        at += length
    # The one document that is long enough to read its memory does.
    alone(family, model, documents[2], memory)


@every_family
def test_document_ids_say_where_the_memory_starts_anew(family: Model) -> None:
    """Explicit ids do for the memory what restarting positions do, and win over them."""
    model, ids = family.make(), family.tokens(2, TOKENS)
    inlay.attach(model, family.config())
    document_ids = torch.cat([torch.full((n,), 7 - i) for i, n in enumerate(DOCUMENTS)]).expand(2, -1)
    restart = torch.cat([torch.arange(n) for n in DOCUMENTS]).expand(2, -1)
    with torch.no_grad():
        by_positions = family.logits(model, ids, position_ids=restart)
        by_both = family.logits(model, ids, position_ids=restart, document_ids=document_ids)
        as_one = family.logits(model, ids, position_ids=restart, document_ids=torch.zeros_like(document_ids))
        by_ids = family.logits(model, ids, document_ids=document_ids)
        neither = family.logits(model, ids)
    assert_close(by_both, by_positions, 1e-6)
    assert relative_error(as_one, by_positions) > 0.01
    assert relative_error(by_ids, neither) > 0.01


@every_family
def test_a_token_of_another_document_never_reaches_the_memory(family: Model) -> None:
    """With ``document_ids`` alone the base model still attends across; V and Z of the first block's memory do not.

    So the test looks at the first memory's own part of the output, which reads X0 and its own MLP's activations.
    """
    model = family.make()
    memory = inlay.attach(model, family.config(layers=[0]))
    layer = memory.layers[0]
    ids = family.tokens(1, 16)
    document_ids = torch.tensor([[0] * 8 + [1] * 8])
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        family.logits(model, ids, document_ids=document_ids)
        family.logits(model, ids)
    handle.remove()
    (z, separate), (_, joined) = seen
    slow = layer.__dict__["base"](z)
    assert torch.equal(separate[:, 8:12], slow[:, 8:12])  # the second document's first chunk reads an empty memory
    assert torch.equal(separate[:, :8], joined[:, :8])
    assert relative_error(joined[:, 8:12], slow[:, 8:12]) > 0.01
    assert relative_error(separate[:, 12:], slow[:, 12:]) > 0.01


def two_forwards(
    family: Model,
    *,
    target: str,
    checkpointing: bool,
    reentrant: bool = False,
    layers: tuple[int, ...] = (),
    mode: TrainMode = "all",
) -> dict[str, Tensor]:
    """Gradients of what is trained after two forwards of different inputs and one backward."""
    model = family.make().train()
    inlay.attach(model, family.config(target=target, layers=list(layers or family.memory_blocks))).train_only(mode)
    if checkpointing:
        enable_checkpointing(model, reentrant=reentrant)
    first, second = family.tokens(2, TOKENS, seed=1), family.tokens(1, 30, seed=2)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 15:] = 0
    one = family.loss(model, first, attention_mask=mask)
    two = family.loss(model, second)
    (one + 2 * two).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-6, name)


@checkpointed_families
@pytest.mark.parametrize("target", ["embeddings", "hidden"])
def test_two_forwards_before_one_checkpointed_backward_give_the_plain_gradients(family: Model, target: str) -> None:
    plain = two_forwards(family, target=target, checkpointing=False)
    checkpointed = two_forwards(family, target=target, checkpointing=True)
    assert family.embedding in plain
    assert_same_gradients(checkpointed, plain)


@pytest.mark.parametrize("target", ["embeddings", "hidden"])
def test_a_memory_trained_alone_gets_its_gradients_under_checkpointing(target: str) -> None:
    """Though nothing that enters a block requires a gradient."""
    plain = two_forwards(BY_NAME["llama"], target=target, checkpointing=False, mode="memory")
    checkpointed = two_forwards(BY_NAME["llama"], target=target, checkpointing=True, mode="memory")
    assert len(plain) == 4
    assert_same_gradients(checkpointed, plain)


@pytest.mark.parametrize("layers", [(0, 2), (1,), (2,)], ids=["first and last", "middle", "last"])
@pytest.mark.parametrize("target", ["embeddings", "hidden"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "moshi"])
def test_reentrant_checkpointing_gives_the_plain_gradients(name: str, target: str, layers: tuple[int, ...]) -> None:
    family = BY_NAME[name]
    plain = two_forwards(family, target=target, checkpointing=False, layers=layers)
    reentrant = two_forwards(family, target=target, checkpointing=True, reentrant=True, layers=layers)
    assert_same_gradients(reentrant, plain)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "home-made"])  # the others round to float32 in their norms
def test_the_target_gives_the_embedding_a_gradient_of_its_own(name: str) -> None:
    """The path over V is part of the gradient of X0 that finite differences see."""
    family = BY_NAME[name]
    model = family.make().double()
    memory = inlay.attach(model, family.config(layers=[family.memory_blocks[-1]])).train_only("all")
    ids = family.tokens(1, 14)
    embedding = model.get_parameter(family.embedding)
    family.loss(model, ids).backward()
    direction = torch.randn(embedding.shape, dtype=embedding.dtype, generator=torch.Generator().manual_seed(0))
    slope = (embedding.grad * direction).sum()

    def shifted(step: float) -> Tensor:
        with torch.no_grad():
            embedding.add_(step * direction)
            loss = family.loss(model, ids)
            embedding.sub_(step * direction)
        return loss

    finite = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
    assert_close(slope, finite, 1e-5)
    with memory.disabled():
        model.zero_grad()
        family.loss(model, ids).backward()
    assert relative_error((embedding.grad * direction).sum(), finite) > 1e-3


def change_of_logits(family: Model, model: nn.Module, token: int, length: int = TOKENS) -> Tensor:
    """Largest change of each position's logits ``[T]`` when ``token`` is another one."""
    ids = family.tokens(1, length)
    changed = ids.clone()
    changed[0, token] = family.tokens(1, length, seed=77)[0, token]
    if torch.equal(changed, ids):
        changed[0, token] = (ids[0, token] + 1) % 12 + 3
    with torch.no_grad():
        difference = family.logits(model, changed) - family.logits(model, ids)
    return difference[0].abs().amax(-1)


@every_family
@pytest.mark.parametrize("init", ["next_token", {"normal": 0.5}], ids=["next_token", "normal"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_without_exposure_no_logit_depends_on_a_later_token(family: Model, training: bool, init: Any) -> None:
    model = family.make().train(training)
    inlay.attach(model, family.config(init=init, conv_kernel=7))
    for token in random.Random(0).sample(range(1, TOKENS), 8):
        change = change_of_logits(family, model, token)
        assert change[:token].max() == 0
        assert change[token] > 0


@every_family
def test_with_full_exposure_a_training_forward_reads_the_next_token(family: Model) -> None:
    """So the test above can fail. In eval mode exposure is off."""
    model = family.make().train()
    inlay.attach(model, family.config(init="next_token", exposure=1.0))
    assert change_of_logits(family, model, token=10)[9] > 0
    assert change_of_logits(family, model.eval(), token=10)[:10].max() == 0


def test_dense_blocks_of_a_mixture_of_experts_are_accepted_and_expert_blocks_refused() -> None:
    model = qwen3_moe([0, 2])
    modules = modules_of(model)
    with pytest.raises(AttachError, match=r"block 1 is a mixture of experts.*Dense blocks of this model: \[0, 2\]"):
        inlay.attach(model, FastWeightConfig(layers=[0, 1]))
    with pytest.raises(AttachError, match="This model has no dense block"):
        inlay.attach(qwen3_moe([]), FastWeightConfig(layers="all"))
    assert modules_of(model) == modules
    assert list(inlay.attach(model, FastWeightConfig(layers=[0, -1])).layers) == [0, 2]


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: transformers.MoshiForConditionalGeneration(moshi_config()), "decoder.model"),
        (lambda: transformers.MoshiModel(moshi_config()), ""),
        (lambda: BY_NAME["gemma3-multimodal"].make(), "model.language_model"),
        (lambda: BY_NAME["kyutai-stt"].make(), "model"),
        (lambda: BY_NAME["llama"].make().model, ""),
    ],
    ids=["moshi-conditional", "moshi-decoder", "gemma3-multimodal", "kyutai-stt", "llama-decoder"],
)
def test_the_text_decoder_is_found_and_no_other_tower(build: Callable[[], nn.Module], path: str) -> None:
    model = build()
    decoder = find_decoder(model)
    assert decoder.module is model.get_submodule(path)
    assert len(decoder.blocks) == BLOCKS
    inlay.attach(model, FastWeightConfig(layers="all")).detach()


def test_a_memory_in_moshi_is_used_by_its_conditional_model() -> None:
    torch.manual_seed(0)
    model = transformers.MoshiForConditionalGeneration(moshi_config()).eval()
    ids = BY_NAME["moshi"].tokens(1, TOKENS)
    with torch.no_grad():
        base = model.decoder(input_ids=ids).logits
        memory = inlay.attach(model, BY_NAME["moshi"].config())
        assert relative_error(model.decoder(input_ids=ids).logits, base) > 0.01
        memory.detach()
        assert torch.equal(model.decoder(input_ids=ids).logits, base)


def test_a_decoder_alone_takes_a_memory() -> None:
    family = BY_NAME["llama"]
    model, ids = family.make(), family.tokens(2, TOKENS)
    inlay.attach(model.model, family.config())
    again = family.make()
    inlay.attach(again, family.config())
    again.load_state_dict(model.state_dict())
    assert torch.equal(family.logits(model, ids), family.logits(again, ids))


def test_a_projection_that_is_given_all_rows_as_one_keeps_them_apart() -> None:
    """OPT's blocks flatten ``[B, T, F]`` to ``[B · T, F]`` around their MLP."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        init_std=0.3,
        dropout=0.0,
    )
    model = transformers.OPTForCausalLM(config).eval()
    ids = BY_NAME["llama"].tokens(3, TOKENS)

    def logits(rows: Tensor, **kwargs: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=rows, use_cache=False, **kwargs).logits

    base = logits(ids)
    pattern = {"layers": "all", "chunk_size": CHUNK, "projection": "model.decoder.layers.{layer}.fc2"}
    memory = inlay.attach(model, FastWeightConfig(**pattern, eta=1.0))
    assert torch.equal(logits(ids), base)
    memory.detach()
    memory = inlay.attach(model, FastWeightConfig(**pattern, eta=0.1, init={"normal": 0.5}))
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, 15:] = 0
    together = logits(ids, attention_mask=mask)
    assert relative_error(together, base) > 0.01
    for row, length in ((0, TOKENS), (1, 15), (2, TOKENS)):
        assert_close(together[row : row + 1, :length], logits(ids[row : row + 1, :length]), 1e-5)
    answer = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    written = model.generate(ids, **answer)
    assert_close(logits(written)[:, TOKENS - 1 : -1].argmax(-1).float(), written[:, TOKENS:].float(), 0)
    memory.detach()
    assert torch.equal(logits(ids), base)
