"""Mutations of files, and many of them tried in a child whose memory is measured."""

import json

import pytest

from personalize.errors import UserError
from tests.support.children import in_child

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
MEMORY = 256  # MiB: hypothesis' own records of thousands of examples, and files of a few KiB
ODD = ["", "a", "../../x", "unet", "lora_unet_", ".", "unet..lora_A.weight", "text_encoder.lora_B.weight", "\u2028",
       "lora_unet_input_blocks_" + "9" * 300, "bundle_emb.", "string_to_param.*", "emb_params", "clip_g"]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
BYTES = st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=6), st.integers(0, 8)), min_size=1, max_size=4)
PLACES = st.integers(0, 10**6)


def fuzzed(check, *strategies, examples):
    """Call `check` with `examples` draws of the strategies in a child: how many it was called with, and MiB grown."""

    def run():
        done = []

        @hypothesis.settings(
            max_examples=examples, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(st.tuples(*strategies))
        def tried(drawn):
            done.append(None)
            check(*drawn)

        tried()
        return len(done)

    return in_child(run, seconds=max(240, examples))


def attempt(*calls):
    """Run each call; a UserError of one line is fine, anything else is not."""
    for call in calls:
        try:
            call()
        except UserError as error:
            assert str(error).strip() and "Traceback" not in str(error)


def spliced(content, changes):
    """`content` with bytes replaced, inserted and cut out."""
    for place, new, cut in changes:
        at = place % (len(content) + 1)
        content = content[:at] + new + content[at + cut :]
    return content


def replanted(value, place, new):
    """A JSON value with one of its parts, at any depth, exchanged for `new`."""
    if isinstance(value, dict) and value and place:
        key = sorted(value)[place % len(value)]
        if place % 7 == 0:
            return {**{k: v for k, v in value.items() if k != key}, str(new)[:40]: value[key]}
        return {**value, key: replanted(value[key], place // max(1, len(value)), new)}
    if isinstance(value, list) and value and place:
        at = place % len(value)
        return [*value[:at], replanted(value[at], place // len(value), new), *value[at + 1 :]]
    return new


def dumped(value):
    return json.dumps(value).encode()
