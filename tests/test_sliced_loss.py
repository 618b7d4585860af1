"""A loss made in slices is the model's own, and no tensor is as large as the logits of the batch."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import inlay
from inlay import sliced_loss
from inlay.data import pack_documents
from inlay.evaluate import loss_by_position
from inlay.sliced_loss import label_nats, slice_loss, whole_logits
from inlay.train import InlayTrainer
from tests.closeness import assert_close
from tests.evaluate.models import SIZES, VOCAB, llama
from tests.fastweight.families import BY_NAME, MODELS, Model, enable_checkpointing
from tests.processes import in_two_processes

TOKENS = 22
ROWS = 2


@pytest.fixture(autouse=True)
def slices_of_five_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced_loss, "LOGITS_AT_ONCE", ROWS * 64 * 5)


def labelled(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, 4:9] = -100
    labels[1, -2:] = -100
    return labels


def step(model: nn.Module, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Output and gradients of a training step."""
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: nn.Module, **inputs: Any) -> Any:
    with whole_logits(model):
        whole, expected = step(model, **inputs)
    sliced, gradients = step(model, **inputs)
    assert whole.logits is not None
    assert sliced.logits is None
    assert sliced.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 1e-5, name)
    return sliced


def inputs_of(family: Model, **more: Any) -> dict[str, Any]:
    ids = family.tokens(ROWS, TOKENS)
    types = {"token_type_ids": torch.zeros_like(ids)} if family.token_types else {}
    return {"input_ids": ids, "labels": labelled(ids[..., 0] if family.codebooks else ids)} | types | more


@pytest.mark.parametrize("family", [family for family in MODELS if family.name != "home-made"], ids=lambda f: f.name)
def test_loss_and_gradients_are_the_models_own(family: Model) -> None:
    model = family.make().train()
    inlay.attach(model, family.config()).train_only("all")
    assert slice_loss(model)
    inputs = inputs_of(family)
    assert_same_step(model, **inputs)
    labels = inputs.pop("labels")
    nats = label_nats(model, inputs, labels)
    with torch.no_grad(), whole_logits(model):
        logits = model(**inputs, use_cache=False).logits
    by_hand = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    assert_close(nats, by_hand, 1e-5)


CAPPED = {
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
}


@pytest.mark.parametrize("kind", CAPPED)
def test_what_a_model_does_to_its_logits_is_done_to_slices(kind: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | CAPPED[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    assert slice_loss(model)
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    assert_same_step(model, input_ids=ids, labels=labelled(ids))


def test_accumulated_steps_count_their_tokens_together() -> None:
    model = llama().train()
    slice_loss(model)
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    for items in (50, torch.tensor(50)):
        assert_same_step(model, input_ids=ids, labels=ids, num_items_in_batch=items)


def test_with_lora_checkpointing_documents_and_autocast() -> None:
    family = BY_NAME["qwen3"]
    model = family.make()
    slice_loss(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    inlay.attach(wrapped, family.config()).train_only("memory+lora")
    enable_checkpointing(wrapped)
    documents = torch.tensor([[0] * 9 + [1] * 13, [0] * 16 + [-1] * 6])
    assert_same_step(wrapped.train(), **inputs_of(family, document_ids=documents))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [step(wrapped, **inputs_of(family))[0].loss.item()]
        with whole_logits(wrapped):
            losses.append(step(wrapped, **inputs_of(family))[0].loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operator gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_no_tensor_is_as_large_as_the_logits() -> None:
    model = llama(vocab_size=4000).train()
    slice_loss(model)
    ids = torch.randint(3, 4000, (ROWS, TOKENS))
    largest = []
    for _ in range(2):  # the first call asks whether the model agrees
        with Largest() as seen:
            model(input_ids=ids, labels=ids).loss.backward()
        largest.append(seen.elements)
    with Largest() as whole, whole_logits(model):
        model(input_ids=ids, labels=ids).loss.backward()
    assert whole.elements == ROWS * TOKENS * 4000
    assert largest == [4000 * 16] * 2  # the embedding's gradient; a slice of one token has 8,000


def test_other_calls_are_as_they_were() -> None:
    plain, model = llama().eval(), llama().eval()
    slice_loss(model)
    slice_loss(model)  # twice is once
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    calls: list[dict[str, Any]] = [
        {"input_ids": ids},
        {"input_ids": ids[:1, :6], "labels": ids[:1, :6]},  # few enough
        {"input_ids": ids, "labels": ids, "return_dict": False},
        {"input_ids": ids, "labels": ids[:, -3:], "logits_to_keep": 3},
    ]
    for call in calls:
        ours, theirs = (m(**call) for m in (model, plain))
        if "return_dict" not in call:
            ours, theirs = ours.to_tuple(), theirs.to_tuple()
        for mine, right in zip(ours, theirs, strict=True):
            assert not isinstance(right, Tensor) or torch.equal(mine, right)
    written = [m.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None) for m in (model, plain)]
    assert torch.equal(*written)


def test_a_copy_has_weights_of_its_own() -> None:
    model = llama()
    slice_loss(model)
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(input_ids=ids, labels=ids).loss.item() == pytest.approx(llama()(input_ids=ids, labels=ids).loss.item())
    twin(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


class Looks(transformers.LlamaForCausalLM):
    """A model whose logits depend on how many there are."""

    def forward(self, *args: Any, labels: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        output.logits = output.logits + self.model.calls
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size, **kwargs)
        self.model.calls += 1
        return output


def test_a_model_with_logits_of_its_own_way_keeps_its_loss(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Looks(transformers.LlamaConfig(**SIZES))
    model.model.calls = 0
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    assert slice_loss(model)
    with caplog.at_level(logging.WARNING):
        output = model(input_ids=ids, labels=ids)
    assert "Looks makes its logits in a way of its own" in caplog.text
    assert output.logits is not None
    assert output.loss.item() == pytest.approx(llama()(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_models_that_cannot_are_left_alone() -> None:
    home_made = BY_NAME["home-made"].make()
    routed = BY_NAME["qwen3-moe"].make()
    routed.config.output_router_logits = True
    for model in (home_made, routed, nn.Linear(2, 2)):
        assert not slice_loss(model)
        assert "forward" not in model.__dict__


def rows(count: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCAB, (count, TOKENS), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row.where(torch.arange(TOKENS) < 22 - i, -100)} for i, row in enumerate(ids)]


def trained(directory: Path, sliced: bool, batch_size: int = 2) -> tuple[list[float], Any, dict[str, Tensor]]:
    model = llama()
    if sliced:
        slice_loss(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = InlayTrainer(memory=None, model=model, args=arguments, train_dataset=rows(8), eval_dataset=rows(3))
    trainer.train()
    logged = [
        line[key] for line in trainer.state.log_history for key in ("loss", "eval_loss", "grad_norm") if key in line
    ]
    return logged, trainer.predict(rows(3)).predictions, dict(model.named_parameters())


def test_the_trainer_trains_evaluates_and_predicts_the_same(tmp_path: Path) -> None:
    (ours, predicted, weights), (right, expected, others) = (trained(tmp_path, sliced) for sliced in (True, False))
    assert len(ours) == 9
    assert ours == pytest.approx(right, rel=1e-4)
    assert predicted.shape == expected.shape == (3, TOKENS, VOCAB)
    for name, weight in weights.items():
        assert_close(weight, others[name], 1e-3, name)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    def each(rank: int) -> None:
        monkeypatched = pytest.MonkeyPatch()
        monkeypatched.setattr(sliced_loss, "LOGITS_AT_ONCE", 64 * 5)
        _, _, weights = trained(tmp_path / str(rank), sliced=True, batch_size=1)
        torch.save({name: weight.detach() for name, weight in weights.items()}, tmp_path / f"{rank}.pt")

    in_two_processes(each)
    _, _, alone = trained(tmp_path / "alone", sliced=False)
    for rank in (0, 1):
        for name, weight in torch.load(tmp_path / f"{rank}.pt").items():
            assert_close(weight, alone[name], 1e-3, name)


@pytest.mark.parametrize(
    "more",
    [
        {"output_hidden_states": True},
        {"use_cache": True},
        {"ignore_index": 5},
        {"return_dict": False},
    ],
    ids=str,
)
def test_a_call_that_asks_for_more_than_a_loss_gets_it(more: dict[str, Any]) -> None:
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    expected = llama()(input_ids=ids, labels=ids, **more)
    model = llama()
    assert slice_loss(model)
    found = model(input_ids=ids, labels=ids, **more)
    assert type(found) is type(expected)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_labels_may_come_by_place_and_a_loss_may_be_replaced() -> None:
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    model = llama()
    assert slice_loss(model)
    by_name = model(input_ids=ids, labels=ids)
    assert set(by_name) == {"loss"}
    assert torch.equal(model(ids, None, None, None, None, ids).loss, by_name.loss)
    model.loss_function = lambda logits, labels, vocab_size, **more: logits.sum() * 0 + 7
    assert model(input_ids=ids, labels=ids).loss == 7
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    assert model(input_ids=ids, labels=ids).loss == 7


def test_loss_by_position_is_the_same() -> None:
    texts = [torch.randint(3, VOCAB, (length,)).tolist() for length in (40, 25)]
    data = pack_documents(texts, ["a", "b"], sequence_length=20, packing="concatenate", pad_token_id=0)
    whole = loss_by_position(llama(), data, batch_size=2)
    model = llama()
    slice_loss(model)
    sliced = loss_by_position(model, data, batch_size=2)
    assert sliced.sums == pytest.approx(whole.sums, rel=1e-5)
    assert sliced.fingerprint == whole.fingerprint
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    assert_close(label_nats(model, {"input_ids": ids}, ids), label_nats(llama(), {"input_ids": ids}, ids), 1e-5)
