"""The networks that edits are measured with: CLIP, vision transformers and LPIPS, loaded frozen.

Each is named by the user: a folder, a hub id, or a file. One that cannot be had raises `Unavailable` with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from personalize.errors import UserError, first_line
from personalize.io.pickles import read_any
from personalize.io.plain_files import require_plain_tree
from personalize.models.config import safetensors_alone


class Unavailable(UserError):
    """A metric that cannot be measured, or a network that cannot be loaded; the message says why."""


def load_clip(network: str | Path | None, device: Any = "cpu") -> tuple[Any, Any]:
    """The frozen CLIPModel in a folder or on the hub, in fp32, and its processor.

    Raises:
        Unavailable: none is given, or it cannot be loaded.
    """
    from transformers import CLIPModel, CLIPProcessor

    place = _given("clip_model", network, "openai/clip-vit-large-patch14")
    return _load_network("clip_model", CLIPModel, place, device), _load("clip_model", CLIPProcessor, place)


def load_vit(option: str, network: str | Path | None, device: Any = "cpu") -> Any:
    """The frozen vision transformer (DINO, DINOv2) that `--option` names: a folder or hub id, in fp32.

    Raises:
        Unavailable: none is given, or it cannot be loaded.
    """
    from transformers import AutoModel

    return _load_network(option, AutoModel, _given(option, network, "facebook/dino-vitb8"), device)


def load_vit_processor(option: str, network: str | Path) -> Any:
    """The image processor beside the vision transformer that `--option` names."""
    from transformers import AutoImageProcessor

    return _load(option, AutoImageProcessor, str(network))


def load_lpips(net: str, device: Any = "cpu", *, backbone: str | Path | None = None) -> Any:
    """The frozen LPIPS network on "alex", "vgg" or "squeeze", for pictures in [−1, 1].

    torchvision downloads the backbone's weights of the first two; those of "squeeze" are read from the file `backbone`.

    Raises:
        Unavailable: the package lpips is not installed, or the backbone is not given, cannot be had, or is another.
    """
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Unavailable("LPIPS needs the package lpips, which is not installed: pip install 'personalize[metrics]'"
                          ) from None  # fmt: skip
    if net == "squeeze":
        if backbone is None:
            raise Unavailable(
                "no backbone is given: name the file of torchvision's squeezenet1_1 with --lpips_backbone"
            )
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        _load_backbone(network, backbone)
    else:
        try:
            network = lpips.LPIPS(net=net, verbose=False)
        except (OSError, RuntimeError) as error:  # the download failed
            raise Unavailable(f"LPIPS ({net}) cannot be loaded: {first_line(error)}") from None
    return network.eval().requires_grad_(False).to(device)


def _load_backbone(network: Any, path: str | Path) -> None:
    """Copy torchvision's `features.N.…` from the file `path` into the slices of LPIPS's backbone."""
    try:
        state = read_any(path, allow_pickle=True).tensors
    except UserError as error:
        raise Unavailable(str(error)) from None
    own = {name.partition(".")[2]: name for name in network.net.state_dict()}
    weights = {own[key]: tensor for name, tensor in state.items() if (key := name.removeprefix("features.")) in own}
    if set(weights) != set(own.values()):
        raise Unavailable(f"{path} is not torchvision's squeezenet1_1: it lacks {sorted(set(own) - set(state))[:1]}")
    network.net.load_state_dict(weights)


def _given(option: str, network: str | Path | None, example: str) -> str:
    if network is None:
        raise Unavailable(f"no network is given: name a folder or hub id with --{option}, e.g. {example}")
    return str(network)


def _load_network(option: str, kind: Any, place: str, device: Any) -> Any:
    safe = safetensors_alone(place)
    return _load(option, kind, place, dtype=torch.float32, use_safetensors=safe).eval().requires_grad_(False).to(device)


def _load(option: str, kind: Any, place: str, **settings: Any) -> Any:
    """`kind.from_pretrained(place)`; `Unavailable` in one line if that fails."""
    require_plain_tree(place)
    try:
        return kind.from_pretrained(place, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise Unavailable(
            f"--{option} {place} cannot be loaded: {first_line(error)}; give a folder or hub id with such a model"
        ) from None
