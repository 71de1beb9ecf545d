"""Personalise Stable Diffusion with one picture, and edit that picture by text.

    personalize.Editor             open an adapter folder and edit with it; edit photos and drag points
    personalize.attach             use an adapter folder inside your own diffusers pipeline
    personalize.Adapter            what a trainer produces: read, write and apply it
    personalize.StableDiffusion    one handle for SD 1.x, SD 2.x and SDXL
    personalize.learn              train an adapter on one picture; multi_concept_run and learn_catalogue: on more

`_MODULES` lists every public name and where it is defined. Importing this package does nothing but define names: torch
is imported with the first of them that is used.

Axes, everywhere: b batch, c latent channels, h w latent size, n heads, q image positions, l text tokens,
d embedding width, t timesteps.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from personalize.adapters.adapter import Adapter as Adapter
    from personalize.adapters.subjects import Subject as Subject
    from personalize.editing.attach import attach as attach
    from personalize.editing.config import EditStrengths as EditStrengths
    from personalize.editing.config import Sampling as Sampling
    from personalize.editing.drag.config import DragSettings as DragSettings
    from personalize.editing.editor import Editor as Editor
    from personalize.editing.photo_settings import PhotoSettings as PhotoSettings
    from personalize.editing.real_image_settings import EditRequest as EditRequest
    from personalize.embedded.samples import bundled as bundled
    from personalize.embedded.scenes import Scene as Scene
    from personalize.embedded.scenes import SceneObject as SceneObject
    from personalize.embedded.scenes import render as render
    from personalize.errors import UserError as UserError
    from personalize.io.figures import grid as grid
    from personalize.io.image_files import load_image as load_image
    from personalize.io.images import fitted_pixels as fitted_pixels
    from personalize.models.stable_diffusion import EMBEDDED as EMBEDDED
    from personalize.models.stable_diffusion import StableDiffusion as StableDiffusion
    from personalize.training.catalogue import learn_catalogue as learn_catalogue
    from personalize.training.catalogue_results import write_table as write_table
    from personalize.training.catalogue_rows import Catalogue as Catalogue
    from personalize.training.catalogue_table import read_items as read_items
    from personalize.training.config import MultiConceptConfig as MultiConceptConfig
    from personalize.training.config import SingleImageConfig as SingleImageConfig
    from personalize.training.data.buckets import fit as fit
    from personalize.training.data.concepts import ConceptPicture as ConceptPicture
    from personalize.training.distributed import ProcessGroup as ProcessGroup
    from personalize.training.multi_concept import multi_concept_run as multi_concept_run
    from personalize.training.single_image import learn as learn

__version__ = "0.1.0"

_MODULES = {  # the module of each public name; a module of the same name would hide it
    "Adapter": "personalize.adapters.adapter",
    "Catalogue": "personalize.training.catalogue_rows",
    "ConceptPicture": "personalize.training.data.concepts",
    "DragSettings": "personalize.editing.drag.config",
    "EMBEDDED": "personalize.models.stable_diffusion",
    "EditRequest": "personalize.editing.real_image_settings",
    "EditStrengths": "personalize.editing.config",
    "Editor": "personalize.editing.editor",
    "MultiConceptConfig": "personalize.training.config",
    "PhotoSettings": "personalize.editing.photo_settings",
    "ProcessGroup": "personalize.training.distributed",
    "Sampling": "personalize.editing.config",
    "Scene": "personalize.embedded.scenes",
    "SceneObject": "personalize.embedded.scenes",
    "SingleImageConfig": "personalize.training.config",
    "StableDiffusion": "personalize.models.stable_diffusion",
    "Subject": "personalize.adapters.subjects",
    "UserError": "personalize.errors",
    "attach": "personalize.editing.attach",
    "bundled": "personalize.embedded.samples",
    "fit": "personalize.training.data.buckets",
    "fitted_pixels": "personalize.io.images",
    "grid": "personalize.io.figures",
    "learn": "personalize.training.single_image",
    "learn_catalogue": "personalize.training.catalogue",
    "load_image": "personalize.io.image_files",
    "multi_concept_run": "personalize.training.multi_concept",
    "read_items": "personalize.training.catalogue_table",
    "render": "personalize.embedded.scenes",
    "write_table": "personalize.training.catalogue_results",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'personalize' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
