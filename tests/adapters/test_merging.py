"""Sums and lower ranks of LoRAs, against dense matrices."""

from dataclasses import replace

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import load_adapters
from personalize.adapters.export import baked
from personalize.adapters.forgetting import parse_rule
from personalize.adapters.fuse import merged_weights
from personalize.adapters.merging import WeightedLora, concatenated, merged
from personalize.editing.attach import attach
from personalize.editing.config import EditStrengths
from personalize.editing.editor import Editor
from personalize.errors import Notice, UserError
from personalize.formats.lora_files import factor_pairs
from personalize.formats.rank_reduction import reduced_pairs
from tests.support.adapter_kinds import KINDS
from tests.support.lora_states import random_adapter, random_lora
from tests.support.tiny import tiny, tiny_pipeline

SHAPES = {"up_blocks.1.a.to_q": (12, 8), "up_blocks.1.b.conv1": (6, 5, 3, 3), "up_blocks.1.c.proj_in": (9, 9, 1, 1)}
FP32 = 1e-6  # entries of order 1e-2 from sums of at most 7 products: rounding of 6e-8 each


def deltas(state, strength=1.0):
    return {module: strength * (b.flatten(1) @ a.flatten(1)) for module, (a, b) in factor_pairs(state).items()}


def test_a_sum_is_exact_and_holds_the_modules_of_all():
    few = {key: shape for key, shape in SHAPES.items() if "to_q" not in key}
    first, second = random_lora(SHAPES, rank=4), random_lora(few, rank=3, seed=1)
    state, rank = concatenated([WeightedLora(first, 2.0, 0.5), WeightedLora(second, 1.0, -1.5)])
    assert rank == 7 and {a.shape[0] for a, _ in factor_pairs(state).values()} == {7}
    one, two, found = deltas(first), deltas(second, -1.5), deltas(state)
    assert found.keys() == one.keys()
    for module, matrix in found.items():
        torch.testing.assert_close(matrix, one[module] + two.get(module, 0), atol=FP32, rtol=0)
    assert all(state[key].shape[1:] == tensor.shape[1:] for key, tensor in first.items() if "lora_A" in key)


def test_lower_rank_is_the_nearest_matrix_and_states_its_error():
    state = random_lora(SHAPES, rank=5)
    found = reduced_pairs(factor_pairs(state), 3.0, 2)
    lost = whole = 0.0
    for module, matrix in deltas(state, 3.0).items():
        u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        nearest = (u[:, :2] * values[:2]) @ v[:2]
        torch.testing.assert_close(deltas(found.state)[module].double(), nearest, atol=FP32, rtol=0)
        tail, total = float(values[2:].square().sum()), float(values.square().sum())
        assert found.errors[module] == pytest.approx((tail / total) ** 0.5, rel=1e-4)  # fp32 dense product above
        lost, whole = lost + tail, whole + total
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4) and 0.1 < found.error < 1
    worst = max(found.errors, key=found.errors.get)
    assert str(found).startswith("rank 2: relative error") and worst in str(found)
    shapes = {key: tensor.shape for key, tensor in random_lora(SHAPES, rank=2).items()}
    assert {key: tensor.shape for key, tensor in found.state.items()} == shapes


def test_what_has_a_lower_rank_already_loses_nothing():
    state = random_lora(SHAPES, rank=2)
    doubled, rank = concatenated([WeightedLora(state, 1.0, 0.25), WeightedLora(state, 1.0, 0.75)])
    found = reduced_pairs(factor_pairs(doubled), 1.0, 2)
    assert rank == 4 and found.error < 1e-6  # fp32 rounding of the sum
    for module, matrix in deltas(state).items():
        torch.testing.assert_close(deltas(found.state)[module], matrix, atol=FP32, rtol=0)
    zero = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    assert reduced_pairs(factor_pairs(zero), 1.0, 1).error == 0


def test_mistakes():
    state = random_lora(SHAPES)
    other = random_lora({key: (7, *shape[1:]) for key, shape in SHAPES.items()})
    for attempt, message in (
        (lambda: concatenated([]), "must be numbers"),
        (lambda: concatenated([WeightedLora(state, 1.0, float("nan"))]), "must be numbers"),
        (lambda: concatenated([WeightedLora(state, 1.0), WeightedLora(other, 1.0)]), "different base models"),
        (lambda: reduced_pairs(factor_pairs(state), 1.0, 0), "whole number from 1"),
        (lambda: reduced_pairs(factor_pairs({}), 1.0, 2), "nothing to reduce"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


@pytest.fixture
def with_biases(tmp_path):
    return KINDS["LoRA and biases"]().write(tmp_path / "biases")


@pytest.mark.parametrize(
    ("kind", "way"), [("LoRA and biases", "convert` the file first"), ("DoRA", "no LoRA holds DoRA: leave it out")]
)
def test_a_rule_is_refused_where_it_would_scale_a_part_of_the_changes(tmp_path, kind, way):
    file, pipe = KINDS[kind]().write(tmp_path / "in"), tiny_pipeline("sd1")
    rules, dials = [parse_rule("middle")], EditStrengths(forget="middle")
    for attempt in (
        lambda: baked(Adapter.load(file), ["middle"]),
        lambda: baked(Adapter.load(file), strength=0.5),
        lambda: Editor(tiny("sd1"), Adapter.load(file)).edit("a cat", dials, seeds=[0]),
        lambda: attach(pipe, file, forget=rules).__enter__(),
    ):
        with pytest.raises(UserError, match=way) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with attach(pipe, file, strength=0.5):  # a strength moves other changes too
        pass


def test_a_sum_says_which_biases_stay_behind(with_biases, tmp_path):
    other = KINDS["LoRA, kohya's names"]().write(tmp_path / "other")
    with pytest.warns(Notice, match=r"biases.*2 changed bias\(es\) or norm\(s\) stay behind") as said:
        load_adapters([with_biases, other])
    assert len([one for one in said if one.category is Notice]) == 1


@pytest.mark.parametrize("kind", ["LoRA and biases", "DoRA", "LoHa"])
def test_a_strength_moves_every_weight_and_bias_by_its_part(tmp_path, kind):
    file = KINDS[kind]().write(tmp_path / "in")
    before, whole, part = (
        merged_weights(tiny("sd1"), Adapter.load(file), any_base=True, strength=strength)
        for strength in (0.0, 1.0, 0.3)
    )
    changed = [name for name in before["unet"] if not torch.equal(before["unet"][name], whole["unet"][name])]
    assert changed and any("bias" in name for name in changed) == (kind == "LoRA and biases")
    for name in changed:
        start, end = before["unet"][name], whole["unet"][name]
        torch.testing.assert_close(
            part["unet"][name], start + 0.3 * (end - start), atol=1e-5, rtol=1e-5
        )  # fp32 near 10


def of_base(*, source=None, info=None, **base):
    return Adapter(random_lora(SHAPES, rank=2), 2, 2.0, source, {"base": base, **(info or {})})


def test_a_sum_records_whose_source_embedding_it_lacks_and_counts_the_pictures():
    source = {"embeds": torch.zeros(1, 77, 8)}
    one = of_base(source=source)
    alone = of_base(source=source, info={"standalone": True, "pictures": 4})
    theirs = of_base(info={"imported": "x", "header": {"ss_num_train_images": "20"}})
    unknown = of_base(info={"imported": "x"})
    both = merged([one, alone], [1.0, 1.0], "ab")
    assert [part.get("left_out") for part in both.info["merged_from"]] == [["source embedding"], None]
    again = merged([theirs, both], [1.0, 1.0], "ab")
    assert [part.get("left_out") for part in again.info["merged_from"]] == [None, ["source embedding"]]
    assert both.info["pictures"] == 5 and again.info["pictures"] == 25
    for adapters in ([one, unknown], [one, merged([one, unknown], [1.0, 1.0], "ab")]):
        assert "pictures" not in merged(adapters, [1.0, 1.0], "ab").info


def test_a_sum_has_the_size_of_the_first_that_has_one_and_the_captions_of_all():
    style = of_base(info={"imported": "x", "header": {}})
    cat = of_base(info={"caption": "a cat, on grass", "size": [96, 64]})
    dogs = of_base(info={"caption": "a dog", "captions": ["a dog", "a cat, on grass", "two dogs"], "size": [32, 32]})
    info = merged([style, cat, dogs], [1.0] * 3, "abc").info
    assert info["size"] == [96, 64]
    assert info["captions"] == ["a cat, on grass", "a dog", "two dogs"] and info["caption"] == "a cat, on grass"
    alone = merged([style, cat], [1.0, 1.0], "ab").info
    assert alone["caption"] == "a cat, on grass" and "captions" not in alone
    assert not {"size", "captions"} & merged([style, style], [1.0, 1.0], "ab").info.keys()
    both = Editor(tiny("sd1"), merged([cat, dogs], [1.0, 1.0], "ab"))
    assert both.size_for("two dogs") == (96, 64) == Editor(tiny("sd1"), cat).size


def test_adapters_used_together_keep_the_source_embedding_if_one_alone_has_one():
    """As a subject beside a LoRA for few steps; saved sums have none."""
    source = {"embeds": torch.randn(2, 77, 8)}
    about = {"captions": ["a cat", "two cats"], "caption": "a cat", "caption_counts": [3, 1], "size": [96, 64]}
    cat, other = of_base(source=source, info=about), of_base(source=source)
    few = of_base(info={"imported": "x", "caption": "lcm", "size": [32, 32]})
    for parts in ([few, cat], [cat, few]):
        both = merged(parts, [1.0, 1.0], "ab", in_memory=True)
        assert both.source is source and not any("left_out" in part for part in both.info["merged_from"])
        assert {key: both.info[key] for key in about} == about
        assert both.starting_from("two cats").source["embeds"].equal(source["embeds"][1:])
        assert merged(parts, [1.0, 1.0], "ab").source is None
    two = merged([cat, other], [1.0, 1.0], "ab", in_memory=True)
    assert two.source is None and all(part["left_out"] for part in two.info["merged_from"])


def test_the_card_of_a_sum_lists_the_captions_one_a_line(tmp_path):
    """Joined by commas, those of a caption could not be told from those between captions."""
    parts = [replace(random_adapter(tiny("sd1"), seed=number), source=None) for number in range(2)]
    for number, caption in enumerate(("a cat, on grass", "a dog")):
        parts[number] = replace(parts[number], info={**parts[number].info, "caption": caption})
    card = (merged(parts, [1.0, 1.0], "ab").save(tmp_path / "sum") / "README.md").read_text("utf-8")
    assert "Write one of the captions of the pictures in your prompt:\n\n```text\na cat, on grass\na dog\n```" in card
    assert Adapter.load(tmp_path / "sum").captions == ("a cat, on grass", "a dog")


def test_the_base_of_a_sum_is_that_of_the_adapters_that_know_it():
    """Files of other programs know no hash: they fit every base of the family, and do not hide which one it is."""
    style, typed = of_base(), of_base(family="sd1")
    one, other = (of_base(family="sd1", name=f"org/{name}", sha256=name) for name in ("a", "b"))
    for adapters in ([style, one], [typed, one], [one, typed], [style, typed, one, one]):
        assert merged(adapters, [1.0] * len(adapters), "abcd"[: len(adapters)]).base == one.base
    assert merged([style, typed], [1.0, 1.0], "ab").base == {"family": "sd1"}
    xl = of_base(family="sdxl")
    for adapters, message in (
        ([style, one, other], "^third was made for another base model than second: "),
        ([typed, one, other], "^third was made for another base model than second: "),
        ([style, one, xl], "^third is for the family sdxl, second for sd1: "),
    ):
        with pytest.raises(UserError, match=message):
            merged(adapters, [1.0] * 3, ["first", "second", "third"])
