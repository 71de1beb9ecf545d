"""The adapter: the result of training, as a value and as a folder whose files other programs can use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from personalize.adapters.adapter_files import (
    CARD,
    SCHEMA,
    WAIT,
    check_manifest,
    check_source,
    check_target,
    kohya_file_name,
    picture_name,
    read_token_files,
    saved_files,
    tensor_digests,
)
from personalize.adapters.captions import caption_info, captions_of, find_caption_number, nearest_caption, source_row
from personalize.adapters.lora import PREFIX, load_lora, remove_lora
from personalize.adapters.model_card import model_card
from personalize.adapters.text_encoder_lora import other_changes, text_lora
from personalize.adapters.timestep_mask import timestep_mask
from personalize.errors import UserError
from personalize.formats import lora_files, textual_inversion_files, verification
from personalize.formats.adapter_folders import DIFFUSERS_FILE, MANIFEST, SOURCE_FILE, is_foreign_folder, no_adapter
from personalize.formats.adapter_source import fetched, open_adapter
from personalize.formats.foreign_files import read_adapter_file
from personalize.formats.integrity import FILE_HASHES, OWN_HASH, sealed
from personalize.formats.reader_keys import ReaderKeys
from personalize.formats.timestep_rank import AnyTimestepRank, rule_header, rule_of
from personalize.formats.verification_report import VerificationReport
from personalize.io.atomic import folder_path, remove_stale, write_folder
from personalize.io.figures import png
from personalize.io.json_files import read_json, utf8
from personalize.io.locks import folder_lock
from personalize.io.provenance import GENERATED
from personalize.io.tensor_files import read_tensors, tensor_bytes
from personalize.models.config import FAMILIES
from personalize.models.ranges import check_number
from personalize.models.stable_diffusion import StableDiffusion

NOT_DRAWN = {"source", "attention"}  # pictures of a folder that no model made: a photo, maps over it


@dataclass(frozen=True)
class Adapter:
    """LoRA weights, the fitted source embedding, learned tokens, and information about them.

    lora: "<component>.<path>.lora_A.weight" (rank, in[, k, k]) and "….lora_B.weight" (out, rank[, 1, 1]);
        ΔW = (alpha / rank) · B A.  Empty for learned tokens alone.
    source: the fitted source embedding, "embeds" (p, l, d) and, for SDXL, "pooled" (p, e), with a row for each of the p
        captions; None for an adapter that was trained to work without it (`standalone`) or comes from another program.
    info: values that JSON can hold.  Used here: `base` (name, family, sha256, prediction_type), `caption`, `captions`
        and `caption_counts`, the pictures of each (if there are several; `caption` is the first), `size` (H, W) and
        `caption_sizes` (if they differ), `config` (the options of training), `date` (if given), `standalone`,
        `standalone_gap_db`, `person`, `license`, `timestep_rank`, `header` (metadata of the file it was read from).
        Any other key is kept: `targets`, `versions`, `edits`, ….
    concepts: learned tokens, token → "text_encoder" (n, d) and, for SDXL, "text_encoder_2" (n, d₂).
    others: modules of other algorithms (LoHa, DoRA, changed biases, …) in a file of another program, their tensors by
        role; see `weight_changes`.  They are applied and merged, but not saved: `as_lora` makes LoRAs of them.
    """

    lora: Mapping[str, Tensor]
    rank: int
    alpha: float
    source: Mapping[str, Tensor] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    concepts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """UserError unless `rank` is a whole number from 1 and `alpha` a finite number."""
        check_number("rank", self.rank, kind=int)
        check_number("alpha", self.alpha, (-(10**6), 10**6))  # of LoRA files: 1 to some thousands, rarely below 0

    @property
    def base(self) -> dict[str, Any]:
        """What is recorded about the base model it was trained on: name, family, sha256, prediction_type."""
        return dict(self.info.get("base") or {})

    @property
    def known_family(self) -> str | None:
        """The base model's family as recorded, or else by the tensors' shapes; None if nothing tells."""
        return self.base.get("family") or lora_files.family_of(self.lora)

    @property
    def family(self) -> str:
        """The base model's family, "sd1", "sd2" or "sdxl"; UserError if nothing tells it."""
        family = self.known_family
        if family not in FAMILIES:
            named = self.info.get("imported") or "the adapter"
            said = "does not tell the family of its base" if family is None else f"is for the family {family!r}"
            raise UserError(f"{named} {said}: say --family sd1, sd2 or sdxl")
        return family

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions of the training pictures, one for each row of the source embedding; ("",) if none is known."""
        return captions_of(self.info, self.source)

    def starting_from(self, caption: str | None = None, *, prompt: str = "") -> Adapter:
        """This adapter with one caption and its source embedding: `caption`, or the nearest to `prompt`.

        Raises:
            UserError: it has no such caption.
        """
        captions = self.captions
        if len(captions) == 1 and caption is None:
            return self
        number = nearest_caption(prompt, captions) if caption is None else find_caption_number(caption, captions)
        info = caption_info(self.info, captions, number)
        return replace(self, source=None if self.source is None else source_row(self.source, number), info=info)

    @property
    def changes_unet(self) -> bool:
        """True if a part of the LoRA is for the UNet."""
        return any(key.startswith(PREFIX) for key in self.lora)

    @property
    def timestep_rank(self) -> AnyTimestepRank | None:
        """The rule by which components take part at high noise (`formats.timestep_rank`); None if all always do."""
        return rule_of(self.info)

    def save(
        self,
        folder: str | Path,
        *,
        pictures: Mapping[str, Image.Image] | None = None,
        kohya_dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write the adapter folder atomically, after its files were read back and every ΔW in them was verified.

        The files of an older adapter in `folder` are replaced; those of another origin stay.  Equal adapters give equal
        bytes.  `kohya_dtype` is the precision of the file in kohya's names, torch.float32 or torch.float16.

        Raises:
            UserError: the disk is full, the folder cannot be replaced, weights are not finite or do not fit
                `kohya_dtype`, or the files do not verify.  What was there before is unchanged.
        """
        folder = folder_path(folder)
        check_target(folder)
        files = self.folder_files(folder.name, pictures or {}, kohya_dtype)

        def check(written: Path) -> None:
            self.check_files(written, folder.name)

        with folder_lock(folder, "writing", wait=WAIT):
            return write_folder(folder, files, check=check, remove=saved_files(folder))

    @staticmethod
    def load(folder: str | Path, *, family: str | None = None) -> Adapter:
        """Read an adapter folder, or a LoRA or textual-inversion file or folder of any program.

        From a file come no source embedding and no caption.  Its metadata `ss_*` and `modelspec.*` are kept in
        `info["header"]`, and what they say of the base model in `info["base"]`.  A learned token has the file's own
        word, or else `<file name>`.  `family` is that of the base model, for files that do not tell it.

        Raises:
            UserError: nothing is there, it is no adapter, or a file is missing, damaged, a pickle or not as saved.
        """
        folder = fetched(folder)
        if folder.is_file() or is_foreign_folder(folder):
            return _load_file(folder, family)
        if not folder.exists():
            raise UserError(f"{folder} does not exist: name an adapter folder, or a LoRA or textual-inversion file")
        remove_stale(folder)  # a save that was killed after it had decided for the new files
        if not (folder / MANIFEST).is_file():
            raise UserError(no_adapter(folder))
        info = read_json(folder / MANIFEST)
        content = read_adapter_file(folder / DIFFUSERS_FILE)
        check_manifest(info, content, folder)
        source = None
        if info["source_tensors"]:
            source = read_tensors(folder / SOURCE_FILE).tensors
            VerificationReport((verification.compare_digests(SOURCE_FILE, source, info["source_tensors"]),)).require()
            check_source(source, len(captions_of(info, source)))
        concepts = read_token_files(folder, info.pop("concepts", {}))
        for key in ("schema", "twin", "tensors", "source_tensors", "files", FILE_HASHES, OWN_HASH):
            info.pop(key, None)
        return Adapter(content.state, info.pop("rank"), info.pop("alpha"), source, info, concepts)

    @contextmanager
    def apply(self, model: StableDiffusion, *, any_base: bool = False, strength: float = 1.0) -> Iterator[None]:
        """Run the body with the adapter's UNet part in `model.unet`, which is removed afterwards, also after an error.

        `strength` is a factor on changes of other algorithms alone; `lora.scaled` sets that of the LoRA.

        Raises:
            UserError: `model` is of another family, is another base of the family (`any_base` allows that), or already
                has an adapter; or `strength` is out of its range.
        """
        check_number("strength", strength)
        if self.lora or self.others:  # the base of tokens alone is checked when they are added to the tokenizer
            self.check_base(model, any_base=any_base)
        with other_changes(model, _of_part(self.others, "unet"), strength):
            if not self.changes_unet:
                yield
                return
            load_lora(model.unet, dict(self.lora), self.rank, self.alpha)
            try:
                with timestep_mask(model.unet, self.timestep_rank):
                    yield
            finally:
                remove_lora(model.unet)

    @contextmanager
    def apply_text(self, model: StableDiffusion, strength: float = 1.0) -> Iterator[None]:
        """Run the body with the adapter's part for the text encoders in them, if it has one; removed as by `apply`."""
        check_number("strength", strength)
        with other_changes(model, _of_part(self.others, "text_encoder"), strength):
            with text_lora(model, self.lora, strength * self.alpha / self.rank):
                yield

    def check_base(self, model: StableDiffusion, *, any_base: bool = False) -> None:
        """UserError, naming both bases, unless the adapter was trained on `model`; see `apply`."""
        trained_on = self.base
        name, other = trained_on.get("name") or "an unknown base", model.name or "the loaded base"
        if self.known_family not in (None, model.family):
            raise UserError(
                f"the adapter was made for {name} ({self.known_family}), not for {other} ({model.family}): "
                "name a base model of its family"
            )
        recorded = None if any_base else trained_on.get("sha256")
        if recorded not in (None, "") and recorded != model.identity["sha256"]:  # computed only where it is compared
            raise UserError(
                f"the adapter was made for {name}, {other} has other weights: name the base it was trained on"
            )

    def check_files(self, folder: Path, name: str) -> VerificationReport:
        """Read the files in `folder` as other programs do; UserError unless every ΔW and token is this adapter's."""
        textual_inversion_files.require_token_files(folder, self.concepts)
        modules = lora_files.factor_pairs(self.lora)
        live = {module: (a, b, self.alpha / self.rank) for module, (a, b) in modules.items()}
        kohya_file = kohya_file_name(name, self.concepts)
        reports = verification.compare_files(folder, kohya_file, live, ReaderKeys(self.family))
        return VerificationReport(tuple(reports)).require()

    def folder_files(self, name: str, pictures: Mapping[str, Image.Image], dtype: torch.dtype) -> dict[str, bytes]:
        """The files of an adapter folder called `name`, kohya's in `dtype`, by name; UserError as in `save`."""
        if self.others:
            raise UserError(
                "an adapter folder holds LoRAs and tokens alone: `personalize convert` makes LoRAs of others"
            )
        if lora_files.common_rank(lora_files.factor_pairs(self.lora)) != self.rank or not self.alpha > 0:
            raise UserError(f"the adapter says rank {self.rank} and alpha {self.alpha}, which its tensors contradict")
        kohya_file, family = kohya_file_name(name, self.concepts), self.family
        metadata = lora_files.kohya_metadata(title=name, family=family, rank=self.rank, info=self.info)
        files = {
            DIFFUSERS_FILE: lora_files.diffusers_file(self.lora, self.alpha, metadata=rule_header(self.info)),
            kohya_file: lora_files.kohya_file(self.lora, self.alpha, family=family, dtype=dtype, metadata=metadata),
            **textual_inversion_files.token_file_contents(self.concepts, family=family),
        }
        if self.source is not None:
            check_source(self.source, len(self.captions))
            identity = {key: str(value) for key, value in self.base.items()}
            about = {"format": "pt", "caption": str(self.info.get("caption", "")), **identity}
            files[SOURCE_FILE] = tensor_bytes({key: value.float() for key, value in self.source.items()}, about)
        images = {
            picture_name(key): png(image, None if key in NOT_DRAWN else GENERATED) for key, image in pictures.items()
        }
        card = model_card(name=name, kohya_file=kohya_file, adapter=self, pictures=list(images))
        files |= {**images, CARD: utf8(card)}
        files[MANIFEST] = self._manifest(kohya_file, files)
        return files

    def _manifest(self, kohya_file: str, files: Mapping[str, bytes]) -> bytes:
        own = {"schema": SCHEMA, "rank": self.rank, "alpha": self.alpha, "twin": kohya_file}
        own |= {"files": sorted([*files, MANIFEST]), "base": self.base | {"family": self.family}}
        own[FILE_HASHES] = {name: sha256(files[name]).hexdigest() for name in sorted(files)}
        return sealed(dict(sorted(self.info.items())) | own | tensor_digests(self.lora, self.source, self.concepts))


def _of_part(others: Mapping[str, Mapping[str, Tensor]], part: str) -> dict[str, Mapping[str, Tensor]]:
    """The modules whose names start with `part`."""
    return {module: parts for module, parts in others.items() if module.startswith(part)}


def _load_file(path: Path, family: str | None) -> Adapter:
    """The adapter in a file of another program, or in a folder of PEFT; its metadata are kept in `info["header"]`."""
    content = open_adapter(path)
    file = read_adapter_file(path, content, family=family)
    bundled, own_word = bool(file.state or file.others), textual_inversion_files.word_of(path.stem)
    concepts = {
        f"<{token}>" if (token == own_word or bundled) and not token.startswith("<") else token: rows
        for token, rows in file.concepts.items()
    }
    info = {"imported": path.name, "base": file.base, "header": file.header}
    return Adapter(file.state, file.rank, file.alpha, None, info, concepts, file.others)
