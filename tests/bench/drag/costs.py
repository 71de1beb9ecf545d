"""What drags cost at the sizes of Stable Diffusion 1.5 and XL: seconds of a preview, bytes of attention that is kept.

    python -m tests.bench.drag.costs                       # a preview at 512 px, ten times; OMP_NUM_THREADS decides

No weights are needed.  The preview reads attention of SD 1.5's shapes that tells a scene's object from the rest, as
`DragSource` keeps it.  Bytes are counted: queries and keys of one prediction for a preview and for `--method pixels`,
keys and values of every inverted step for `--method latents`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.editing.drag.attention import AttentionRows, Recording, self_attention_sites
from personalize.editing.drag.config import DEFAULTS, DragSettings
from personalize.editing.drag.preview import preview_drag
from personalize.editing.drag.reading import READ_AT, DragSource
from personalize.embedded.scenes import random_scene, render
from personalize.io.images import to_pixels
from personalize.models.attention import AttentionSite, attention_sites
from personalize.models.empty import empty_model
from personalize.models.image_processor import PaddedImage
from tests.bench.drag.measures import drag_task, handle_point
from tests.bench.picture_measures import iou

FACTOR, WIDE = 8, 20  # pixels per latent cell; latent cells of the drag


@dataclass(frozen=True)
class CostBench:
    side: int = 512
    """Side of the picture in pixels."""
    repeats: int = 10
    """Number of previews; the fastest and the median are told."""
    seed: int = 0
    """Number of the scene."""


def sites_of(family: str, side: int, settings: DragSettings = DEFAULTS) -> list[AttentionSite]:
    """The sites that decide masks, for a picture of `side` pixels."""
    cells = side // FACTOR
    sites = attention_sites(empty_model(family).unet, (cells, cells))
    return self_attention_sites(sites, settings.map_places, settings.map_levels)


def head_width(family: str, site: AttentionSite) -> int:
    """d of one head of `site`."""
    attention: Any = empty_model(family).unet.get_submodule(site.name)
    return attention.to_q.out_features // site.heads


def kept_bytes(family: str, side: int, settings: DragSettings = DEFAULTS, bytes_each: int = 4) -> dict[str, int]:
    """Bytes of attention kept on the host: {"pixels": …, "latents": …}."""
    cells = side // FACTOR
    unet: Any = empty_model(family).unet

    def one_tensor(places: tuple[str, ...], levels: tuple[int, ...] | None) -> int:
        sites = self_attention_sites(attention_sites(unet, (cells, cells)), places, levels)
        widths = [unet.get_submodule(site.name).to_q.out_features for site in sites]
        return bytes_each * sum(s.height * s.width * width for s, width in zip(sites, widths, strict=True))

    inverted = round(settings.steps * replace(settings, method="latents", strength=None).sampled_share)
    return {
        "pixels": 2 * one_tensor(settings.map_places, settings.map_levels),
        "latents": 2 * inverted * one_tensor(("up",), settings.kv_levels),
    }


def separating_attention(mask: Tensor, sites: list[AttentionSite], widths: list[int], seed: int) -> Recording:
    """Queries and keys of `sites` by which the cells of `mask` (H, W) attend to one another, with noise."""
    rng, kept = torch.Generator().manual_seed(seed), Recording()
    for site, width in zip(sites, widths, strict=True):
        share = interpolate(mask[None, None].float(), (site.height, site.width), mode="area").flatten()[:, None]
        thing, rest = torch.randn(2, site.heads, 1, width, generator=rng) * 1.2
        noise = 0.3 * torch.randn(site.heads, len(share), width, generator=rng)
        features = (share * thing + (1 - share) * rest + noise)[None]
        kept[site.name, READ_AT] = (features, features)
    return kept


def run(options: CostBench) -> dict[str, Any]:
    """Preview one drag several times, and count."""
    scene = random_scene(options.seed, split="bench/drag/costs", objects=1)
    before, (mask,) = render(drag_task(scene, options.seed, 0.25).before, options.side)
    sites = sites_of("sd1", options.side)
    kept = separating_attention(
        torch.from_numpy(mask), sites, [head_width("sd1", site) for site in sites], options.seed
    )
    picture, cells = Image.fromarray(before), options.side // FACTOR
    frame = PaddedImage(picture, (options.side, options.side), to_pixels(picture), FACTOR)
    source = DragSource(frame, AttentionRows(kept, sites, (cells, cells)))
    x, y = handle_point(mask)
    target = (x + FACTOR * WIDE if x < options.side / 2 else x - FACTOR * WIDE, y)
    walls, processors, found = [], [], before
    for _ in range(options.repeats):
        began, used = time.perf_counter(), time.process_time()
        preview = preview_drag(source, [(x, y), target])
        walls.append(time.perf_counter() - began)
        processors.append(time.process_time() - used)
        found = np.asarray(preview.mask) > 0
    return {
        "threads": torch.get_num_threads(), "mask iou": iou(found, mask),
        "preview seconds": {"fastest": min(walls), "median": float(np.median(walls))},
        "preview CPU seconds": {"fastest": min(processors), "median": float(np.median(processors))},
        "kept MB, SD 1.5 at 512 px": {name: round(count / 1e6) for name, count in kept_bytes("sd1", 512).items()},
        "kept MB, SDXL at 1024 px": {name: round(count / 1e6) for name, count in kept_bytes("sdxl", 1024).items()},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(CostBench, config=(tyro.conf.OmitArgPrefixes,))), indent=1))
