"""Why claims are not borne out, as far as was found out, by how the claims begin; the page of claims says it."""

from __future__ import annotations

_TRADE = "the arms trade one for the other along the frontier of [single images](single_image.md); none has both"
_MISSING_CAPTION = (
    "it is the missing caption that costs the dB: without a prompt ordinary maps do no better, and the model was told "
    "what it saw in eight to nine of ten updates"
)
_LEARNED_FRAMES = (
    "whole squares show bricks and horizons at the one place that the model knows by heart; cut out anywhere, as the "
    "others are, squares are 0.6 dB ahead"
)
REASONS = {
    "One object": "the last 6,000 updates went into frames of other shapes; before them it was 96.4 %",
    "Two objects": "of two, each is half as wide as alone; 60.4 % before the last 6,000 updates, which raised it",
    "Inversion and replay": (
        "a hair: the median scene loses 0.7 dB, but 32 of 500 more than 6, most of them before plain grounds (green: "
        "3.4 dB; bricks and water: 0.6)"
    ),
    "What a replay loses": (
        "the median scene loses 0.9 dB; plain grounds, of which the caption alone tells, lose most: white 9 dB, pink "
        "6, where bricks, water and night lose 0.5 at most"
    ),
    "quickstart: a row": "on scene 0 all four edits come true, but one draws another cat ([rows](quickstart.md))",
    "--auto against no forgetting: identity": _TRADE,
    "--auto against decoder side: edits": _TRADE,
    "--auto against encoder side: identity": "equal within the interval, and twice as many edits come true",
    "--auto against paper, rate 0.0002: edits": "20 scenes do not tell the sign of 10 points",
    "Photos that are not square: ": _LEARNED_FRAMES,
    "Photos cut out anywhere that are not square, only where the noun attends: success": "23 of 36 against 8 of 12",
    "Uniform maps (embedded model): replay nearer": _MISSING_CAPTION,
    "Uniform maps (leaky twin): replay nearer": _MISSING_CAPTION,
    "Drags on textures: recall": "one sunflower's leaves stay behind (0.74); of all others 0.87 or more is found",
    "Dynamic prompts (published weights, null-text)": "two edits of 24 tell no sign, and 0.2 dB hardly one",
    "Dynamic prompts (published weights, direct inversion): an edit": (
        "the published weights move a noun's embedding by 1.3 of its length; guidance carries that into the target's "
        "row, and direct inversion corrects the source's alone"
    ),
    "Dynamic prompts (calibrated weights, direct inversion): an edit": (
        "cleaner maps do not keep a region by themselves: where they decide what may change (`--local`), the other "
        "object gains 4.4 dB"
    ),
    "Dynamic prompts (published weights, only where": "the gain is large in few scenes: 24 do not tell 1 dB",
    "Calibrated attention: fewer": "none shows the other concept in either arm, so that there is nothing to lower",
}


def reason(claim: str) -> str:
    """Why the claim of this text is not borne out."""
    return next((why for start, why in REASONS.items() if claim.startswith(start)), "not found out")
