"""Forgetting rules: scaling down an adapter's LoRA in some modules of the UNet, which weakens what it learned there.

A rule selects LoRA modules by their side of the UNet (encoder = down blocks: layout and pose; decoder = up blocks:
appearance and identity) and by their kind (self-attention, keys and values, …).  The LoRA of a selected module is
multiplied by the rule's `degree`: 0, the default, removes it; 1 keeps it.  All rules are rows of the table below.

    parse_rule("decoder=0.5")      halves the LoRA of the decoder
    parse_rule("encoderattn")      removes the LoRA of the encoder except in its attention layers

Published names (`encoderattn`, `decoderkv`, …) say what is *kept* on that side; names with `no` say what is removed.
The authors use `encoderkv` for two opposite rules.  Here it is that of their plain method, which keeps keys and values;
that of their DreamBooth variant, which removes only keys and values, is `noencoderkv`.

References: Zhang et al., "Forgedit", arXiv 2309.10556.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from personalize.errors import UserError
from personalize.models.ranges import FRACTION, check_number

if TYPE_CHECKING:  # the studio shows the rules before torch is imported
    from personalize.models.blocks import Role


@dataclass(frozen=True)
class ForgettingRule:
    """One rule: which modules it selects, and the `degree` by which their LoRA is multiplied.

    Selected are the modules on one of `sides`, at `level` if given, whose path contains one of `only` if given, and
    that are neither at `keep_level` nor contain one of `keep` in their path.
    """

    name: str
    description: str
    sides: tuple[str, ...]
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    keep_level: int | None = None
    level: int | None = None
    degree: float = 0.0

    def __post_init__(self) -> None:
        """UserError unless `degree` is a number in [0, 1]."""
        check_number(f"the share kept by the forgetting rule {self.name!r}", self.degree, FRACTION)

    def __str__(self) -> str:
        return f"{self.name}={self.degree:g}" if self.degree else self.name


ENCODER, DECODER, MIDDLE = ("encoder",), ("decoder",), ("middle",)
ALL = (*ENCODER, *MIDDLE, *DECODER)
ATTENTION, KEY_VALUE = ("attn1", "attn2"), ("attn2.to_k", "attn2.to_v")
QUERY = ("attn1.to_q", "attn2.to_q")

_ROWS = (
    ForgettingRule("none", "nothing is forgotten", ()),
    # published rules, by side: the name says what is kept
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
    # finer rules, useful for attention-only adapters too: the name says what is removed
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
    # the two transformers of SDXL to which InstantStyle attributes style and layout
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
_EXPECTED = 'a rule such as "decoder=0.5", or a list of rules'


def parse_rule(text: str) -> ForgettingRule:
    """The rule of "NAME" or "NAME=degree"; the names `decoder`, `encoder` and `middle` stand for a whole side.

    Raises:
        UserError: an unknown name (the message names similar ones), or a degree outside [0, 1].
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
    """Whether `rule` selects the module at `path`, e.g. `up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k`."""
    if role.side not in rule.sides or (rule.level is not None and role.level != rule.level):
        return False
    if rule.only and not _has(path, rule.only):
        return False
    return not _has(path, rule.keep) and role.level != rule.keep_level


def _has(path: str, parts: Iterable[str]) -> bool:
    """Whether `path` contains one of `parts` as whole dotted names: `attentions.1` does not contain `attn1`."""
    return any(f".{part}." in f".{path}." for part in parts)


def degrees(roles: Mapping[str, Role], rules: Iterable[ForgettingRule]) -> dict[str, float]:
    """The factor of each module's LoRA under `rules`: the smallest degree among the rules that select it, else 1.

    The order of the rules does not matter, and a rule given twice counts once.

    Args:
        roles: the role of each module, by path.

    Raises:
        UserError: a rule other than `none` selects no module; the message says why.
    """
    kept = dict.fromkeys(roles, 1.0)
    for rule in rules:
        chosen = [path for path, role in roles.items() if selects(rule, path, role)]
        if rule.sides and not chosen:
            raise UserError(_no_match(rule, roles))
        kept |= {path: min(kept[path], rule.degree) for path in chosen}
    return kept


def _no_match(rule: ForgettingRule, roles: Mapping[str, Role]) -> str:
    """The error message for a rule that selects none of the adapter's modules."""
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
    return f"rule {rule.name!r} ({rule.description}) forgets nothing here: {reason}; rules that do: {others}"


def parse_rules(forget: str | ForgettingRule | Iterable[str | ForgettingRule] | None) -> list[ForgettingRule]:
    """Forgetting rules from one or several, parsed or as text for `parse_rule_sum`; None is no rule.

    Raises:
        UserError: `forget` is, or contains, something else.
    """
    given = [] if forget is None else [forget] if isinstance(forget, str | ForgettingRule) else forget
    if isinstance(given, bytes | Mapping) or not isinstance(given, Iterable):
        raise UserError(f"forget is {given!r}, expected {_EXPECTED}")
    rules = list(given)
    if wrong := [rule for rule in rules if not isinstance(rule, str | ForgettingRule)]:
        raise UserError(f"forget contains {wrong[0]!r}, expected {_EXPECTED}")
    parsed = ([rule] if isinstance(rule, ForgettingRule) else parse_rule_sum(rule) for rule in rules)
    return [rule for several in parsed for rule in several if rule.sides]


def parse_rule_sum(text: str) -> list[ForgettingRule]:
    """Parse forgetting rules joined by "+" ("none": no rule); the name of a published rule may itself contain a "+"."""
    parts: list[str] = []
    for part in map(str.strip, text.split("+")):
        if parts and f"{parts[-1]}+{part.partition('=')[0]}".strip().lower() in RULES:
            parts[-1] += f"+{part}"
        else:
            parts.append(part)
    return [rule for rule in map(parse_rule, parts) if rule.sides]
