"""A folder that has what the commands of the pages name: drawn, random and tiny, under the names that stand there."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import foreign
import synthetic_checkpoints as synthetic
import torch
import yaml
from documented import ROOT, blocks, code_lines
from synthetic_download import write_download

from mixmodal.cli import main
from mixmodal.data.shards import read_samples
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.evaluation.scenes import write_scenes
from mixmodal.quickstart import recipe

CLASSES = ("circle", "square", "triangle")
SHORT = {"max_steps": 4, "micro_batch_size": 4, "log_every": 1, "save_every": 2}
"""Of every training of the recipe."""
LONG_ENOUGH = synthetic.SMALL._replace(positions=512)


def write_recipes(root: Path) -> None:
    """The quickstart's own recipes with few pictures and steps: FOLDER, and TUNED of the stage `finetune`."""
    changes: dict[str, dict[str, Any]] = {
        "corpus": {"min_distance": 0.0, "mixed": False},
        "text_tokenizer": {"vocab_size": 400},
        "tokens": {"num_variants": 2},
        "classes": {"max_pictures": 4},
        "samples": {"prompts_per_split": 2},
        "answers": {"per_task": 2, "max_new_tokens": 20},
    }
    trained = {"FOLDER": ("image_tokenizer", "encoder", "pretrain"), "TUNED": ("finetune",)}
    others = {"FOLDER": [*changes][:-1], "TUNED": ["answers", *recipe.GROUPS_OF_TASKS]}
    for folder in trained:
        (root / folder).mkdir()
        for name in (*trained[folder], *others[folder]):
            settings = yaml.safe_load(recipe.read_packaged(f"{name}.yaml")) | changes.get(name, {})
            if name in trained[folder]:
                settings["trainer"] |= {
                    key: value for key, value in SHORT.items() if name == "pretrain" or "eval" not in key
                }
            if name in recipe.GROUPS_OF_TASKS:
                settings["tokens"] = {"sequence_format": "cm3leon", "num_sentinels": 16}
            if name == "encoder":
                settings["model"] |= {"vocab_size": 400}
            (root / folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def draw_picture(path: Path, number: int = 0, size: int = 48) -> None:
    """A coloured shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for pair in synthetic_pairs(number + 1, size, two_things_share=0):
        picture = pair.picture
    picture.save(path)


def own_pictures(root: Path) -> None:
    """`pictures/` as docs/tutorial.md shows it, and a few more."""
    for number, (name, caption) in enumerate((("apple.png", "a red apple on a table"), ("pear.jpg", "two pears"))):
        draw_picture(root / "pictures" / name, number)
        (root / "pictures" / name).with_suffix(".txt").write_text(caption)
    for pair in synthetic_pairs(10, 48):
        pair.picture.save(root / "pictures" / f"{pair.key}.png")
        (root / "pictures" / f"{pair.key}.txt").write_text(pair.caption)


def lines_of(page: str, start: str) -> str:
    """Lines of a page's blocks that begin with `start`."""
    found = [code for _, code in code_lines(ROOT / page) if code.startswith(start)]
    assert found, f"{page} shows no line {start}"
    return "".join(f"{line}\n" for line in found)


def prompt_files(root: Path) -> None:
    """Pictures that prompts name, and `prompts.jsonl` as docs/sampling.md shows it."""
    for number, name in enumerate(("apple.png", "more.png", "FILE")):
        draw_picture(root / f"{name}.png", number, 32)
        (root / f"{name}.png").rename(root / name)
    shown = lines_of("docs/sampling.md", '{"prompt"') + lines_of("docs/sampling.md", '{"key": "apple"')
    (root / "prompts.jsonl").write_text(shown)


def labelled_pictures(root: Path) -> None:
    """Folders with a subfolder a class, cues by name, captions in pairs, and the file of classes."""
    for place, folder in enumerate(("PICTURES", "OTHER_PICTURES", "FEW_PICTURES")):
        for number, name in enumerate(CLASSES):
            for copy in range(2):
                draw_picture(root / folder / name / f"{copy}.png", 6 * place + 2 * number + copy)
    for number, name in enumerate(("circle1-square2.png", "square1-circle3.png")):
        draw_picture(root / "CUE_CONFLICT" / name, number)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def compositions(root: Path) -> None:
    """Pictures with captions of the same words, in the three layouts that docs/classifiers.md names."""
    (root / "images").mkdir()
    for number, name in enumerate(("0.png", "1.png", "images/ex_0_img_0.png", "images/ex_0_img_1.png", "COCO/0.jpg")):
        draw_picture(root / name, number)
    (root / "task.jsonl").write_text(lines_of_table("docs/classifiers.md", '{"images"'))
    winoground = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "collapsed_tag": "Object"}
    winoground |= {"caption_0": "a on b", "caption_1": "b on a", "tag": "Noun"}
    (root / "examples.jsonl").write_text(json.dumps(winoground) + "\n")
    crepe = {"0": {"filename": "0.jpg", "caption": "a on b", "negative_caption": "b on a"}}
    (root / "swap_obj.json").write_text(json.dumps(crepe))


def lines_of_table(page: str, start: str) -> str:
    """What stands between backticks on a page and begins with `start`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text[text.index(f"`{start}") + 1 :].partition("`")[0] + "\n"


def meta_download(root: Path) -> None:
    """`chameleon/data` as Meta's download, and the same as CHAMELEON."""
    for name in ("chameleon/data", "CHAMELEON"):
        write_download(root / name, LONG_ENOUGH)


def other_downloads(root: Path) -> None:
    """Folders as of Anole and Lumina-mGPT, a text model, and `vqgan.ckpt`."""
    from chameleon.synthetic_tokens import text_pieces, tokenizer_json, write_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.save({"state_dict": foreign.draw_state("taming")}, root / "vqgan.ckpt")
    for name, num_reserved in (("Anole-7b-v0.1-hf", 4), ("Lumina-mGPT-7B-768", 120)):
        names = write_tokenizer(root / "tokenizer.json", num_codes=foreign.CODES, num_reserved=num_reserved)
        size = LONG_ENOUGH._replace(vocab=len(names))
        state = synthetic.draw_state(size)
        spelled = synthetic.of_anole(state, size) if "Anole" in name else synthetic.of_shards(state, size)
        folder = synthetic.write_transformers(root / name, spelled, size)
        shutil.move(root / "tokenizer.json", folder / "tokenizer.json")
    pieces, merges = text_pieces("byte_level")
    names = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaConfig(vocab_size=len(names), bos_token_id=1, eos_token_id=2, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(llama).save_pretrained(root / "TinyLlama-1.1B-Chat-v1.0")
    file = json.dumps(tokenizer_json("byte_level", names, merges, ["<unk>", "<s>", "</s>"]))
    (root / "TinyLlama-1.1B-Chat-v1.0" / "tokenizer.json").write_text(file)


def base_tokens(root: Path) -> None:
    """The sources of configs/train/text_base.yaml, by the tokenizers of a base as docs/checkpoints.md makes."""
    images = "runs/quickstart/image_tokenizer/export"
    main(["import", "TinyLlama-1.1B-Chat-v1.0", "--out", "base", "--image_tokenizer", images])
    corpora = ["--config", "configs/data/own_pictures.yaml", "--tokens.text_tokenizer", "base/text_tokenizer.json"]
    corpora += ["--tokens.num_sentinels", "512", "--tokens.sequence_format", "chameleon"]
    for name in ("text", "pairs", "held_out"):
        main(["prepare", *corpora, "--out", f"prepared/{name}"])
        link(root, f"data/tokens/{name}", f"prepared/{name}/tokens")


def chameleon(root: Path) -> None:
    """models/chameleon_7b, an imported Chameleon, which is also MODEL."""
    write_download(root / "download", LONG_ENOUGH)
    main(["import", "download", "--out", "models/chameleon_7b"])
    link(root, "MODEL", "models/chameleon_7b")


def conversations(root: Path) -> None:
    """The files of configs/data/conversations.yaml; the first as docs/finetune.md shows it."""
    shown = {block.language: block.text for block in blocks("docs/finetune.md")}
    for folder in ("conversations", "llava", "edits", "tasks", "preferences", "documents/pictures"):
        for number, name in enumerate(("apple.png", "dark.png", "dog.png", "a.png", "b.png", "1.jpg", "2.jpg")):
            draw_picture(root / folder / name, number, 100)
    (root / "conversations" / "conversations.jsonl").write_text(shown["jsonl"])
    drawn = [line for line in shown["jsonl"].splitlines() if '"a1"' in line or '"a2"' in line]
    (root / "conversations" / "drawn.jsonl").write_text("\n".join(drawn))
    shutil.copy(root / "conversations" / "drawn.jsonl", root / "held_out.jsonl")
    for name in ("apple.png", "dark.png"):
        shutil.copy(root / "conversations" / name, root / name)
    (root / "preferences" / "preferences.jsonl").write_text(shown["pairs"])
    (root / "tasks" / "tasks.jsonl").write_text(shown["json"])
    said = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "An apple."}]
    (root / "llava" / "llava_instruct_150k.json").write_text(
        json.dumps([{"id": "0", "image": "apple.png", "conversations": said}])
    )
    edit = {"input_image": "a.png", "edit": "make it darker", "edited_image": "dark.png"}
    (root / "edits" / "edits.jsonl").write_text(json.dumps(edit))
    (root / "documents" / "documents.jsonl").write_text(lines_of("configs/data/interleaved.yaml", "A line: ")[8:])


def conversation_shards(root: Path) -> None:
    """`runs/conversations`, which configs/data/conversations.yaml writes."""
    tokenizers = [
        "--tokens.text_tokenizer",
        "MODEL/text_tokenizer.json",
        "--tokens.image_tokenizer",
        "MODEL/image_tokenizer",
    ]
    main(["prepare", "--config", "configs/data/conversations.yaml", "--image_size", "16", *tokenizers])


def scenes(root: Path) -> None:
    """What configs/data/scenes.yaml and configs/sample/evaluate_scenes.yaml read, of few questions."""
    write_scenes(root / "runs/scenes", num_training=6, num_held_out=3, size=32)


def scene_tokens(root: Path) -> None:
    """What configs/data/scenes.yaml makes of them."""
    scenes(root)
    main(["prepare", "--config", "configs/data/scenes.yaml"])


def diffusers_folder(root: Path) -> None:
    """DIFFUSERS_FOLDER, a tiny Stable Diffusion."""
    build = runpy.run_path(str(ROOT / "benchmarks" / "tiny_diffusion.py"))["build"]
    build("sd_epsilon").save_pretrained(root / "DIFFUSERS_FOLDER")


def lumina(root: Path) -> None:
    """LUMINA, an imported model of pictures of several sizes."""
    other_downloads(root)
    options = ["--image_tokenizer", "vqgan.ckpt", "--image_size", "64", "--sequence_format", "lumina"]
    main(["import", "Lumina-mGPT-7B-768", "--out", "LUMINA", *options])


def yaml_of_checkpoints(root: Path) -> None:
    """`pairs.yaml` as docs/checkpoints.md shows it."""
    (text,) = [block.text for block in blocks("docs/checkpoints.md") if block.language == "yaml"]
    (root / "pairs.yaml").write_text(text)


def training_file(root: Path) -> None:
    """TRAINING.yaml, a config of the reader's own."""
    shutil.copy(ROOT / "configs" / "train" / "demo.yaml", root / "TRAINING.yaml")


def shards_of_classes(root: Path) -> None:
    """`runs/shards` with classes, as configs/train/diffusion_classes.yaml needs them."""
    for split in ("train", "heldout"):
        link(root, f"runs/shards/{split}", f"runs/quickstart/data/{split}")
    samples = read_samples([root / "runs" / "quickstart" / "data" / split for split in ("train", "heldout")])
    (root / "runs" / "shards" / "classes.txt").write_text("".join(f"{one.parts[0]}\n" for one in samples))


def link(root: Path, name: str, target: str) -> None:
    """`name` in the world is `target`, another path in it."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(root / target)


def link_repository(root: Path) -> None:
    """The files that a checkout has and the commands name."""
    for name in ("configs", "tokenizers", "train", "sample", "benchmarks"):
        (root / name).symlink_to(ROOT / name)
