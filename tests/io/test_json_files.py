"""JSON from outside comes through one door: limits while it is parsed, then types and ranges by a schema."""

import ast
import json
from pathlib import Path

import pytest

import personalize
from personalize.errors import UserError
from personalize.formats.manifest import Manifest, read_manifest
from personalize.io.json_files import checked, finite_values, json_bytes, parse_json, read_json

HOSTILE = {
    "no JSON": b"{", "not UTF-8": b'"\xff"', "a name twice": b'{"a": 1, "a": 2}', "100,000 brackets": b"[" * 100_000,
    "100 levels": b"[" * 100 + b"]" * 100, "100 levels of objects": b'{"a":' * 100 + b"1" + b"}" * 100,
    "5,000 digits": b"9" * 5000, "half": b"1 2", "nothing": b"",
}  # fmt: skip
GOOD = {"schema": 1, "rank": 2, "alpha": 2.0, "base": {"family": "sd1"}, "tensors": {}, "source_tensors": {}}
GOOD["twin"] = "a.safetensors"
WRONG = [
    ("rank", 0), ("rank", -1), ("rank", 2.5), ("rank", True), ("rank", "2"), ("rank", 10**12), ("rank", 10**300),
    ("alpha", 0), ("alpha", float("nan")), ("alpha", float("inf")), ("alpha", "1"), ("alpha", True), ("alpha", 10**300),
    ("base", []), ("base", {"family": 1}), ("tensors", {"a": 1}), ("tensors", None), ("schema", None),
    ("concepts", {"<a>": ["x"]}), ("concepts", {"<a>": {"text_encoder": 7}}), ("files", "abc"), ("files", [1]),
    ("caption", 5), ("header", {"a": 1}), ("twin", 1),
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_sound_json_is_refused_in_one_line(name, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(HOSTILE[name])
    for call in (lambda: parse_json(HOSTILE[name], path), lambda: read_json(path)):
        with pytest.raises(UserError) as caught:
            call()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_halves_of_surrogate_pairs_are_replaced_wherever_they_stand():
    text = r'{"a\ud800": ["\udfff b", {"c": "\ud83d\ude00"}], "d": "\\ud800"}'
    value = parse_json(text, "x")
    assert value == {"a\ufffd": ["\ufffd b", {"c": "😀"}], "d": "\\ud800"}
    json.dumps(value, ensure_ascii=False).encode()  # any file can hold it


@pytest.mark.parametrize("key, value", WRONG)
def test_a_manifest_of_other_types_or_ranges_is_refused_and_its_place_is_named(key, value, tmp_path):
    path = tmp_path / "adapter.json"
    path.write_text(json.dumps(GOOD | {key: value}))
    with pytest.raises(UserError, match=f"is damaged: .*{key}"):
        read_manifest(path)


def test_a_sound_manifest_is_read_and_more_keys_may_be_anything(tmp_path):
    path = tmp_path / "adapter.json"
    path.write_text(json.dumps(GOOD | {"anything": [1, {"a": None}]}))
    read = read_manifest(path)
    assert (read.family, read.kohya_file, read.scaling) == ("sd1", "a.safetensors", 1.0)
    with pytest.raises(UserError, match="damaged: .*missing required field schema"):
        checked({}, Manifest, path)


def test_no_other_file_of_the_package_parses_json():
    """A second door would have none of the limits."""
    root = Path(personalize.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            there_and_back = bool(call.args) and ast.unparse(call.args[0]).startswith("json.dumps(")
            assert name not in ("json.loads", "json.load") or there_and_back or path.name in ALLOWED, path


ALLOWED = {"json_files.py", "fuse.py", "memory.py"}  # these two: what they have written themselves, a moment ago


def test_numbers_that_json_does_not_know_are_null():
    inf = float("inf")
    value = {"a": (1.5, inf, [-inf, {"b": float("nan")}]), "c": "inf", "d": 2, "e": None, "f": True}
    assert finite_values(value) == {"a": [1.5, None, [None, {"b": None}]], "c": "inf", "d": 2, "e": None, "f": True}
    assert json_bytes([inf, "ä"], ensure_ascii=False) == '[\n null,\n "ä"\n]'.encode()
