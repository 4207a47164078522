"""The whole of `check-parity`: draw samples, compute them twice, and say one line for each quantity."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file

from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.problems import raise_problems
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, Recipe
from megatron_deepstack.config.sizes import expert_layers
from megatron_deepstack.convert.hf_config import read_config
from megatron_deepstack.convert.hf_facts import CONFIG
from megatron_deepstack.convert.hf_folder_model import model_of_folder
from megatron_deepstack.convert.hf_names import part_of
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.errors import DeepStackError, ParityError, RankError
from megatron_deepstack.parallel.axes import axes_for
from megatron_deepstack.planning.check import model_ranks
from megatron_deepstack.planning.slots import nearly_even, stage_chunks
from megatron_deepstack.testing.parity.by_transformers import by_transformers, special_tokens
from megatron_deepstack.testing.parity.drawn import draw_samples
from megatron_deepstack.testing.parity.on_ranks import EXPECTED, ParityNumbers, ParityTask, compare_on_rank
from megatron_deepstack.testing.ranks import RankPool

LOGITS_TOLERANCE = 2e-5
"""Largest error of a logit, float32, over the largest logit of the sample or over 1."""
GRADIENT_TOLERANCE = 1e-4
"""Largest error of a gradient's entry over the tensor's largest."""
LOSS_TOLERANCE = 1e-5
"""Largest relative error of the loss."""


@dataclass(frozen=True, slots=True)
class ParityLine:
    """One quantity."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Within the tolerance."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        numbers = (
            f"{self.error:.1e} (at most {self.tolerance:.0e})" if self.tolerance else f"{self.error:g} (at most 0)"
        )
        return f"{'ok  ' if self.passed else 'FAIL'} {self.what}: {numbers}"


def check_folder(
    folder: Path,
    parallel: ParallelConfig,
    *,
    data_parallel: int = 1,
    micro_batch_size: int = 1,
    seed: int = 0,
    pool: RankPool | None = None,
) -> Iterator[ParityLine]:
    """Compare a Hugging Face folder with this system on drawn samples, one by one and packed.

    Args:
        folder: A folder with config.json and weights; a tokenizer or processor is not needed.
        parallel: The layout. Layers that do not split evenly over its chunks are split nearly evenly.
        data_parallel: Number of replicas.
        micro_batch_size: Samples of a micro-batch where they are not packed.
        seed: What samples are drawn from.
        pool: Ranks that are there already; without them, ranks are started and ended.

    Yields:
        A line for each quantity as it comes: logits of each sample, the loss, and gradients of each part of the model
        with the worst tensor; each tensor beyond the tolerance has a line of its own.

    Raises:
        CheckpointError: The folder's model is not understood, or a tensor is missing or has another shape; the message
            names the file and each key or tensor.
        ConfigError: The layout does not fit the model, or a stack has no layer; before any rank starts.
        ParityError: After the last line, if a quantity exceeds its tolerance.
    """
    model = model_of_folder(folder)
    parallel = _fitting_layout(folder, model, parallel)
    axes = axes_for(parallel, model_ranks(parallel) * data_parallel if pool is None else pool.num_ranks)
    published_source(folder, model=model)
    config = read_config(folder)
    samples = draw_samples(model, special_tokens(model, config, str(folder / CONFIG)), seed)
    expected = by_transformers(folder, model, config, samples)
    tensors = {f"logits.{index}": value for index, value in enumerate(expected.logits)}
    failed = 0
    with ExitStack() as opened:
        scratch = opened.enter_context(tempfile.TemporaryDirectory(prefix="check-parity-"))
        file = Path(scratch) / EXPECTED
        save_file({name: value.contiguous() for name, value in {**tensors, **expected.gradients}.items()}, file)
        task = ParityTask(
            folder=folder,
            model=model,
            parallel=parallel,
            micro_batch_size=micro_batch_size,
            samples=tuple(samples),
            packed=False,
            expected=file,
        )
        ranks = pool or opened.enter_context(RankPool(axes.world_size))
        for packed in (False, True):
            how = "packed" if packed else "padded"
            found = _compared(ranks, replace(task, packed=packed))
            for line in _lines(found, task, expected.loss, how):
                failed += not line.passed
                yield line
    if failed:
        raise ParityError(f"{folder}: {failed} quantities exceed their tolerances")


def _compared(ranks: RankPool, task: ParityTask) -> ParityNumbers:
    """What the ranks find. What is wrong with the folder is raised as it is, without the rank that met it."""
    try:
        return ranks.run(compare_on_rank, task)[0]  # type: ignore[no-any-return]
    except RankError as error:
        if isinstance(error.__cause__, DeepStackError):
            raise error.__cause__ from error
        raise


def _fitting_layout(folder: Path, model: ModelConfig, parallel: ParallelConfig) -> ParallelConfig:
    """Return the layout with chunks that hold all layers, whatever their number; refuse one that no recipe may have.

    A decoder with experts needs sequence parallelism beside tensor parallelism, which is then added.
    """
    num_layers = model.language.num_layers
    if expert_layers(model.language) and parallel.tensor > 1:
        parallel = replace(parallel, sequence_parallel=True)
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    if num_layers % num_chunks and num_layers > num_chunks and parallel.layers_per_stage is None:
        parallel = replace(parallel, layers_per_stage=tuple(nearly_even(num_layers, num_chunks)))
    stage_chunks(num_layers, parallel)
    problems = find_problems(Recipe(model=model, parallel=parallel))
    raise_problems(
        [
            replace(problem, text=f"{problem.text} (the model is that of {folder / CONFIG})")
            for problem in problems
            if problem.concerns("parallel")
        ]
    )
    return parallel


def _lines(found: ParityNumbers, task: ParityTask, loss: float, how: str) -> Iterator[ParityLine]:
    shown = f", such as {found.weights[0]}" if found.weights else ""
    yield ParityLine(f"{how}: tensors that are not written back as they were read{shown}", len(found.weights), 0)
    for sample, error in zip(task.samples, found.logits, strict=True):
        yield ParityLine(f"{how}: logits of {sample.name}", error, LOGITS_TOLERANCE)
    yield ParityLine(f"{how}: loss {loss:.6f}", abs(found.loss - loss) / max(abs(loss), 1e-30), LOSS_TOLERANCE)
    parts: dict[str, list[str]] = {}
    for name in found.gradients:
        parts.setdefault(str(part_of(name) or "newline"), []).append(name)
    for part, names in parts.items():
        worst = max(names, key=lambda name: found.gradients[name])
        what = f"{how}: {len(names)} gradients of the {part}, worst {worst}"
        yield ParityLine(what, found.gradients[worst], GRADIENT_TOLERANCE)
        for name in names:
            if found.gradients[name] > GRADIENT_TOLERANCE and name != worst:
                yield ParityLine(f"{how}: gradient of {name}", found.gradients[name], GRADIENT_TOLERANCE)
