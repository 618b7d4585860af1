"""The arithmetic of reach: how many chunks a document needs, and what the requirement documents made of it.

A chunk is applied before it is written, so of the n = ceil(T / C) chunks of a document, chunk i is read by the
n − 1 − i chunks after it. Two shares follow, and they are not the same thing:

    ever read    (n − 1) / n         chunks whose update some later chunk reads: all but the last
    mean reach   (n − 1) / (2 n)     mean over chunks of (n − 1 − i) / n: how much of a document reads an update

The first goes to 1 in long documents, the second to 1/2. The requirement documents print the per-chunk numbers of the
second with averages near the first (and equal to neither): :func:`retention_claims` sets them side by side.

The planner inverts ``ceil``: n chunks exist from (n − 1)·C + 1 tokens on, and are all full at n·C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from inlay.report import Section, Table, Text
from inlay.report.numbers import Cell

MOSHI_FRAME_RATE = 12.5
"""Frames (tokens in time) per second of Mimi, Moshi's codec."""


def chunks_in(tokens: int, chunk_size: int) -> int:
    """Chunks n of a document of ``tokens`` tokens; an incomplete last one counts: it reads, but is never written."""
    if tokens < 1 or chunk_size < 1:
        raise ValueError(f"tokens and chunk_size must be at least 1; got {tokens} and {chunk_size}")
    return -(-tokens // chunk_size)


def ever_read_share(chunks: int) -> float:
    """Share of a document's chunks whose update is ever read, (n − 1) / n."""
    return (chunks - 1) / chunks


def mean_reach_share(chunks: int) -> float:
    """Mean over a document's chunks of the share of it that reads their update, (n − 1) / (2 n)."""
    return (chunks - 1) / (2 * chunks)


def reach_of_chunk(index: int, chunks: int) -> float:
    """Share of a document's chunks that read the update of chunk ``index`` (from 0), (n − 1 − i) / n."""
    if not 0 <= index < chunks:
        raise ValueError(f"chunk {index} of a document of {chunks}")
    return (chunks - 1 - index) / chunks


def telling_chunks(chunks: int) -> tuple[int, ...]:
    """The chunks that a table shows: the first, a quarter in, the middle and the last two (fewer where they meet)."""
    return tuple(sorted({0, chunks // 4, chunks // 2, max(0, chunks - 2), chunks - 1}))


def frames_in(seconds: float, frame_rate: float) -> int:
    """Frames of a clip: a frame that has begun counts, as moshi-finetune pads ``duration_sec`` to whole frames."""
    return math.ceil(Fraction(str(seconds)) * Fraction(str(frame_rate)))


@dataclass(frozen=True)
class ReachPlan:
    """How long a document must be for a number of chunks.

    Attributes:
        chunk_size: Tokens per chunk C.
        chunks: Chunks n of the document.
        ever_read: Share of its chunks whose update is ever read, (n − 1) / n.
        mean_reach: (n − 1) / (2 n).
        min_tokens: Fewest tokens that make n chunks, (n − 1)·C + 1: all but the last are written, the last reads.
        full_tokens: n full chunks, n·C. No more updates are read than with ``min_tokens``: the last is written in vain.
        tokens: Of the document that was asked about; ``min_tokens`` where a wish was inverted.
        frame_rate: Tokens per second of audio; None for text, which has no seconds.
        min_seconds: ``duration_sec`` for ``min_tokens``, a whole number of frames.
        full_seconds: ``duration_sec`` for ``full_tokens``.
        seconds: ``duration_sec`` for ``tokens``.
    """

    chunk_size: int
    chunks: int
    ever_read: float
    mean_reach: float
    min_tokens: int
    full_tokens: int
    tokens: int
    frame_rate: float | None = None
    min_seconds: float | None = None
    full_seconds: float | None = None
    seconds: float | None = None


def plan_reach(
    *,
    chunk_size: int,
    chunks: int | None = None,
    ever_read: float | None = None,
    mean_reach: float | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    frame_rate: float | None = None,
) -> ReachPlan:
    """The length that a wish needs, or what a length gives: one of the five, exactly.

    Args:
        chunk_size: Tokens per chunk C.
        chunks: Chunks wanted, at least.
        ever_read: Share of the chunks, in [0, 1), whose update some later chunk reads; at least.
        mean_reach: Mean reach wanted, in [0, 1/2); at least.
        tokens: A length that is given, in tokens.
        seconds: A length that is given, in seconds (``duration_sec``); an incomplete frame counts as one.
        frame_rate: Tokens per second of audio (Moshi: 12.5); None for text.

    Raises:
        ValueError: None or several of the five are given, one cannot be had, or seconds without a frame rate.
    """
    wishes = {"chunks": chunks, "ever_read": ever_read, "mean_reach": mean_reach, "tokens": tokens, "seconds": seconds}
    given = [name for name, value in wishes.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"plan_reach takes exactly one of {', '.join(wishes)}; got {', '.join(given) or 'none'}")
    if frame_rate is not None and frame_rate <= 0:
        raise ValueError(f"frame_rate must be above 0 frames per second; got {frame_rate}")
    if seconds is not None:
        if frame_rate is None or seconds <= 0:
            raise ValueError(f"seconds need a frame_rate (Moshi: 12.5) and must be above 0; got {seconds}")
        tokens = frames_in(seconds, frame_rate)
    if tokens is not None:
        chunks = chunks_in(tokens, chunk_size)
    elif ever_read is not None:
        chunks = _fewest_chunks(Fraction(str(ever_read)), "ever_read", limit=Fraction(1))
    elif mean_reach is not None:
        chunks = _fewest_chunks(2 * Fraction(str(mean_reach)), "mean_reach", limit=Fraction(1, 2))
    assert chunks is not None
    if chunks < 1 or chunk_size < 1:
        raise ValueError(f"chunks and chunk_size must be at least 1; got {chunks} and {chunk_size}")
    fewest, full = (chunks - 1) * chunk_size + 1, chunks * chunk_size
    length = fewest if tokens is None else tokens

    def duration(frames: int) -> float | None:
        return None if frame_rate is None else frames / frame_rate

    return ReachPlan(
        chunk_size=chunk_size,
        chunks=chunks,
        ever_read=ever_read_share(chunks),
        mean_reach=mean_reach_share(chunks),
        min_tokens=fewest,
        full_tokens=full,
        tokens=length,
        frame_rate=frame_rate,
        min_seconds=duration(fewest),
        full_seconds=duration(full),
        seconds=duration(length),
    )


def plan_table(plans: list[ReachPlan], caption: str = "") -> Table:
    """Plans as rows, with seconds where they are of audio."""
    audio = any(plan.frame_rate is not None for plan in plans)
    columns = ["chunks", "tokens, at least", "tokens, all full", "ever read", "mean reach"]
    rows: list[list[Cell]] = []
    for plan in plans:
        shares = percent(plan.ever_read), percent(plan.mean_reach)
        seconds = (_seconds(plan.min_seconds), _seconds(plan.full_seconds)) if audio else ()
        rows.append([plan.chunks, plan.min_tokens, plan.full_tokens, *shares, *seconds])
    if audio:
        columns += ["seconds, at least", "seconds, all full"]
    return Table(columns, rows, caption, align=["right"] * len(columns))


def _seconds(value: float | None) -> str | None:
    """Not rounded to fewer digits than a frame has: Moshi's is 0.08 s."""
    return None if value is None else f"{value:,.2f}"


def percent(share: float) -> str:
    """A share as it is read: 0.4286 → 42.9 %."""
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class RetentionClaim:
    """An "average gradient retention" that the requirement documents state, and what their own numbers give.

    Attributes:
        tokens: Length of the clip.
        seconds: The same at 12.5 frames per second.
        stated_chunks: Chunks as the documents count them.
        stated_average: Average they state, as a share.
        documents: Numbers of the documents that state it.
        chunks: Chunks n as the library counts them, an incomplete last one included.
        by_chunk: ``(i, (n − 1 − i) / n)`` of the telling chunks, with their own count for n: their table.
        mean_reach: Mean of that table over all chunks, (n − 1) / (2 n).
        ever_read: Share of chunks that are ever read, (n − 1) / n.
        exposure_needed: The exposure α that would lift the mean to the stated average: a chunk that reads a share α of
            its own update adds α / n. Above 1 there is none.
        follows: Whether the stated average is the mean of the table, to half a percentage point.
    """

    tokens: int
    seconds: float
    stated_chunks: int
    stated_average: float
    documents: tuple[str, ...]
    chunks: int
    by_chunk: tuple[tuple[int, float], ...]
    mean_reach: float
    ever_read: float
    exposure_needed: float
    follows: bool


# Tokens, chunks as written, average as written, documents. 92 % stands for 25 chunks in one and for 20 in another.
_STATED: tuple[tuple[int, int, float, tuple[str, ...]], ...] = (
    (1_875, 7, 0.49, ("000", "004")),
    (3_750, 15, 0.87, ("004",)),
    (5_000, 20, 0.92, ("004",)),
    (6_400, 25, 0.92, ("000",)),
    (32_000, 125, 0.996, ("000", "001", "004")),
)
_CHUNK_SIZE = 256


def retention_claims() -> tuple[RetentionClaim, ...]:
    """The requirement documents' averages for 7, 15, 20, 25 and 125 chunks of 256 tokens, checked."""
    return tuple(_claim(*stated) for stated in _STATED)


def retention_section() -> Section:
    """The claims as a section of a report: lengths, shares, their tables by chunk, and which averages follow."""
    claims = retention_claims()
    lengths = Table(
        ["chunks stated", "chunks", "tokens", "seconds", "average stated", "mean reach", "ever read", "follows"],
        [
            [
                claim.stated_chunks,
                claim.chunks,
                claim.tokens,
                claim.seconds,
                percent(claim.stated_average),
                percent(claim.mean_reach),
                percent(claim.ever_read),
                claim.follows,
            ]
            for claim in claims
        ],
        f"Clips at {MOSHI_FRAME_RATE} frames/s in chunks of {_CHUNK_SIZE}. Mean reach and ever read are of the stated "
        "chunks; `chunks` counts an incomplete last one, which reads but is not written.",
        verdicts=["good" if claim.follows else "bad" for claim in claims],
    )
    tables = Table(
        ["chunks stated", *("first chunk", "a quarter in", "middle", "last but one", "last")],
        [[claim.stated_chunks, *(f"{i}: {percent(reach)}" for i, reach in claim.by_chunk)] for claim in claims],
        "Share of the document that reads the update of chunk i, (n−1−i)/n: their tables, with the rows they left out.",
    )
    worked = next(claim for claim in claims if claim.documents == ("004",))
    wrong = sum(not claim.follows for claim in claims)
    text = (
        f"{wrong} of the {len(claims)} averages do not follow from the tables they stand under. The mean of the table "
        "is (n−1)/2n, which never reaches 50 %; what comes near 100 % is the share of chunks that are read at all, "
        f"(n−1)/n. One document works out {percent(worked.mean_reach)} for {worked.stated_chunks} chunks itself and "
        f'then writes "≈ {100 * worked.stated_average:.0f} % with delta exposure"; reading its own update in full '
        f"lifts a chunk by 1/n, so that would take an exposure of {worked.exposure_needed:.1f}, and 1 is the most."
    )
    counted = Text(
        "1,875 tokens are called 7 chunks: they are 7 whole ones and 83 tokens more, so n = 8, (n−1)/n = 87.5 %. "
        "3,750 and 5,000 tokens, 14.6 and 19.5 chunks, are counted up to 15 and 20. 92 % stands for 25 chunks in "
        "document 000 and for 20 in 004; of 25 chunks, 000 says itself, only the last (4 %) gets no gradient."
    )
    return Section("What the requirement documents say of reach", text, [lengths, tables, counted])


def _claim(tokens: int, stated_chunks: int, stated_average: float, documents: tuple[str, ...]) -> RetentionClaim:
    mean = mean_reach_share(stated_chunks)
    return RetentionClaim(
        tokens=tokens,
        seconds=tokens / MOSHI_FRAME_RATE,
        stated_chunks=stated_chunks,
        stated_average=stated_average,
        documents=documents,
        chunks=chunks_in(tokens, _CHUNK_SIZE),
        by_chunk=tuple((i, reach_of_chunk(i, stated_chunks)) for i in telling_chunks(stated_chunks)),
        mean_reach=mean,
        ever_read=ever_read_share(stated_chunks),
        exposure_needed=(stated_average - mean) * stated_chunks,
        follows=abs(stated_average - mean) <= 0.005,
    )


def _fewest_chunks(share: Fraction, name: str, limit: Fraction) -> int:
    """The smallest n with (n − 1) / n ≥ share."""
    if not 0 <= share < 1:
        raise ValueError(f"{name} lies in [0, {limit}): however long a document is, it does not get to {limit}")
    return math.ceil(1 / (1 - share))


def set_length(key: str, tokens: int, frame_rate: float | None) -> str:
    """A recipe's line that makes sequences of so many tokens: in seconds where its ``key`` is ``duration_sec``."""
    if key != "duration_sec" or frame_rate is None:
        return f"{key}: {tokens}"
    return f"{key}: {tokens / frame_rate:g}"
