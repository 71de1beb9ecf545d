"""A LoRA file for a diffusion transformer, of any program, as one LoRA by diffusers' names of layers.

A stem is the part of a key that names the layer: "lora_unet_double_blocks_0_img_attn_qkv" of
"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from personalize.errors import UserError
from personalize.formats.algorithms import NEEDED, algorithm_of, require_no_new_weight
from personalize.formats.diffusion_transformers.factors import Pair, halves_swapped, outputs_of, split
from personalize.formats.diffusion_transformers.families import FAMILIES
from personalize.formats.diffusion_transformers.names import Layer, spellings, stem_of
from personalize.formats.diffusion_transformers.skeletons import models, shapes_of
from personalize.formats.layer_kinds import with_kernel
from personalize.formats.layer_sizes import SMALL, products
from personalize.formats.layouts import MAX_KEY_LENGTH, role_of
from personalize.formats.peft_settings import PeftSettings, settings_of, strength
from personalize.formats.weight_changes import NEED_THE_BASE, NOT_A_MATRIX, lora_pair
from personalize.io.tensor_files import TensorFile

BIASES = {"diff_b", "b_norm", "lora_B.bias"}


@dataclass(frozen=True)
class SortedFile:
    """The tensors of a file by the stem of their key, without a look at their numbers.

    parts: by stem, the tensors by role.  schemes: by stem, the naming scheme.  unknown: keys of no layer.  twice: keys
    of a tensor that another key has given already.
    """

    family: str
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    schemes: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def layer(self, stem: str) -> Layer:
        """The layer that a stem of this file names."""
        return spellings(self.family)[stem][0]

    @property
    def names(self) -> list[str]:
        """The layers of diffusers that the file names."""
        return sorted({name for stem in self.parts for name in self.layer(stem).layers})


@dataclass(frozen=True)
class TransformerLora:
    """A LoRA by diffusers' names of layers, "transformer.transformer_blocks.0.attn.to_q": ΔW = B A.

    left: layers with a change that no LoRA holds (of a bias, or of a norm).
    """

    family: str
    pairs: dict[str, Pair]
    left: list[str]
    metadata: dict[str, str]


def identify(content: TensorFile, family: str | None = None) -> tuple[str, str] | None:
    """The family of a file for a diffusion transformer and the evidence for it; None if it is for none of them.

    The names decide, then the shapes, then what the metadata say.  `family` is taken in place of the file's own if it
    has at least one of the layers.
    """
    found = [stem_of(key) for key in content.tensors if len(key) <= MAX_KEY_LENGTH]
    stems = {one[0] for one in found if one is not None}
    hits = {name: _known_layers(stems, name) for name in FAMILIES}
    candidates = [name for name in FAMILIES if hits[name]]
    if family in candidates:
        return family, "it was said"
    if not candidates:
        return None
    stated = " ".join(content.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture",
                                                                 "ss_network_module")).lower()  # fmt: skip
    fits = {name: (hits[name], _fitting(content, name), any(word in stated for word in FAMILIES[name].stated))
            for name in candidates}  # fmt: skip
    best = max(candidates, key=fits.__getitem__)
    rivals = [name for name in candidates if name != best and fits[name][:2] == fits[best][:2]]
    if equal := [FAMILIES[name].title for name in rivals if fits[name] == fits[best]]:
        return best, f"its names and shapes, which {' and '.join(equal)} has too (convert --family says which)"
    return best, "its metadata say so" if rivals else "the names and shapes of its layers"


def _known_layers(stems: set[str], family: str) -> int:
    """How many of the stems name a layer of the family's transformer; text encoders are those of other families too."""
    known = spellings(family)
    return sum(known[stem][0].layers[0].startswith("transformer.") for stem in stems if stem in known)


def _fitting(content: TensorFile, family: str) -> int:
    """The number of layers whose ΔW has the shape of one of the family's models."""
    file = sort(content, family)
    return len(file.parts) - len(model_of(file)[1])


def model_of(file: SortedFile) -> tuple[str | None, list[str]]:
    """The released model whose layers have the shapes of all of the file's, and the layers that fit none.

    The model is None where none fits all of them, or where the file has no LoRA whose shape could tell them apart.
    """
    fits = {title: [stem for stem, parts in file.parts.items() if not _fits(file.layer(stem), shapes, parts)]
            for title, shapes in models(file.family).items()}  # fmt: skip
    best = min(fits, key=lambda title: len(fits[title]))
    has_shapes = any("A" in parts and "B" in parts for parts in file.parts.values())
    return (best if has_shapes and not fits[best] else None), fits[best]


def _fits(layer: Layer, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Tensor]) -> bool:
    """True if the layer is in a model of these shapes, and its factors make a ΔW of its shape, or are none of LoRA."""
    own = [shapes[name] for name in layer.layers if name in shapes]
    if not own:
        return False
    if not {"A", "B"} <= set(parts):
        return True
    if min(parts["A"].ndim, parts["B"].ndim) < 2:
        return False
    return (sum(shape[0] for shape in own), math.prod(own[0][1:])) == (len(parts["B"]), math.prod(parts["A"].shape[1:]))


def sort(content: TensorFile, family: str) -> SortedFile:
    """Sort the tensors of a file by layer and role; raises nothing, whatever the keys are."""
    file, known = SortedFile(family), spellings(family)
    for key in sorted(content.tensors):
        found = stem_of(key) if len(key) <= MAX_KEY_LENGTH else None
        if found is None or found[0] not in known:
            file.unknown.append(key)
            continue
        stem, _, role, folder = found
        role = role_of(role, content.tensors[key])
        parts = file.parts.setdefault(stem, {})
        if role in parts:
            file.twice.append(key)
            continue
        parts[role] = content.tensors[key]
        file.schemes[stem] = "PEFT folder" if folder else known[stem][1]
    return file


def read(path: str | Path, content: TensorFile, family: str) -> TransformerLora:
    """The LoRA of a file, with all strengths multiplied into B and fused projections split, exactly.

    Raises:
        UserError: factors that are missing, do not fit, are not finite or multiply out to more than their layer;
            algorithms that change the base's own weights; keys that belong to no layer of the family.
    """
    file, settings = sort(content, family), settings_of(content.metadata, path)
    if file.unknown or file.twice:
        key = (file.unknown or file.twice)[0][:120]
        what = "belongs to no layer of" if file.unknown else "gives a tensor a second time, for"
        raise UserError(f"{path}: {key!r} {what} {FAMILIES[family].title}; `personalize inspect` lists such keys")
    pairs: dict[str, Pair] = {}
    left: list[str] = []
    for stem, parts in file.parts.items():
        layer = file.layer(stem)
        left += [layer.path] if BIASES & set(parts) or algorithm_of(parts) in NOT_A_MATRIX else []
        try:
            made = layer_pairs(layer, family, parts, settings)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if twice := [name for name in made if name in pairs]:
            raise UserError(f"{path} changes layer {twice[0]} twice, once as {stem[:120]!r}: which is meant?")
        pairs |= made
    if not pairs:
        raise UserError(f"{path} holds no change of {FAMILIES[family].title} that a LoRA could hold")
    return TransformerLora(family, pairs, left, content.metadata)


def layer_pairs(
    layer: Layer, family: str, parts: Mapping[str, Tensor], settings: Mapping[str, PeftSettings]
) -> dict[str, Pair]:
    """A and B with ΔW = B A for each layer of diffusers that a layer of a file stands for; none for biases alone.

    Raises:
        UserError: see `read`.
    """
    require_no_new_weight(f"layer {layer.path}", parts)
    matrices = {role: tensor for role, tensor in parts.items() if role not in BIASES}
    algorithm = algorithm_of(matrices)
    if not set(matrices) - {"alpha"} or algorithm in NOT_A_MATRIX:
        return {}
    _require_readable(layer, family, matrices, algorithm)
    kernel = shapes_of(family, layer.layers[0])[0][2:]
    a, b = lora_pair(layer.path, matrices, (), largest(layer, family))
    a, b = with_kernel(a.float(), kernel), with_kernel(b.float(), tuple(1 for _ in kernel))
    if not a.ndim == b.ndim == 2 + len(kernel) or len(a) != b.shape[1]:
        raise UserError(f"layer {layer.path}: A {tuple(a.shape)} and B {tuple(b.shape)} make no pair")
    b = b * strength(layer.layers[0], matrices, settings)
    pair = halves_swapped((a, b)) if layer.swapped else (a, b)
    if len(layer.layers) == 1:
        return {layer.layers[0]: pair}
    shapes = [shapes_of(family, name)[0] for name in layer.layers]
    parted = split(pair, outputs_of(shapes, a[0].numel(), len(b), layer.path))
    made = {name: one for name, one in zip(layer.layers, parted, strict=True) if len(one[0])}
    return made or dict(zip(layer.layers, [(a[:1], part.new_zeros(len(part), 1)) for _, part in parted], strict=True))


def largest(layer: Layer, family: str) -> int:
    """The most numbers that the layer's ΔW has in a model of the family."""
    shapes = [shapes_of(family, name)[0] for name in layer.layers]
    return max(SMALL, sum(math.prod(shape) for shape in shapes))


def _require_readable(layer: Layer, family: str, parts: Mapping[str, Tensor], algorithm: str) -> None:
    """UserError unless the layer's factors are complete, finite, of an algorithm that a LoRA can hold, and fit."""
    if algorithm in NEED_THE_BASE:
        raise UserError(f"layer {layer.path} is of {algorithm}, which changes the base's own weights: no LoRA holds it")
    if "mid" in parts:
        raise UserError(f"layer {layer.path} has a Tucker core (lora_mid), which linear layers have no use for")
    missing = [choice for choice in NEEDED.get(algorithm, ()) if not any(set(parts) >= one for one in choice)]
    if missing:
        lacking = " and ".join(sorted(missing[0][0]))
        raise UserError(f"layer {layer.path} of {algorithm} lacks {lacking}: get the file again")
    if odd := [role for role, tensor in parts.items() if not bool(tensor.float().isfinite().all())]:
        raise UserError(f"layer {layer.path} holds a number that is not finite (in {odd[0]}): train it again")
    if empty := [role for role, tensor in parts.items() if 0 in tensor.shape]:
        raise UserError(f"layer {layer.path} has a side of 0 in {empty[0]}: the file is damaged or made to harm")
    shapes = [shapes_of(family, name)[0] for name in layer.layers]
    limits = (sum(shape[0] for shape in shapes), math.prod(shapes[0][1:]))
    for what, sides in products(parts):
        if any(side > limit for side, limit in zip(sides, limits, strict=True)):
            raise UserError(f"layer {layer.path} makes a change of {sides[0]}×{sides[1]} of {what}, it has at most "
                            f"{limits[0]}×{limits[1]} in {FAMILIES[family].title}")  # fmt: skip


def scheme_counts(file: SortedFile) -> Counter[str]:
    """How many layers of the file are named in each scheme."""
    return Counter(file.schemes.values())
