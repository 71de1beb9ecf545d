"""The rules of forgetting as data: names, degrees, and what they select by path and role."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from personalize.adapters.forgetting import RULES, degrees, parse_rule, parse_rules, selects
from personalize.errors import UserError
from personalize.models.blocks import Role

BLOCK = "transformer_blocks.0"
UP, DOWN = Role("decoder", 2, True), Role("encoder", 2, True)


def test_names_degrees_and_friendly_names() -> None:
    assert parse_rule("decoderattn") is RULES["decoderattn"]
    half = parse_rule("decoder=0.5")
    assert (half.name, half.degree, half.sides) == ("nodecoder", 0.5, ("decoder",))
    assert str(half) == "nodecoder=0.5" and str(parse_rule("Encoder")) == "noencoder"
    assert parse_rule("donotforget").sides == ()


@pytest.mark.parametrize("text", ["decoder=1.5", "decoder=-0.1", "decoder=", "decoder=half", "decoder=nan"])
def test_degrees_outside_0_to_1_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="between 0"):
        parse_rule(text)


@pytest.mark.parametrize(
    ("rules", "said"),
    [(5, "forget is 5"), (b"decoder", "forget is b'decoder'"), (["decoder=0.5", 3], "forget contains 3"),
     ([None], "forget contains None"), ({"decoder": 0.5}, "forget is {'decoder': 0.5}")],
)  # fmt: skip
def test_what_is_no_rule_is_named(rules: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(said)}, expected a rule such as"):
        parse_rules(rules)


@pytest.mark.parametrize("degree", [math.nan, math.inf, -0.1, 1.5, "1", None, True])
def test_rules_made_in_python_keep_a_share(degree: Any) -> None:
    with pytest.raises(UserError, match="the share kept by the forgetting rule 'nodecoder' is"):
        replace(RULES["nodecoder"], degree=degree)


def test_forgedit_c04_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean decoderattn"):
        parse_rule("decoderatn")
    with pytest.raises(UserError, match="choose one of none, noencoder"):
        parse_rule("qqqqqq")


def test_forgedit_c03_attn_does_not_catch_what_merely_sits_in_attentions() -> None:
    rule = RULES["decoderattn"]
    prefix = "up_blocks.1.attentions.1"
    for path in (f"{prefix}.proj_in", f"{prefix}.{BLOCK}.ff.net.0.proj", "up_blocks.1.resnets.0.conv1"):
        assert selects(rule, path, UP)
    for path in (f"{prefix}.{BLOCK}.attn1.to_q", f"{prefix}.{BLOCK}.attn2.to_out.0"):
        assert not selects(rule, path, UP)
    assert not selects(rule, "down_blocks.1.resnets.0.conv1", DOWN)
    assert not selects(RULES["noselfattn"], f"{prefix}.proj_in", UP)  # attentions.1 is not attn1


def test_both_meanings_of_encoderkv_have_a_name() -> None:
    key, other = f"down_blocks.1.attentions.0.{BLOCK}.attn2.to_k", "down_blocks.1.resnets.0.conv1"
    vanilla, dreambooth = parse_rule("encoderkv"), parse_rule("dreambooth-encoderkv")
    assert [selects(vanilla, path, DOWN) for path in (key, other)] == [False, True]
    assert [selects(dreambooth, path, DOWN) for path in (key, other)] == [True, False]


def test_rules_together_are_idempotent_and_order_free() -> None:
    roles = {"up_blocks.1.resnets.0.conv1": UP, "down_blocks.1.resnets.0.conv1": DOWN}
    half, whole = parse_rule("decoder=0.5"), parse_rule("encoderattn")
    expected = {"up_blocks.1.resnets.0.conv1": 0.5, "down_blocks.1.resnets.0.conv1": 0.0}
    assert degrees(roles, [half, whole]) == degrees(roles, [whole, half, half, whole]) == expected
    assert degrees(roles, [parse_rule("none")]) == dict.fromkeys(roles, 1.0)


def test_forgetting_nothing_says_why() -> None:
    attention = {f"up_blocks.1.attentions.0.{BLOCK}.attn1.to_q": UP}
    with pytest.raises(UserError, match="all attention.*rules that do: .*nodecoder"):
        degrees(attention, [RULES["decoderattn"]])
    with pytest.raises(UserError, match="no module in the encoder"):
        degrees(attention, [RULES["noencoder"]])


def test_rules_joined_by_a_plus_are_read_wherever_rules_are() -> None:
    """`edit` and ComfyUI's node took them, `attach` and the exports did not."""
    both = [RULES["nodecoder"], RULES["encoderattn"]]
    assert parse_rules("decoder+encoderattn") == parse_rules(["decoder", "encoderattn"]) == both
    assert parse_rules(["decoder=0.5+nokv", "Decoderattn+Decoder2=0.5"]) == [
        replace(RULES["nodecoder"], degree=0.5), RULES["nokv"], replace(RULES["decoderattn+decoder2"], degree=0.5)
    ]  # fmt: skip
    assert parse_rules("none") == parse_rules(["orig", "none"]) == []
