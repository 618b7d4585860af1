"""The causality probe: exact zeros for honest models, and every way of reading ahead is seen and named."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor, nn

from inlay import attach
from inlay.doctor.causality import probe_causality
from inlay.doctor.findings import Severity
from inlay.report.console import print_section
from tests.evaluate.models import llama
from tests.fastweight.families import BY_NAME, MODELS, Model, snapshot

C = 4
PROBED = [model for model in MODELS if model.name != "home-made"]  # which does not call its tokens input_ids


def batch_of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids if ids.dim() == 2 else ids[..., 0]}


def leaking_block(model: nn.Module, index: int) -> None:
    """Let the block add what comes after each token to it."""
    model.model.layers[index].register_forward_hook(lambda module, args, output: output + 0.1 * output.roll(-1, 1))


@pytest.mark.parametrize("family", PROBED, ids=lambda family: family.name)
def test_an_honest_model_shows_exactly_zero_and_exposure_does_not(family: Model) -> None:
    model = family.make()
    attach(model, family.config(exposure=1.0))
    result = probe_causality(model, batch_of(family.tokens(2, 23)))
    assert result.base.change == 0.0
    assert result.honest is not None
    assert result.honest.change == 0.0
    assert result.honest.changed == 0
    assert result.exposed is not None
    assert result.exposed.change > 0.01
    assert [finding.code for finding in result.findings()] == ["causality.exposure"]
    assert result.findings()[0].severity == Severity.WARNING


def test_exposure_reads_no_further_ahead_than_its_own_chunk() -> None:
    family = BY_NAME["llama"]
    model = family.make()
    attach(model, family.config(exposure=0.5, init="next_token"))
    result = probe_causality(model, batch_of(family.tokens(2, 30)), positions=40)
    assert result.exposed is not None
    assert 0 < result.exposed.reach < C
    # In every chunk the first token is preceded by none of its own chunk, so replacing it changes nothing.
    assert 0 < result.exposed.changed < result.probes == 40


def test_a_fresh_memory_shows_no_leak_yet_but_is_told_that_it_will() -> None:
    family = BY_NAME["mistral"]
    model = family.make()
    memory = attach(model, family.config(exposure=1.0, init="zero"))
    before = snapshot(model)
    result = probe_causality(model, batch_of(family.tokens(2, 23)))
    assert result.exposed is not None
    assert result.exposed.change == 0.0
    assert result.trained is not None
    assert result.trained.change > 0.01
    (finding,) = result.findings()
    assert finding.code == "causality.exposure"
    assert "will leak" in finding.says
    assert finding.fix == "memory.exposure: 0"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert memory.config.exposure == 1.0


def test_what_exposure_takes_off_the_loss_is_what_the_models_own_loss_says() -> None:
    family = BY_NAME["llama"]
    model = family.make()
    attach(model, family.config(exposure=0.7))
    batch = batch_of(family.tokens(2, 23))
    result = probe_causality(model, batch)
    with torch.no_grad():
        evaluated = float(model.eval()(**batch, use_cache=False).loss)
        trained = float(model.train()(**batch, use_cache=False).loss)
    assert result.leaked_bits == pytest.approx((evaluated - trained) / math.log(2), abs=1e-5)


def test_on_random_tokens_where_nothing_can_be_learnt_the_training_loss_falls_by_the_leak_alone() -> None:
    model = llama(vocab_size=16, num_hidden_layers=1)
    attach(model, BY_NAME["llama"].config(layers=[0], exposure=1.0, eta=0.1, init="next_token", normalize_target=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(120):
        ids = torch.randint(0, 16, (8, 16), generator=generator)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result = probe_causality(model, batch_of(torch.randint(0, 16, (32, 16), generator=generator)))
    assert result.leaked_bits is not None
    assert result.leaked_bits > 0.3
    assert result.honest is not None
    assert result.honest.bits is not None
    assert result.honest.bits > math.log2(16) - 0.1, "the tokens are random: log2(16) bits each"
    assert "lower for it" in result.findings()[0].says


@pytest.mark.parametrize("with_memory", [False, True])
def test_a_base_model_that_reads_ahead_is_caught_and_named(with_memory: bool) -> None:
    family = BY_NAME["llama"]
    model = family.make()
    leaking_block(model, 1)
    if with_memory:
        attach(model, family.config())
    result = probe_causality(model, batch_of(family.tokens(2, 23)))
    assert result.base.change > 0.01
    finding = result.findings()[0]
    assert finding.code == "causality.leak"
    assert finding.severity == Severity.FATAL
    assert "base model itself" in finding.says
    assert result.culprits == ()


def test_a_bidirectional_model_is_caught() -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **size, initializer_range=0.2))
    result = probe_causality(model, batch_of(BY_NAME["llama"].tokens(2, 23)))
    assert result.base.changed == result.probes
    assert [finding.severity for finding in result.findings()] == [Severity.FATAL]


def test_a_memory_whose_target_looks_into_the_next_chunk_is_caught_by_name() -> None:
    family = BY_NAME["qwen3"]
    model = family.make()
    memory = attach(model, family.config())
    # As a convolution would that does not end at the chunk's border: a chunk's last token sees the second of the next.
    memory.layers[2].target.forward = lambda x: x.roll(-2, 1)
    result = probe_causality(model, batch_of(family.tokens(2, 40)), positions=16)
    assert result.base.change == 0.0
    assert result.culprits == (2,)
    finding = result.findings()[0]
    assert (finding.code, finding.severity) == ("causality.leak", Severity.FATAL)
    assert "block 2" in finding.says


def test_packed_documents_with_padding_and_carried_memory_are_honest_too() -> None:
    family = BY_NAME["llama"]
    ids = family.tokens(2, 24)
    documents = torch.tensor([[0] * 9 + [1] * 11 + [-1] * 4, [0] * 24])
    places = torch.cat([torch.arange(9), torch.arange(11), torch.zeros(4, dtype=torch.long)])
    positions = torch.stack([places, torch.arange(24)])
    batch = {"input_ids": ids, "document_ids": documents, "position_ids": positions}
    for boundary in ("reset", "carry"):
        model = family.make()
        attach(model, family.config(boundary=boundary))
        result = probe_causality(model, batch, positions=24)
        assert result.probes == 24
        assert result.honest is not None
        assert result.honest.change == 0.0
        assert result.honest.bits is None


def test_dropout_does_not_blur_the_probe_and_every_mode_is_given_back() -> None:
    model = llama(attention_dropout=0.5)
    memory = attach(model, BY_NAME["llama"].config(layers=[0], exposure=1.0, max_update_norm=1.0))
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    counted = [int(layer.statistics.updates) for layer in memory.layers.values()]
    ids = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))
    first, second = (probe_causality(model, batch_of(ids)) for _ in range(2))
    assert first == second
    assert first.honest is not None
    assert first.honest.change == 0.0
    assert [module.training for module in model.modules()] == modes
    assert [int(layer.statistics.updates) for layer in memory.layers.values()] == counted


def test_the_section_tells_zero_from_almost_zero() -> None:
    family = BY_NAME["llama"]
    model = family.make()
    attach(model, family.config(exposure=1.0))
    console = Console(record=True, width=120)
    print_section(console, probe_causality(model, batch_of(family.tokens(2, 23))).section())
    text = console.export_text()
    assert "exactly 0" in text
    assert "exposure 1 in training" in text


def test_a_batch_in_which_nothing_can_be_replaced_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        probe_causality(llama(), {"input_ids": torch.zeros(2, 1, dtype=torch.long)})
    with pytest.raises(ValueError, match="positions"):
        probe_causality(llama(), {"input_ids": torch.zeros(2, 9, dtype=torch.long)}, positions=0)
