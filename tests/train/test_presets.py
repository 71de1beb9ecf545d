"""Presets compose: every pair of them, in both orders, against a written table."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from personalize.cli.launch import load_script, presets, scripts
from personalize.cli.parser import parse
from personalize.errors import UserError
from personalize.training.config import MultiConceptConfig, SingleImageConfig, extract_config
from personalize.training.cuda_graph import check_capturable
from personalize.training.data.samples import SampleShard

# presets in their order on the command line: updates (for one picture, or for five) × samples of each, samples at a
# time, and what else decides memory
SINGLE_IMAGE = """
dreambooth: 100 or 250 × 4, 4 at a time, as launched, text encoders
embedded: 85 or 212 × 4, 4 at a time, as launched
fast: 40 or 100 × 10, 5 at a time, bf16, cuda_graph
low_memory: 40 or 100 × 10, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sd15: 40 or 100 × 10, 10 at a time, bf16
sd21: 40 or 100 × 10, 2 at a time, bf16
sdxl: 40 or 100 × 10, 1 at a time, bf16
dreambooth embedded: 85 or 212 × 4, 4 at a time, as launched, text encoders
dreambooth fast: 100 or 250 × 4, 4 at a time, bf16, text encoders, refused: cuda_graph
dreambooth low_memory: 100 or 250 × 4, 1 at a time, bf16, 4 bits, checkpointed, Adam8, text encoders
dreambooth sd15: 100 or 250 × 4, 4 at a time, bf16, text encoders
dreambooth sd21: 100 or 250 × 4, 2 at a time, bf16, text encoders
dreambooth sdxl: 100 or 250 × 4, 1 at a time, bf16, text encoders
embedded dreambooth: 100 or 250 × 4, 4 at a time, as launched, text encoders
embedded fast: 85 or 212 × 4, 4 at a time, bf16, cuda_graph
embedded low_memory: 85 or 212 × 4, 1 at a time, bf16, 4 bits, checkpointed, Adam8
embedded sd15: 85 or 212 × 4, 4 at a time, bf16
embedded sd21: 85 or 212 × 4, 2 at a time, bf16
embedded sdxl: 85 or 212 × 4, 1 at a time, bf16
fast dreambooth: 100 or 250 × 4, 4 at a time, bf16, text encoders, refused: cuda_graph
fast embedded: 85 or 212 × 4, 4 at a time, bf16, cuda_graph
fast low_memory: 40 or 100 × 10, 1 at a time, bf16, 4 bits, checkpointed, Adam8, refused: cuda_graph
fast sd15: 40 or 100 × 10, 5 at a time, bf16, cuda_graph
fast sd21: 40 or 100 × 10, 2 at a time, bf16, cuda_graph
fast sdxl: 40 or 100 × 10, 1 at a time, bf16, cuda_graph
low_memory dreambooth: 100 or 250 × 4, 1 at a time, bf16, 4 bits, checkpointed, Adam8, text encoders
low_memory embedded: 85 or 212 × 4, 1 at a time, bf16, 4 bits, checkpointed, Adam8
low_memory fast: 40 or 100 × 10, 5 at a time, bf16, 4 bits, checkpointed, Adam8, refused: cuda_graph
low_memory sd15: 40 or 100 × 10, 1 at a time, bf16, 4 bits, checkpointed, Adam8
low_memory sd21: 40 or 100 × 10, 2 at a time, bf16, 4 bits, checkpointed, Adam8
low_memory sdxl: 40 or 100 × 10, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sd15 dreambooth: 100 or 250 × 4, 4 at a time, bf16, text encoders
sd15 embedded: 85 or 212 × 4, 4 at a time, bf16
sd15 fast: 40 or 100 × 10, 5 at a time, bf16, cuda_graph
sd15 low_memory: 40 or 100 × 10, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sd15 sd21: 40 or 100 × 10, 2 at a time, bf16
sd15 sdxl: 40 or 100 × 10, 1 at a time, bf16
sd21 dreambooth: 100 or 250 × 4, 2 at a time, bf16, text encoders
sd21 embedded: 85 or 212 × 4, 2 at a time, bf16
sd21 fast: 40 or 100 × 10, 5 at a time, bf16, cuda_graph
sd21 low_memory: 40 or 100 × 10, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sd21 sd15: 40 or 100 × 10, 2 at a time, bf16
sd21 sdxl: 40 or 100 × 10, 1 at a time, bf16
sdxl dreambooth: 100 or 250 × 4, 1 at a time, bf16, text encoders
sdxl embedded: 85 or 212 × 4, 1 at a time, bf16
sdxl fast: 40 or 100 × 10, 5 at a time, bf16, cuda_graph
sdxl low_memory: 40 or 100 × 10, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sdxl sd15: 40 or 100 × 10, 1 at a time, bf16
sdxl sd21: 40 or 100 × 10, 2 at a time, bf16
"""

MULTI_CONCEPT = """
embedded: 250 × 8, 2 at a time, as launched
low_memory: 250 × 8, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sd15: 250 × 8, 2 at a time, bf16
sd21: 250 × 8, 2 at a time, bf16, checkpointed
sdxl: 250 × 8, 2 at a time, bf16, checkpointed
embedded low_memory: 250 × 8, 1 at a time, bf16, 4 bits, checkpointed, Adam8
embedded sd15: 250 × 8, 2 at a time, bf16
embedded sd21: 250 × 8, 2 at a time, bf16, checkpointed
embedded sdxl: 250 × 8, 2 at a time, bf16, checkpointed
low_memory embedded: 250 × 8, 1 at a time, bf16, 4 bits, checkpointed, Adam8
low_memory sd15: 250 × 8, 1 at a time, bf16, 4 bits, checkpointed, Adam8
low_memory sd21: 250 × 8, 1 at a time, bf16, 4 bits, checkpointed, Adam8
low_memory sdxl: 250 × 8, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sd15 embedded: 250 × 8, 2 at a time, bf16
sd15 low_memory: 250 × 8, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sd15 sd21: 250 × 8, 2 at a time, bf16, checkpointed
sd15 sdxl: 250 × 8, 2 at a time, bf16, checkpointed
sd21 embedded: 250 × 8, 2 at a time, bf16, checkpointed
sd21 low_memory: 250 × 8, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sd21 sd15: 250 × 8, 2 at a time, bf16, checkpointed
sd21 sdxl: 250 × 8, 2 at a time, bf16, checkpointed
sdxl embedded: 250 × 8, 2 at a time, bf16, checkpointed
sdxl low_memory: 250 × 8, 1 at a time, bf16, 4 bits, checkpointed, Adam8
sdxl sd15: 250 × 8, 2 at a time, bf16, checkpointed
sdxl sd21: 250 × 8, 2 at a time, bf16, checkpointed
"""


def rows(table: str) -> dict[tuple[str, ...], str]:
    lines = [line.partition(":") for line in table.strip().splitlines()]
    return {tuple(names.split()): rest.strip() for names, _, rest in lines}


def read(trainer: str, *names: str) -> Any:
    line = [part for name in names for part in ("--config", name)]
    return parse(load_script(scripts("train")[trainer]).Config, line, prog=trainer, presets=presets(trainer))


def described(trainer: str, *names: str) -> str:
    config = read(trainer, *names)
    single = trainer == "single_image"
    settings = extract_config(config, SingleImageConfig if single else MultiConceptConfig)
    shard = SampleShard.of(settings)
    updates = [shard.updates(settings.train_samples(n)) for n in (1, 5)] if single else [config.max_train_steps]
    words = [
        f"{' or '.join(map(str, updates))} × {shard.samples}",
        f"{shard.largest} at a time",
        config.mixed_precision or "as launched",
    ]
    savings = {
        "4 bits": config.load_in_4bit,
        "checkpointed": config.gradient_checkpointing,
        "Adam8": config.use_8bit_adam,
    }
    words += [name for name, on in savings.items() if on]
    words += ["text encoders"] if single and config.train_text_encoder else []
    if config.cuda_graph:
        try:
            check_capturable(settings, torch.device("cuda"), 1, autocast=config.load_in_4bit)
            words.append("cuda_graph")
        except UserError:
            words.append("refused: cuda_graph")
    return ", ".join(words)


def every_pair(trainer: str) -> list[tuple[str, ...]]:
    return [(name,) for name in presets(trainer)] + list(permutations(presets(trainer), 2))


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "table"), [("single_image", SINGLE_IMAGE), ("multi_concept", MULTI_CONCEPT)])
def test_every_pair_of_presets_means_what_the_table_says(trainer: str, table: str) -> None:
    """`sdxl dreambooth` was 10 updates of 40, `sd21 dreambooth` 20 of 20, where the preset says 100 of 4."""
    assert {names: described(trainer, *names) for names in every_pair(trainer)} == rows(table)
