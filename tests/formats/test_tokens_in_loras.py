"""Learned tokens inside LoRA files, and words that come from file names."""

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.errors import UserError
from personalize.formats.inspection import inspect_file
from personalize.formats.textual_inversion_files import bundled_token
from personalize.io.tensor_files import read_tensors
from tests.formats.test_conversion import convert
from tests.support.foreign_files import kohya, save, small_state


def bundle(path, **rows):
    tensors = {f"bundle_emb.{name.replace('_DOT_', '.')}.string_to_param.*": part for name, part in rows.items()}
    return save(path, kohya(small_state("sd1"), "sd1", 4.0) | tensors)


@pytest.mark.parametrize("to", ["kohya", "peft"])
@pytest.mark.parametrize("name", ["mycat", "MyCat"])  # file systems of Windows and macOS know no case
def test_the_file_of_a_token_never_takes_the_place_of_the_lora(tmp_path, name, to):
    file = bundle(tmp_path / "in.safetensors", mycat=torch.ones(2, 768))
    said = r"is also the file of its learned token mycat: name another --output"
    output = tmp_path / f"{name}.safetensors"
    if to == "peft":
        assert convert(file, "peft", tmp_path / name).is_dir()  # a folder beside learned_embeds.safetensors
        output = tmp_path / "learned_embeds.safetensors"
        output.unlink()
        said = "is also the file of its learned token"
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=said) as caught:
        convert(file, to, output)
    assert "\n" not in str(caught.value) and sorted(path.name for path in tmp_path.iterdir()) == before
    convert(file, "kohya", tmp_path / "other.safetensors")
    assert "emb_params" in read_tensors(tmp_path / "mycat.safetensors").tensors


def test_names_of_tokens_may_have_dots(tmp_path):
    one, two = torch.full((1, 768), 0.1), torch.full((1, 768), 0.2)
    file = bundle(tmp_path / "in.safetensors", bad_v1_DOT_3=one, bad_v1_DOT_2=two)
    assert {token["token"] for token in inspect_file(file).tokens} == {"bad_v1.3", "bad_v1.2"}
    convert(file, "kohya", tmp_path / "out.safetensors", family="sd1")
    assert torch.equal(read_tensors(tmp_path / "bad_v1.3.safetensors").tensors["emb_params"], one)
    assert torch.equal(read_tensors(tmp_path / "bad_v1.2.safetensors").tensors["emb_params"], two)
    for name, key in [("a.clip_l", "clip_g"), ("a.b", "clip_l_out"), ("a", "string_to_token.*"), ("a", "unheard.of")]:
        assert bundled_token(f"bundle_emb.{name}.{key}") == (name, key)


@pytest.mark.parametrize(("name", "token"), [("my cat", "<my_cat>"), ("my-cat", "<my-cat>"), ("a  b\tc", "<a_b_c>")])
def test_a_file_whose_name_has_spaces_gives_a_token_in_brackets_as_any_other(tmp_path, name, token):
    file = save(tmp_path / f"{name}.safetensors", {"emb_params": torch.ones(2, 768)})
    assert list(Adapter.load(file).concepts) == [token]


def test_a_token_of_sdxls_first_encoder_alone_stays_one(tmp_path):
    """It was written as a token of SD 1.x, in a file of its own and beside its LoRA; the trigger is the file's name."""
    rows, about = torch.randn(2, 768), {"modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion"}
    alone = save(tmp_path / "cat.safetensors", {"clip_l": rows}, about)
    lora = kohya(small_state("sdxl", want=lambda path: path.startswith("mid_block.") and ".attn" in path), "sdxl", 4.0)
    bundle = save(tmp_path / "in.safetensors", lora | {"bundle_emb.fox.clip_l": rows})
    convert(alone, "kohya", tmp_path / "cat2.safetensors")
    convert(bundle, "kohya", tmp_path / "out.safetensors")
    for trigger in ("cat2", "fox"):
        found = read_tensors(tmp_path / f"{trigger}.safetensors")
        assert found.tensors.keys() == {"clip_l"} and torch.equal(found.tensors["clip_l"], rows)
        assert found.metadata["modelspec.architecture"] == about["modelspec.architecture"]
        assert found.metadata["modelspec.title"] == found.metadata["modelspec.trigger_phrase"] == trigger
