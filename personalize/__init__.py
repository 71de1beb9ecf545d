"""Learn one subject from a few pictures with Stable Diffusion, and edit pictures by text.

    personalize.Editor             open an adapter folder and edit with it
    personalize.attach             use an adapter folder inside your own diffusers pipeline
    personalize.Adapter            what a trainer produces: read, write and apply it
    personalize.StableDiffusion    one handle for SD 1.x, SD 2.x and SDXL

Importing this package imports no torch; that happens when one of these names is first used.

Letters for shapes in all docstrings: b batch, c latent channels, h w latent size, n heads, q image positions,
l text tokens, d embedding width, t timesteps.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from personalize.adapters.adapter import Adapter as Adapter
    from personalize.editing.attach import attach as attach
    from personalize.editing.editor import Editor as Editor
    from personalize.models.stable_diffusion import StableDiffusion as StableDiffusion

__version__ = "0.1.0"

_MODULES = {  # the module of each public name; a module of the same name would hide it
    "Adapter": "personalize.adapters.adapter",
    "Editor": "personalize.editing.editor",
    "StableDiffusion": "personalize.models.stable_diffusion",
    "attach": "personalize.editing.attach",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'personalize' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
