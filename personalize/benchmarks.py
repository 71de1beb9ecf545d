"""Folders of published benchmarks as lists of items: PIE-Bench, TEdBench, DragBench, and whatever is laid out so."""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.files import read_json
from personalize.images import load_image

SIDE = 512  # px, of PIE-Bench's masks
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PUBLISHED = {"PIE-Bench": (700, 700), "TEdBench": (100, 40)}  # edits, pictures
NUMPY = {  # all that a pickled mask needs
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.numeric", "_frombuffer"),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One edit of a benchmark.  `result` is where its edited picture belongs, without suffix, below the results."""

    name: str
    source: Path
    result: str
    source_prompt: str = ""
    target_prompt: str = ""
    mask: Tensor | None = None  # (H, W), True where the edit belongs
    kind: str = ""


def read_benchmark(folder: Path, *, allow_pickle: bool = False) -> tuple[str, list[Item]]:
    """The benchmark in `folder`, recognised by its files, and its items.

    PIE-Bench: mapping_file.json and annotation_images/.  TEdBench: input_list.json and originals/.  DragBench: folders
    that hold original_image.png and meta_data.json, or meta_data.pkl if pickles are allowed (arrays and plain values
    alone are read).

    Raises:
        UserError: none of these, or damaged.
    """
    if (folder / "mapping_file.json").is_file():
        return "PIE-Bench", list(_pie(folder))
    if (folder / "input_list.json").is_file():
        return "TEdBench", list(_ted(folder))
    samples = sorted(path.parent for path in folder.rglob("original_image.png"))
    if samples:
        return "DragBench", [_drag(folder, sample, allow_pickle) for sample in samples]
    raise UserError(
        f"{folder} is no benchmark: it has neither mapping_file.json (PIE-Bench) nor input_list.json (TEdBench) nor "
        "folders with original_image.png (DragBench)"
    )


def shortfall(name: str, items: Sequence[Item]) -> str:
    """What `items` lack, or have too much, of the published benchmark; empty when they are all of it."""
    here = (len(items), len({item.source for item in items}))
    if here == PUBLISHED.get(name, here):
        return ""
    (edits, pictures), (ours, theirs) = PUBLISHED[name], here
    return f"{name} is {edits} edits of {pictures} pictures, this folder {ours} of {theirs}: compare with care"


def decode_mask(runs: list[int], side: int = SIDE) -> Tensor:
    """PIE-Bench's mask (side, side) of pairs (start, length); the outermost pixels count as edited."""
    flat = torch.zeros(side * side, dtype=torch.bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        flat[start : start + length] = True
    mask = flat.view(side, side)
    mask[0] = mask[-1] = True
    mask[:, 0] = mask[:, -1] = True
    return mask


def find_result(results: Path, item: Item) -> Path | None:
    """The edited picture of `item` below `results`, whatever its suffix."""
    for stem in (item.result, f"annotation_images/{item.result}", Path(item.result).name):
        for suffix in PICTURES:
            if (path := results / f"{stem}{suffix}").is_file():
                return path
    return None


def _pie(folder: Path) -> Iterator[Item]:
    for key, entry in read_json(folder / "mapping_file.json").items():
        try:
            path, runs = Path(entry["image_path"]), entry["mask"]
            source_prompt, target_prompt = (
                entry[name].replace("[", "").replace("]", "") for name in ("original_prompt", "editing_prompt")
            )
            runs = [int(number) for number in (runs.split() if isinstance(runs, str) else runs)]
            mask = decode_mask(runs)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / 'mapping_file.json'}: entry {key} cannot be read ({error})") from None
        kind = str(entry.get("editing_type_id", ""))
        source = _inside(folder / "annotation_images", path)
        yield Item(key, source, str(path.with_suffix("")), source_prompt, target_prompt, mask, kind)


def _ted(folder: Path) -> Iterator[Item]:
    """A picture with one target text has its result under its own name, one with several under name_0, name_1, …"""
    listed = read_list(folder / "input_list.json")
    counts: Counter[str] = Counter(name for name, _ in listed)
    seen: Counter[str] = Counter()
    for name, target in listed:
        stem = Path(name).stem
        place = stem if counts[name] == 1 else f"{stem}_{seen[name]}"
        seen[name] += 1
        yield Item(place, _inside(folder / "originals", Path(name)), place, "", target)


def read_list(path: Path) -> list[tuple[str, str]]:
    """(picture, target text) pairs: a JSON list of pairs or of objects, or an object of picture: text or texts."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: its JSON cannot be read ({error})") from None
    entries = list(value.items()) if isinstance(value, dict) else value
    found = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        pair = [entry.get("img_name"), entry.get("target_text")] if isinstance(entry, dict) else entry
        name, text = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
        texts = text if isinstance(text, list) else [text]
        if not isinstance(name, str) or not all(isinstance(one, str) for one in texts):
            raise UserError(f"{path}: entry {number} names no picture and target text: {str(entry)[:60]}")
        found += [(name, one) for one in texts]
    return found


def _drag(folder: Path, sample: Path, allow_pickle: bool) -> Item:
    about: dict[str, Any] = {}
    if (sample / "meta_data.json").is_file():
        about = read_json(sample / "meta_data.json")
    elif (sample / "meta_data.pkl").is_file():
        if not allow_pickle:
            raise UserError(f"{sample / 'meta_data.pkl'} is a pickle: say --allow_pickle to read its arrays and texts")
        about = _plain_pickle(sample / "meta_data.pkl")
    name = str(sample.relative_to(folder))
    mask, drawn = about.get("mask"), sample / "mask.png"
    if mask is None and drawn.is_file():
        mask = np.asarray(load_image(drawn).convert("L")) > 127
    found = None if mask is None else torch.from_numpy(np.array(mask) > 0)
    return Item(name, sample / "original_image.png", name, str(about.get("prompt", "")), "", found)


def _inside(folder: Path, path: Path) -> Path:
    """`folder` / `path`, which must not lead out of it."""
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{path} leads out of {folder}: a benchmark names pictures inside its own folder")
    return folder / path


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NUMPY:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _plain_pickle(path: Path) -> dict[str, Any]:
    try:
        value = _Plain(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # whatever a hostile pickle makes the reader raise
        raise UserError(
            f"{path} holds more than arrays and plain values: {' '.join(str(error).split())[:120]}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, a dictionary was expected")
    return value
