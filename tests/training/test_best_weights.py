"""With --keep_best a run saves the weights whose validation pictures scored best, however it was interrupted."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from personalize.adapters.adapter import Adapter
from personalize.cli.main import main
from personalize.errors import Notice
from personalize.evaluation.scoring import Scores
from personalize.io.images import to_image
from personalize.training import trainer, validation
from personalize.training.best_weights import BestWeights, Judge, find_judge
from personalize.training.checkpoints import numbered
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from tests.support.children import run_processes
from tests.support.runs import SMALL, pixels
from tests.support.tiny import tiny, tiny_folder
from tests.support.tiny_scorers import clip_folder, dino_folder
from tests.training.test_averaging import run_of, same_all
from tests.training.test_multi_concept_run import SMALL as SMALL_CONCEPTS

ABOUT = {"scorer": "given"}
KINDS: dict[str, SingleImageConfig | MultiConceptConfig] = {
    "source": replace(SMALL, max_train_samples=4),
    "average": replace(SMALL, max_train_samples=4, use_ema=True),
    "orthogonal": replace(SMALL, max_train_samples=4, orthogonal_start=True, min_rank=1),
    "text_encoders": replace(SMALL, max_train_samples=4, train_text_encoder=True),
    "concepts": replace(SMALL_CONCEPTS, max_train_steps=4),
    "full_kv": replace(SMALL_CONCEPTS, max_train_steps=4, full_kv=True),
}


def test_the_best_is_kept_and_of_equal_scores_the_earliest() -> None:
    weight = nn.Parameter(torch.zeros(3))
    best = BestWeights({"weight": weight}, ABOUT)
    for update, score, better in ((1, 0.0, True), (2, 0.7, True), (3, 0.7, False), (4, float("nan"), False)):
        with torch.no_grad():
            weight.fill_(update)
        assert best.consider(update, score) is better
    assert (best.update, best.judged, best.score) == (2, 4, 0.7)
    with pytest.raises(KeyError), best.in_place():
        assert weight.tolist() == [2, 2, 2]
        raise KeyError
    assert weight.tolist() == [4, 4, 4]
    assert best.info(4) == {"updates": 2, "kept_best": {"update": 2, "updates": 4, "score": 0.7, "scorer": "given"}}


def test_scores_of_a_checkpoint_count_if_they_compare() -> None:
    weight = nn.Parameter(torch.ones(3))
    best, again = (BestWeights({"weight": weight}, ABOUT) for _ in range(2))
    best.consider(5, 0.25)
    assert again.load(best.state()) and (again.update, again.judged, again.score) == (5, 5, 0.25)
    assert again.values["weight"].tolist() == [1, 1, 1]
    other = BestWeights({"weight": weight}, {"scorer": "another"})
    assert not other.load(best.state()) and not other.load({}) and (other.update, other.score) == (0, -1.0)


class Given:
    """Scores by update, in the place of networks."""

    name, copy_distance, lost_distance = "given", 0.0, 1.0

    def __init__(self, run: Any, scores: dict[int, float]) -> None:
        self.run, self.scores, self.judged = run, scores, []

    def __call__(self, pictures: Any, request: Any) -> list[Scores]:
        self.judged.append(self.run.update)
        return [Scores(self.scores[self.run.update], 1.0, 0.5)] * len(pictures)


def options(folder: Path, **changes: Any) -> SimpleNamespace:
    values = {
        "output_dir": folder, "validation_prompt": "a cat in snow", "num_validation_images": 1, "preview_steps": 1,
        "validation_steps": 1, "checkpointing_steps": 1, "checkpoints_total_limit": None, "report_to": None,
        "resume_from_checkpoint": None,
    }  # fmt: skip
    return SimpleNamespace(**values | changes)


SCORES = {1: 0.2, 2: 0.9, 3: 0.4, 4: 0.5}


def trained(kind: str, given: SimpleNamespace, scores: dict[int, float] = SCORES) -> tuple[Adapter, Any, list[int]]:
    """The adapter that is saved, those after each update, and the updates that were scored."""
    states = {}

    def watch(run: Any, report: Any) -> bool:
        states[report.update] = run.adapter()
        return False

    trainer_name = "multi_concept" if isinstance(KINDS[kind], MultiConceptConfig) else "single_image"
    with run_of(trainer_name, tiny("sd1"), KINDS[kind]) as run:
        scorer = Given(run, scores)
        judge = Judge(scorer, None, ABOUT)  # pyright: ignore[reportArgumentType]
        trainer.train(given, run, "x", watch, judge)
        return run.kept_adapter(), states, scorer.judged


SLOW = ("orthogonal", "text_encoders", "full_kv")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in KINDS])
def test_the_adapter_with_the_best_score_is_saved(kind: str, tmp_path: Path) -> None:
    kept, states, judged = trained(kind, options(tmp_path, checkpointing_steps=None))
    assert judged == [1, 2, 3, 4] and same_all(kept, states[2]) and not same_all(kept, states[4])
    about = {"update": 2, "updates": 4, "score": 0.9487, "scorer": "given"}  # √(0.9 · 1)
    assert kept.info["updates"] == 2 and kept.info["kept_best"] == about
    if kind == "source":
        said = "best score of the training's validation pictures, 0.949 after update 2 of 4"
        assert said in (kept.save(tmp_path / "cat") / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["source", "text_encoders", "concepts"])
def test_of_two_processes_the_main_one_scores_and_keeps_the_best(kind: str, tmp_path: Path) -> None:
    """The other one waits at the next update, draws nothing, and learns the same."""

    def learned(rank: int) -> list[Any]:
        kept, states, judged = trained(kind, options(tmp_path, checkpointing_steps=None))
        return [same_all(kept, states[2]), same_all(kept, states[4]), judged]

    assert run_processes(learned, 2) == [[True, False, [1, 2, 3, 4]], [False, True, []]]


STARTS = [(kind, start) for kind in ("source", "average", "concepts") for start in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("kind", "start"), [pytest.param(*s, marks=() if s == ("source", 2) else pytest.mark.slow) for s in STARTS]
)
def test_a_resumed_run_saves_the_same(kind: str, start: int, tmp_path: Path) -> None:
    kept, _, _ = trained(kind, options(tmp_path))
    again, _, judged = trained(kind, options(tmp_path, resume_from_checkpoint=f"checkpoint-{start}"))
    assert judged == [1, 2, 3, 4][start - 1 :], "a checkpoint is written before its own pictures are scored"
    assert same_all(again, kept) and again.info["kept_best"] == kept.info["kept_best"]


def test_the_last_update_is_scored_whatever_validation_steps_is(tmp_path: Path) -> None:
    kept, states, judged = trained("source", options(tmp_path, validation_steps=3))
    assert judged == [3, 4] and same_all(kept, states[4]) and kept.info["kept_best"]["update"] == 4


def test_validation_steps_of_0_draws_no_picture_before_the_last_update(tmp_path: Path) -> None:
    """It ended with a division by zero after the first update."""
    kept, states, judged = trained("source", options(tmp_path, validation_steps=0, checkpointing_steps=0))
    assert judged == [4] and same_all(kept, states[4]) and not numbered(tmp_path)
    with run_of("single_image", tiny("sd1"), KINDS["source"]) as run:
        trainer.train(options(tmp_path / "plain", validation_steps=0), run, "x")
        assert run.update == 4 and not (tmp_path / "plain" / "validation").exists()


@pytest.mark.slow
def test_with_and_without_scores_a_checkpoint_serves_both(tmp_path: Path) -> None:
    _, states, _ = trained("source", options(tmp_path))
    with run_of("single_image", tiny("sd1"), KINDS["source"]) as run:
        trainer.train(options(tmp_path, resume_from_checkpoint="checkpoint-2", validation_prompt=None), run, "x")
        assert same_all(run.kept_adapter(), states[4]) and "kept_best" not in run.kept_adapter().info
    assert {number for number, _ in numbered(tmp_path)} == {1, 2, 3, 4}
    with pytest.warns(Notice, match="sought from here on"):  # checkpoint-3 is now one of the run without scores
        kept, _, judged = trained("source", options(tmp_path, resume_from_checkpoint="checkpoint-3"))
    assert judged == [3, 4] and same_all(kept, states[4])


def test_pictures_that_fail_cost_a_score_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "draw", lambda *_, **__: 1 / 0)
    with pytest.warns(UserWarning, match="no pictures could be scored: the last weights"):
        kept, states, judged = trained("source", options(tmp_path))
    assert judged == [] and same_all(kept, states[4]) and kept.info["updates"] == 4


def test_learned_tokens_are_not_for_the_scorer() -> None:
    config = SimpleNamespace(keep_best=True, validation_prompt="a <c1> cat on the beach", clip_model=None,
                             identity_model=None, num_validation_images=2, preview_steps=1)  # fmt: skip
    model = SimpleNamespace(name="embedded")
    shown = [(to_image(pixels()), "a <c1> cat")]
    judge = find_judge(config, model, shown, ["<c1>"])  # pyright: ignore[reportArgumentType]
    assert judge is not None and (judge.request.prompt, judge.request.caption) == ("a cat on the beach", "a cat")
    assert 0 <= judge([Image.new("RGB", (64, 64))] * 2) <= 1 and judge.about["pictures"] == 2


@pytest.mark.parametrize(("bare", "prompt"), [(False, "a photo of a dog"), (True, "a dog")])
def test_the_prompt_is_judged_as_it_is_drawn(bare: bool, prompt: str) -> None:
    """Worded like the caption, where an edit starts from its source embedding."""
    config = SimpleNamespace(keep_best=True, validation_prompt="a dog", clip_model=None, identity_model=None,
                             num_validation_images=2, preview_steps=1, without_source_embedding=bare)  # fmt: skip
    shown = [(Image.new("RGB", (64, 64)), "a photo of a cat")]
    judge = find_judge(config, SimpleNamespace(name="embedded"), shown)  # pyright: ignore[reportArgumentType]
    assert judge is not None and judge.request.prompt == prompt


def test_of_several_pictures_the_one_that_the_edit_starts_from_is_compared() -> None:
    """It was the first, whatever it shows."""
    config = SimpleNamespace(keep_best=True, validation_prompt="a dog in the snow", clip_model=None,
                             identity_model=None, num_validation_images=2, preview_steps=1)  # fmt: skip
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    shown = [(first, "a cat on the beach"), (second, "a dog on the beach")]
    judge = find_judge(config, SimpleNamespace(name="embedded"), shown)  # pyright: ignore[reportArgumentType]
    assert judge is not None and judge.request.source is second and judge.request.caption == "a dog on the beach"


@pytest.mark.slow
def test_concepts_are_judged_by_clip_on_other_bases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"pretrained_model_name_or_path": tiny_folder("sd1", tmp_path / "base"), "output_dir": tmp_path / "out",
              "rank": 2, "max_train_steps": 3, "samples_per_update": 2, "num_validation_images": 2, "preview_steps": 1,
              "validation_steps": 1, "validation_prompt": "a <cat1> cat on the beach",
              "num_class_images": 2, "class_image_steps": 1, "class_image_cache": tmp_path / "drawn",
              "clip_model": clip_folder(tmp_path), "identity_model": dino_folder(tmp_path)}  # fmt: skip
    line = ["train", "multi_concept", PHOTO, "--concepts", "<cat1> cat", "--keep_best", "--attention_maps"]
    assert main([*line, *(f"--{name}={value}" for name, value in values.items())]) == 0
    kept, said = Adapter.load(tmp_path / "out").info["kept_best"], capsys.readouterr().out
    assert kept["prompt"] == "a cat on the beach" and kept["scorer"].startswith("CLIP (")
    scores = [float(score) for score in re.findall(r"update \d: score (\d\.\d+)", said)]
    best = re.findall(r"update (\d): score .*, the best so far", said)
    assert len(scores) == 3 and kept["update"] == int(best[-1]) and scores[kept["update"] - 1] == max(scores)
    assert kept["score"] == pytest.approx(max(scores), abs=1e-3)  # printed with three digits


PHOTO = str(Path(__file__).parents[2] / "examples" / "quickstart.png")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--keep_best"], "needs --validation_prompt"),
        (["--keep_best", "--validation_prompt", " "], "needs --validation_prompt"),
        (["--keep_best", "--validation_prompt", "a", "--num_validation_images", "0"], "num_validation_images"),
        (["--clip_model", "x"], "--clip_model belongs to --keep_best"),
        (["--identity_model", "vgg"], "--identity_model belongs to --keep_best"),
        (["--keep_best", "--validation_prompt", "xyzzy"], "the embedded scorer knows no word of 'a photo of xyzzy'"),
        (["--keep_best", "--validation_prompt", "a cat", "--identity_model", "vgg"], "goes with --clip_model"),
        (["--keep_best", "--validation_prompt", "a cat", "TINY"], "need a CLIP model to be judged"),
    ],
)
def test_what_cannot_be_judged_is_said_before_the_work(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[-1] == "TINY":
        words = [*words[:-1], "--pretrained_model_name_or_path", str(tiny_folder("sd1", tmp_path / "base"))]
        capsys.readouterr()
    line = ["train", "single_image", PHOTO, "--caption", "a photo of a cat", "--output_dir", str(tmp_path / "out")]
    assert main([*line, *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out" / "adapter.json").exists()


@pytest.mark.slow
def test_the_command_line_keeps_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"output_dir": tmp_path / "out", "rank": 2, "targets": "attention", "max_train_steps": 3,
              "samples_per_update": 1, "preview_steps": 1, "num_validation_images": 1, "validation_steps": 2,
              "validation_prompt": "a photo of a cat on the beach"}  # fmt: skip
    line = ["train", "single_image", PHOTO, "--caption", "a photo of a cat on the grass", "--keep_best"]
    assert main([*line, *(f"--{name}={value}" for name, value in values.items())]) == 0
    said, kept = capsys.readouterr().out, Adapter.load(tmp_path / "out").info["kept_best"]
    assert "update 2: score " in said and "update 3: score " in said
    assert kept["update"] in (2, 3) and kept["updates"] == 3 and kept["prompt"] == values["validation_prompt"]
    assert kept["scorer"] == "the package's scorer of the embedded model's world"
