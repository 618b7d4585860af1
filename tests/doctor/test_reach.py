"""Reach counts what the operation reads, the planner inverts it, and the stated averages are recomputed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from inlay import FastWeightConfig
from inlay.data import collate, pack_documents
from inlay.doctor.findings import Severity
from inlay.doctor.reach import Reach, examine_reach
from inlay.doctor.reach_plan import (
    chunks_in,
    ever_read_share,
    mean_reach_share,
    plan_reach,
    reach_of_chunk,
    retention_claims,
    retention_section,
    telling_chunks,
)
from inlay.fastweight import fast_weight_linear_reference
from inlay.report import Report, render_report


def readers(tokens: int, chunk_size: int) -> list[int]:
    """How many chunks read each chunk's update in one document: those whose output has a gradient to its targets."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, tokens, 3, generator=generator, dtype=torch.float64)
    v = torch.randn(1, tokens, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    out, _ = fast_weight_linear_reference(
        z, v, torch.zeros(2, 3, dtype=torch.float64), eta=1.0, chunk_size=chunk_size, exposure=0.0
    )
    out = out + 0 * v.sum()  # so that the first chunk, which reads nothing, has a gradient too: zero
    starts = range(0, tokens, chunk_size)
    counts = [0] * len(starts)
    for j in starts:
        (gradient,) = torch.autograd.grad(out[:, j : j + chunk_size].sum(), v, retain_graph=True)
        for index, i in enumerate(starts):
            counts[index] += bool(gradient[:, i : i + chunk_size].any())
    return counts


@pytest.mark.parametrize("tokens", [3, 4, 5, 8, 9, 16, 23, 28])
def test_the_shares_are_what_the_operation_reads(tokens: int) -> None:
    counts = readers(tokens, 4)
    n = len(counts)
    assert chunks_in(tokens, 4) == n
    assert [round(reach_of_chunk(i, n) * n) for i in range(n)] == counts
    assert ever_read_share(n) == sum(count > 0 for count in counts) / n
    assert mean_reach_share(n) == pytest.approx(sum(counts) / n / n)


def config(chunk_size: int, **fields: Any) -> FastWeightConfig:
    return FastWeightConfig(chunk_size=chunk_size, **fields)


def packed(lengths: list[int], sequence_length: int) -> dict[str, Tensor]:
    documents = [list(range(1, 1 + length)) for length in lengths]
    names = [str(index) for index in range(len(lengths))]
    rows = pack_documents(
        documents, names, sequence_length=sequence_length, packing="concatenate", pad_token_id=0, min_tokens=2
    )
    return collate([rows[index] for index in range(len(rows))])


def test_a_batch_is_counted_document_by_document() -> None:
    """Rows of 16: documents of 5 and 11 tokens, then 5 tokens (the rest of 16) and padding. Chunks of 4."""
    reach = examine_reach(packed([5, 16], 16), config(4))
    assert [(d.row, d.tokens, d.chunks) for d in reach.reset.documents] == [(0, 5, 2), (0, 11, 3), (1, 5, 2)]
    assert [d.ever_read for d in reach.reset.documents] == pytest.approx([1 / 2, 2 / 3, 1 / 2])
    assert [d.mean_reach for d in reach.reset.documents] == pytest.approx([1 / 4, 1 / 3, 1 / 4])
    assert reach.reset.ever_read == pytest.approx(4 / 7)  # of 7 chunks, 3 are a document's last
    assert reach.reset.mean_reach == pytest.approx((1 / 2 + 0 + 2 / 3 + 1 / 3 + 0 + 1 / 2 + 0) / 7)
    assert reach.reset.reading_share == pytest.approx((1 + 7 + 1) / 21)
    assert [(d.row, d.tokens, d.chunks) for d in reach.carry.documents] == [(0, 16, 4), (1, 5, 2)]
    assert reach.carry.ever_read == pytest.approx(4 / 6)


def test_any_column_tells_the_documents_and_padding_counts_nowhere() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [-1, -1, 0, 0, 0, 0, 0, 0]])
    tokens = torch.ones_like(ids)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 0, 1, 2, 3, 4, 5]])
    mask = (ids >= 0).long()
    batches: list[dict[str, Any]] = [
        {"input_ids": tokens, "document_ids": ids},
        {"document_ids": ids, "attention_mask": mask},
        {"input_ids": tokens, "attention_mask": mask, "position_ids": positions},
        {"input_ids": tokens.unsqueeze(-1).expand(-1, -1, 9), "document_ids": ids},
    ]
    for batch in batches:
        reach = examine_reach(batch, config(2))
        assert [d.tokens for d in reach.reset.documents] == [3, 4, 6]
        assert [d.tokens for d in reach.carry.documents] == [7, 6]
    whole = examine_reach({"input_ids": tokens}, config(2))
    assert [d.tokens for d in whole.reset.documents] == [8, 8]
    only_mask = examine_reach({"attention_mask": mask}, config(2))
    assert [d.tokens for d in only_mask.reset.documents] == [7, 6]


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no input_ids"):
        examine_reach({"labels": torch.ones(2, 3)}, config(2))
    with pytest.raises(ValueError, match="no token that is not padding"):
        examine_reach({"document_ids": torch.full((2, 3), -1)}, config(2))


def one_finding(reach: Reach) -> tuple[str, Severity, str, str]:
    (finding,) = reach.findings()
    return finding.code, finding.severity, finding.says, finding.fix


def test_a_memory_that_nothing_reads_is_fatal() -> None:
    batch = {"input_ids": torch.ones(3, 12)}
    code, severity, says, fix = one_finding(examine_reach(batch, config(12)))
    assert (code, severity) == ("reach.never_read", Severity.FATAL)
    assert "none of the 3 documents" in says
    assert "the longest has 12 tokens" in says
    assert says.endswith("it gets no gradient")
    assert "sequence_length: 96" in fix
    assert "carry" not in fix  # a row is one document already
    exposed = one_finding(examine_reach(batch, config(12, exposure=0.5)))
    assert exposed[2].endswith("exposure 0.5, which evaluation turns off")
    code, _, _, fix = one_finding(examine_reach(packed([6, 6, 6, 6], 24), config(8)))
    assert code == "reach.never_read"
    assert "memory.boundary: carry" in fix
    assert "makes 3 chunks of a row" in fix


@pytest.mark.parametrize(("tokens", "short"), [(17, True), (32, True), (33, False), (128, False)])
def test_fewer_than_three_chunks_are_a_warning(tokens: int, short: bool) -> None:
    findings = examine_reach({"input_ids": torch.ones(2, tokens)}, config(16)).findings()
    assert [(f.code, f.severity) for f in findings] == [("reach.short", Severity.WARNING)] * short
    assert all("not in itself a reason for the gradient to vanish" in f.says for f in findings)


@pytest.mark.parametrize("tokens", [8, 17, 30, 100])
def test_the_chunk_size_of_the_fix_gives_at_least_eight_chunks(tokens: int) -> None:
    batch = {"input_ids": torch.ones(2, tokens)}
    fix = one_finding(examine_reach(batch, config(tokens // 2 + 1)))[3]
    found = re.search(r"chunk_size: (\d+) gives a document of (\d+) tokens (\d+) chunks", fix)
    assert found
    mended = examine_reach(batch, config(int(found[1])))
    assert mended.findings() == []
    assert all((d.tokens, d.chunks) == (int(found[2]), int(found[3])) for d in mended.reset.documents)
    assert int(found[3]) >= 8


def test_the_configured_boundary_decides() -> None:
    batch = packed([6, 6, 6, 6], 24)
    assert one_finding(examine_reach(batch, config(4)))[0] == "reach.short"
    assert examine_reach(batch, config(4, boundary="carry")).findings() == []


def test_an_examination_is_plain_numbers_and_renders() -> None:
    reach = examine_reach(packed([30, 5, 60, 9, 2], 32), config(4), frame_rate=12.5)
    assert TypeAdapter(Reach).validate_json(TypeAdapter(Reach).dump_json(reach)) == reach
    page = render_report(Report("Reach", sections=[reach.section(), retention_section()]))
    for text in ("reset (configured)", "seconds, at least", "42.9 %", "n = 8"):
        assert text in page


# Transcribed from the requirement documents: chunks, {chunk: per cent}, average in per cent.
TABLES_000 = {
    125: ({0: 99.2, 62: 49.6, 123: 0.8, 124: 0.0}, 99.6),
    7: ({0: 85.7, 3: 42.9, 5: 14.3, 6: 0.0}, 49.0),
}
TABLES_004 = {
    7: ({0: 85.7, 3: 42.9, 6: 0.0}, 49.0),
    15: ({0: 93.3, 7: 46.7, 14: 0.0}, 87.0),
    20: ({}, 92.0),
}
AVERAGES_000 = {25: 92.0}
SECONDS = {7: (150, 1_875), 15: (300, 3_750), 20: (400, 5_000), 25: (512, 6_400), 125: (2_560, 32_000)}
MEANS = {7: 42.9, 15: 46.7, 20: 47.5, 25: 48.0, 125: 49.6}
EVER_READ = {7: 85.7, 15: 93.3, 20: 95.0, 25: 96.0, 125: 99.2}


@pytest.mark.parametrize("tables", [TABLES_000, TABLES_004], ids=["000", "004"])
def test_the_stated_averages_are_not_those_of_their_own_tables(tables: dict[int, Any]) -> None:
    claims = {claim.stated_chunks: claim for claim in retention_claims()}
    for n, (table, average) in tables.items():
        # Their tables fall by 100 / n per chunk to 0: what they leave out follows from what they print.
        whole = [100 * (n - 1 - i) / n for i in range(n)]
        assert all(whole[i] == pytest.approx(share, abs=0.05) for i, share in table.items())
        mean = sum(whole) / n
        assert mean == pytest.approx(MEANS[n], abs=0.05)
        assert abs(mean - average) > 5
        claim = claims[n]
        assert 100 * claim.stated_average == pytest.approx(average)
        assert 100 * claim.mean_reach == pytest.approx(mean)
        assert not claim.follows
        assert all(100 * share == pytest.approx(whole[i]) for i, share in claim.by_chunk)


def test_the_five_lengths_of_the_requirement_documents() -> None:
    claims = retention_claims()
    assert [claim.stated_chunks for claim in claims] == [7, 15, 20, 25, 125]
    assert 100 * claims[3].stated_average == AVERAGES_000[25]
    for claim in claims:
        n = claim.stated_chunks
        assert (claim.seconds, claim.tokens) == SECONDS[n]
        assert 100 * claim.mean_reach == pytest.approx(MEANS[n], abs=0.05)
        assert 100 * claim.ever_read == pytest.approx(EVER_READ[n], abs=0.05)
        assert not claim.follows
    # They round 7.3 chunks down and 14.6 and 19.5 up; counted alike, 1,875 tokens are 8.
    assert [claim.chunks for claim in claims] == [8, 15, 20, 25, 125]


def test_no_exposure_gives_the_stated_averages_but_for_seven_chunks() -> None:
    """A chunk that reads a share α of itself adds α / n to its reach: at α = 1 the mean is (n + 1) / 2n."""
    for claim in retention_claims():
        n = claim.stated_chunks
        highest = (n + 1) / (2 * n)
        assert (claim.exposure_needed > 1) == (claim.stated_average > highest) == (n > 7)
        assert claim.mean_reach + claim.exposure_needed / n == pytest.approx(claim.stated_average)


def test_a_table_shows_the_ends_and_the_middle() -> None:
    assert telling_chunks(125) == (0, 31, 62, 123, 124)
    assert telling_chunks(7) == (0, 1, 3, 5, 6)
    assert telling_chunks(2) == (0, 1)
    assert telling_chunks(1) == (0,)


@given(chunks=st.integers(1, 500), size=st.integers(1, 2_000))
def test_the_planner_inverts_the_count(chunks: int, size: int) -> None:
    plan = plan_reach(chunks=chunks, chunk_size=size)
    exist = [len(range(0, tokens, size)) for tokens in (plan.min_tokens - 1, plan.min_tokens, plan.full_tokens)]
    assert exist == [chunks - 1, chunks, chunks]
    assert len(range(0, plan.full_tokens + 1, size)) == chunks + 1
    assert plan.seconds is None


@given(share=st.integers(0, 999))
def test_a_wanted_share_gets_the_fewest_chunks(share: int) -> None:
    wanted = share / 1000
    n = plan_reach(ever_read=wanted, chunk_size=256).chunks
    assert 1000 * (n - 1) >= share * n
    assert n == 1 or 1000 * (n - 2) < share * (n - 1)
    if share < 500:
        n = plan_reach(mean_reach=wanted, chunk_size=256).chunks
        assert 1000 * (n - 1) >= 2 * share * n
        assert n == 1 or 1000 * (n - 2) < 2 * share * (n - 1)


def test_audio_is_planned_in_whole_frames() -> None:
    plan = plan_reach(chunks=8, chunk_size=256, frame_rate=12.5)
    assert (plan.min_tokens, plan.full_tokens) == (1_793, 2_048)
    assert (plan.min_seconds, plan.full_seconds) == (143.44, 163.84)
    paper = plan_reach(chunks=125, chunk_size=256, frame_rate=12.5)
    assert (paper.min_tokens, paper.full_seconds) == (31_745, 2_560)
    for seconds, tokens in SECONDS.values():
        forward = plan_reach(seconds=seconds, chunk_size=256, frame_rate=12.5)
        assert (forward.tokens, forward.seconds) == (tokens, seconds)
        assert forward.chunks == plan_reach(tokens=tokens, chunk_size=256).chunks == -(-tokens // 256)
    assert plan_reach(seconds=150.01, chunk_size=256, frame_rate=12.5).tokens == 1_876  # a frame that has begun
    assert plan_reach(seconds=0.3, chunk_size=1, frame_rate=10).tokens == 3  # 0.3 × 10 is above 3 in floats


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "exactly one of"),
        ({"chunks": 3, "tokens": 5}, "got chunks, tokens"),
        ({"chunks": 0}, "at least 1"),
        ({"tokens": 0}, "at least 1"),
        ({"ever_read": 1.0}, r"ever_read lies in \[0, 1\)"),
        ({"mean_reach": 0.5}, r"mean_reach lies in \[0, 1/2\)"),
        ({"seconds": 10}, "need a frame_rate"),
        ({"chunks": 2, "frame_rate": 0}, "above 0 frames per second"),
    ],
)
def test_what_cannot_be_planned_is_refused(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_reach(chunk_size=256, **wish)
