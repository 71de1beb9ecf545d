"""Timestep-dependent rank (T-LoRA): of a LoRA's r rank components, only the first r(t) take part at timestep t.

    r(t) = ⌊ ((T − t) / T)^α · (r − r_min) ⌋ + r_min
    ΔW(t) = s · B diag(m(t)) A,   m(t)_i = 1 for i < r(t), else 0

What is learned at high noise is layout and background, which is what overfits to a single picture; there the rule
leaves r_min components to learn.  It holds in sampling as in training.  A LoRA of an orthogonal start has rank 2r, and
its halves are masked alike: component i + r goes with component i.

References: Soboleva et al., "T-LoRA: Single Image Diffusion Model Customization Without Overfitting", arXiv 2507.05964.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

from personalize.errors import UserError
from personalize.formats.adapter_folders import MANIFEST
from personalize.formats.manifest import is_part_of_adapter
from personalize.io.json_files import parse_json, read_json
from personalize.io.output_folder import is_tensor_name

KEY = "timestep_rank"  # in adapter.json
HEADER_KEY = "ss_timestep_rank"  # in the header of a file in kohya's names
MAX_EXPONENT, MAX_TIMESTEPS = 10**4, 10**4  # a file of others must not make a table, or a power, that never ends


@dataclass(frozen=True)
class TimestepRank:
    """The rule of one adapter: `rank` is r, `min_rank` r_min, `alpha` the exponent α, `timesteps` T."""

    rank: int
    min_rank: int
    alpha: float = 1.0
    timesteps: int = 1000

    def __post_init__(self) -> None:
        if not 1 <= self.min_rank <= self.rank or not 0 < self.alpha <= MAX_EXPONENT:
            raise UserError(
                f"timestep-dependent rank needs 1 ≤ min_rank ≤ rank and an exponent above 0, up to {MAX_EXPONENT}, got "
                f"min_rank {self.min_rank}, rank {self.rank} and exponent {self.alpha}"
            )
        if not 1 <= self.timesteps <= MAX_TIMESTEPS:
            raise UserError(f"timestep-dependent rank is for {self.timesteps} timesteps: 1 to {MAX_TIMESTEPS} are read")

    def active(self, timestep: int) -> int:
        """r(t), the number of components that take part at the whole `timestep` in [0, T]."""
        left = Fraction(self.timesteps - timestep, self.timesteps)
        if self.alpha == int(self.alpha):  # exact: a product such as 0.29 · 100 would be rounded to below 29
            return floor(left ** int(self.alpha) * (self.rank - self.min_rank)) + self.min_rank
        return floor(float(left) ** self.alpha * (self.rank - self.min_rank) + 1e-9) + self.min_rank

    def masks(self) -> list[list[float]]:
        """m(t) for t = 0 … T, r numbers each."""
        counts = map(self.active, range(self.timesteps + 1))
        return [[1.0] * count + [0.0] * (self.rank - count) for count in counts]

    def shares(self) -> list[float]:
        """For each of the r components the share of the timesteps 0 … T − 1 in which it takes part."""
        counts = [self.active(timestep) for timestep in range(self.timesteps)]
        return [sum(count > index for count in counts) / self.timesteps for index in range(self.rank)]

    def values(self) -> dict[str, Any]:
        """The rule as values that JSON can hold, for `adapter.json`."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"timestep-dependent rank: {self.min_rank} of {self.rank} components at the highest noise, all "
            f"{self.rank} at the lowest (exponent {self.alpha:g})"
        )


@dataclass(frozen=True)
class SummedTimestepRank:
    """The rules of a sum of LoRAs whose components lie side by side: of each its rule, if it has one, and its rank.

    It is for adapters in memory, which are applied together: no file holds it.
    """

    parts: tuple[tuple[TimestepRank | None, int], ...]

    def __post_init__(self) -> None:
        rules = [rule for rule, _ in self.parts if rule is not None]
        if len({rule.timesteps for rule in rules}) != 1:
            raise UserError("timestep-dependent ranks add up if they are of equally many timesteps: leave one out")
        for rule, rank in self.parts:
            if rule is not None and rank % rule.rank:
                raise UserError(
                    f"the LoRA has rank {rank}, its timestep-dependent rank is for {rule.rank}: files are mixed up"
                )

    @property
    def rank(self) -> int:
        return sum(rank for _, rank in self.parts)

    def masks(self) -> list[list[float]]:
        """m(t) for t = 0 … T, those of the parts one after the other; of a part without a rule all ones."""
        count = next(rule.timesteps + 1 for rule, _ in self.parts if rule is not None)
        each = [[[1.0] * rank] * count if rule is None else [row * (rank // rule.rank) for row in rule.masks()]
                for rule, rank in self.parts]  # fmt: skip
        return [sum(rows, []) for rows in zip(*each, strict=True)]

    def shares(self) -> list[float]:
        """For each component the share of the timesteps in which it takes part, as `TimestepRank.shares`."""
        return sum(([1.0] * rank if rule is None else rule.shares() * (rank // rule.rank) for rule, rank in self.parts),
                   [])  # fmt: skip

    def __str__(self) -> str:
        return " + ".join("constant rank" if rule is None else str(rule) for rule, _ in self.parts)


AnyTimestepRank = TimestepRank | SummedTimestepRank


def read_rule(values: Any, source: object) -> TimestepRank | None:
    """The rule in `values`, as `TimestepRank.values` writes it or as JSON text; None if `values` is None.

    Raises:
        UserError, naming `source`: anything else than such a rule.
    """
    if values is None:
        return None
    try:
        settings = parse_json(values, source) if isinstance(values, str) else values
        return TimestepRank(
            int(settings["rank"]), int(settings["min_rank"]), float(settings["alpha"]), int(settings["timesteps"])
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{source}: its timestep-dependent rank is damaged ({error!r}): save the adapter anew"
        ) from None


def rule_of(info: Mapping[str, Any], source: object = "the adapter") -> AnyTimestepRank | None:
    """The rule of an adapter by its `info`, or by the header of the file that it was read from; None without one."""
    if isinstance(summed := info.get(KEY), SummedTimestepRank):
        return summed
    return read_rule(summed or (info.get("header") or {}).get(HEADER_KEY), source)


def rule_header(info: Mapping[str, Any]) -> dict[str, str]:
    """The rule of an adapter by its `info` as strings for a file's header; UserError for a sum's, which no file holds.

    Every file has it, so that one that is copied out of its folder still says it.
    """
    if isinstance(rule := rule_of(info), SummedTimestepRank):
        raise UserError(f"no file holds {rule}: write each adapter with `personalize export lora`, then merge these")
    return {} if rule is None else {HEADER_KEY: json.dumps(rule.values())}


def with_rule(path: str | Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of the adapter at `path`, with the rule that the folder of ours has in which the file lies.

    Raises:
        UserError: a damaged `adapter.json`.
    """
    path = Path(path)
    ours = (path / MANIFEST).is_file() if path.is_dir() else is_tensor_name(path) and is_part_of_adapter(path)
    if HEADER_KEY in metadata or not ours:
        return dict(metadata)
    manifest = (path if path.is_dir() else path.parent) / MANIFEST
    rule = read_rule(read_json(manifest).get(KEY), manifest)
    return dict(metadata) | ({HEADER_KEY: json.dumps(rule.values())} if rule else {})


def require_whole_rank(rule: AnyTimestepRank | None) -> None:
    """UserError if there is a rule: it says which components act when, and a lower rank mixes them."""
    if rule is not None:
        raise UserError(
            f"an adapter with {rule} cannot be cut to a lower rank: first resolve it with `personalize export lora`"
        )


def warning(rule: AnyTimestepRank) -> str:
    """A sentence for people who open the file in another program."""
    return (
        f"trained with {rule}; Personalize keeps to that, other programs apply all components at every step, which is "
        "stronger at high noise than was trained (see `personalize export lora --timestep_rank`)"
    )
