"""The way from published weights and data to a model that answers, with tiny stand-ins of the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run
from pages import ROOT, commands, text_of
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from megatron_deepstack.testing.tiny_data import jpeg_bytes, write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_transformers")]

PAGE = text_of(ROOT / "docs" / "first_7b.md")
SMALL = [
    "model.vision.image_size=28",
    "model.vision.hidden_size=32",
    "model.vision.ffn_hidden_size=64",
    "model.vision.num_layers=3",
    "model.vision.num_heads=4",
    "model.language.vocab_size=512",
    "model.language.hidden_size=32",
    "model.language.ffn_hidden_size=64",
    "model.language.num_layers=6",
    "model.language.num_heads=4",
    "parallel.pipeline=1",
    "parallel.distributed_optimizer=false",
    "train.precision=fp32",
    "train.steps=2",
    "train.global_batch_size=4",
    "train.seq_length=256",
]
"""The stand-ins' sizes; everything else stays as the published recipes have it."""
OF_665K = (
    "coco/train2017/000000033471.jpg",
    "gqa/images/2354786.jpg",
    "ocr_vqa/images/140031996.jpg",
    "textvqa/train_images/011e7e629fb9ae7b.jpg",
    "vg/VG_100K/2368620.jpg",
    "vg/VG_100K_2/2405722.jpg",
)
"""An image of each folder that the mix refers to."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page assumes it."""
    folder = tmp_path_factory.mktemp("first_7b")
    _weights(folder / "checkpoints")
    _captions(folder / "data" / "llava-pretrain")
    _mix(folder / "data" / "llava-665k")
    (folder / "photo.jpg").write_bytes(jpeg_bytes(90, 60, 99))
    return folder


def _weights(folder: Path) -> None:
    vicuna = folder / "vicuna-7b-v1.5"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
        )
    ).save_pretrained(vicuna)
    write_tokenizer(vicuna / "tokenizer.model")
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    }
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(vision_config=tower, text_config=text)).save_pretrained(folder / "clip-vit-large-patch14-336")


def _captions(folder: Path) -> None:
    records = []
    for number in range(8):
        name = f"{number:05d}/{number:09d}.jpg"
        _picture(folder / "images" / name, number)
        turns = [("human", "<image>\nWhat is it?"), ("gpt", "A photo.")]
        records.append(
            {
                "id": f"{number:09d}",
                "image": name,
                "conversations": [{"from": who, "value": said} for who, said in turns],
            }
        )
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))


def _mix(folder: Path) -> None:
    """Several turns, as the mix has them, and records that are text alone, which carry a `model` key there."""
    records = []
    for number, name in enumerate(OF_665K):
        _picture(folder / "images" / name, 100 + number)
        turns = ["<image>\nWhat is it?", "A photo.", "Which number is printed there?", str(number)]
        speakers = ["human", "gpt"] * 2
        records.append(
            {
                "id": Path(name).stem,
                "image": name,
                "conversations": [{"from": who, "value": said} for who, said in zip(speakers, turns, strict=True)],
            }
        )
    said = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A photo."}]
    records += [{"id": f"text{number}", "model": "", "conversations": said} for number in range(3)]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(records))


def _picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg_bytes(70 + seed % 30, 60, seed))


@pytest.mark.timeout(900)
def test_every_command_of_the_page(workplace: Path) -> None:
    said = {}
    for words in commands("megatron-deepstack", PAGE):
        verb, rest = words[0], words[1:]
        more = {"preprocess": ["--workers", "0", *SMALL], "train": SMALL, "plan": SMALL}.get(verb, [])
        said[verb] = run([verb, *rest, *more], workplace)
    answered = said["ask"].strip()
    assert answered
    assert (workplace / "exports" / "deepstack-l-7b" / "config.json").is_file()
