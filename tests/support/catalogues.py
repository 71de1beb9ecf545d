"""Catalogues of a few rows, learned in two samples each."""

from __future__ import annotations

import json

import pytest

from personalize.formats.adapter_folders import MANIFEST
from personalize.training import catalogue
from personalize.training.catalogue import Catalogue, learn_catalogue
from personalize.training.catalogue_table import read_items
from personalize.training.config import SingleImageConfig
from personalize.training.distributed import ProcessGroup
from tests.support.tiny import tiny

SHORT = SingleImageConfig(rank=2, targets="attention", max_train_samples=2, samples_per_update=1)


def table(shop, *lines, header="image,caption,name"):
    path = shop / "items.csv"
    path.write_text("\n".join([header, *lines]), encoding="utf-8")
    return path


def learned(shop, path, model=None, load=None):
    """Every row's status by name, after a run."""
    items, refused = read_items(path, SHORT)
    shared = Catalogue(shop / "out", SHORT)
    rows = learn_catalogue(items, refused, shared, load or (lambda: model or tiny("sd1")), ProcessGroup())
    return {row["name"]: row for row in rows}


@pytest.fixture
def pretended(monkeypatch):
    """Rows are learned in no time, and leave but a manifest with their caption; for what is about the rows alone."""

    def train_row(model, item, shared):
        folder = shared.output_dir / item.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps({"caption": item.sources.caption}))
        return {"adapter": str(folder), "caption": item.sources.caption, "updates": 1, "loss": 0.0}

    monkeypatch.setattr(catalogue, "_train_row", train_row)
