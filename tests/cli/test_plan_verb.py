"""`plan` with estimates: for one layout, for all layouts, as JSON and drawings, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.cli.plan_verbs import show_before_start
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.errors import LayoutError
from megatron_deepstack.platform.compute import gpu_model as gpu_models
from megatron_deepstack.platform.compute.gpu_model import gpu_model
from megatron_deepstack.testing.tiny_store import write_tiny_store


def ran(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "120"})


def test_one_layout_shows_memory_time_and_timeline(tmp_path: Path) -> None:
    drawing = tmp_path / "step.svg"
    found = ran("deepstack_l_7b_finetune", "--ranks", "8", "--gpu", "h200", "--timeline", str(drawing))
    assert found.exit_code == 0
    for text in ("GB of a rank by stage (h200", "fits", "tokens/s, MFU", "predicted timeline", "not modelled in time"):
        assert text in found.output
    assert drawing.read_text().startswith("<svg")


@pytest.mark.parametrize("width", [40, 80])
def test_memory_is_readable_in_any_terminal(width: int) -> None:
    """No word or number is cut short; the unit fits the size."""
    found = CliRunner().invoke(app, ["plan", "demo"], env={"COLUMNS": str(width)})
    table = found.output[found.output.index("MB of a rank by stage") : found.output.index("fits")]
    words = table.split()
    assert {"weights", "grads", "optim", "activ", "logits", "rows", "encoder", "moment", "total"} <= set(words)
    assert max(float(word) for word in words if word.replace(".", "").isdigit()) > 1
    assert "…" not in table


def test_all_layouts() -> None:
    found = ran("deepstack_l_7b_finetune", "--gpus", "8")
    assert found.exit_code == 0
    for text in ("Layouts on 8 GPUs", "the fastest: parallel.tensor=", "The best side by side"):
        assert text in found.output
    values = json.loads(ran("deepstack_l_7b_finetune", "--gpus", "8", "--json").stdout)
    assert values["fitting"][0]["fits"]
    assert {"memory", "flops", "seconds", "sent_bytes", "mfu"} <= set(values["fitting"][0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gpus", "0"], "the nearest that works is --gpus 1"),
        (["--gpu", "h101"], "did you mean 'h100'?"),
        (["--gpus", "-3"], "the nearest that works is --gpus 1"),
        (["--gpus", "3000"], "the nearest number on which one does is 4096 of h100"),
        (["--ranks", "0"], "--ranks: found 0; the nearest that works is 2"),
        (["--store", "nowhere"], "--store nowhere: no such folder; make it with `megatron-deepstack preprocess`."),
        (["parallel.tensor=3"], "3 tensor-parallel ranks do not divide model.language.num_heads 32; use 2"),
        (["parallel.pipeline=5"], "do not split evenly over 5 chunks"),
        (["train.batching=padded", "--ranks", "6"], "126 or 129"),
        (["--gpus", "1"], "the nearest number on which one does is "),
        (["--ranks", "7"], "start 6 ranks"),
    ],
)
def test_bad_input_names_what_works(arguments: list[str], text: str) -> None:
    found = ran("deepstack_l_7b_finetune", *arguments)
    assert found.exit_code != 0
    assert text in " ".join(found.output.split())


def test_the_nearest_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "finetune.zarr").mkdir()
    found = ran("deepstack_l_7b_finetune", "--store", str(tmp_path / "fintune.zar"))
    assert found.exit_code != 0
    assert f"did you mean {tmp_path / 'finetune.zarr'}?" in "".join(found.output.split("\n")).replace("  ", "")


NATIVE = """
model:
  variant: qwen3_vl
  vision: {architecture: qwen3_vl_8b}
  language: {architecture: qwen3_vl_8b}
"""


def test_views_of_any_size_are_planned_too(tmp_path: Path) -> None:
    recipe = tmp_path / "native.yaml"
    recipe.write_text(NATIVE)
    found = ran(str(recipe), "--ranks", "8", "data.max_pixels=400000")
    assert found.exit_code == 0
    assert "images of 307,200 pixels on average" in " ".join(found.output.split())
    assert "encoder" in found.output
    assert json.loads(ran(str(recipe), "--gpus", "16", "--json").stdout)["fitting"]


def test_a_store_that_is_not_there_yet_is_named() -> None:
    found = ran("deepstack_l_7b_finetune", "data.store=later.zarr")
    assert found.exit_code == 0
    assert "not there yet: later.zarr" in " ".join(found.output.split())


def test_lengths_of_a_store(tmp_path: Path) -> None:
    store = write_tiny_store(tmp_path / "store.zarr")
    found = ran("demo", "--store", str(store), "--json")
    assert json.loads(found.stdout)["estimate"]["lengths"].startswith("step 1 of ")


def test_a_run_that_cannot_fit_is_refused_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("deepstack_l_7b_finetune", ["parallel.pipeline=1", "parallel.distributed_optimizer=false"])
    monkeypatch.setattr(gpu_models, "gpu_model", lambda: "NVIDIA H100 80GB HBM3")
    lines: list[str] = []
    with pytest.raises(LayoutError, match=r"needs about \d+ GB .*; .*, or start it with --anyway"):
        show_before_start(recipe, 1, False, lines.append)
    show_before_start(recipe, 1, True, lines.append)
    assert lines[0].count("\n") == 2
    assert "does not fit" in lines[0]


def test_the_driver_tells_the_model(tmp_path: Path) -> None:
    assert gpu_model(tmp_path) is None
    (tmp_path / "0000").mkdir()
    (tmp_path / "0000" / "information").write_text("Model: \t NVIDIA H100 80GB HBM3\nIRQ: 5\n")
    assert gpu_model(tmp_path) == "NVIDIA H100 80GB HBM3"
