"""What can be wrong with a command's options, found before torch is imported: files, prompts, combinations.

The functions are called by the `check` methods of the options' classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from personalize.adapters.forgetting import parse_rule_sum
from personalize.cli.drag_settings import drag_settings
from personalize.cli.lists import check_said_once
from personalize.cli.places import check_place, interleaved_points, point_of
from personalize.cli.unused import check_unused_of_drag, check_unused_of_edit, check_unused_of_photo
from personalize.cli.words import check_words, local_words, pair, weight
from personalize.editing.config import DYNAMIC, UNIFORM
from personalize.editing.photo_settings import PhotoSettings
from personalize.errors import UserError
from personalize.formats.adapter_folders import MANIFEST, is_foreign_folder, no_adapter
from personalize.formats.key_parts import TOKEN
from personalize.io.atomic import folder_path
from personalize.io.json_files import read_json
from personalize.io.output_folder import check_output_folder, require_absent
from personalize.models.config import HUB_FILE, cell_pixels, check_resolution
from personalize.sampling.config import INVERSIONS, SCHEDULERS, TRAJECTORY

GRADIO = (6, 7)  # the oldest version with the security fixes that the studio relies on
STRENGTHS = ("alpha", "beta", "gamma", "forget", "strength")


def check_edit(config: Any) -> None:
    """Check the options of `personalize edit` with an adapter."""
    _check_auto(config)
    check_output_folder(config.output_dir)
    if not config.prompt.strip():
        raise UserError("the prompt is empty: say what the picture should show")
    check_adapters(config.adapters)
    check_forget(config.forget)
    if config.scheduler not in SCHEDULERS:
        raise UserError(f"unknown --scheduler {config.scheduler}: choose one of {', '.join(SCHEDULERS)}")
    if config.cuda_graph and (config.cpu or config.torch_compile):
        raise UserError(f"--cuda_graph does not go with {'--cpu' if config.cpu else '--torch_compile'}: leave one out")
    _check_sides(config)
    check_tokens([config.prompt, config.negative_prompt], config.adapters)
    if config.auto:
        source_picture(config)
    check_unused_of_edit(config)


def source_picture(config: Any) -> Path:
    """The picture the adapter was trained on: --source_image, or the one in its folder; UserError if there is none."""
    path = config.source_image or config.adapter / "source.png"
    if path.is_file():
        return path
    in_folder = config.source_image is not None or config.adapter.is_dir()
    what = f"{path} does not exist" if in_folder else f"{config.adapter} holds no picture for --auto to compare with"
    raise UserError(f"{what}: name the picture the adapter was trained on with --source_image")


def check_forget(rules: Iterable[str]) -> None:
    """UserError unless each of the texts after --forget is a rule, or several with "+" between."""
    for text in rules:
        parse_rule_sum(text)


def _check_sides(config: Any) -> None:
    """UserError unless --height and --width are whole numbers of the base's latent cells."""
    cell = cell_pixels(config.pretrained_model_name_or_path)
    for name in ("height", "width"):
        side = getattr(config, name)
        if side is not None and (side < cell or side % cell):
            near = max(cell, round(side / cell) * cell)
            raise UserError(f"--{name} is {side}: both sides must be multiples of {cell} px, such as {near}")


def _check_auto(config: Any) -> None:
    given = [name for name in STRENGTHS if getattr(config, name) not in ((), None)]
    if config.auto and given:
        raise UserError(f"--auto chooses the strengths itself: leave out --{given[0]}, or --auto")
    own = ("clip_model", "identity_model", "source_image", "budget")
    extra = [name for name in own if getattr(config, name) != getattr(type(config), name)]
    if extra and not config.auto:
        raise UserError(f"--{extra[0]} belongs to --auto: add --auto, or leave --{extra[0]} out")
    if config.auto and (config.seeds or config.num_images != 1):
        raise UserError("--auto draws --budget pictures with seeds from --seed on: leave out --seeds and --num_images")
    if config.seeds and (config.seed is not None or config.num_images != 1):
        raise UserError("--seeds lists every seed: leave out --seed and --num_images")
    if config.gamma and (config.alpha or config.beta):
        raise UserError("--gamma is vector subtraction, --alpha and --beta are vector projection: give one of the two")


def check_photo(config: Any) -> None:
    """Check the options of `personalize edit PHOTO`."""
    from personalize.io.image_files import image_size

    size = image_size(config.photo)
    check_output_folder(config.output_dir)
    folder_path(config.output_dir / INVERSIONS)
    if config.trajectory is not None and not (config.trajectory / TRAJECTORY).is_file():
        check_output_folder(config.trajectory)  # one that is stored there already is only read
    check_resolution(config.resolution, config.pretrained_model_name_or_path)
    if not config.source.strip():
        raise UserError("--source is empty: say what the photo shows, e.g. 'a cat on the beach'")
    for text in config.local:
        local_words(text)
    check_said_once("swap", map(pair, config.swap))
    check_said_once("weight", map(weight, config.weight))
    target = " ".join(config.target).strip()
    if not config.report and not target and not config.swap and not config.weight:
        raise UserError("nothing is to change: give --target, words to --swap, or --weight of words")
    if target and config.swap:
        raise UserError("--target and --swap are two ways to say one thing: give one of them")
    if config.dpl and config.controller == "mutual":
        raise UserError("--controller mutual has no source prompt, so that --dpl has no noun: use one of them")
    if config.controller == "mutual" and (config.weight or config.attention_maps):
        raise UserError("--weight and --attention_maps belong to the controller p2p: leave them out, or --controller")
    fitted, blended = (DYNAMIC if config.dpl else None), (UNIFORM if config.uniform else None)
    PhotoSettings(
        config.inversion, config.num_inference_steps, fixed_point=config.fixed_point_iterations, dynamic=fitted,
        uniform=blended,
    )  # fmt: skip
    check_unused_of_photo(config)
    check_adapters(config.adapters)
    check_tokens([config.source, *config.target, *(new for _, new in map(pair, config.swap))], config.adapters)
    placed = [pair(text, "noun=mask.png or noun=left,top,right,bottom") for text in config.region]
    check_said_once("region", placed)
    regions = [*(where for _, where in placed), *filter(None, [config.mask])]
    regions += [] if config.background_mask in ("auto", "none") else [config.background_mask]
    for where in regions:
        check_place(where, size)
    if not config.report:
        check_words(config)


def check_edit_table(config: Any) -> None:
    """Check the options of `personalize edit TABLE`; its rows are checked one by one, when their turn comes."""
    if not config.table.is_file():
        raise UserError(f"{config.table}: no such file; name a CSV table with the columns file, source, target")
    check_adapters(config.adapters)
    check_output_folder(config.output_dir)


def check_drag(config: Any) -> None:
    """Check the options of `personalize drag`."""
    from personalize.editing.drag.points import check_inside, handles_and_targets
    from personalize.io.image_files import image_size
    from personalize.io.mask_files import check_mask_size

    points, settings = interleaved_points(config.from_, config.to), drag_settings(config)
    if settings.method == "latents" and (config.preview or config.add or config.remove):
        raise UserError("--preview, --add and --remove need --method pixels: leave them out, or --method latents")
    if config.mask is not None and config.user_mask == "replace" and (config.add or config.remove):
        raise UserError(
            "--add and --remove change the mask that attention finds, and --mask takes its place: paint it as wanted, "
            "or choose --user_mask intersect"
        )
    check_unused_of_drag(config)
    more = [point_of(text) for text in (*config.add, *config.remove)]
    check_output_folder(config.output_dir)
    check_resolution(config.resolution, config.pretrained_model_name_or_path)
    size = image_size(config.photo)
    if config.mask is not None:
        check_mask_size(image_size(config.mask), size)
    handles_and_targets(points, size, regions=config.mode == "region")
    for point in more:
        check_inside((point,), "point of the mask", size)
    check_adapters(config.adapters)


def check_quickstart(config: Any) -> None:
    """Check the picture and caption of `personalize quickstart`."""
    from personalize.io.image_files import check_image
    from personalize.io.image_folders import only_picture
    from personalize.training.data.captions import find_caption

    check_output_folder(config.output_dir)
    if config.photo is None:
        if config.caption is not None:
            raise UserError("--caption belongs to a picture of your own: name it, e.g. quickstart photo.jpg")
        return
    if config.scene != type(config).scene:
        raise UserError(f"--scene {config.scene} is a bundled picture: leave it out, or {config.photo}")
    picture = only_picture(config.photo)
    check_image(picture)
    find_caption(picture, config.caption)


def check_studio(config: Any) -> None:
    """Check that Gradio is there, and what `personalize studio` begins with."""
    from importlib.metadata import PackageNotFoundError, version

    from personalize.models.config import check_base_name

    try:
        found = version("gradio")
    except PackageNotFoundError:
        raise UserError("the studio needs Gradio, which is not installed: pip install 'personalize[studio]'") from None
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < GRADIO:
        raise UserError(f"the studio needs Gradio 6.7 or newer, found {found}: pip install 'personalize[studio]'")
    if config.start is not None:
        check_files(config.start)
    if config.base is not None:
        check_base_name(config.base)
    if config.auth is not None and not all(config.auth.partition(":")):
        raise UserError(f"--auth is {config.auth!r}, expected user:password")
    check_output_folder(Path("studio"))


def check_output(path: Path) -> None:
    """UserError unless the file `path` can be written, in the place of no other; its folder need not exist yet."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, the name of a file was expected: name a file in it")
    require_absent(path)
    check_output_folder(path.parent, (path.name,))


def check_files(*paths: Path) -> None:
    """UserError unless each of `paths` is a file or a folder, or may be a file on the hub."""
    for path in paths:
        if not path.exists() and not HUB_FILE.fullmatch(str(path)):
            raise UserError(f"{path} does not exist: check the path")


def check_adapters(paths: Iterable[Path]) -> None:
    """UserError unless each is a folder that may be an adapter, a file, or may be a file on the hub."""
    for path in paths:
        if not path.exists() and not HUB_FILE.fullmatch(str(path)):
            raise UserError(f"{path} does not exist: name an adapter folder, or a LoRA or textual-inversion file")
        if path.is_dir() and not (path / MANIFEST).exists() and not is_foreign_folder(path):
            raise UserError(no_adapter(path))


def check_tokens(prompts: Sequence[str], adapters: Sequence[Path]) -> None:
    """UserError for a `<token>` in a prompt that none of the adapters has learned, if all their tokens are known.

    An embedding file has its token inside, and a base model may have tokens of its own: then the tokenizer decides.
    """
    learned: set[str] = set()
    for path in adapters:
        if not (path / MANIFEST).is_file():
            return
        learned |= set(_concepts(path))
    for token in (token for prompt in prompts for token in TOKEN.findall(prompt)):
        if token.lower() not in map(str.lower, learned):
            if not adapters:
                raise UserError(f"the prompt says {token}, but there is no adapter that has learned it: name it too")
            have = f"it has {', '.join(sorted(learned))}" if learned else "it has no tokens"
            raise UserError(f"the prompt says {token}, which the adapter has not learned: {have}")


def _concepts(folder: Path) -> list[str]:
    """The learned tokens in the manifest of an adapter folder; none if it cannot be read, which loading says."""
    try:
        return list(read_json(folder / MANIFEST).get("concepts", {}))
    except (UserError, TypeError):
        return []
