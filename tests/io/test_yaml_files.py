"""Options in YAML: the scalars that options have are read, and nothing that a few bytes could blow up."""

import os

import pytest

from personalize.errors import UserError
from personalize.io.tables import read_table
from personalize.io.yaml_files import read_options
from tests.support.children import in_child

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(7)
)
HOSTILE = {
    "anchors that multiply": BOMB,
    "an alias of itself": "a: &a [*a]",
    "a merge": "a: &a {b: 1}\n<<: *a",
    "no integer": "a: !!int abc",
    "no number": "a: !!float x",
    "an object": "a: !!python/object/apply:os.system [ls]",
    "a set": "a: !!set {x}",
    "binary": "a: !!binary aGVsbG8=",
    "5,000 digits": "a: " + "9" * 5000,
    "5,000 digits of a float": "a: " + "9" * 5000 + ".5",
    "100,000 brackets": "a: " + "[" * 100_000,
    "100,000 braces": "{" * 100_000,
    "lists in lists": "a: [[1]]",
    "a mapping": "a: {b: 1}",
    "a name twice": "a: 1\nb: 2\na: 3",
    "a list as a name": "[1]: 2",
    "two documents": "a: 1\n---\nb: 2",
    "control characters": "a: \x01",
    "a megabyte": "a: " + "x" * 2**20,
    "no YAML": "a: [",
    "a list": "- a",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_hostile_yaml_is_refused_in_one_line(name, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(HOSTILE[name])

    def attempt():
        with pytest.raises(UserError) as caught:
            read_options(path)
        return str(caught.value)

    message, grown = in_child(attempt, seconds=60)
    assert str(path) in message and "\n" not in message and len(message) < 600 and grown < 150


def test_what_options_need_is_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "a: 3\nb: 0.5\nc: 1e-4\nd: yes\ne: no\nf:\ng: [1, x]\nh: 2024-01-05\ni: 'text'\nj: 12:30\nk: |\n  two\n"
    )
    assert read_options(path) == {
        "a": 3, "b": 0.5, "c": "1e-4", "d": True, "e": False, "f": None, "g": [1, "x"], "h": "2024-01-05", "i": "text",
        "j": "12:30", "k": "two\n",
    }  # fmt: skip
    path.write_text("")
    assert read_options(path) == {}


TABLES = {
    "two million columns": ",".join(map(str, range(2_000_000))) + "\n" + "x\n" * 10,
    "two million rows": "a,b\n" + "1,2\n" * 2_000_000,
    "a cell over csv's limit": "a\n" + "x" * 200_000 + "\n",
    "a header over csv's limit": "x" * 200_000 + "\n1\n",
    "20 MB": "a\n" + "x\n" * 10_000_000,
    "not UTF-8": "a\n\udcff\n",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_table_without_end_is_refused(name, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(TABLES[name], errors="surrogateescape")

    def attempt():
        with pytest.raises(UserError) as caught:
            for _ in read_table(path)[1]:
                pass
        return str(caught.value)

    message, grown = in_child(attempt, seconds=60)
    assert str(path) in message and len(message) < 600
    assert grown < 400  # 16 MiB of text as csv's reader has it, four bytes a character, and two million names
