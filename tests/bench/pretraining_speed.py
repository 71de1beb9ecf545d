"""Throughput of the embedded model's training at 128 px, eager and compiled: samples per second.

    python -m tests.bench.pretraining_speed     # bf16, 12 samples an update, grounded; some minutes to compile

Seconds are of the wall on a GPU, and of this process's CPU time elsewhere.
Both arms make the same updates (forward, backward, AdamW) on the same random batches; updates alternate between them.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from diffusers.models.attention_processor import AttnProcessor

from personalize.cli.launch import load_script
from personalize.models.stable_diffusion import EMBEDDED
from personalize.randomness import generator

SCRIPT = load_script(Path(__file__).parents[2] / "train" / "embedded_model.py")


@dataclass(frozen=True)
class PretrainingSpeed:
    arms: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    """What is measured."""
    batch: int = 12
    """Samples of an update."""
    updates: int = 4
    """Updates measured in each arm, after one that is not."""
    threads: int = 1
    """Threads of torch."""


def update(objective: torch.nn.Module, optimizer: torch.optim.Optimizer, size: int, number: int) -> float:
    """Seconds of one update on random batch `number`."""
    device = next(objective.parameters()).device
    rng = generator(0, "pretraining-speed", number)
    batch = {
        "latents": torch.randn(size, 4, 32, 32, generator=rng), "noise": torch.randn(size, 4, 32, 32, generator=rng),
        "timesteps": torch.randint(1000, (size,), generator=rng), "masks": torch.rand(size, 2, 32, 32, generator=rng),
        "input_ids": torch.randint(850, (size, 77), generator=rng),
        "nouns": torch.randint(1, 9, (size, 2), generator=rng),
    }  # fmt: skip
    batch = {name: values.to(device) for name, values in batch.items()}
    start = seconds(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = objective(batch).total
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return seconds(device) - start


def seconds(device: torch.device) -> float:
    """The time now, once the device has finished what it was given."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def run(options: PretrainingSpeed) -> dict[str, float]:
    """Samples per second of each arm, and if both are measured their ratio and the seconds that compiling took."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    arms: dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]] = {}
    for name in options.arms:
        objective = SCRIPT.networks(EMBEDDED, 0.1).to(device)
        objective.unet.set_attn_processor(AttnProcessor())
        if name == "compiled":
            SCRIPT.compile_unet(objective.unet)
        arms[name] = (objective, torch.optim.AdamW(objective.parameters(), lr=1e-5, fused=True))
    first = {name: update(*arm, options.batch, 0) for name, arm in arms.items()}
    times = {name: [] for name in arms}
    for number in range(1, options.updates + 1):
        for name, arm in arms.items():
            times[name].append(update(*arm, options.batch, number))
    rates = {name: options.batch / float(np.median(seconds)) for name, seconds in times.items()}
    both = (
        {"ratio": rates["compiled"] / rates["eager"], "first_compiled_s": first["compiled"]} if len(arms) == 2 else {}
    )
    return rates | both


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(PretrainingSpeed))))
