"""Personalise Stable Diffusion with one picture, and edit that picture by text.

    personalize.Editor             open an adapter folder and edit with it
    personalize.attach             use an adapter folder inside your own diffusers pipeline
    personalize.Adapter            what a trainer produces: read, write and apply it
    personalize.StableDiffusion    one handle for SD 1.x, SD 2.x and SDXL

Importing this package does nothing but define names: torch is imported with the first of them that is used.

Axes, everywhere: b batch, c latent channels, h w latent size, n heads, q image positions, l text tokens,
d embedding width, t timesteps.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from personalize.adapter import Adapter as Adapter
    from personalize.attachment import attach as attach
    from personalize.editor import Editor as Editor
    from personalize.model import StableDiffusion as StableDiffusion

__version__ = "0.1.0"

_HOMES = {  # the module of each public name; none may be called like the name itself, which would hide it
    "Adapter": "personalize.adapter",
    "Editor": "personalize.editor",
    "StableDiffusion": "personalize.model",
    "attach": "personalize.attachment",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'personalize' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
