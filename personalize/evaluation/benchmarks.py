"""Reading the folders of published editing benchmarks: PIE-Bench, TEdBench, DragBench, and others in their layout."""

from __future__ import annotations

import io
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
from personalize.io.image_files import load_image
from personalize.io.image_metadata import IMAGE_SUFFIXES
from personalize.io.json_files import parse_json, read_json
from personalize.io.mask_files import HALF_WHITE
from personalize.io.plain_files import read_bytes, read_text

Point = tuple[float, float]  # x, y in pixels
MASK_SIDE = 512  # px, of PIE-Bench's masks
MAX_PICKLE_BYTES = 64 * 2**20
PUBLISHED_SIZES = {"PIE-Bench": (700, 700), "TEdBench": (100, 40)}  # (edits, pictures)
ALLOWED_IN_PICKLES = {  # the globals that unpickling a numpy array needs
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.numeric", "_frombuffer"),
}  # fmt: skip


@dataclass(frozen=True)
class BenchmarkItem:
    """One edit of a benchmark.

    source: the file of the picture to edit.
    result: where the edited picture belongs: its path below the folder of results, without suffix.
    mask: (H, W), True where the edit belongs; None if the benchmark has none.
    kind: PIE-Bench's id of the kind of edit.
    points: DragBench's (handle, target), each (x, y) in pixels.
    """

    name: str
    source: Path
    result: str
    source_prompt: str = ""
    target_prompt: str = ""
    mask: Tensor | None = None
    kind: str = ""
    points: tuple[tuple[Point, Point], ...] = ()


def read_benchmark(folder: Path, *, allow_pickle: bool = False) -> tuple[str, list[BenchmarkItem]]:
    """The name of the benchmark in `folder`, recognised by its files, and its items.

    PIE-Bench: mapping_file.json and annotation_images/.  TEdBench: input_list.json and originals/.  DragBench: folders
    that hold original_image.png and meta_data.json, or meta_data.pkl if pickles are allowed, of which only arrays and
    plain values are read.

    Raises:
        UserError: the folder is none of these, or a file in it is damaged.
    """
    if (folder / "mapping_file.json").is_file():
        return "PIE-Bench", list(_pie_bench_items(folder))
    if (folder / "input_list.json").is_file():
        return "TEdBench", list(_tedbench_items(folder))
    samples = sorted(path.parent for path in folder.rglob("original_image.png"))
    if samples:
        return "DragBench", [_dragbench_item(folder, sample, allow_pickle) for sample in samples]
    raise UserError(
        f"{folder} is no benchmark: it has neither mapping_file.json (PIE-Bench) nor input_list.json (TEdBench) nor "
        "folders with original_image.png (DragBench)"
    )


def size_warning(name: str, items: Sequence[BenchmarkItem]) -> str:
    """A warning that `items` are more or fewer than the published benchmark `name` has; empty if the counts agree."""
    counts = (len(items), len({item.source for item in items}))
    if counts == PUBLISHED_SIZES.get(name, counts):
        return ""
    (edits, pictures), (edits_here, pictures_here) = PUBLISHED_SIZES[name], counts
    return (
        f"{name} is {edits} edits of {pictures} pictures, this folder {edits_here} of {pictures_here}: its figures do "
        "not compare with published ones"
    )


def decode_mask(runs: list[int], side: int = MASK_SIDE) -> Tensor:
    """PIE-Bench's run-length mask (side, side), True where the picture is edited.

    runs: start and length of each run of edited pixels in row-major order, alternating.  As in the published code, the
    outermost pixels count as edited.
    """
    flat = torch.zeros(side * side, dtype=torch.bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        flat[start : start + length] = True
    mask = flat.view(side, side)
    mask[0] = mask[-1] = True
    mask[:, 0] = mask[:, -1] = True
    return mask


def find_result(results: Path, item: BenchmarkItem) -> Path | None:
    """The file of the edited picture of `item` below the folder `results`, with any image suffix; None if not there.

    Besides our own name, PIE-Bench's, DragDiffusion's `<item>/dragged_image` and the name without folders are tried.
    """
    name = item.result
    for stem in (name, f"annotation_images/{name}", f"{name}/dragged_image", Path(name).name):
        for suffix in IMAGE_SUFFIXES:
            if (path := results / f"{stem}{suffix}").is_file():
                return path
    return None


def _pie_bench_items(folder: Path) -> Iterator[BenchmarkItem]:
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
        yield BenchmarkItem(key, source, str(path.with_suffix("")), source_prompt, target_prompt, mask, kind)


def _tedbench_items(folder: Path) -> Iterator[BenchmarkItem]:
    """The items of TEdBench.

    The result of a picture with one target text has the picture's name; with several texts, or if another picture has
    that name with another suffix, name_0, name_1, ….
    """
    edits = read_edit_list(folder / "input_list.json")
    counts: Counter[str] = Counter(Path(name).stem for name, _ in edits)
    earlier: Counter[str] = Counter()
    for name, target in edits:
        stem = Path(name).stem
        result = stem if counts[stem] == 1 else f"{stem}_{earlier[stem]}"
        earlier[stem] += 1
        yield BenchmarkItem(result, _inside(folder / "originals", Path(name)), result, "", target)


def read_edit_list(path: Path) -> list[tuple[str, str]]:
    """The (picture, target text) pairs in a JSON file.

    The file holds a list of pairs, a list of objects with img_name and target_text, or an object that maps each picture
    to its text or texts.

    Raises:
        UserError: the file is no JSON, or an entry has another form.
    """
    value = parse_json(read_text(path), path)
    entries = list(value.items()) if isinstance(value, dict) else value
    pairs = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        pair = [entry.get("img_name"), entry.get("target_text")] if isinstance(entry, dict) else entry
        name, text = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
        texts = text if isinstance(text, list) else [text]
        if not isinstance(name, str) or not all(isinstance(one, str) for one in texts):
            raise UserError(f"{path}: entry {number} names no picture and target text: {str(entry)[:60]}")
        pairs += [(name, one) for one in texts]
    return pairs


def _dragbench_item(folder: Path, sample: Path, allow_pickle: bool) -> BenchmarkItem:
    metadata: dict[str, Any] = {}
    if (sample / "meta_data.json").is_file():
        metadata = read_json(sample / "meta_data.json")
    elif (sample / "meta_data.pkl").is_file():
        if not allow_pickle:
            raise UserError(f"{sample / 'meta_data.pkl'} is a pickle: give --allow_pickle to read its arrays and texts")
        metadata = _read_plain_pickle(sample / "meta_data.pkl")
    name = str(sample.relative_to(folder))
    array, mask_file = metadata.get("mask"), sample / "mask.png"
    if array is None and mask_file.is_file():
        array = np.asarray(load_image(mask_file).convert("L")) >= HALF_WHITE
    mask = None if array is None else _mask_of(sample, array)
    points = _point_pairs(sample, metadata.get("points", []))
    prompt = str(metadata.get("prompt", ""))
    return BenchmarkItem(name, sample / "original_image.png", name, prompt, "", mask, points=points)


def _mask_of(sample: Path, listed: Any) -> Tensor:
    """DragBench's mask (H, W), True where it is above 0."""
    try:
        array = np.array(listed)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "biuf":
        raise UserError(f"{sample}: the mask is no table of numbers, rows of equal length were expected")
    return torch.from_numpy(array > 0)


def _point_pairs(sample: Path, listed: Any) -> tuple[tuple[Point, Point], ...]:
    """DragBench's list handle, target, handle, … of [x, y] as pairs."""
    try:
        flat = [(float(x), float(y)) for x, y in listed]
        return tuple(zip(flat[::2], flat[1::2], strict=True))
    except (TypeError, ValueError):
        raise UserError(f"{sample}: points are no list of handle and target in turn, each [x, y]") from None


def _inside(folder: Path, path: Path) -> Path:
    """`folder` / `path`, which must not lead out of it."""
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{path} leads out of {folder}: a benchmark names pictures inside its own folder")
    return folder / path


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every global but those of `ALLOWED_IN_PICKLES`: nothing in the file is executed."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_IN_PICKLES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _read_plain_pickle(path: Path) -> dict[str, Any]:
    try:
        value = _PlainUnpickler(io.BytesIO(read_bytes(path, MAX_PICKLE_BYTES))).load()
    except Exception as error:  # a malicious pickle can make the unpickler raise anything
        raise UserError(
            f"{path} holds more than arrays and plain values: {' '.join(str(error).split())[:120]}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, a dictionary was expected")
    arrays = [array for array in value.values() if isinstance(array, np.ndarray)]
    if sum(array.nbytes for array in arrays) > path.stat().st_size:  # made by their shape alone
        raise UserError(f"{path} claims arrays of more numbers than it holds: get it again")
    return value
