"""Gradient attribution: the right cause is named, in words and in the table."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from pydantic import TypeAdapter
from torch import Tensor, nn

import inlay
from inlay.doctor.attribution import Attribution, attribute_gradients
from inlay.doctor.findings import Severity
from inlay.doctor.gradients import Reading
from tests.doctor.attributions import GROUPS, attached, batch_of, trial


def found(attribution: Attribution) -> dict[str, Severity]:
    return {finding.code: finding.severity for finding in attribution.findings()}


# The configuration of the requirement documents, in small: 7 chunks, every update clipped to 1e-5, init normal. X0 has
# unit RMS, as in a trained model with summed codebooks, so that the clip bites at both of their inits.


def documents_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data *= 5
    return model


def documents_attribution(std: float, **changes: Any) -> Attribution:
    settings = {"chunk_size": 16, "eta": 3e-4, "init": {"normal": std}, "max_update_norm": 1e-5} | changes
    model, memory = attached(model=documents_model(), **settings)
    lengths = {"125 chunks": batch_of(2000, rows=1)}
    return attribute_gradients(memory, model, batch_of(112, 1), longer_batch=batch_of(224, 1), lengths=lengths)


@pytest.fixture(scope="module")
def small_init() -> Attribution:
    return documents_attribution(1e-4)


@pytest.fixture(scope="module")
def large_init() -> Attribution:
    return documents_attribution(1e-2)


def test_seven_chunks_were_seven_chunks(small_init: Attribution) -> None:
    assert small_init.own.reading == Reading(chunks=7, reading=6, longest=112)
    assert small_init.own.clip_rate == 1.0


@pytest.mark.parametrize("init", ["small_init", "large_init"])
def test_on_the_documents_configuration_the_clip_is_named(init: str, request: pytest.FixtureRequest) -> None:
    attribution: Attribution = request.getfixturevalue(init)
    (finding,) = attribution.findings()
    assert (finding.code, finding.severity) == ("gradient.clip", Severity.FATAL)
    assert finding.fix == "set memory.max_update_norm: null"
    assert attribution.sentence.startswith("the clip keeps the memory from learning: it shortens 100% of the updates")
    assert attribution.remedy is trial(attribution, "clip", "off")


def test_raising_the_init_lowered_the_gradient(small_init: Attribution, large_init: Attribution) -> None:
    """What the documents did in despair: 1e-4 to 1e-2. The same random numbers, so it is the same memory scaled."""
    lowered = large_init.own.memory / small_init.own.memory
    assert lowered == pytest.approx(0.01, rel=1e-3)
    assert trial(small_init, "init", "×100").ratio == pytest.approx(lowered, rel=1e-3)
    assert "an init 100 times as large divides it by 100" in small_init.sentence
    assert large_init.own.memory_rms < 1e-8 < small_init.own.memory_rms


def test_125_chunks_alone_would_not_have_helped(small_init: Attribution, large_init: Attribution) -> None:
    for attribution, without_clip in ((small_init, 10), (large_init, 1e5)):
        length = trial(attribution, "sequence length", "125 chunks").ratio
        assert length is not None
        assert 1 < length < 5
        clip = trial(attribution, "clip", "off").ratio
        assert clip is not None
        assert clip > max(without_clip, 4 * length)
        assert f"length alone does little (125 chunks: {length:.2f} times" in attribution.sentence
    longest = trial(large_init, "sequence length", "125 chunks").norms
    assert longest is not None
    assert longest.memory_rms < 1e-8, "still nothing that AdamW could step by"


def test_without_the_clip_the_same_memory_is_healthy_at_the_larger_init() -> None:
    attribution = documents_attribution(1e-2, max_update_norm=None)
    assert attribution.findings() == []
    assert attribution.sentence.startswith("the memory gets a gradient (RMS ")
    clip = trial(attribution, "clip", "on (‖Δ‖ ≤ 1e-05)")
    assert clip.ratio is not None
    assert clip.ratio < 1e-5


def test_reading_ahead_is_measured_and_never_advised(small_init: Attribution) -> None:
    half, full = trial(small_init, "exposure", "0.5"), trial(small_init, "exposure", "1")
    assert half.ratio is not None
    assert full.ratio is not None
    assert 1 < half.ratio < full.ratio
    assert half.fix == full.fix == ""


def test_a_fresh_memory_is_clipped_only_once_it_writes() -> None:
    attribution = documents_attribution(1e-2, init="zero")
    assert attribution.own.clip_rate == 0.0
    assert trial(attribution, "clip", "off").ratio == 1.0
    assert found(attribution) == {"gradient.clip": Severity.FATAL}
    assert attribution.sentence.startswith("once the target has grown, the clip keeps the memory from learning")


# The verdict.


def attribution_of(*, batch: dict[str, Tensor] | None = None, **changes: Any) -> Attribution:
    model, memory = attached(**changes)
    return attribute_gradients(memory, model, batch_of(22) if batch is None else batch)


def test_a_fresh_memory_whose_projection_waits_for_the_convolution_is_healthy() -> None:
    attribution = attribution_of(init="zero")
    assert attribution.own.groups["projection"].norm == 0.0
    assert attribution.own.groups["convolution"].norm > 0
    assert attribution.findings() == []
    texts = [item.body for item in attribution.section().items if hasattr(item, "body")]
    assert any("the projection's gradient is exactly 0 at the first step" in text for text in texts)


@pytest.mark.parametrize("exposure", [0.0, 1.0])
def test_documents_of_one_chunk_are_never_read(exposure: float) -> None:
    documents = torch.tensor([[0] * 11 + [1] * 11] * 2)
    attribution = attribution_of(batch=batch_of(22, document_ids=documents), chunk_size=11, exposure=exposure)
    (finding,) = attribution.findings()
    assert (finding.code, finding.severity) == ("gradient.never_read", Severity.FATAL)
    assert "no document of the batch is longer than a chunk (the longest has 11 tokens" in finding.says
    assert ("exactly zero" in finding.says) == (exposure == 0)
    assert ("reading ahead" in finding.says) == (exposure == 1)
    assert finding.fix.startswith("set memory.chunk_size: 2 or less")
    assert "memory.boundary: carry" in finding.fix, "the neighbours are two chunks together"
    carried = trial(attribution, "boundary", "carry").norms
    assert carried is not None
    assert carried.reading.reading == 2


def test_carry_is_not_advised_where_it_does_not_help() -> None:
    (finding,) = attribution_of(chunk_size=22).findings()
    assert finding.code == "gradient.never_read"
    assert "carry" not in finding.fix


@pytest.mark.parametrize(
    ("changes", "code", "severity", "says", "fix"),
    [
        ({"eta": 0.0}, "gradient.zero", 2, "dominant cause is η: with 0.0003 it gets one", "set memory.eta: 0.0003"),
        (
            {"eta": 1e-11},
            "gradient.vanishing",
            2,
            "dominant cause is η, which it is in proportion to and which is 30,000,000 times below",
            "set memory.eta: 0.0003",
        ),
        (
            {"init": {"normal": 1e-4}},
            "gradient.weak",
            1,
            "dominant cause is init, which it is in proportion to and which is 100 times below the usual",
            "set memory.init: {normal: 0.01}",
        ),
        (
            {"max_update_ratio": 1e-9},
            "gradient.clip",
            2,
            "it shortens 100% of the updates, to 2.5e−10 of the base weight all told",
            "set memory.max_update_ratio: null",
        ),
    ],
)
def test_what_starves_a_memory_is_named(changes: dict[str, Any], code: str, severity: int, says: str, fix: str) -> None:
    (finding,) = attribution_of(**changes).findings()
    assert (finding.code, finding.severity, finding.fix) == (code, severity, fix)
    assert says in finding.says


def test_steps_of_unequal_size_do_not_decide_the_cause() -> None:
    """η ×10 and init ×100 raise any gradient in proportion. What is to blame is what lies below its usual value."""
    documents = torch.arange(22).div(5, rounding_mode="floor").expand(2, 22)  # of five tokens: two chunks, barely
    batch = batch_of(22, document_ids=documents)
    usual = attribution_of(batch=batch, eta=3e-4, init={"normal": 0.05})
    ratios = {(t.factor, t.setting): t.ratio for t in usual.trials}
    assert ratios["η", "×10"] == pytest.approx(10, rel=1e-2)
    assert ratios["init", "×100"] == pytest.approx(100, rel=0.1)
    assert found(usual) == {"gradient.weak": Severity.WARNING}
    assert usual.remedy is trial(usual, "boundary", "carry")
    assert "dominant cause is boundary: with carry it is 2.25 times as large" in usual.sentence
    carried = attribution_of(batch=batch, eta=3e-4, init={"normal": 0.01}, boundary="carry", normalize_target=True)
    assert carried.remedy is None
    assert carried.sentence.endswith(
        "nothing that was tried but a larger init or η, to which it is in proportion, makes it more than twice as large"
    )
    tiny = attribution_of(batch=batch, eta=3e-6, init={"normal": 0.05})
    assert tiny.remedy is trial(tiny, "η", "×10")
    assert "dominant cause is η, which it is in proportion to and which is 100 times below the usual" in tiny.sentence


def fresh_qwen3(last_norm: float = 1.0, **changes: Any) -> Attribution:
    """Of a fresh memory of an untrained Qwen3, whose embeddings are small; ``last_norm`` scales all gradients."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(vocab_size=64, tie_word_embeddings=True, **size, **heads)
    )
    torch.nn.init.constant_(model.model.norm.weight, last_norm)
    memory = inlay.attach(model, inlay.FastWeightConfig(init="zero", chunk_size=64, **changes))
    ids = torch.randint(0, 64, (2, 128))
    return attribute_gradients(memory, model, {"input_ids": ids, "labels": ids})


def test_small_embeddings_are_told_to_be_normalized() -> None:
    attribution = fresh_qwen3()
    assert found(attribution) == {"gradient.vanishing": Severity.FATAL}
    normalized = trial(attribution, "target", "normalized")
    assert attribution.remedy is normalized
    assert normalized.ratio == pytest.approx(50, rel=0.1)  # their RMS is 0.02
    assert attribution.findings()[0].fix == "set memory.normalize_target: true"
    assert not any("as it should be" in item.body for item in attribution.section().items[1:])
    assert found(fresh_qwen3(normalize_target=True)) == {}


def test_what_raises_the_gradient_and_is_not_advised_is_not_called_nothing() -> None:
    """Reading ahead raises it 5-fold."""
    attribution = fresh_qwen3(last_norm=0.01, normalize_target=True)
    assert found(attribution) == {"gradient.vanishing": Severity.FATAL}
    ahead = trial(attribution, "exposure", "1").ratio
    assert ahead is not None
    assert ahead > 2
    assert attribution.remedy is None
    assert "good" not in attribution.section().items[0].verdicts
    assert attribution.sentence.endswith(
        "nothing that was tried but a larger init or η, to which it is in proportion, and exposure, which reads ahead, "
        "makes it more than twice as large"
    )


def test_a_gradient_that_is_no_number_is_fatal() -> None:
    assert found(attribution_of(eta=3e37)) == {"gradient.not_finite": Severity.FATAL}


def test_what_could_not_be_tried_says_why() -> None:
    attribution = attribution_of(chunk_size=1)
    assert trial(attribution, "chunk size", "halved").why_not == "chunks of one token cannot be halved"
    assert trial(attribution, "sequence length", "×2").why_not == "the data gave no batch of twice the length"
    assert {t.norms is None for t in attribution.trials[-2:]} == {True}


def test_a_trial_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = attached()
    forward = model.forward

    def limited(input_ids: Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 22:
            raise torch.OutOfMemoryError
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    attribution = attribute_gradients(memory, model, batch_of(22), longer_batch=batch_of(44))
    assert [(t.factor, t.why_not) for t in attribution.trials if t.why_not] == [
        ("sequence length", "it does not fit into the device's memory")
    ]


def test_progress_counts_the_trials() -> None:
    model, memory = attached()
    seen: list[tuple[int, int]] = []
    attribution = attribute_gradients(memory, model, batch_of(22), progress=lambda *counts: seen.append(counts))
    assert seen == [(n, len(attribution.trials)) for n in range(len(attribution.trials) + 1)]


def test_the_table_tells_the_figures_and_marks_the_remedy(large_init: Attribution) -> None:
    section = large_init.section()
    table = section.items[0]
    assert list(table.columns) == ["factor", "setting", *GROUPS[:3]]
    assert len(table.rows) == 1 + len(large_init.trials)
    assert table.rows[0][:2] == ["recipe", "as it is"]
    assert float(str(table.rows[0][2]).replace("−", "-")) == pytest.approx(
        large_init.own.groups["convolution"].norm, rel=0.01
    )
    cells = {(row[0], row[1]): row[2:] for row in table.rows}
    assert cells["init", "×100"] == ["0.0100 ×", "0.0100 ×", "1.00 ×"]
    marked = [row[:2] for row, verdict in zip(table.rows, table.verdicts, strict=True) if verdict == "good"]
    assert marked == [["clip", "off"]]
    assert "Measured at ‖Δ‖ ≤ 1e-05, init normal 0.01, η 0.0003, chunks of 16 tokens" in section.text


def test_json_holds_every_figure(large_init: Attribution) -> None:
    content = json.loads(TypeAdapter(Attribution).dump_json(large_init))
    assert content["own"]["groups"]["convolution"]["norm"] == large_init.own.groups["convolution"].norm
    assert [t["ratio"] for t in content["trials"]] == [t.ratio for t in large_init.trials]
    assert TypeAdapter(Attribution).validate_python(content) == large_init
