"""The runs of benches whose figures and tables are in results/, by name: module, base model and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Bench:
    """A run of a bench: the module, the base model it measures, and its options beside those."""

    module: str
    base: Literal["embedded", "leaky"]
    options: str = ""

    def command(self) -> str:
        """The command line, without the folders of the model and of the results."""
        return f"python -m {self.module} {self.options}".strip()


_MAPS = "--scenes 24 --steps 20 --guidance_scale 4"
_FITTED = "--updates 4 --balancing 0.05 --disjoint 1 --background 1 --cap 0.5"
_SHAPES = '--steps 10 --arms "P2P + direct" "P2P + direct, local" --shapes 128x128 128x96 96x128 160x120'
_DRAGS = (
    'move deform "move, coarse mask" "move, smooth fill" "move, no pinning" "move, true mask" "move, attention fill" '
    '"move, all keys"'
)
_FIFTY = 'move "move, 50 steps"'
BENCHES = {
    "pictures": Bench(
        "tests.bench.embedded_model",
        "embedded",
        "--only nouns background pairs --scheduler dpm++_2m --steps 15 --mixed_precision bf16",
    ),
    "inversion": Bench("tests.bench.embedded_model", "embedded", "--only inversion uncaptioned_inversion"),
    "attention": Bench("tests.bench.embedded_model", "embedded", "--only cross_attention self_attention"),
    "quickstart": Bench("tests.bench.quickstart", "embedded"),
    "single image": Bench("tests.bench.single_image", "embedded", "--scenes 20 --steps 10"),
    "photos": Bench(
        "tests.bench.real_image_editing",
        "embedded",
        '--scenes 12 --steps 20 --arms "P2P + direct" "P2P + none, 8 steps" "P2P + none, 12 steps" '
        '"mutual + direct" "mutual + none, 12 steps"',
    ),
    "photo methods": Bench(
        "tests.bench.real_image_editing",
        "embedded",
        '--scenes 6 --steps 20 --arms "P2P + ddim" "P2P + negative" "P2P + direct" "P2P + null-text" "P2P + ddpm" '
        '"P2P + DPL + direct" "P2P + DPL + null-text" "UAM + P2P + ddim" "UAM + P2P + direct" "UAM + mutual + ddim" '
        '"UAM + mutual + direct"',
    ),
    "several pictures": Bench("tests.bench.several_pictures", "embedded", "--scenes 2"),
    "photo shapes": Bench("tests.bench.real_image_editing", "embedded", f"--scenes 12 {_SHAPES}"),
    "photo shapes, windows": Bench("tests.bench.real_image_editing", "embedded", f"--windows --scenes 12 {_SHAPES}"),
    "uniform maps": Bench(
        "tests.bench.attention_maps", "embedded", "--only reconstruction masks auxiliaries --scenes 24 --steps 20"
    ),
    "drags": Bench("tests.bench.drag", "embedded", f"--only drags --arms {_DRAGS}"),
    "drags, textured": Bench("tests.bench.drag", "embedded", f"--only drags --textured --arms {_DRAGS}"),
    "drags, 50 steps": Bench("tests.bench.drag", "embedded", f"--only drags --scenes 8 --arms {_FIFTY}"),
    "drags, 50 steps, textured": Bench(
        "tests.bench.drag", "embedded", f"--only drags --scenes 8 --textured --arms {_FIFTY}"
    ),
    "drag distances": Bench("tests.bench.drag", "embedded", "--only distances --scenes 20 --arms move"),
    "drag turns": Bench("tests.bench.drag", "embedded", "--only turns --scenes 20"),
    "drag turns, textured": Bench("tests.bench.drag", "embedded", "--only turns --scenes 20 --textured"),
    "drag masks": Bench("tests.bench.drag", "embedded", "--only calibration"),
    "drag previews": Bench("tests.bench.drag.previews", "embedded"),
    "drag previews, textured": Bench("tests.bench.drag.previews", "embedded", "--textured"),
    "leaky": Bench("tests.bench.leaky.measure", "leaky", "--scenes 24 --inversion_steps 20 --prompts 48"),
    "dynamic prompts": Bench("tests.bench.attention_maps", "leaky", f"--only maps swaps {_MAPS}"),
    "dynamic prompts, calibrated": Bench("tests.bench.attention_maps", "leaky", f"--only maps swaps {_MAPS} {_FITTED}"),
    "dynamic prompts, local": Bench("tests.bench.attention_maps", "leaky", f"--only swaps --local {_MAPS}"),
    "dynamic prompts, calibrated, local": Bench(
        "tests.bench.attention_maps", "leaky", f"--only swaps --local {_MAPS} {_FITTED}"
    ),
    "dynamic prompts, null-text": Bench(
        "tests.bench.attention_maps",
        "leaky",
        f"--only swaps {_MAPS} --inversion null-text --null_text_rate 0.1",
    ),
    "dynamic prompts, embedded": Bench("tests.bench.attention_maps", "embedded", "--only maps --scenes 24 --steps 20"),
    "calibration": Bench(
        "tests.bench.multi_concept", "leaky", "--scenes 12 --steps 20 --updates 120 --class_images 24 --timed_updates 0"
    ),
    "uniform maps, leaky": Bench("tests.bench.attention_maps", "leaky", f"--only reconstruction masks {_MAPS}"),
}
