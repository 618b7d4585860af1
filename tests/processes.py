"""Processes on the CPU that work together, as under ``torchrun``."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState


def in_two_processes(work: Callable[[int], object]) -> None:
    """Call ``work`` with 0 and with 1, each in a process as torchrun starts it."""
    in_processes(2, work)


def in_processes(count: int, work: Callable[[int], object]) -> None:
    """Call ``work`` with each rank below ``count``, each in a process as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, of one process
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        work(rank)
        torch.distributed.destroy_process_group()

    started = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()  # one whose partner has failed waits for it
    assert [process.exitcode for process in started] == [0] * count
