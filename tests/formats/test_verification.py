"""Verification: every kind of error in a file is found and named, by code independent of the code that writes files."""

import ast
import json
from pathlib import Path

import pytest
import torch

from personalize.adapters import adapter as adapter_module
from personalize.adapters.adapter import Adapter
from personalize.cli.commands import verify
from personalize.cli.options import VerifyConfig
from personalize.editing.attach import attach
from personalize.errors import UserError
from personalize.formats import lora_files, verification
from personalize.formats.folder_inspection import inspect_folder
from personalize.formats.inspection import inspect_file
from personalize.formats.reader_keys import ReaderKeys, original_paths
from personalize.formats.verification import verify_folder
from personalize.io.tensor_files import read_tensors, tensor_bytes
from personalize.models.empty import empty_model, empty_unet
from tests.support.foreign_files import kohya
from tests.support.lora_states import ATTENTION, paths, predict, random_lora, text_lora
from tests.support.tiny import tiny

DIFFUSERS_FILE, KOHYA_FILE, SOURCE_FILE = (
    "pytorch_lora_weights.safetensors",
    "mine.safetensors",
    "source_embedding.safetensors",
)
MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"


def make(name="sd1", text=False, want=ATTENTION, **options):
    model = tiny(name)
    state = random_lora(paths(model.unet, want)) | (text_lora(model) if text else {})
    width = model.unet.config.cross_attention_dim
    source = {"embeds": torch.linspace(-1, 1, 77 * width).reshape(1, 77, width)}
    info = {"base": model.identity, "caption": "a photo of my cat"}
    return model, Adapter(state, 4, 8.0, source, info | options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = make()[1].save(tmp_path_factory.mktemp("verify") / "mine")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(saved, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, content in saved.items():
        (tmp_path / "mine" / name).write_bytes(content)
    return tmp_path / "mine"


def rewrite(path, change):
    """Change the tensors and header strings of a file in place."""
    content = read_tensors(path)
    change(content.tensors, content.metadata)
    path.write_bytes(tensor_bytes(content.tensors, content.metadata))


def problems(folder, model=None):
    report = verify_folder(folder, model)
    found = {file.file.split()[0]: [] for file in report.files}
    for file in report.files:
        found[file.file.split()[0]] += file.problems
    assert report.ok == (not any(found.values()))
    assert ("NOT verified" in str(report)) == (not report.ok)
    if not report.ok:
        with pytest.raises(UserError, match="does not verify"):
            report.require()
    return found


def test_a_saved_adapter_verifies(folder):
    report = verify_folder(folder)
    assert report.ok and report.require() is report
    assert [(file.matched, file.total) for file in report.files] == [(5, 5), (256, 256), (128, 128), (128, 128), (1, 1)]


def test_one_corrupted_tensor_is_named(folder):
    def change(tensors, metadata):
        tensors[f"{KOHYA}.lora_up.weight"][0, 0] += 0.01

    rewrite(folder / KOHYA_FILE, change)
    found = problems(folder)
    assert len(found[KOHYA_FILE]) == 1 and MODULE in found[KOHYA_FILE][0] and "deviates" in found[KOHYA_FILE][0]
    assert not found[DIFFUSERS_FILE]


def test_one_corrupted_tensor_in_the_diffusers_file_is_named(folder):
    def change(tensors, metadata):
        tensors[f"{MODULE}.lora_A.weight"][0, 0] += 1e-6

    rewrite(folder / DIFFUSERS_FILE, change)
    assert problems(folder)[DIFFUSERS_FILE] == [f"tensor {MODULE}.lora_A.weight is not what was saved"]


@pytest.mark.parametrize("file", [DIFFUSERS_FILE, KOHYA_FILE])
def test_one_dropped_module_is_named(folder, file):
    stem = MODULE if file == DIFFUSERS_FILE else KOHYA

    def change(tensors, metadata):
        for key in [key for key in tensors if key.startswith(f"{stem}.")]:
            del tensors[key]

    rewrite(folder / file, change)
    found = problems(folder)[file]
    assert found and all(MODULE in problem and "missing" in problem for problem in found)


def test_a_module_without_one_of_its_matrices_is_named(folder):
    rewrite(folder / KOHYA_FILE, lambda tensors, metadata: tensors.pop(f"{KOHYA}.lora_down.weight"))
    assert any(MODULE in problem and "only" in problem for problem in problems(folder)[KOHYA_FILE])


def test_one_changed_alpha_is_named(folder):
    rewrite(folder / KOHYA_FILE, lambda tensors, metadata: tensors[f"{KOHYA}.alpha"].mul_(2))
    found = problems(folder)[KOHYA_FILE]
    assert len(found) == 1 and MODULE in found[0]


def test_changed_metadata_of_the_diffusers_file_is_found(folder):
    for field, value in {
        "unet.lora_alpha": 4,
        "unet.r": 2,
        "unet.target_modules": ["to_q", "to_v", "to_out.0"],
    }.items():

        def change(tensors, metadata, field=field, value=value):
            settings = json.loads(metadata["lora_adapter_metadata"])
            metadata["lora_adapter_metadata"] = json.dumps(settings | {field: value})

        before = (folder / DIFFUSERS_FILE).read_bytes()
        rewrite(folder / DIFFUSERS_FILE, change)
        assert any(MODULE in problem for problem in problems(folder)[DIFFUSERS_FILE])
        (folder / DIFFUSERS_FILE).write_bytes(before)
    rewrite(folder / DIFFUSERS_FILE, lambda tensors, metadata: metadata.clear())
    assert any("strength 1 is assumed" in problem for problem in problems(folder)[DIFFUSERS_FILE])


def test_unknown_keys_wrong_shapes_and_numbers_that_are_not_finite_are_named(folder):
    def change(tensors, metadata):
        tensors["lora_unet_nothing.lora_up.weight"] = torch.zeros(2, 2)
        tensors[f"{KOHYA}.lora_up.weight"] = torch.zeros(3, 4)
        other = KOHYA.replace("to_k", "to_q")
        tensors[f"{other}.lora_up.weight"].fill_(float("nan"))

    rewrite(folder / KOHYA_FILE, change)
    found = " ".join(problems(folder)[KOHYA_FILE])
    assert "nothing" in found and f"{MODULE} has shape" in found and MODULE.replace("to_k", "to_q") in found


def test_alpha_keys_together_with_diffusers_metadata_are_found(folder):
    rewrite(folder / KOHYA_FILE, lambda tensors, metadata: metadata.update(lora_adapter_metadata="{}"))
    assert any("diffusers refuses" in problem for problem in problems(folder)[KOHYA_FILE])


def test_a_changed_source_embedding_is_found(folder):
    rewrite(folder / SOURCE_FILE, lambda tensors, metadata: tensors["embeds"].add_(1))
    assert problems(folder)[SOURCE_FILE] == ["tensor embeds is not what was saved"]


@pytest.mark.parametrize(("name", "text"), [("sd1", True), pytest.param("sdxl", True, marks=pytest.mark.slow)])
def test_verifying_with_a_base_model_uses_diffusers_loader_and_leaves_the_model_unchanged(tmp_path, name, text):
    model, adapter = make(name, text)
    before, names = predict(model), [name for name, _ in model.unet.named_modules()]
    report = verify_folder(adapter.save(tmp_path / "mine"), model)
    total = len(adapter.lora) // 2
    assert report.ok and [(file.matched, file.total) for file in report.files][-2:] == [(total, total)] * 2
    assert torch.equal(predict(model), before) and [name for name, _ in model.unet.named_modules()] == names


def test_one_different_alpha_that_diffusers_misreads_is_found(folder):
    """kohya's tools read alphas per module correctly, diffusers does not; only loading through diffusers shows it."""

    def change(tensors, metadata):
        tensors[f"{KOHYA}.alpha"] *= 2
        tensors[f"{KOHYA}.lora_up.weight"] /= 2

    rewrite(folder / KOHYA_FILE, change)
    found = problems(folder)
    assert found.pop("adapter.json") == [f"{KOHYA_FILE} is not what was saved"] and not any(found.values())
    found = problems(folder, make()[0])
    assert found[KOHYA_FILE] and all("attn1.to_k" in problem for problem in found[KOHYA_FILE])


def test_another_family_or_a_loaded_adapter_is_refused(folder):
    with pytest.raises(UserError, match="sd1.*sdxl"):
        verify_folder(folder, tiny("sdxl"))
    model, adapter = make()
    with adapter.apply(model), pytest.raises(UserError, match="already carries"):
        verify_folder(folder, model)


def test_a_wrong_width_is_found_by_shape(folder):
    model = tiny("sd1")
    attention = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_k = torch.nn.Linear(64, 32, bias=False)
    report = verification.compare_files(
        folder, KOHYA_FILE, {MODULE: (torch.ones(4, 64), torch.ones(64, 4), 1.0)}, ReaderKeys("sd1", model.unet)
    )
    assert any(f"{MODULE} has shape (64, 64), the base model's has (32, 64)" in p for p in report[0].problems)


@pytest.mark.parametrize("damage", ["{}", "[]", '{"base": {"family": "x"}}'])
def test_damaged_manifests_are_user_errors(folder, damage):
    (folder / "adapter.json").write_text(damage)
    with pytest.raises(UserError):
        verify_folder(folder)


def test_a_manifest_cannot_name_a_path(folder):
    manifest = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(manifest | {"twin": "../mine.safetensors"}))
    with pytest.raises(UserError, match="no plain file name"):
        verify_folder(folder)


def test_saving_verifies_so_a_mistake_in_the_writer_leaves_no_file(tmp_path, monkeypatch):
    """The most common mistake of writers, diffusers' block names in an SDXL file, is caught by the reader's keys."""
    monkeypatch.setattr(lora_files, "kohya_name", lambda module, family: "lora_" + module.replace(".", "_"))
    with pytest.raises(UserError, match="does not verify"):
        make("sdxl")[1].save(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_the_key_maps_of_writer_and_verifier_share_no_code():
    package = Path(verification.__file__).parent
    for name in ("verification", "reader_keys", "source_reading"):
        tree = ast.parse((package / f"{name}.py").read_text(encoding="utf-8"))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {
            "personalize.formats.lora_files",
            "personalize.formats.lora_keys",
            "personalize.formats.key_parts",
            "personalize.formats.peft_settings",
            "personalize.formats.weight_changes",
            "personalize.adapters.adapter",
        }
    assert adapter_module.verification is verification


def test_both_key_maps_agree_on_every_module_of_sdxl():
    from personalize.formats.lora_keys import original_name

    unet = empty_unet("sdxl")
    assert original_paths(unet) == {original_name(path): path for path in paths(unet)}


def test_the_command_prints_the_report_and_raises_on_a_mismatch(folder, capsys):
    report = verify.run(VerifyConfig(folder))
    assert report.ok and "128 / 128 modules match" in capsys.readouterr().out
    rewrite(folder / KOHYA_FILE, lambda tensors, metadata: tensors[f"{KOHYA}.alpha"].mul_(2))
    with pytest.raises(UserError, match="does not verify"):
        verify.run(VerifyConfig(folder))
    assert "NOT verified" in capsys.readouterr().out


def released(path, family, text, endings, metadata=None):
    """A LoRA of rank 1 in kohya's names on a part of the released model of SD 1.x or 2.x."""
    base = empty_model(family)
    part = base.text_encoders[0] if text else base.unet
    state = random_lora(paths(part, lambda name: name.endswith(endings)), "text_encoder" if text else "unet", rank=1)
    path.write_bytes(tensor_bytes(kohya(state, family, 1.0), metadata))
    return path, len(state) // 2


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(("text", "endings"), [(False, ("to_q", "to_v")), (True, ("q_proj",)), (False, ("proj_in",))])
def test_the_family_is_found_by_all_that_tells_it(tmp_path, family, text, endings):
    """By keys or values of the text, the text encoder's width, or the kind of a projection."""
    path, count = released(tmp_path / "x.safetensors", family, text, endings)
    found = verification.verify_file(path)
    readings = 1 if text else 2  # diffusers is asked about UNets of the released sizes alone
    assert found.ok and [file.matched for file in found.files] == [count] * readings


def test_what_the_metadata_say_decides_where_nothing_else_does(tmp_path):
    path, _ = released(tmp_path / "x.safetensors", "sd2", False, "attn1.to_q", {"ss_base_model_version": "sd_v2"})
    assert verification.verify_file(path).ok


def test_a_module_of_no_model_is_refused_by_every_command_and_inspect_says_so(tmp_path):
    state = random_lora(paths(tiny("sd1").unet, ATTENTION))
    pair = {f"unet.down_blocks.9.attentions.0.proj_in.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    (tmp_path / "x.safetensors").write_bytes(tensor_bytes(state | pair, {"ss_base_model_version": "sd_v1"}))
    verdict, reason = inspect_file(tmp_path / "x.safetensors").readers["personalize"]
    assert verdict == "no" and "1 module(s), first unet.down_blocks.9" in reason
    assert inspect_folder(tmp_path)[0].readers["personalize"] == "no"
    with pytest.raises(UserError, match="in no model|no layer"):
        with attach(tiny("sd1").pipeline(), tmp_path / "x.safetensors"):
            pass
