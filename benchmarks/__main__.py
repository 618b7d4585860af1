"""``python -m benchmarks``: run the entries, print their tables and write ``runs/bench.json``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.entry import Benchmark, Entry
from benchmarks.measure import collect
from inlay.files import write_whole

BUSY = 0.75
"""An idle machine gives the operation's entry about nine tenths of its threads' time."""

ENTRIES = ("operation", "decode", "monitor", "plan", "moshi", "moshi_stream")
"""Modules of this package; each is imported when it is run, for those of Moshi need Kyutai's package."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print, write. A missed aim is shown and fails nothing; a wrong result raises."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("entries", nargs="*", metavar="entry", help=f"of {', '.join(ENTRIES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="threads of one operation on the CPU; PyTorch's choice by default")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    options = parser.parse_args(arguments)
    unknown = [name for name in options.entries if name not in ENTRIES]
    if unknown:
        parser.error(f"no entry is called {', '.join(unknown)}; there are {', '.join(ENTRIES)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    console = Console()
    started = time.perf_counter()
    results: dict[str, Any] = {}
    for name in options.entries or ENTRIES:
        collect(device)
        wall, processor = time.perf_counter(), time.process_time()
        entry = _run(import_module(f"benchmarks.{name}").run, options.quick, device, console)
        share = (time.process_time() - processor) / (time.perf_counter() - wall) / torch.get_num_threads()
        results[name] = {**entry.to_json(), "processor_share": share}
        console.print(f"\n[bold]{entry.title}[/]")
        for table in [*entry.tables, entry.aims_table()]:
            console.print(table)
        if device.type == "cpu" and not options.quick and share < BUSY:
            console.print(
                f"[yellow]The machine was busy: this process got {share:.0%} of the processor time of its "
                f"{torch.get_num_threads()} threads, so the times say little. Run it again on an idle machine, or "
                "with --threads 1 so that threads do not wait for each other.[/]"
            )
    content = {"environment": _environment(device, options.quick), "entries": results}
    path = write_whole(options.output, json.dumps(content, indent=1) + "\n")
    console.print(f"{time.perf_counter() - started:.0f} s in all, written to {path}")


def _run(benchmark: Benchmark, quick: bool, device: torch.device, console: Console) -> Entry:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting")
        return benchmark(
            quick,
            device,
            lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
        )


def _environment(device: torch.device, quick: bool) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": quick,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
