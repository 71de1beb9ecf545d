"""What is claimed of the methods, and the benches that measure it."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.claim import Claim
from tests.bench.lookups import above_fixed, calibration, edits, figure, on_frontier, quickstart, squares
from tests.bench.quickstart import EDITS_RIGHT, IDENTITY_GAIN, REPLAY_GAIN, goals_reached
from tests.bench.single_image import AUTO, DECODER, ENCODER, NONE, paper

_DYNAMIC_MAPS = tuple(
    claim
    for name, which in (
        ("dynamic prompts", "published loss weights"),
        ("dynamic prompts, calibrated", "calibrated loss weights"),
        ("dynamic prompts, embedded", "embedded model, its calibrated loss weights"),
    )
    for claim in (
        Claim(f"Dynamic prompts ({which}): IoU of noun maps rises", name, figure("iou gain, direct"), goal=0),
        Claim(
            f"Dynamic prompts ({which}): less of a noun's attention lies off its object",
            name,
            figure("off gain, direct"),
            goal=0,
            better="below",
        ),
        Claim(
            f"Dynamic prompts ({which}): noun maps overlap less",
            name,
            figure("overlap gain, direct"),
            goal=0,
            better="below",
        ),
    )
)
_DYNAMIC_SWAPS = tuple(
    claim
    for name, which in (
        ("dynamic prompts, null-text", "published loss weights, null-text"),
        ("dynamic prompts", "published loss weights, direct inversion"),
        ("dynamic prompts, calibrated", "calibrated loss weights, direct inversion"),
        ("dynamic prompts, local", "published loss weights, only where the nouns attend"),
        ("dynamic prompts, calibrated, local", "calibrated loss weights, only where the nouns attend"),
    )
    for claim in (
        Claim(
            f"Dynamic prompts ({which}): an edit of one of two objects leaves the other one nearer the photo",
            name,
            figure("swaps, other gain"),
            "dB",
            1,
        ),
        Claim(
            f"Dynamic prompts ({which}): such an edit comes true as often",
            name,
            figure("swapped, difference", 100),
            "points",
            -2,
            by="value",
        ),
    )
)
_UNIFORM = tuple(
    claim
    for name, base in (("uniform maps", "embedded model"), ("uniform maps, leaky", "leaky twin"))
    for claim in (
        Claim(
            f"Uniform maps ({base}): replay nearer the photo than with the caption, w = 1",
            name,
            figure("U9 gain over the caption, 20 steps"),
            "dB",
            0,
        ),
        Claim(f"Uniform maps ({base}): the same, w = 7.5", name, figure("U9 gain over w = 7.5, 20 steps"), "dB", 3),
        Claim(
            f"Uniform maps ({base}): background of an edit kept better", name, figure("U10 background gain"), "dB", 0.5
        ),
        Claim(
            f"Uniform maps ({base}): change inside the edited object kept",
            name,
            figure("U10 change kept", 100),
            "%",
            90,
        ),
    )
)
_LEAKY = (
    Claim("The leaky twin: overlap of two noun maps", "leaky", figure("overlap"), goal=0.3),
    Claim("The leaky twin: IoU of noun maps with their objects", "leaky", figure("iou"), goal=0.45, better="below"),
    Claim(
        "The leaky twin: prompts that show an object they do not name",
        "leaky",
        figure("wrong_object", 100),
        "%",
        15,
        by="value",
    ),
)
_CALIBRATION = (
    Claim(
        "Calibrated attention: class maps of two concepts overlap less",
        "calibration",
        calibration("overlap"),
        goal=0,
        better="below",
    ),
    Claim(
        "Calibrated attention: fewer prompts for one concept show the other",
        "calibration",
        calibration("wrong_object", 100),
        "points",
        0,
        "below",
    ),
    Claim(
        "Calibrated attention: prompts for one come true as often",
        "calibration",
        calibration("single_success", 100),
        "points",
        -2,
        by="value",
    ),
    Claim(
        "Calibrated attention: prompts for both that come true (none does in either arm)",
        "calibration",
        calibration("both_success", 100),
        "points",
        -2,
        by="value",
    ),
)
_AUTO = tuple(
    claim
    for arm in (NONE, DECODER, ENCODER, paper(2e-4), paper(1e-3))
    for claim in (
        Claim(
            f"--auto against {arm}: edits that come true", "single image", edits(AUTO, arm, "success", 100), "points", 0
        ),
        Claim(f"--auto against {arm}: identity", "single image", edits(AUTO, arm, "psnr"), "dB", 0),
    )
)
_SHAPES = tuple(
    claim
    for photos, bench in (("Photos", "photo shapes"), ("Photos cut out anywhere", "photo shapes, windows"))
    for how, arm in (("", "P2P + direct"), (", only where the noun attends", "P2P + direct, local"))
    for claim in (
        Claim(
            f"{photos} that are not square{how}: background against square ones",
            bench,
            squares("psnr", arm=arm),
            "dB",
            -1,
            by="value",
        ),
        Claim(
            f"{photos} that are not square{how}: success against square ones",
            bench,
            squares("success", 100, arm=arm),
            "points",
            -2,
            by="value",
        ),
    )
)
_DRAGS = tuple(
    claim
    for drags, bench, turns in (
        ("Drags", "drags", "drag turns"),
        ("Drags on textures", "drags, textured", "drag turns, textured"),
    )
    for claim in (
        *(
            Claim(f"{drags} by {n} cells arrive", bench, figure(f"D10 moved by {n} cells within tolerance"), "%", 80)
            for n in (2, 4, 8)
        ),
        Claim(
            f"{drags}: what remains of the object at its old place",
            bench,
            figure("D13 ghost"),
            goal=0.08,
            better="below",
        ),
        Claim(f"{drags}: recall of the mask that is found", bench, figure("mask recall"), goal=0.97),
        Claim(f"{drags}: a twin beside it stays", bench, figure("D14 twin stays within a cell"), "%", 90),
        Claim(
            f"{drags}: what remains of the object beside a twin",
            bench,
            figure("D14 ghost beside a twin"),
            goal=0.08,
            better="below",
        ),
        Claim(
            f"{drags}: turned by 30° and scaled by 1.4, to 5° and 0.1",
            turns,
            figure("turn by 30°, scale by 1.4: found so, to 5° and 0.1"),
            "%",
            80,
        ),
    )
)
CLAIMS: Sequence[Claim] = (
    Claim("One object: it is in the picture", "pictures", figure("right_object"), "%", 97, by="value"),
    Claim("Two objects: both are in the picture", "pictures", figure("both_present"), "%", 75, by="value"),
    Claim("The style that was asked for", "pictures", figure("right_style_when_asked"), "%", 92, by="value"),
    Claim(
        "Inversion and replay: lost of the autoencoder's own",
        "inversion",
        figure("inversion_below_ceiling"),
        "dB",
        1.5,
        "below",
        "value",
    ),
    Claim(
        "What a replay loses without a caption",
        "inversion",
        figure("lost_without_a_caption"),
        "dB",
        1,
        "below",
        "value",
    ),
    Claim(
        "A noun's attention map finds its object: AUC, best layer of maps of 16×16",
        "attention",
        figure("noun_map_auc"),
        goal=0.9,
    ),
    Claim(
        "Self-attention finds the object of a cell: AUC, best layer and timestep",
        "attention",
        figure("self_attention_auc"),
        goal=0.85,
    ),
    Claim(
        f"quickstart: the replay is {REPLAY_GAIN:g} dB nearer the picture than the base's own",
        "quickstart",
        quickstart(lambda scene: scene["replay"] - scene["base"] >= REPLAY_GAIN),
        "% of scenes",
        100,
        by="value",
    ),
    Claim(
        f"quickstart: a row with {EDITS_RIGHT} of 4 edits right and identity {IDENTITY_GAIN:g} dB above the base's",
        "quickstart",
        quickstart(lambda scene: any(map(goals_reached, scene["rows"].values()))),
        "% of scenes",
        100,
        by="value",
    ),
    *_AUTO,
    Claim(
        "--auto: edits that come true, above what other arms reach at its identity, alone or two in turn",
        "single image",
        above_fixed(AUTO),
        "points",
        0,
    ),
    Claim("--auto is on the frontier of success and identity", "single image", on_frontier(AUTO), "%", 100, by="value"),
    Claim(
        "The preset's own setting (no forgetting) is on the frontier",
        "single image",
        on_frontier(NONE),
        "%",
        100,
        by="value",
    ),
    *_SHAPES,
    Claim(
        "Photo edits without inversion, 8 steps: background against direct inversion",
        "photos",
        edits("P2P + none, 8 steps", "P2P + direct", "psnr"),
        "dB",
        0,
        by="value",
    ),
    Claim(
        "Photo edits without inversion, 8 steps: success against direct inversion",
        "photos",
        edits("P2P + none, 8 steps", "P2P + direct", "success", 100),
        "points",
        0,
        by="value",
    ),
    *_UNIFORM,
    Claim(
        "Uniform maps (embedded model, --uniform_auxiliary stored): background of an edit kept better",
        "uniform maps",
        figure("U14 background gain, stored"),
        "dB",
        0.5,
    ),
    *_DRAGS,
    *_LEAKY,
    *_DYNAMIC_MAPS,
    *_DYNAMIC_SWAPS,
    *_CALIBRATION,
)
