"""Train one adapter for each row of a table, on one base model that stays loaded.

The rows are divided among the processes of the launch, and each process trains its own.  The outcome of a row is one
JSON line, appended and synced when the row is finished, so that a run killed at any moment can be started again and
repeats no finished row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from accelerate import Accelerator

from personalize.adapters.adapter import Adapter
from personalize.adapters.adapter_files import check_target
from personalize.errors import UserError, first_line
from personalize.io.progress import ticked
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.batched_adapters import learn_batched
from personalize.training.catalogue_results import (
    COLUMNS,
    DONE,
    FAILED,
    RESULTS,
    Results,
    claimed,
    key_of,
    merged,
    outcome,
    own_results,
    print_outcome,
)
from personalize.training.catalogue_rows import Catalogue, digest_of, group_rows, is_finished, row_pictures
from personalize.training.catalogue_table import Item
from personalize.training.data.buckets import FittedImage, fit
from personalize.training.data.class_images import class_images
from personalize.training.data.images import load_pictures
from personalize.training.data.samples import SampleShard
from personalize.training.distributed import ProcessGroup
from personalize.training.single_image import check_sizes, planned_updates, single_image_run
from personalize.training.validation import save_with_preview

PAUSE = 1.0  # seconds between two looks at rows that another catalogue trains


def learn_row(model: StableDiffusion, item: Item, catalogue: Catalogue) -> dict[str, Any]:
    """Train one row and save its adapter; any exception becomes the row's outcome, in one line.

    Only what stops the program (an interrupt) is raised.
    """
    started = time.monotonic()
    row = _outcome(item, catalogue, lambda: _train_row(model, item, catalogue))
    return row | {"seconds": round(time.monotonic() - started, 1)}


def _outcome(item: Item, catalogue: Catalogue, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The outcome of a row that `call` trains or saves."""
    digest = digest_of(item, catalogue)
    try:
        return outcome(item.line, item.name, DONE, digest=digest, **call())
    except UserError as error:
        return outcome(item.line, item.name, FAILED, digest=digest, reason=str(error))
    except Exception as error:  # a bug or a device out of memory on one row must not cost the others
        first = (str(error) or "no message").splitlines()[0]
        return outcome(item.line, item.name, FAILED, digest=digest, reason=f"{type(error).__name__}: {first}")


def learn_rows(model: StableDiffusion, items: Sequence[Item], catalogue: Catalogue) -> Iterator[dict[str, Any]]:
    """Train rows together, in one batch; if that fails, one at a time, so that each bad row has its own outcome.

    Each outcome is yielded as soon as the row's adapter is saved.
    """
    started, together = time.monotonic(), []
    if len(items) > 1:
        try:
            together = _train_rows_together(model, items, catalogue)
        except Exception as error:
            lines = ", ".join(str(item.line) for item in items)  # rows of another kind may lie between them
            print(f"lines {lines} are learned one at a time: {first_line(error)}", flush=True)
    seconds = round((time.monotonic() - started) / len(items), 1)
    for item, (pictures, adapter, loss) in zip(items, together, strict=False):
        save = partial(_save, model, item, catalogue, pictures, adapter, loss)
        yield _outcome(item, catalogue, save) | {"seconds": seconds}
    for item in items if not together else ():
        yield learn_row(model, item, catalogue)


def _train_row(model: StableDiffusion, item: Item, catalogue: Catalogue) -> dict[str, Any]:
    pictures, captions = _load_row(model, item, catalogue)
    config, loss = catalogue.config_of(item), float("nan")
    sources, accelerator = catalogue.sources_of(item), _accelerator(model, catalogue)
    planned_updates(config, len(pictures), SampleShard.of(config))  # what cannot work is said before pictures are drawn
    check_sizes(config, pictures)
    classes = class_images(sources, model, sources.class_prompt or "", pictures[0].size, accelerator)
    with single_image_run(model, pictures, captions, config, class_images=classes, accelerator=accelerator) as run:
        for report in run.steps():
            loss = float(report.losses["loss"])
        adapter = run.adapter()
    return _save(model, item, catalogue, pictures, adapter, loss)


def _train_rows_together(
    model: StableDiffusion, items: Sequence[Item], catalogue: Catalogue
) -> list[tuple[list[FittedImage], Adapter, float]]:
    """The pictures, the adapter and the last loss of each row; nothing is saved yet."""
    pictures, config = [_load_row(model, item, catalogue) for item in items], catalogue.config_of(items[0])
    results = learn_batched(model, pictures, config, accelerator=_accelerator(model, catalogue))
    return [(images, *result) for (images, _), result in zip(pictures, results, strict=True)]


def _load_row(model: StableDiffusion, item: Item, catalogue: Catalogue) -> tuple[list[FittedImage], list[str]]:
    """The row's pictures in their training sizes, and their captions."""
    check_target(catalogue.output_dir / item.name)
    sources, resolution = catalogue.sources_of(item), catalogue.resolution or model.resolution
    images = load_pictures(row_pictures(sources), sources)
    fitted = [fit(image.image, image.mask, resolution, 8 * model.factor) for image in images]
    return fitted, [image.caption for image in images]


def _accelerator(model: StableDiffusion, catalogue: Catalogue) -> Accelerator:
    return Accelerator(cpu=model.device.type == "cpu", mixed_precision=catalogue.mixed_precision)


def _save(
    model: StableDiffusion, item: Item, catalogue: Catalogue, pictures: Sequence[FittedImage], adapter: Adapter,
    loss: float,
) -> dict[str, Any]:  # fmt: skip
    """Save a row's adapter, with a preview on its card; returns the details for the row's outcome."""
    folder, seed = catalogue.output_dir / item.name, catalogue.config_of(item).seed
    figures = save_with_preview(model, adapter, pictures[0], folder, steps=catalogue.preview_steps, seed=seed)
    details = {"caption": adapter.info["caption"], "updates": adapter.info["updates"], "loss": round(loss, 5)}
    details |= {"pictures": len(pictures)}
    return {"adapter": str(folder), **details, **{key: figures[key] for key in figures if key in COLUMNS}}


def learn_catalogue(
    items: Sequence[Item], refused: Sequence[Mapping[str, Any]], catalogue: Catalogue,
    load: Callable[[], StableDiffusion], processes: ProcessGroup,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train every row that is not finished yet; returns the outcomes of all rows, from all processes.

    Another catalogue may run on the same output: each row is trained by one of them, and both wait for all.  The
    processes may have no disk in common: a row is finished if one of them has its adapter.

    refused: the outcomes of rows that cannot be trained on, see `read_items`; load: loads the base model, and is called
    only if this process has rows to train.
    """
    started = time.time()
    with own_results(catalogue.output_dir / RESULTS, processes.index) as results:
        known = merged(processes.all_gather(results.rows()))
        finished = processes.all_gather({item.name for item in items if is_finished(item, known, catalogue)})
        pending = [item for item in items if item.name not in set().union(*finished)]
        for row in refused if processes.index == 0 else ():
            before = known.get(key_of(row), {})
            if {**before, **row} != before:  # recorded once
                results.add(row)
            print_outcome(row)
        if processes.index == 0 and len(pending) < len(items):
            print(f"{len(items) - len(pending)} of {len(items)} rows are finished already", flush=True)
        own = pending[processes.index :: processes.count]
        print("".join(f"line {item.line}: {remark}\n" for item in own for remark in item.remarks), end="", flush=True)
        model = load() if own else None
        groups = _groups(model, own, catalogue)
        while groups:
            assert model is not None
            tried = ticked(groups, "Rows" if catalogue.adapters_per_batch == 1 else "Groups of rows")
            left = [_learn_group(model, group, catalogue, results, started) for group in tried]
            if sum(map(len, left)) == sum(map(len, groups)):  # another catalogue trains all that is left
                time.sleep(PAUSE)
            groups = [group for group in left if group]
        outcomes = merged(processes.all_gather(results.rows()))
    untried = {item.name for item in pending if outcomes.get(item.name) == known.get(item.name)}
    lost = {"status": FAILED, "reason": "no process of this launch has an outcome of this row: start again"}
    learned = [
        {"name": item.name, **(lost if item.name in untried else outcomes[item.name]), "line": item.line}
        for item in items
    ]
    return learned + [dict(outcomes.get(key_of(row), row)) for row in refused]


def _learn_group(
    model: StableDiffusion, group: Sequence[Item], catalogue: Catalogue, results: Results, started: float
) -> list[Item]:
    """Train the rows of `group` that no other catalogue trains or has trained since; returns those that one trains."""
    with ExitStack() as stack:
        free = [item for item in group if stack.enter_context(claimed(results.folder, item.name))]
        known = results.rows()
        own = [item for item in free if known.get(item.name, {}).get("time", 0) < started]
        for row in learn_rows(model, own, catalogue) if own else ():
            results.add(row)
            print_outcome(row)
    return [item for item in group if item not in free]


def _groups(model: StableDiffusion | None, items: Sequence[Item], catalogue: Catalogue) -> list[list[Item]]:
    if model is None or catalogue.adapters_per_batch == 1:
        return [[item] for item in items]
    return group_rows(items, catalogue, catalogue.resolution or model.resolution, 8 * model.factor)
