"""transformers' LLaVA-NeXT folders: read as the any-resolution baseline, and converted; logits are transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from megatron_deepstack.config.choices import Variant
from megatron_deepstack.convert.exported_folder import read_exported
from megatron_deepstack.convert.folders import convert_folder
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.testing.oracle import OracleSample, oracle_forward
from megatron_deepstack.testing.parity.by_folder import TransformersFolder
from megatron_deepstack.testing.parity.drawn import DrawnSample

pytestmark = pytest.mark.usefixtures("quiet_transformers")

TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IMAGE = 60
# Measured: 1.1e-6 apart, the largest logit 4.0; both in float32.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlavaNextForConditionalGeneration]:
    """A folder that transformers wrote, with weights of ordinary size everywhere."""
    config = LlavaNextConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**TOWER),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 16], [16, 32], [32, 32]],
    )
    model, generator = LlavaNextForConditionalGeneration(config), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    folder = tmp_path_factory.mktemp("native") / "llava-next"
    model.save_pretrained(folder)
    return folder, model.eval()


@pytest.mark.parametrize(("columns", "rows"), [(2, 2), (2, 1), (1, 2)])
def test_logits_are_those_of_transformers(native, tmp_path: Path, columns: int, rows: int) -> None:
    """An image as large as its grid, of which LLaVA-NeXT cuts nothing off: by the oracle, and converted."""
    folder, model = native
    found = read_exported(folder)
    assert found.model.variant is Variant.LLAVA_ANYRES
    assert found.model.language.vocab_size == IMAGE
    views = torch.randn(1 + columns * rows, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    tokens = torch.tensor([1, 5, IMAGE_TOKEN_ID, 7, 30])
    length = 16 + 4 * rows * (4 * columns + 1)
    ids = torch.cat([tokens[:2], torch.full((length,), IMAGE), tokens[3:]])[None]
    with torch.no_grad():
        expected = model(
            input_ids=ids, pixel_values=views[None], image_sizes=torch.tensor([[16 * rows, 16 * columns]])
        ).logits[0, :, :IMAGE]
    sample = OracleSample(tokens=tokens, labels=tokens, pixel_values=views, grids=((columns, rows),))
    weights = {name: tensor.read() for name, tensor in found.tensors.items()}
    (ours,) = oracle_forward(found.model, weights, [sample])
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
    convert_folder(folder, tmp_path / "converted", Naming.HUGGING_FACE)
    theirs = TransformersFolder(tmp_path / "converted", found.model)
    asked = DrawnSample("", tokens.numpy(), np.ones(5, np.int64), (), ())
    converted = theirs.logits(asked, [(views.numpy(), (columns, rows))])
    torch.testing.assert_close(converted, expected, atol=TOLERANCE, rtol=0)


def test_train_init_from_reads_it_with_its_newline(native) -> None:
    folder, model = native
    read = published_source(folder, model=read_exported(folder).model)
    newline = model.model.image_newline
    assert torch.equal(read("model.image_newline", (32,)), newline)
    assert torch.equal(read("lm_head.weight", (IMAGE, 32)), model.lm_head.weight[:IMAGE])
