"""What the doctor says of the memory's scale, against sums written out, and the η it recommends, against training."""

from __future__ import annotations

import argparse
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

import inlay
from inlay import Memory, attach
from inlay.data import load_data
from inlay.doctor.findings import Severity
from inlay.doctor.measuring import LayerTrace, trace_layer
from inlay.doctor.scale import Scale, examine_scale, growth_exponent
from inlay.doctor.step_size import StepSize, nice, plain, recommend_step_size
from inlay.evaluate import evaluating
from inlay.fastweight import fast_weight_linear
from inlay.fastweight.chunks import chunk_layout
from inlay.fastweight.layer import Observation
from inlay.report import Figure
from inlay.train.recipe import Recipe, load_recipe
from inlay.train.run import build_model
from tests.fastweight.families import BY_NAME, HomeMade, snapshot

D, WIDE, C = 6, 9, 4
RECIPES = Path(inlay.__file__).parent / "recipes"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observed(z: Tensor, v: Tensor, base: Tensor, eta: float, documents: Tensor | None = None) -> Observation:
    """An observation of a layer whose base gives ``base``; the sums are written out, document by document."""
    layout = chunk_layout(*z.shape[:2], C, documents=documents)
    output = base.clone()
    for row, start, stop in spans(z, documents):
        for t in range(start, stop):
            read = start + (t - start) // C * C
            total = torch.einsum("td,tf->df", v[row, start:read], z[row, start:read])
            output[row, t] += eta * total @ z[row, t]
    return Observation(layout.pack(z), layout.pack(v), None, layout, z, output)


def spans(z: Tensor, documents: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, start, stop) of every document."""
    rows, tokens = z.shape[:2]
    if documents is None:
        return [(row, 0, tokens) for row in range(rows)]
    found = []
    for row in range(rows):
        ids = documents[row].tolist()
        found += [(row, ids.index(n), len(ids) - ids[::-1].index(n)) for n in sorted(set(ids) - {-1})]
    return found


def rms(x: Tensor) -> float:
    return float(x.detach().double().pow(2).mean().sqrt())


def real_parts(model: nn.Module, memory: Memory, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Base output and memory's part of the first memory layer, [B, T, D] each, by running it both ways."""
    layer = next(iter(memory.layers.values()))
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with evaluating(model):
        model(input_ids=ids, use_cache=False)
        handle.remove()
        ((z, output),) = seen
        base = layer.__dict__["base"](z)
    return base, output - base


def chunk_shares(base: Tensor, fast: Tensor) -> list[float]:
    return [
        rms(fast[:, start : start + C]) / rms((base + fast)[:, start : start + C])
        for start in range(0, base.shape[1], C)
    ]


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_a_trace_is_what_the_sums_written_out_say(eta: float) -> None:
    z, v, base = randn(2, 11, WIDE), randn(2, 11, D, seed=1), randn(2, 11, D, seed=2)
    result = trace_layer(observed(z, v, base, eta), eta)
    assert result.tokens == (8, 8, 6)
    for k in range(3):
        total = torch.einsum("btd,btf->bdf", v[:, : k * C], z[:, : k * C])
        here = slice(k * C, (k + 1) * C)
        fast = torch.einsum("btf,bdf->btd", z[:, here], total)
        assert result.base_power[k] == pytest.approx(float(base[:, here].pow(2).mean()))
        assert result.fast_power[k] == pytest.approx(float(fast.pow(2).mean()))
        assert result.cross_power[k] == pytest.approx(float((fast * base[:, here]).mean()))
        assert result.sum_norm[k] == pytest.approx(math.sqrt(float(total.pow(2).sum((1, 2)).mean())))
        assert result.share(0.7)[k] == pytest.approx(rms(0.7 * fast) / rms(base[:, here] + 0.7 * fast))
    updates = torch.stack([torch.einsum("btd,btf->bdf", v[:, s : s + C], z[:, s : s + C]) for s in (0, C)])
    norms = updates.pow(2).sum((2, 3)).sqrt()
    assert result.update_norm == pytest.approx(norms.pow(2).mean(1).sqrt().tolist())
    assert result.smallest_update == pytest.approx(float(norms.min()))
    assert result.target_rms == pytest.approx(rms(v))
    assert result.echo_power == pytest.approx(float((z.pow(2).sum(-1, keepdim=True) * v).pow(2).mean()))
    mean = z.mean((0, 1))
    assert result.common_mode == pytest.approx(float(mean @ mean / z.pow(2).sum(-1).mean()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trace_within_autocast_is_the_one_without(dtype: torch.dtype) -> None:
    seen = observed(100 * randn(2, 11, WIDE), 100 * randn(2, 11, D, seed=1), randn(2, 11, D, seed=2), 0.3)
    with torch.autocast("cpu", dtype):
        within = trace_layer(seen, 0.3)
    assert within == trace_layer(seen, 0.3)
    assert all(math.isfinite(power) for power in within.fast_power)


def test_packed_documents_count_from_their_own_start_and_padding_counts_for_nothing() -> None:
    documents = torch.tensor([[0] * 6 + [1] * 5, [-1] * 2 + [0] * 9])
    z, v, base = randn(2, 11, WIDE), randn(2, 11, D, seed=1), randn(2, 11, D, seed=2)
    real = documents >= 0
    result = trace_layer(observed(z, v, base, 0.5, documents), 0.5)
    apart = [
        trace_layer(observed(z[r : r + 1, a:b], v[r : r + 1, a:b], base[r : r + 1, a:b], 0.5), 0.5)
        for r, a, b in spans(z, documents)
    ]
    assert result.tokens == (4 + 4 + 4, 2 + 1 + 4, 1)
    for k in range(3):
        pieces = [one for one in apart if len(one.tokens) > k]
        for name in ("base_power", "cross_power", "fast_power"):
            expected = sum(one.tokens[k] * getattr(one, name)[k] for one in pieces) / result.tokens[k]
            assert getattr(result, name)[k] == pytest.approx(expected)
    assert result.target_rms == pytest.approx(rms(v[real]))
    assert result.smallest_update == pytest.approx(min(one.smallest_update for one in apart))


def test_the_common_mode_is_0_for_opposite_inputs_and_1_for_equal_ones() -> None:
    def of(z: Tensor) -> LayerTrace:
        return trace_layer(
            observed(z, torch.ones(1, 4, D, dtype=torch.float64), torch.zeros(1, 4, D).double(), 0.0), 0.0
        )

    line = torch.ones(1, 4, WIDE, dtype=torch.float64)
    assert of(line).common_mode == pytest.approx(1.0)
    assert of(line * torch.tensor([1.0, -1, 1, -1]).view(1, 4, 1)).common_mode == pytest.approx(0.0)
    corners = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.float64)
    assert of(F.pad(corners, (0, WIDE - 2)).unsqueeze(0)).common_mode == pytest.approx(0.5)
    assert of(line).target_common_mode == pytest.approx(1.0)


def test_growth_is_a_half_for_updates_of_every_direction_and_one_for_equal_ones() -> None:
    steps = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    walk = [0.0, *steps.cumsum(0).norm(dim=1).tolist()]
    assert growth_exponent(walk) == pytest.approx(0.5, abs=0.05)
    assert growth_exponent([0.0, 2.0, 4.0, 6.0, 8.0]) == pytest.approx(1.0)
    assert growth_exponent([0.0, 1.0, 4.0, 9.0]) == pytest.approx(2.0)
    assert growth_exponent([0.0, 1.0, 2.0]) is None
    assert growth_exponent([0.0, 0.0, 0.0, 0.0]) is None


def test_the_share_is_what_running_the_layer_with_and_without_its_memory_shows() -> None:
    family = BY_NAME["llama"]
    model, ids = family.make(), family.tokens(2, 23)
    memory = attach(model, family.config(layers=[1]))
    (layer,) = examine_scale(memory, model, {"input_ids": ids}).layers
    base, fast = real_parts(model, memory, ids)
    assert layer.share == pytest.approx(chunk_shares(base, fast), rel=1e-4)
    assert layer.mean_share == pytest.approx(rms(fast[:, C:]) / rms((base + fast)[:, C:]), rel=1e-4)
    assert layer.base_norm == pytest.approx(rms(memory.layers[1].weight) * math.sqrt(memory.layers[1].weight.numel()))


def test_measuring_changes_nothing() -> None:
    family = BY_NAME["gpt2"]
    model = family.make()
    memory = attach(model, family.config(max_update_norm=1.0))
    before, counted = snapshot(model), memory.clip_rate()
    config = memory.config
    model.train()
    examine_scale(memory, model, {"input_ids": family.tokens(2, 23)})
    recommend_step_size(memory, model, {"input_ids": family.tokens(2, 23)})
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert memory.clip_rate() == counted
    assert memory.config == config
    assert all(module.training for module in model.modules())
    assert all(layer.observer is None for layer in memory.layers.values())


def test_resolution_tells_whether_a_bf16_weight_would_keep_the_update() -> None:
    weight = 0.05 * randn(D * 40, WIDE * 40).float()
    update = randn(D * 40, WIDE * 40, seed=1).float()

    def kept(resolution: float) -> float:
        """Share of the entries of a bf16 weight that move when an update of that resolution is added to it."""
        scale = resolution * 2.0**-8 * rms(weight) / rms(update)
        rounded = weight.bfloat16()
        return float(((rounded.float() + scale * update).bfloat16() != rounded).float().mean())

    assert kept(0.01) < 0.02
    assert kept(10) > 0.9
    family = BY_NAME["llama"]
    model = family.make()
    memory = attach(model, family.config(layers=[1]))
    (layer,) = examine_scale(memory, model, {"input_ids": family.tokens(1, 4)}).layers
    with memory.session() as session:
        model(input_ids=family.tokens(1, 4))
        model(input_ids=family.tokens(1, 1))  # what has been read is written when the next token comes
        update = memory.config.eta * session.state.layers[1].total()
    assert layer.resolution == pytest.approx(rms(update) / (2.0**-8 * rms(memory.layers[1].weight)), rel=1e-4)


def test_a_clip_that_always_bites_is_found_and_one_that_never_does_is_not() -> None:
    family = BY_NAME["llama"]
    for limit, rate in ((1e-3, 1.0), (1e6, 0.0)):
        model = family.make()
        memory = attach(model, family.config(max_update_norm=limit))
        scale = examine_scale(memory, model, {"input_ids": family.tokens(2, 23)})
        assert [layer.clip_rate for layer in scale.layers] == [rate, rate]
        codes = [finding.code for finding in scale.findings() if finding.severity == Severity.WARNING]
        assert codes == ["scale.clip"] * 2 * (rate > 0.9)
        model.train()(input_ids=family.tokens(2, 23), use_cache=False)
        assert set(memory.clip_rate().values()) == {rate}


class Unnormalised(HomeMade):
    """No norm anywhere: what an earlier memory adds makes the inputs of a later one grow."""

    def forward(self, input_ids: Tensor) -> object:
        return super().forward(words=input_ids)


def test_sums_that_feed_one_another_diverge_and_those_behind_a_norm_do_not() -> None:
    torch.manual_seed(0)
    model = Unnormalised()
    memory = attach(model, BY_NAME["home-made"].config(eta=1.0, init="next_token"))
    scale = examine_scale(memory, model, {"input_ids": BY_NAME["home-made"].tokens(2, 64)})
    first, last = scale.layers
    assert not first.diverging
    assert last.diverging
    assert scale.findings()[0].code == "scale.diverging"
    assert "block 2" in scale.findings()[0].says

    family = BY_NAME["llama"]
    model = family.make()
    memory = attach(model, family.config(eta=1.0, init="next_token"))
    scale = examine_scale(memory, model, {"input_ids": family.tokens(2, 64)})
    assert not any(layer.diverging for layer in scale.layers)


def test_numbers_that_overflow_are_fatal() -> None:
    family = BY_NAME["llama"]
    model = family.make()
    memory = attach(model, family.config(eta=1e38, init="next_token"))
    scale = examine_scale(memory, model, {"input_ids": family.tokens(2, 23)})
    assert scale.findings()[0].severity == Severity.FATAL
    assert scale.findings()[0].code == "scale.diverging"
    assert scale.section().items


def test_the_share_at_another_eta_is_known_from_one_pass() -> None:
    family = BY_NAME["llama"]
    model, ids = family.make(), family.tokens(2, 23)
    memory = attach(model, family.config(layers=[1]))
    (layer,) = recommend_step_size(memory, model, {"input_ids": ids}).layers
    for eta in (1e-3, 0.2, 7.0):
        with memory.using(eta=eta):
            shares = chunk_shares(*real_parts(model, memory, ids))
        assert layer.own.share(eta) == pytest.approx(shares, rel=1e-3)


def test_unit_gain_is_what_init_next_token_makes() -> None:
    family = BY_NAME["mistral"]
    batch = {"input_ids": family.tokens(2, 23)}
    results = []
    for init in ("zero", "next_token", {"normal": 1e-4}):
        model = family.make()
        memory = attach(model, family.config(init=init, normalize_target=True))
        results.append(recommend_step_size(memory, model, batch))
    zero, ready, noise = results
    assert [layer.fresh for layer in zero.layers] == [True, True]
    assert [layer.own for layer in ready.layers] == [layer.unit for layer in zero.layers]
    assert zero.recommended == ready.recommended == noise.recommended


def test_an_echo_is_what_a_token_gives_back_when_its_z_comes_again() -> None:
    z, v = randn(1, 1, WIDE), randn(1, 1, D, seed=1)
    again, _ = fast_weight_linear(
        torch.cat([z, z], 1), torch.cat([v, v], 1), torch.zeros(D, WIDE).double(), eta=1.0, chunk_size=1
    )
    measured = trace_layer(observed(z, v, torch.zeros(1, 1, D).double(), 0.0), 0.0)
    assert rms(again[:, 1]) == pytest.approx(math.sqrt(measured.echo_power))


def source_text(rows: int, tokens: int) -> dict[str, Tensor]:
    """Real text, byte by byte."""
    data = Path(inspect.getsourcefile(argparse) or "").read_bytes()[: rows * tokens]
    ids = torch.tensor(list(data)).view(rows, tokens)
    return {"input_ids": ids, "labels": ids}


def recommended_for(recipe: Recipe, batch: dict[str, Tensor], vocabulary: int) -> StepSize:
    torch.manual_seed(0)
    model = build_model(recipe, vocabulary)
    assert recipe.memory is not None
    return recommend_step_size(attach(model, recipe.memory), model, batch)


def test_the_eta_that_trained_best_lies_in_the_band() -> None:
    """By docs/log.md: 0.1 for both recipes, and 1e-3 taught recall nothing in 160 steps."""
    recall = load_recipe(RECIPES / "recall.yaml")
    data = load_data(recall.data)
    result = recommended_for(recall, data.collate([data.train[i] for i in range(4)]), data.vocab_size)
    assert result.low < 0.1 < result.high
    assert result.low > 1e-3
    assert result.findings() == []
    stdlib = load_recipe(RECIPES / "stdlib.yaml")
    result = recommended_for(stdlib, source_text(4, 512), 2048)
    assert result.low < 0.1 < result.high
    assert result.low > 1e-3


def step_size_of(**changes: object) -> StepSize:
    family = BY_NAME["llama"]
    model = family.make()
    memory = attach(model, family.config(**{"init": "next_token", "normalize_target": True} | changes))
    return recommend_step_size(memory, model, {"input_ids": family.tokens(2, 40)})


def test_the_advice_taken_leaves_nothing_to_say_and_a_hundredth_or_a_hundredfold_of_it_does() -> None:
    advice = step_size_of().recommended
    assert step_size_of(eta=advice).findings() == []
    for factor, code in ((0.01, "scale.too_small"), (100.0, "scale.too_large")):
        (finding,) = step_size_of(eta=advice * factor).findings()
        assert (finding.code, finding.severity) == (code, Severity.WARNING)
        assert f"memory.eta: {plain(advice)}" in finding.fix


def test_the_advice_is_inverse_to_the_targets_scale_and_blind_to_the_recipes_eta_and_clip() -> None:
    advice = step_size_of()
    assert step_size_of(eta=7.0).recommended == advice.recommended
    assert step_size_of(max_update_norm=1e-5).low == advice.low
    family = BY_NAME["llama"]
    model = family.make()
    memory = attach(model, family.config(init="zero"))
    ids = {"input_ids": family.tokens(2, 40)}
    before = recommend_step_size(memory, model, ids)
    hooked = model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 10)
    after = recommend_step_size(memory, model, ids)
    hooked.remove()
    assert after.low < before.low  # ten times the embeddings: the target grows with them, Z behind a norm does not


def test_a_frozen_base_under_a_target_with_gain_is_judged_by_the_sequences_end() -> None:
    family = BY_NAME["llama"]
    model, ids = family.make(), family.tokens(2, 40)
    memory = attach(model, family.config(layers=[1], init="next_token"))
    assert recommend_step_size(memory, model, {"input_ids": ids}).rule == "echo", "the base can adapt"
    memory.train_only("memory")
    result = recommend_step_size(memory, model, {"input_ids": ids})
    assert result.rule == "end"
    eta = math.sqrt(result.low * result.high)
    with memory.using(eta=eta):
        base, fast = real_parts(model, memory, ids)
    assert rms(fast[:, -C:]) == pytest.approx(rms(base[:, -C:]), rel=1e-3)
    with memory.using(eta=30 * eta):
        (finding,) = recommend_step_size(memory, model, {"input_ids": ids}).findings()
    assert finding.code == "scale.too_large"
    assert "frozen" in finding.says
    memory.layers[1].target.conv.data.zero_()
    assert recommend_step_size(memory, model, {"input_ids": ids}).rule == "echo", "the gain is learnt"


def test_an_eta_that_changes_nothing_is_told_and_whether_a_larger_one_would() -> None:
    (finding,) = step_size_of(eta=1e-9).findings()
    assert (finding.code, finding.severity) == ("scale.no_effect", Severity.WARNING)
    (finding,) = step_size_of(eta=0.0).findings()
    assert (finding.code, finding.severity) == ("scale.no_effect", Severity.FATAL)
    (finding,) = step_size_of(init="zero", eta=1e-9).findings()
    assert finding.code == "scale.no_effect", "of a zero target, what it would be at unit gain counts"
    (finding,) = step_size_of(init={"normal": 1e-6}, eta=0.1).findings()
    assert (finding.code, finding.severity) == ("scale.no_effect", Severity.FATAL)
    assert "the target is next to nothing" in finding.says


def test_a_clip_that_no_eta_outweighs_is_fatal_and_named() -> None:
    for init in ("zero", "next_token"):
        (finding,) = step_size_of(eta=0.1, init=init, max_update_norm=1e-7).findings()
        assert (finding.code, finding.severity) == ("scale.no_effect", Severity.FATAL)
        assert "clipping" in finding.says
        assert "memory.max_update_norm: null" in finding.fix


def test_documents_of_one_chunk_are_not_this_examinations_business() -> None:
    family = BY_NAME["llama"]
    model = family.make()
    memory = attach(model, family.config(init="next_token", eta=step_size_of().recommended))
    batch = {"input_ids": family.tokens(2, 3)}
    result = recommend_step_size(memory, model, batch)
    assert [finding.code for finding in result.findings()] in ([], ["scale.too_small"], ["scale.too_large"])
    assert examine_scale(memory, model, batch).layers[0].mean_share == 0.0


def test_step_sizes_are_told_as_one_writes_them() -> None:
    assert [nice(x) for x in (0.02, 0.0154, 1.9, 5.0, 6e-4)] == [0.03, 0.01, 3.0, 3.0, 1e-3]
    assert math.isnan(nice(math.nan))
    assert [plain(x) for x in (3e-4, 0.03, 1.5e-5, 0.0, 12.0, 260.0, 1e4)] == [
        "3e-4",
        "0.03",
        "1.5e-5",
        "0",
        "12",
        "260",
        "1e4",
    ]


def test_both_go_to_json_and_back_and_are_drawn() -> None:
    family = BY_NAME["llama"]
    model = family.make()
    memory = attach(model, family.config())
    batch = {"input_ids": family.tokens(2, 23)}
    scale, step_size = examine_scale(memory, model, batch), recommend_step_size(memory, model, batch)
    for kind, result in ((Scale, scale), (StepSize, step_size)):
        adapter = TypeAdapter(kind)
        assert adapter.validate_json(adapter.dump_json(result)) == result
    (figure,) = (item for item in step_size.section().items if isinstance(item, Figure))
    assert "recommended" in figure.light_svg or "recommended" in figure.alt
