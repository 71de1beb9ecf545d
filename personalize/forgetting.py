"""Forgetting: which parts of a learned change go back to the base model, as rows of one table.

A rule selects LoRA modules by the side of the UNet they sit on (encoder = down path: layout, pose; decoder = up path:
look, identity) and by what they are (self-attention, keys and values, …).  A selected module keeps the share `degree`
of its learned change: 0, the default, forgets it wholly, 1 keeps it.

    parse_rule("decoder=0.5")      half of the learned change on the decoder side
    parse_rule("encoderattn")      the encoder forgets all but its attentions

Published names (`encoderattn`, `decoderkv`, …) say what *survives* on that side; names with `no` say what goes.
`encoderkv` is used for two opposite rules by its authors: here it is the vanilla one (K and V survive), and their
DreamBooth one (only K and V go) is `noencoderkv`.

References: Zhang et al., "Forgedit", arXiv 2309.10556.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from personalize.errors import UserError


@dataclass(frozen=True)
class Role:
    """Where a module sits: the `side` of the UNet, and its `level` = how often the latents were halved before it."""

    side: str  # "encoder", "middle", "decoder", or "outside" (input, output and embedding layers)
    level: int
    attention: bool = False  # has its block any attention?


@dataclass(frozen=True)
class ForgettingRule:
    """Forget on `sides`; if `only` is given just the modules with one of these name parts; never those of `keep`."""

    name: str
    says: str
    sides: tuple[str, ...]
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    keep_level: int | None = None
    level: int | None = None
    degree: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}={self.degree:g}" if self.degree else self.name


ENCODER, DECODER, MIDDLE = ("encoder",), ("decoder",), ("middle",)
BOTH = (*ENCODER, *DECODER)
ALL = (*ENCODER, *MIDDLE, *DECODER)
ATTENTION, KEY_VALUE = ("attn1", "attn2"), ("attn2.to_k", "attn2.to_v")
QUERY = ("attn1.to_q", "attn2.to_q")

_ROWS = (
    ForgettingRule("none", "nothing is forgotten", ()),
    # published: by side, the name says what survives
    ForgettingRule("noencoder", "the whole encoder side", ENCODER),
    ForgettingRule("encoderattn", "the encoder but its attentions", ENCODER, keep=ATTENTION),
    ForgettingRule(
        "encoderattn+encoder1", "the same, and its half-resolution stage is kept", ENCODER, keep=ATTENTION, keep_level=1
    ),
    ForgettingRule("encoderkv", "the encoder but its cross-attention keys and values", ENCODER, keep=KEY_VALUE),
    ForgettingRule("nodecoder", "the whole decoder side", DECODER),
    ForgettingRule("decoderattn", "the decoder but its attentions", DECODER, keep=ATTENTION),
    ForgettingRule(
        "decoderattn+decoder2", "the same, and its half-resolution stage is kept", DECODER, keep=ATTENTION, keep_level=1
    ),
    ForgettingRule("decoderkv", "the decoder but its cross-attention keys and values", DECODER, keep=KEY_VALUE),
    # finer: useful for attention-only adapters too, the name says what goes
    ForgettingRule("nomiddle", "the middle block", MIDDLE),
    ForgettingRule("noselfattn", "all self-attention", ALL, only=("attn1",)),
    ForgettingRule("nocrossattn", "all cross-attention", ALL, only=("attn2",)),
    ForgettingRule("nokv", "all cross-attention keys and values", ALL, only=KEY_VALUE),
    ForgettingRule("noquery", "all attention queries", ALL, only=QUERY),
    ForgettingRule("noencoderselfattn", "the encoder's self-attention", ENCODER, only=("attn1",)),
    ForgettingRule("noencodercrossattn", "the encoder's cross-attention", ENCODER, only=("attn2",)),
    ForgettingRule("noencoderkv", "the encoder's cross-attention keys and values", ENCODER, only=KEY_VALUE),
    ForgettingRule("nodecoderselfattn", "the decoder's self-attention", DECODER, only=("attn1",)),
    ForgettingRule("nodecodercrossattn", "the decoder's cross-attention", DECODER, only=("attn2",)),
    ForgettingRule("nodecoderkv", "the decoder's cross-attention keys and values", DECODER, only=KEY_VALUE),
    # the two transformers that InstantStyle reports for style and layout on SDXL
    ForgettingRule("nostyle", "the transformer of style (decoder)", DECODER, only=("attentions.1",), level=2),
    ForgettingRule("nolayout", "the transformer of layout (encoder)", ENCODER, only=("attentions.1",), level=2),
)
RULES: dict[str, ForgettingRule] = {row.name: row for row in _ROWS}
ALIASES = {
    "decoder": "nodecoder",
    "encoder": "noencoder",
    "middle": "nomiddle",
    "donotforget": "none",
    "orig": "none",
    "dreambooth-encoderkv": "noencoderkv",
}


def parse_rule(text: str) -> ForgettingRule:
    """The rule of "NAME" or "NAME=degree"; `decoder`, `encoder` and `middle` mean that whole side.

    Raises:
        UserError: unknown name (the nearest ones are given), or a degree outside [0, 1].
    """
    name, equals, number = (part.strip() for part in text.partition("="))
    rule = RULES.get(ALIASES.get(name.lower(), name.lower()))
    if rule is None:
        near = get_close_matches(name.lower(), [*RULES, *ALIASES], n=3, cutoff=0.5)
        options = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(RULES)}"
        raise UserError(f"unknown forgetting rule {name!r}: {options}")
    return replace(rule, degree=_degree(text, number)) if equals else rule


def _degree(text: str, number: str) -> float:
    try:
        degree = float(number)
    except ValueError:
        degree = math.nan
    if not 0 <= degree <= 1:
        raise UserError(f"forgetting rule {text!r}: the share kept must be between 0 (forget all) and 1 (keep all)")
    return degree


def selects(rule: ForgettingRule, path: str, role: Role) -> bool:
    """Does `rule` forget the module at `path`, e.g. `up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k`?"""
    if role.side not in rule.sides or (rule.level is not None and role.level != rule.level):
        return False
    if rule.only and not _has(path, rule.only):
        return False
    return not _has(path, rule.keep) and role.level != rule.keep_level


def _has(path: str, parts: Iterable[str]) -> bool:
    """Is one of `parts` a run of whole names of `path`?  So `attn1` is not found in `attentions.1`."""
    return any(f".{part}." in f".{path}." for part in parts)


def degrees(roles: Mapping[str, Role], rules: Iterable[ForgettingRule]) -> dict[str, float]:
    """The share kept of each module of `roles` (path → role): the smallest degree among the rules that select it.

    So a rule given twice acts once, and the order of rules does not matter.

    Raises:
        UserError: a rule (other than `none`) selects no module; the message says why.
    """
    kept = dict.fromkeys(roles, 1.0)
    for rule in rules:
        chosen = [path for path, role in roles.items() if selects(rule, path, role)]
        if rule.sides and not chosen:
            raise UserError(_nothing(rule, roles))
        kept |= {path: min(kept[path], rule.degree) for path in chosen}
    return kept


def _nothing(rule: ForgettingRule, roles: Mapping[str, Role]) -> str:
    there = [path for path, role in roles.items() if role.side in rule.sides]
    side = " or ".join(rule.sides)
    if not there:
        reason = f"the adapter has no module in the {side}"
    elif all(_has(path, ATTENTION) for path in there):
        reason = f"the adapter's {len(there)} modules in the {side} are all attention, which this rule does not touch"
    else:
        reason = f"none of the adapter's {len(there)} modules in the {side} is one of these"
    able = [row.name for row in _ROWS if any(selects(row, path, role) for path, role in roles.items())]
    others = ", ".join(able) or "none"
    return f"rule {rule.name!r} ({rule.says}) forgets nothing here: {reason}; rules that do: {others}"
