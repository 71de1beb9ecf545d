"""More than a hundred mistakes that users make on a command line, in a folder made for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Mistake:
    """A command line, what its message must say, and whether something heavy must be loaded to find it."""

    command: str
    says: str
    loads: bool = False


def make_place(folder: Path) -> None:
    """Pictures, files that are none, adapter folders by their manifests, and option files, in `folder`."""
    Image.new("RGB", (64, 48)).save(folder / "photo.png")
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    Image.new("L", (48, 48), 255).save(folder / "square.png")
    (folder / "text.png").write_text("hello")
    (folder / "notes.txt").write_text("hello")
    (folder / "SD.SAFETENSORS").write_text("hello")
    for name, concepts in (("plain", {}), ("pets", {"<cat1>": {}, "<dog1>": {}})):
        (folder / name).mkdir()
        (folder / name / "adapter.json").write_text(json.dumps({"concepts": concepts}))
    (folder / "empty").mkdir()
    pictures = folder / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 48)).save(pictures / "1.png")
    Image.new("RGB", (64, 48)).save(pictures / "2.png")
    named = folder / "named"
    named.mkdir()
    Image.new("RGB", (64, 48)).save(named / "1.png")
    (named / "metadata.jsonl").write_text('{"file_name": "one.png", "text": "a cat"}\n')
    (folder / "taken").mkdir()
    (folder / "taken" / "trajectories").write_text("mine")
    (folder / "bad.yaml").write_text("rnak: 4\n")
    (folder / "nested.yaml").write_text("config: other.yaml\n")
    (folder / "list.yaml").write_text("- rank\n")


TRAIN, MULTI = "train single_image photo.png --caption cat", "train multi_concept photo.png"
PRIOR = f"{TRAIN} --with_prior_preservation --class_prompt cat"
TWO = f"{MULTI} --concepts '<a> cat' '<b> dog'"
PHOTO = "edit photo.png --source 'a cat'"
MISTAKES = (
    Mistake("edti", "unknown command edti: did you mean edit?"),
    Mistake("train", "personalize train needs a name: catalogue"),
    Mistake("train single", "there is no personalize train single: did you mean single_image?"),
    Mistake("train single_image", "name the pictures in one way"),
    Mistake("train single_image missing.png --caption cat", "missing.png: no such file or folder"),
    Mistake("train single_image text.png --caption cat", "text.png is not a picture Pillow can read"),
    Mistake("train single_image tiny.png --caption cat", "each side needs at least 16 px"),
    Mistake("train single_image photo.png", "photo.png has no caption: pass --caption"),
    Mistake("train single_image photo.png --caption ' '", "the caption from --caption is empty"),
    Mistake("train single_image empty --caption cat", "empty holds no picture"),
    Mistake("train single_image pictures", "pictures/1.png has no caption"),
    Mistake("train single_image named", "line 1 names one.png, which is not in named"),
    Mistake(f"{TRAIN} --dataset_name x", "got 2 of picture, --instance_image"),
    Mistake("train single_image pictures --caption cat --instance_mask photo.png", "a mask belongs to one picture"),
    Mistake(f"{TRAIN} --instance_mask missing.png", "missing.png: no such file"),
    Mistake(f"{TRAIN} --rnak 4", "unknown option --rnak: did you mean --rank?"),
    Mistake(f"{TRAIN} --rank many", "--rank is 'many', expected a whole number"),
    Mistake(f"{TRAIN} --rank 0", "--rank is 0: give a number from 1 to 1,000,000"),
    Mistake(f"{TRAIN} --rank 100000000", "--rank is 100,000,000: give a number from 1 to 1,000,000"),
    Mistake(f"{TRAIN} --resolution 7", "--resolution is 7: this base needs at least 32 px on a side"),
    Mistake(f"{TWO} --resolution 7", "--resolution is 7: this base needs at least 32 px on a side"),
    Mistake(f"{TRAIN} --mixed_precision fp8", "--mixed_precision is 'fp8': choose one of no, fp16, bf16"),
    Mistake(f"{TRAIN} --config missing.yaml", "--config missing.yaml: no such file; presets:"),
    Mistake(f"{TRAIN} --config bad.yaml", "unknown key in bad.yaml: rnak: did you mean rank?"),
    Mistake(f"{TRAIN} --config nested.yaml", "a file cannot name other files"),
    Mistake(f"{TRAIN} --config list.yaml", "list.yaml holds a list"),
    Mistake(f"{TRAIN} --num_processes two", "--num_processes must be a whole number from 1, got two"),
    Mistake(f"{TRAIN} --pretrained_model_name_or_path nowhere", "no base model at nowhere"),
    Mistake(f"{TRAIN} --pretrained_model_name_or_path empty", "it has no model_index.json"),
    Mistake(f"{TRAIN} --pretrained_model_name_or_path notes.txt", "notes.txt is no .safetensors file"),
    Mistake(f"{TRAIN} --pretrained_model_name_or_path SD.SAFETENSORS", "SD.SAFETENSORS: rename it to SD.safetensors"),
    Mistake(f"{TRAIN} --with_prior_preservation", "--with_prior_preservation needs --class_prompt"),
    Mistake(
        f"{TRAIN} --with_prior_preservation --class_prompt cat --class_data_dir nowhere", "nowhere: no such folder"
    ),
    Mistake(f"{TRAIN} --with_prior_preservation --class_prompt cat --class_data_dir empty", "empty holds no picture"),
    Mistake(f"{TRAIN} --resume_from_checkpoint checkpoint-9", "no checkpoint at checkpoint-9"),
    Mistake(f"{TRAIN} --output_dir notes.txt", "notes.txt is a file, a folder was expected"),
    Mistake(f"{TRAIN} --learning_rate nan", "learning_rate"),
    Mistake("edit plain --prompt cat --strength inf", "--strength is inf, expected a number"),
    Mistake(f"{PHOTO} --weight cat=nan", "write word=factor"),
    Mistake(f"{TRAIN} --image_column photo", "image_column photo is for data sets"),
    Mistake(MULTI, "name at least one concept, e.g. --concepts"),
    Mistake("train multi_concept --concepts '<a> cat'", "name one picture"),
    Mistake(f"{MULTI} --concepts cat", "'cat' cannot be a token"),
    Mistake(f"{MULTI} --concepts '<a>'", "token <a> needs a class phrase"),
    Mistake(f"{MULTI} --concepts '<a> cat' '<a> dog'", "the token <a> is given twice"),
    Mistake(f"{TWO} --instance_prompt 'a <a> cat'", "there must be one “<b> dog” in the prompt, there is none"),
    Mistake(f"{TWO} --masks photo.png", "2 of --concepts need as many --masks or none, got 1"),
    Mistake(f"{TWO} --mask_weight 1", "mask_weight needs masks"),
    Mistake("train multi_concept pictures --concepts '<a> cat'", "must hold exactly one picture, found 2"),
    Mistake("edit nowhere --prompt cat", "nowhere does not exist: name an adapter folder"),
    Mistake("edit empty --prompt cat", "empty is no adapter folder"),
    Mistake("edit plain", "personalize edit needs --prompt"),
    Mistake("edit plain --prompt ' '", "the prompt is empty"),
    Mistake("edit pets --prompt 'a <cat2> cat'", "which the adapter has not learned: it has <cat1>, <dog1>"),
    Mistake("edit plain --prompt cat --cuda_graph --cpu", "--cuda_graph does not go with --cpu"),
    Mistake("edit plain --prompt cat --cuda_graph --torch_compile", "--cuda_graph does not go with --torch_compile"),
    Mistake("edit plain --prompt cat --num_images 0", "--num_images is 0: give a number from 1"),
    Mistake("edit plain --prompt cat --num_images -1", "--num_images is -1: give a number from 1"),
    Mistake("edit plain --prompt cat --alpha", "--alpha needs a value, got nothing"),
    Mistake("edit plain --prompt cat --auto --alpha 1", "leave out --alpha, or --auto"),
    Mistake("edit plain --prompt cat --clip_model x", "--clip_model belongs to --auto: add --auto"),
    Mistake("edit plain --prompt cat --c2pa a.pem b.pem --no_provenance", "--no_provenance keeps it out"),
    Mistake("edit plain --prompt cat --budget 32", "--budget belongs to --auto: add --auto"),
    Mistake("edit plain --prompt cat --auto", "source.png does not exist"),
    Mistake("edit someone/cat:cat.safetensors --prompt cat --auto", "cat.safetensors holds no picture for --auto"),
    Mistake("edit plain --prompt cat --seeds 1 2 --num_images 3", "--seeds lists every seed"),
    Mistake("edit plain --prompt cat --gamma 1 --beta 1", "--gamma is vector subtraction"),
    Mistake("edit missing.png --source cat --target dog", "missing.png: no such file"),
    Mistake("edit photo.png --target dog", "personalize edit needs --source"),
    Mistake(PHOTO, "nothing is to change"),
    Mistake(f"{PHOTO} --target dog --trajectory notes.txt", "notes.txt is a file, a folder was expected"),
    Mistake(f"{PHOTO} --swap cat", "write old=new, for example cat=dog"),
    Mistake(f"{PHOTO} --weight cat=much", "write word=factor"),
    Mistake(f"{PHOTO} --target dog --swap cat=dog", "two ways to say one thing"),
    Mistake(f"{PHOTO} --target dog --strict_background", "--strict_background belongs to --uniform"),
    Mistake(f"{PHOTO} --target dog fox --mask missing.png", "missing.png: no such file"),
    Mistake(f"{PHOTO} --target dog --mask 10,10,20", "'10,10,20' is no box left,top,right,bottom in pixels"),
    Mistake(f"{PHOTO} --target dog --mask 10%,10%,20%,20%", "is no box left,top,right,bottom in pixels"),
    Mistake(f"{PHOTO} --swap 'cat=<cat9> cat'", "the prompt says <cat9>, but there is no adapter that has learned it"),
    Mistake(f"{PHOTO} --swap 'cat=<c> cat' --adapter pets", "<c>, which the adapter has not learned: it has <cat1>"),
    Mistake(f"{PHOTO} --target dog --adapter nowhere", "nowhere does not exist"),
    Mistake(
        f"{PHOTO} --target dog --mask 10,10,65,20", "the box 10,10,65,20 does not lie in the picture of 64×48 px: "
    ),
    Mistake(f"{PHOTO} --target dog --mask square.png", "the mask is 48×48 px, the picture 64×48: give a mask of the p"),
    Mistake(f"{PHOTO} --report --background_mask square.png", "the mask is 48×48 px, the picture 64×48"),
    Mistake(f"{PHOTO} --report --region cat=square.png", "the mask is 48×48 px, the picture 64×48"),
    Mistake(f"{PHOTO} --report --region cat=20,10,10,20", "does not lie in the picture of 64×48 px"),
    Mistake(f"{PHOTO} --target dog --output_dir taken", "taken/trajectories is a file, a folder was expected"),
    Mistake(f"{PHOTO} --swap dog=cat", "the word 'dog' is not in the prompt 'a cat': its words are a, cat"),
    Mistake(
        f"{PHOTO} --target 'a dog' --weight dig=2", "the word 'dig' is not in the prompt 'a dog': did you mean dog"
    ),
    Mistake(f"{PHOTO} --weight 'Cat a=2'", "the word 'Cat a' is not in the prompt 'a cat'"),
    Mistake(f"{PHOTO} --target 'a dog' --local fox=dog", "the word 'fox' is not in the prompt 'a cat'"),
    Mistake(f"{PHOTO} --target 'a dog' 'a fox' --local cat=dog", "the word 'dog' is not in the prompt 'a fox'"),
    Mistake(f"{PHOTO} --target 'a dog' --local fox", "the word 'fox' is not in the prompt 'a cat'"),
    Mistake(f"{PHOTO} --weight 3", "'3': write word=factor, for example fluffy=3"),
    Mistake(f"{PHOTO} --weight =3", "'=3': write word=factor, for example fluffy=3"),
    Mistake(f"{PHOTO} --target dog --local ''", "write one word, or old=new, for example cat=dog"),
    Mistake(
        f"{PHOTO} --target dog --inversion ddpm --num_inference_steps 1",
        "ddpm carries out 64% of the steps, which is none of 1: take 2 or more",
    ),
    Mistake("drag photo.png --from 1,2 --to 3,4 --mask square.png", "the mask is 48×48 px, the picture 64×48"),
    Mistake("drag photo.png --from 1,2 --to 3,4 --mask photo.png --add 5,5", "--add and --remove change the mask that"),
    Mistake("drag photo.png --from 1,2 --to 3,4 --remove 64,5", "point of the mask 64,5 is outside the picture"),
    Mistake("drag photo.png --from 1,2", "personalize drag needs --to"),
    Mistake("drag photo.png --from 1 --to 3,4", "a point is x,y in pixels"),
    Mistake("drag photo.png --from 1,2 3,4 --to 3,4", "2 of --from and 1 of --to"),
    Mistake("drag missing.png --from 1,2 --to 3,4", "missing.png: no such file"),
    Mistake("drag photo.png --from 64,2 --to 3,4", "handle 64,2 is outside the picture: it is 64×48 px"),
    Mistake("drag photo.png --from 1,2 1,2 --to 3,4 5,6", "one handle has two targets, 3,4 and 5,6"),
    Mistake("quickstart missing.png", "missing.png: no such file or folder"),
    Mistake("quickstart photo.png --caption cat --scene 2", "--scene 2 is a bundled picture: leave it out"),
    Mistake("quickstart --caption cat", "--caption belongs to a picture of your own"),
    Mistake("inspect photo.png --picture x.png", "photo.png is a picture, --picture draws what an adapter changes"),
    Mistake("inspect missing.safetensors", "missing.safetensors does not exist"),
    Mistake("verify nowhere", "nowhere does not exist"),
    Mistake("convert missing.safetensors --to kohya --output x.safetensors", "missing.safetensors does not exist"),
    Mistake("evaluate nowhere --results empty", "nowhere does not exist"),
    Mistake("export lora nowhere --output x.safetensors", "nowhere does not exist"),
    Mistake("export merge nowhere pets --output x", "nowhere does not exist"),
    Mistake("export tokens empty --output x", "empty is no adapter folder"),
    Mistake("export checkpoint plain --output photo.png", "photo.png exists already"),
    Mistake("train catalogue missing.csv", "missing.csv: no such file; name a CSV table"),
    Mistake("edit missing.csv --num_inference_steps 5", "each row of the table has its own, in a column num_inference"),
    Mistake(f"{PHOTO} --target dog --resolution 7", "--resolution is 7: this base needs at least 32 px on a side"),
    Mistake("drag photo.png --from 1,2 --to 3,4 --resolution 7", "--resolution is 7: this base needs at least 32 px"),
    Mistake("edit missing.csv", "missing.csv: no such file; name a CSV table"),
    Mistake(f"{TRAIN} --max_train_steps 0", "--max_train_steps is 0: give a number from 1"),
    Mistake(
        "drag photo.png --from 1,2 --to 3,4 --num_inference_steps 0", "--num_inference_steps is 0: give a number from 1"
    ),
    Mistake("edit plain --prompt cat --scheduler dpm", "unknown --scheduler dpm: choose one of ddim, ddpm, "),
    Mistake("edit plain --prompt cat --forget decodr=0.5", "did you mean decoder"),
    Mistake("edit plain --prompt cat --forget none decoder=5", "decoder=5"),
    Mistake("edit plain --prompt cat --forget encoder+midle", "midle"),
    Mistake("edit plain --prompt cat --height 130", "--height is 130: both sides must be multiples of 4 px"),
    Mistake("edit plain --prompt cat --width 100 --pretrained_model_name_or_path a/b", "multiples of 8 px, such as 96"),
    Mistake("export lora plain --output x.safetensors --forget decodr", "did you mean decoder"),
    Mistake("export checkpoint plain --output x --forget decodr", "did you mean decoder"),
    Mistake("edit plain --prompt cat --seeds 1,2,3", "expected whole numbers with spaces between them"),
    Mistake(
        "edit plain --prompt cat --alpha 0,8",
        "--alpha is '0,8', expected numbers with spaces between them, such as 0.8 1",
    ),
    Mistake(f"{TRAIN} --report_to foo", "--report_to is 'foo': choose one of tensorboard"),
    Mistake(f"{PHOTO} --target dog --dpl --region cat", "'cat': write noun=mask.png"),
)
