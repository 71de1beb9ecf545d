"""inspect, convert and verify on LoRA files for diffusion transformers, as their users call them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from personalize.cli.main import main
from personalize.formats.adapter_source import open_adapter
from personalize.formats.diffusion_transformers.reading import read
from personalize.formats.diffusion_transformers.writing import tensors_in
from personalize.formats.folder_inspection import inspect_folder
from personalize.formats.inspection import inspect_file
from personalize.formats.inspection_report import report
from tests.support.transformer_loras import random_pairs, update

WIDTH = 3072
BLOCK = {
    "transformer_blocks.0.attn.to_q": torch.Size((WIDTH, WIDTH)),
    "transformer_blocks.0.attn.to_k": torch.Size((WIDTH, WIDTH)),
    "transformer_blocks.0.attn.to_v": torch.Size((WIDTH, WIDTH)),
    "single_transformer_blocks.3.attn.to_q": torch.Size((WIDTH, WIDTH)),
    "single_transformer_blocks.3.attn.to_k": torch.Size((WIDTH, WIDTH)),
    "single_transformer_blocks.3.attn.to_v": torch.Size((WIDTH, WIDTH)),
    "single_transformer_blocks.3.proj_mlp": torch.Size((4 * WIDTH, WIDTH)),
    "norm_out.linear": torch.Size((2 * WIDTH, WIDTH)),
}
ROOT = {"x_embedder": torch.Size((WIDTH, 64))}
SOFTWARE = {"software": json.dumps({"name": "ai-toolkit", "version": "0.7.2"}), "format": "pt"}


def write(path, sizes=BLOCK, scheme="diffusers", metadata=None, rank=1, dtype=torch.float32):
    """A LoRA file for FLUX.1 at its released width, and the truth."""
    pairs = random_pairs(dict(sizes), rank)
    save_file(tensors_in(pairs, "flux1", scheme, dtype), path, metadata or {})
    return path, pairs


def run(capsys, *words):
    code = main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_inspect_says_who_wrote_it_what_it_covers_and_who_reads_it(tmp_path):
    file, _ = write(tmp_path / "a.safetensors", metadata=SOFTWARE)
    found = inspect_file(file)
    assert (found.family, found.writer.split(" (")[0]) == ("flux1", "ai-toolkit 0.7.2")
    assert "FLUX.1" in found.family_by and found.components == {"transformer": 8} and not found.dropped
    assert found.readers["diffusers"] == ("yes", "") and found.readers["ComfyUI"] == ("yes", "")
    assert found.readers["personalize"][0] == "partly" and found.readers["InvokeAI"][0] == "unknown"
    rows = {row.block: row for row in found.rows}
    assert rows["transformer_blocks.0"].counts["attention"] == (3, 8)
    assert rows["single_transformer_blocks.4–37"].counts["attention"] == (0, 3 * 34)
    assert found.problems == [] and "attention" in report(found)


def test_inspect_names_every_layer_that_diffusers_drops(tmp_path):
    """diffusers 0.42 gives x_embedder of a kohya file a name without `transformer.`, and then takes no notice of it."""
    found = inspect_file(write(tmp_path / "a.safetensors", BLOCK | ROOT, "kohya")[0])
    assert found.dropped == {"diffusers": ["transformer.norm_out.linear", "transformer.x_embedder"]}
    assert found.readers["diffusers"][0] == "partly" and "x_embedder" not in found.readers["ComfyUI"][1]


def test_inspect_says_why_nothing_happens(tmp_path):
    found = inspect_file(write(tmp_path / "a.safetensors", scheme="PEFT folder")[0])
    assert found.readers["ComfyUI"][0] == found.readers["diffusers"][0] == "no" and found.writer.startswith("PEFT")
    tensors = tensors_in(random_pairs(BLOCK, 1), "flux1", "OneTrainer", torch.float32)
    save_file({key: t * (".lora_up" not in key) for key, t in tensors.items()}, tmp_path / "b.safetensors")
    found = inspect_file(tmp_path / "b.safetensors")
    assert found.problems[0].startswith("8 layer(s) are zero and change nothing") and "OneTrainer" in found.writer


def test_inspect_names_what_diffusers_drops_of_onetrainers_names(tmp_path):
    """Its converter knows the attention alone of these names."""
    found = inspect_file(write(tmp_path / "a.safetensors", scheme="OneTrainer")[0])
    assert found.dropped == {"diffusers": ["transformer.single_transformer_blocks.3.proj_mlp"]}
    assert found.readers["ComfyUI"] == ("yes", "")


@pytest.mark.parametrize(
    ("scheme", "to"),
    [
        ("OneTrainer", "diffusers"), ("ComfyUI", "peft"), ("kohya", "kohya"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("diffusers", "kohya"), ("ComfyUI", "diffusers"))),
    ],
)  # fmt: skip
def test_convert_gives_every_change_back(tmp_path, capsys, scheme, to):
    file, pairs = write(tmp_path / "a.safetensors", scheme=scheme)
    output = tmp_path / ("out" if to == "peft" else "out.safetensors")
    code, text = run(capsys, "convert", file, "--to", to, "--output", output)
    assert code == 0 and "FLUX.1, 8 layers, rank 1, verified" in text
    found = read(output, open_adapter(output), "flux1").pairs
    assert found.keys() == pairs.keys()
    for name, pair in pairs.items():
        rows, columns = found[name][1] * 1.0, found[name][0]
        torch.testing.assert_close(rows[:8] @ columns, pair[1][:8] @ pair[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rows @ columns[:, :8], pair[1] @ pair[0][:, :8], atol=1e-5, rtol=1e-5)
    if to != "peft":
        assert inspect_file(output).readers["ComfyUI"][0] == "yes"


def test_a_peft_folder_may_hold_hidden_files_and_no_others(tmp_path, capsys):
    file, _ = write(tmp_path / "a.safetensors")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".DS_Store").write_text("of macOS")
    command = ["convert", file, "--to", "peft", "--output", folder, "--overwrite"]
    assert run(capsys, *command)[0] == 0 and (folder / ".DS_Store").is_file()
    (folder / "notes.txt").write_text("mine")
    code, said = run(capsys, *command)
    assert code == 2 and "already holds notes.txt" in said


def test_alphas_ranks_and_algorithms_of_others_become_one_lora(tmp_path, capsys):
    """alpha 1 at rank 2, a LoHa, a LoKr, a full difference and a changed bias, under LyCORIS' names."""
    noise = torch.Generator().manual_seed(0)
    name, stem = "transformer.transformer_blocks.{}.attn.to_{}", "lycoris_transformer_blocks_{}_attn_to_{}"

    def random(*size):
        return torch.randn(*size, generator=noise)

    down, up, small = random(2, 32), random(32, 2), random(32, 32)
    w1a, w1b, w2a, w2b, k1, k2 = (random(*s) for s in ((32, 2), (2, 32), (32, 2), (2, 32), (4, 4), (8, 8)))
    tensors = {
        f"{stem.format(0, 'q')}.lora_down.weight": down, f"{stem.format(0, 'q')}.lora_up.weight": up,
        f"{stem.format(0, 'q')}.alpha": torch.tensor(1.0), f"{stem.format(0, 'k')}.hada_w1_a": w1a,
        f"{stem.format(0, 'k')}.hada_w1_b": w1b, f"{stem.format(0, 'k')}.hada_w2_a": w2a,
        f"{stem.format(0, 'k')}.hada_w2_b": w2b, f"{stem.format(0, 'v')}.lokr_w1": k1,
        f"{stem.format(0, 'v')}.lokr_w2": k2, f"{stem.format(1, 'q')}.diff": small,
        f"{stem.format(1, 'q')}.diff_b": random(32),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    code, text = run(
        capsys, "convert", tmp_path / "a.safetensors", "--to", "diffusers", "--output", tmp_path / "b.safetensors"
    )
    assert code == 0 and "1 changed bias(es)" in text
    found = read("b", open_adapter(tmp_path / "b.safetensors"), "flux1").pairs
    truth = {name.format(0, "q"): up @ down / 2, name.format(0, "k"): (w1a @ w1b) * (w2a @ w2b),
             name.format(0, "v"): torch.kron(k1, k2), name.format(1, "q"): small}  # fmt: skip
    assert found.keys() == truth.keys()
    for layer, expected in truth.items():
        torch.testing.assert_close(update(found[layer]), expected, atol=1e-4, rtol=1e-4)


def test_xlabs_names_and_text_encoders_are_read(tmp_path):
    a, b = torch.randn(1, WIDTH), torch.randn(3 * WIDTH, 1)
    tensors = {
        "double_blocks.0.processor.qkv_lora1.down.weight": a,
        "double_blocks.0.processor.qkv_lora1.up.weight": b,
        "single_blocks.1.processor.qkv_lora.down.weight": a.clone(),
        "single_blocks.1.processor.qkv_lora.up.weight": b.clone(),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = read("x", open_adapter(tmp_path / "x.safetensors"), "flux1").pairs
    torch.testing.assert_close(update(found["transformer.single_transformer_blocks.1.attn.to_v"]), (b @ a)[2 * WIDTH :])
    text = {"text_model.encoder.layers.0.mlp.fc1": torch.Size((3072, 768))}
    encoder = random_pairs(text, 1, "text_encoder")
    pairs = random_pairs(dict(list(BLOCK.items())[:1]), 1) | encoder
    for scheme in ("diffusers", "kohya", "ComfyUI"):
        save_file(tensors_in(pairs, "flux1", scheme, torch.float32), tmp_path / "t.safetensors")
        assert read("t", open_adapter(tmp_path / "t.safetensors"), "flux1").pairs.keys() == pairs.keys()
        verdict = inspect_file(tmp_path / "t.safetensors").readers["diffusers"]
        # diffusers 0.42 reads ComfyUI's names where the endings are lora_down and lora_up, and is silent where not
        assert verdict == (("no", "refuses it: it finds none of its layers, and says nothing") if scheme == "ComfyUI"
                           else ("yes", "")), scheme  # fmt: skip


def test_verify_passes_what_every_reader_reads_and_names_what_one_drops(tmp_path, capsys):
    assert run(capsys, "verify", write(tmp_path / "a.safetensors")[0])[0] == 0
    code, text = run(capsys, "verify", write(tmp_path / "b.safetensors", BLOCK | ROOT, "kohya")[0])
    assert code == 1 and "layer transformer.x_embedder is not loaded: convert --to diffusers" in text
    tensors = tensors_in(random_pairs({"x_embedder": torch.Size((WIDTH, 63))}, 1), "flux1", "diffusers", torch.float32)
    save_file(tensors | {"transformer.nothing.lora_A.weight": torch.ones(1, 4)}, tmp_path / "c.safetensors")
    code, text = run(capsys, "verify", tmp_path / "c.safetensors")
    assert code == 1 and "no layer of FLUX.1 has the key 'transformer.nothing" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"transformer.x_embedder.lora_A.weight": torch.ones(1, 64)}, "lacks"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "not finite"),
        (lambda t: t | {"transformer.odd.lora_A.weight": torch.ones(1, 4)}, "belongs to no layer of FLUX.1"),
        (lambda t: {k: v.repeat(3, 1) if "lora_B" in k else v for k, v in t.items()}, "makes a change of"),
        (lambda t: t | {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(1, WIDTH),
                        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(3 * WIDTH, 1)}, "twice"),
        (lambda t: t | {"transformer.x_embedder.dora_scale": torch.ones(WIDTH, 1)}, "DoRA"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_in_one_line(tmp_path, capsys, change, said):
    tensors = tensors_in(random_pairs(dict(list(BLOCK.items())[:3]), 1), "flux1", "diffusers", torch.float32)
    save_file(change(tensors), tmp_path / "a.safetensors")
    code, text = run(
        capsys, "convert", tmp_path / "a.safetensors", "--to", "kohya", "--output", tmp_path / "o.safetensors"
    )
    assert (
        code == 2 and said in text and len(text.strip().splitlines()) == 1 and not (tmp_path / "o.safetensors").exists()
    )
    assert inspect_file(tmp_path / "a.safetensors").problems


def test_what_two_families_have_in_common_is_told_apart_by_the_metadata(tmp_path):
    """FLUX.1 and Chroma share the attention of their first blocks, by name and by shape."""
    shared = dict(list(BLOCK.items())[:3])
    assert "Chroma has too" in inspect_file(write(tmp_path / "a.safetensors", shared)[0]).family_by
    stated = {"modelspec.architecture": "chroma/lora"}
    found = inspect_file(write(tmp_path / "b.safetensors", shared, metadata=stated)[0])
    assert found.family == "chroma" and found.family_by.startswith("its metadata")


def test_projections_that_onetrainer_trained_as_one_are_split(tmp_path):
    a, b = torch.randn(2, 8), torch.randn(56, 2)  # three projections of 8 outputs, and 4 · 8 of the feed-forward
    stem = "transformer.single_transformer_blocks.0.qkv_mlp"
    save_file({f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}, tmp_path / "a.safetensors")
    found = read("a", open_adapter(tmp_path / "a.safetensors"), "flux1").pairs
    names = [f"transformer.single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v")]
    parts = [update(found[name]) for name in [*names, "transformer.single_transformer_blocks.0.proj_mlp"]]
    torch.testing.assert_close(torch.cat(parts), b @ a)


def test_the_picture_has_room_for_the_names_of_its_blocks(tmp_path, capsys):
    file, _ = write(tmp_path / "a.safetensors")
    code, _ = run(capsys, "inspect", file, "--picture", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert code == 0 and image.width > 190 + 5 * 112  # five columns; "single_transformer_blocks.4–37" takes 190


def test_convert_to_a_lower_rank_is_the_nearest_and_says_its_error(tmp_path, capsys):
    """Of two components of sizes 3 and 4 on one layer, the smaller is lost: 3 / 5 of the size."""
    a = torch.eye(2, WIDTH)
    b = torch.zeros(WIDTH, 2)
    b[0, 0], b[1, 1] = 3.0, 4.0
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "a.safetensors")
    words = ("convert", tmp_path / "a.safetensors", "--to", "diffusers", "--output", tmp_path / "b.safetensors")
    code, text = run(capsys, *words, "--rank", 1)
    assert code == 0 and "60.00%" in text and "rank 1, verified" in text
    pair = read("b", open_adapter(tmp_path / "b.safetensors"), "flux1").pairs[name]
    torch.testing.assert_close(update(pair)[:2, :2], torch.tensor([[0.0, 0.0], [0.0, 4.0]]), atol=1e-5, rtol=1e-5)
    code, text = run(capsys, *words, "--rank", 2, "--overwrite")
    assert code == 2 and "--rank must be lower" in text


def test_other_commands_say_whose_file_it_is_and_a_wrong_family_is_refused(tmp_path, capsys):
    file, _ = write(tmp_path / "a.safetensors")
    code, text = run(capsys, "edit", file, "--prompt", "a cat")
    assert code == 2 and "is a LoRA for FLUX.1" in text
    code, text = run(capsys, "convert", file, "--to", "kohya", "--output", tmp_path / "o", "--family", "sd1")
    assert code == 2 and "leave --family sd1 out" in text
    row = next(row for row in inspect_folder(tmp_path) if row.file == "a.safetensors")
    assert (row.family, row.modules, row.readers["ComfyUI"]) == ("flux1", 8, "yes")
