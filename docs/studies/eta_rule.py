"""The runs behind the doctor's rule for η: one training run for each η, with what the doctor said before it.

    python docs/studies/eta_rule.py recall  1e-3,1e-2,3e-2,0.1,0.3,1,10 --steps 160
    python docs/studies/eta_rule.py scratch 1e-3,1e-2,0.1 --steps 300
    python docs/studies/eta_rule.py tuned   1e-4,1e-3,1e-2,0.1,1,10 --steps 150 --learning-rate 2e-3
    python docs/studies/eta_rule.py frozen  1e-4,1e-3,1e-2,0.1,1,10 --steps 150 --learning-rate 2e-3
    python docs/studies/eta_rule.py frozen  1e-3,0.1,10 --steps 150 --learning-rate 2e-3 --layer 0
    python docs/studies/eta_rule.py frozen  1e-3,0.1 --steps 150 --learning-rate 2e-3 --init next_token

``recall`` and ``scratch`` are the shipped recipes from random weights; ``tuned`` and ``frozen`` give the memory to a
model that was trained without one on the same text for 400 steps, and train everything or the memory alone. A line of
JSON for each run. One thread; half a minute to three minutes a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup, set_seed

import inlay
from inlay.data import Data, load_data
from inlay.doctor.step_size import recommend_step_size
from inlay.evaluate.scoring import Batch, evaluating, logits_of, token_bits
from inlay.fastweight import Memory, attach
from inlay.train.recipe import Recipe, load_recipe
from inlay.train.run import build_model

RECIPES = Path(inlay.__file__).parent / "recipes"
BASE_STEPS = 400


def batches(data: Data, size: int) -> Iterator[Batch]:
    """Training batches in random order, without end; the same ones each time."""
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(
        data.train, batch_size=size, shuffle=True, drop_last=True, collate_fn=data.collate, generator=order
    )
    while True:
        yield from loader


def train(
    model: nn.Module, memory: Memory | None, data: Data, recipe: Recipe, steps: int, learning_rate: float
) -> None:
    """AdamW, linear decay, gradients clipped at 1: what the Trainer does by default."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 20, steps)
    model.train()
    for _, batch in zip(range(steps), batches(data, recipe.trainer["per_device_train_batch_size"]), strict=False):
        if memory is None:
            del batch["document_ids"]
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def evaluate(model: nn.Module, data: Data, most: int = 64) -> dict[str, float]:
    """Bits per token over the last quarter of the positions, and the share of right answers, on held-out sequences."""
    rows = np.linspace(0, len(data.eval) - 1, min(most, len(data.eval))).round().astype(int)
    batch = data.collate([data.eval[int(row)] for row in rows])
    with evaluating(model):
        logits: Tensor = logits_of(model, batch)
    bits, labelled = token_bits(logits, batch["labels"])
    late = slice(3 * bits.shape[1] // 4, None)
    right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]).numpy()
    return {"bits": float(bits[:, late][labelled[:, late]].mean()), "right": float(right[labelled].mean())}


def main() -> None:
    """One run for each η."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["recall", "scratch", "tuned", "frozen"])
    parser.add_argument("etas", type=lambda text: [float(eta) for eta in text.split(",")])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, help="the recipe's when not given")
    parser.add_argument("--layer", type=int, default=1, help="the block that gets the memory, of two")
    parser.add_argument("--init", choices=["zero", "next_token"], help="the recipe's when not given")
    given = parser.parse_args()
    torch.set_num_threads(1)

    recipe = load_recipe(RECIPES / ("recall.yaml" if given.task == "recall" else "stdlib.yaml"))
    assert recipe.memory is not None
    learning_rate = given.learning_rate or recipe.trainer["learning_rate"]
    data = load_data(recipe.data)
    base = None
    if given.task in ("tuned", "frozen"):
        set_seed(recipe.seed)
        model = build_model(recipe, data.vocab_size)
        train(model, None, data, recipe, BASE_STEPS, recipe.trainer["learning_rate"])
        base = model.state_dict()
        print(json.dumps({"task": given.task, "eta": None, **evaluate(model, data)}), flush=True)
    for eta in given.etas:
        set_seed(recipe.seed)
        model = build_model(recipe, data.vocab_size)
        if base is not None:
            model.load_state_dict(base)
        changes = {"eta": eta, "layers": [given.layer], "init": given.init or recipe.memory.init}
        memory = attach(model, recipe.memory.model_copy(update=changes))
        memory.train_only("memory" if given.task == "frozen" else "all")
        before = recommend_step_size(memory, model, data.collate([data.train[row] for row in range(4)]))
        train(model, memory, data, recipe, given.steps, learning_rate)
        line = {"task": given.task, "eta": eta, "rule": before.rule, "figure": before.figure}
        line |= {"band": [before.low, before.high]}
        print(json.dumps(line | evaluate(model, data)), flush=True)


if __name__ == "__main__":
    main()
