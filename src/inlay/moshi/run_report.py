"""The report of a file that Moshi heard: what its memory wrote, how large it grew, whether it kept up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from inlay.moshi.commits import Commit, write_commits
from inlay.moshi.run import Run
from inlay.report import Figure, Headline, Plot, Report, Section, Series, Table, Text, write_report
from inlay.report.canvas import Canvas
from inlay.report.drawing import draw_curves
from inlay.report.jsonfile import write_json
from inlay.report.numbers import short
from inlay.report.provenance import provenance
from inlay.report.series import clean

REPORT, FIGURES, COMMITS = "report.html", "run.json", "commits.jsonl"
_MOST_LINES = 5
_MOST_ROWS = 200


def write_run(run: Run, directory: str | Path) -> Path:
    """Write ``report.html``, ``run.json`` and ``commits.jsonl`` (one line a chunk and block) to ``directory``.

    Returns:
        The report's path.
    """
    directory = Path(directory)
    write_commits(run.commits, directory / COMMITS)
    write_json(figures(run), directory / FIGURES)
    report = Report(
        title=f"Moshi heard {Path(run.source).name}",
        subtitle="without a memory" if run.chunk_size is None else f"with a memory, chunks of {run.chunk_size} frames",
        summary=run_cards(run),
        sections=run_sections(run),
        provenance={"heard": run.source, "model": run.model, **provenance()},
    )
    return write_report(report, directory / REPORT)


def figures(run: Run) -> dict[str, object]:
    """The run's figures for ``run.json``."""
    return {
        "source": run.source,
        "model": run.model,
        "frames": run.frames,
        "frames_before": run.frames_before,
        "audio_seconds": run.audio_seconds,
        "real_time_factor": run.real_time_factor,
        "frame_milliseconds": _percentiles(run.milliseconds),
        "late_frames": run.late_frames,
        "chunk_size": run.chunk_size,
        "chunks": run.chunks,
        "state_bytes": run.state_bytes,
        "transcript": run.transcript,
    }


def run_cards(run: Run) -> list[Headline]:
    """The cards at the top."""
    pace = run.real_time_factor
    cards = [
        Headline("audio heard", f"{run.audio_seconds:,.1f} s", f"{run.frames:,} frames"),
        Headline(
            "real-time factor",
            f"{pace:.2f}",
            "computing time by audio time; below 1 keeps up",
            "good" if pace < 1 else "bad",
        ),
    ]
    if run.chunk_size is not None:
        cards.append(
            Headline("chunks committed", f"{run.chunks:,}", f"in each layer, one every {run.chunk_size} frames")
        )
    if run.commits or run.sum_before:
        last = max((commit.relative_sum for commit in _latest(run.commits).values()), default=run.sum_before)
        cards.append(Headline("memory's size", f"{short(100 * last, 2)} %", "largest ‖ηS‖ / ‖W0‖ at the end"))
    return cards


def run_sections(run: Run) -> list[Section]:
    """The memory while it listened, the time each frame took, and the transcript."""
    return [*_memory_sections(run), _pace_section(run), _transcript_section(run)]


def _memory_sections(run: Run) -> list[Section]:
    if run.chunk_size is None:
        return []
    if not run.commits:
        told = f"No chunk of {run.chunk_size} frames was filled in {run.frames} frames: the memory was not written."
        return [Section("The memory while it listened", items=[Text(told, tone="note")])]
    relative = _by_block(run.commits, lambda commit: 100 * commit.relative_sum)
    items = [
        _commits_figure(run, run.chunk_size),
        _figure(
            "The memory beside the weight it is added to",
            relative,
            "‖ηS‖ / ‖W0‖, %",
            "The sum of all updates as it is read. Where it reaches the size of W0, the memory drowns the model.",
        ),
        _figure("The sum's norm", _by_block(run.commits, lambda commit: commit.post_norm), "‖S‖ (Frobenius)"),
        _clip_item(run.commits),
    ]
    text = f"Per chunk, means over {len(relative)} memory layers; each layer by itself is in `{COMMITS}`."
    return [
        Section("The memory while it listened", items=items),
        Section("Chunks", text, [_chunk_table(run.commits)]),
    ]


def _commits_figure(run: Run, chunk_size: int) -> Figure:
    by_chunk = _chunks(run.commits)
    seconds = [commits[0].seconds for commits in by_chunk]
    first = max(0.0, seconds[0] - chunk_size / run.frame_rate)
    expected = [time * run.frame_rate / chunk_size for time in (first, *seconds)]
    series = [
        Series("committed", [first, *seconds], [by_chunk[0][0].chunk - 1, *(c[0].chunk for c in by_chunk)]),
        Series(f"{run.frame_rate:g} frames/s × time / {chunk_size}", [first, *seconds], expected, muted=True),
    ]
    return _over_time(
        "Commits", series, "chunks in each layer", "If the memory ran only in part of the steps, it would fall behind."
    )


def _clip_item(commits: Sequence[Commit]) -> Figure | Text:
    if all(commit.clip_scale == 1 for commit in commits):
        return Text("No update was clipped.")
    chunks = _chunks(commits)
    seconds = [one[0].seconds for one in chunks]
    rate = [100 * sum(commit.clipped for commit in one) / len(one) for one in chunks]
    kept = [100 * float(np.mean([commit.clip_scale for commit in one])) for one in chunks]
    return _over_time(
        "Clipping",
        [Series("layers clipped", seconds, rate), Series("update kept", seconds, kept)],
        "%",
        "Share of the layers whose update was shortened, and what was left of its length on average.",
        top=105.0,
    )


def _pace_section(run: Run) -> Section:
    every = max(1, round(len(run.milliseconds) / 400))
    groups = [run.milliseconds[i : i + every] for i in range(0, len(run.milliseconds), every)]
    means = [float(np.mean(group)) for group in groups]
    seconds = [(i * every + len(group)) / run.frame_rate for i, group in enumerate(groups)]
    limit = 1000 / run.frame_rate
    series = [
        Series("a frame takes", seconds, means),
        Series(f"it lasts {limit:.0f} ms", [seconds[0], seconds[-1]], [limit, limit], muted=True),
    ]
    over = f"mean of {every} frames, ms" if every > 1 else "ms"
    spread = _percentiles(run.milliseconds)
    with_commit = {commit.tokens: commit.milliseconds for commit in run.commits}
    table = Table(
        ["frames", "median, ms", "99 %, ms", "slowest, ms", "late frames"],
        [[run.frames, spread["50"], spread["99"], spread["100"], run.late_frames]],
    )
    text = f"A frame of {limit:.0f} ms with Mimi, the language model and the memory."
    if with_commit:
        text += f" The frames that commit took {float(np.mean(list(with_commit.values()))):.1f} ms on average."
    # The first frame of a process takes many times as long as the others, which would then all look like none.
    top = 1.5 * max(limit, float(np.percentile(means, 98)))
    caption = "What takes longer leaves the picture; the slowest is in the table." if max(means) > top else ""
    return Section("Pace", text, [_over_time("Time per frame", series, over, caption, top=top), table])


def _transcript_section(run: Run) -> Section:
    if not run.transcript:
        return Section("Transcript", items=[Text("Moshi said nothing.")])
    return Section(
        "Transcript", items=[Table(["second", "Moshi"], [[f"{t:.1f}", _plain(s)] for t, s in run.transcript])]
    )


def _chunk_table(commits: Sequence[Commit]) -> Table:
    chunks = _chunks(commits)
    step = -(-len(chunks) // _MOST_ROWS)
    shown = chunks[::step] if chunks[::step][-1] is chunks[-1] else [*chunks[::step], chunks[-1]]
    columns: Mapping[str, Callable[[Commit], float]] = {
        "‖Δ‖": lambda c: c.delta_norm,
        "‖S‖ before": lambda c: c.pre_norm,
        "‖S‖ after": lambda c: c.post_norm,
        "‖ηΔ‖/‖W0‖, %": lambda c: 100 * c.relative_delta,
        "‖ηS‖/‖W0‖, %": lambda c: 100 * c.relative_sum,
        "clipped, %": lambda c: 100 * c.clipped,
    }
    rows = [
        [
            one[0].chunk,
            one[0].tokens,
            *(float(np.mean([of(commit) for commit in one])) for of in columns.values()),
            one[0].milliseconds,
            one[0].frame_milliseconds,
        ]
        for one in shown
    ]
    caption = "" if step == 1 else f"Every {step}th of {len(chunks)} chunks."
    return Table(["chunk", "tokens", *columns, "its frame, ms", "mean frame, ms"], rows, caption)


def _chunks(commits: Sequence[Commit]) -> list[list[Commit]]:
    """The commits of each chunk of the first row, in order of time."""
    chunks: dict[tuple[float, int], list[Commit]] = {}
    row = min(commit.row for commit in commits)
    for commit in commits:
        if commit.row == row:
            chunks.setdefault((commit.seconds, commit.chunk), []).append(commit)
    return list(chunks.values())


def _latest(commits: Sequence[Commit]) -> dict[int, Commit]:
    return {commit.block: commit for commit in commits}


def _by_block(commits: Sequence[Commit], of: Callable[[Commit], float]) -> dict[int, tuple[list[float], list[float]]]:
    """Seconds and values of each block."""
    found: dict[int, tuple[list[float], list[float]]] = {}
    for one in _chunks(commits):
        for commit in one:
            seconds, values = found.setdefault(commit.block, ([], []))
            seconds.append(commit.seconds)
            values.append(of(commit))
    return found


def _figure(
    title: str, blocks: Mapping[int, tuple[list[float], list[float]]], ylabel: str, caption: str = ""
) -> Figure:
    """One line for each block; of many blocks their mean, and their range shaded."""
    if len(blocks) <= _MOST_LINES:
        series = [Series(f"block {index}", *line) for index, line in blocks.items()]
    else:
        seconds = next(iter(blocks.values()))[0]
        values = np.array([line[1] for line in blocks.values()])
        name = f"mean of {len(blocks)} blocks (shaded: least to most)"
        series = [Series(name, seconds, values.mean(0), band=(values.min(0), values.max(0)))]
    return _over_time(title, series, ylabel, caption)


def _over_time(
    title: str, series: Sequence[Series], ylabel: str, caption: str = "", *, top: float | None = None
) -> Figure:
    """A plot over seconds of audio whose vertical axis begins at 0, so that what hardly changes looks like it."""
    curves, notes = clean(series)
    highest = max((float(np.nanmax(c.y if c.high is None else c.high)) for c in curves), default=1.0)

    def paint(canvas: Canvas) -> None:
        draw_curves(canvas, curves, "audio, seconds", ylabel, y_limits=(0.0, top or 1.12 * highest or 1.0))

    ranges = [f"{c.name} runs from {short(float(c.drawn[0]))} to {short(float(c.drawn[-1]))}" for c in curves]
    alt = f"{title}: {ylabel} against seconds of audio. {'; '.join(ranges)}."
    return Plot(title, paint, alt, note=" ".join(notes), empty=not curves).figure(caption)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"50": float("nan"), "99": float("nan"), "100": float("nan")}
    return {str(p): float(np.percentile(values, p)) for p in (50, 99, 100)}


def _plain(text: str) -> str:
    """Without control characters, which a page cannot show."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
