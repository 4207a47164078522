"""Questions answered and scored at intervals while a run trains, in the run's own layout and by all of its ranks.

Answers come from the weights as they are, without a checkpoint. Nothing that training depends on changes: no random
number is drawn, no gradient flows, and modules are put back as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.inference.answerer import RunAnswerer
from megatron_deepstack.inference.evaluate.exam import OpenedExam, Questions, open_exam
from megatron_deepstack.inference.evaluate.rank import evaluate_exam
from megatron_deepstack.platform.files.run_disk import writing
from megatron_deepstack.platform.quantity import number_of
from megatron_deepstack.scores.evaluation import Evaluation, write_evaluation
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.step.work import untimed


def open_training_exam(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> OpenedExam | None:
    """The questions that a recipe asks for during training. Not collective; every rank opens its own.

    Args:
        recipe: The run's recipe.
        say: Called with a line where something is unusual.

    Returns:
        The questions; None where the recipe asks for no evaluation.

    Raises:
        DeepStackError: The questions or the tokenizer cannot be used, or do not fit the model.
    """
    asked = recipe.evaluation
    if not asked.interval:
        return None
    questions = Questions(
        store=asked.store,
        file=None if asked.file is None else Path(asked.file),
        images=asked.images,
        limit=asked.limit,
    )
    return open_exam(RunAnswerer(recipe), questions, "train", say)


@dataclass(frozen=True, slots=True)
class Examination:
    """Evaluates at intervals."""

    recipe: Recipe
    engine: Engine
    opened: OpenedExam

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps."""
        return step % self.recipe.evaluation.interval == 0 or step == self.recipe.train.steps

    def told(self, evaluation: Evaluation) -> str:
        """An evaluation in one line: the recipe's metric and the number of questions."""
        metric, means = self.recipe.evaluation.metric, evaluation.means()
        score = f"{means[metric]:.1%}" if metric in means else "not defined for these questions"
        asked = number_of(len(evaluation.answers), "question")
        return f"evaluation after step {evaluation.step}: {metric.replace('_', ' ')} {score}, {asked}"

    def evaluate(self, step: int, progress: Callable[[str], None], asked: Callable[[], bool]) -> Evaluation | None:
        """Answer and score the questions. Collective over all ranks; rank 0 writes the answers into the run's folder.

        Args:
            step: Steps done.
            progress: Told of every token that a replica has written.
            asked: Whether this rank was asked to end the run; see `evaluate_exam`.

        Returns:
            The evaluation, on every rank; None on every rank where one was asked to end the run meanwhile.

        Raises:
            DataError: Its files cannot be written; on rank 0.
        """
        exam = self.opened.exam
        self.engine.gather_parameters()
        with _answering(self.engine):
            scored = evaluate_exam(
                self.engine,
                exam,
                self.opened.tokenizer,
                self.opened.template,
                self.recipe.evaluation.max_new_tokens,
                lambda done: progress(
                    f"evaluation after step {step}: {done:.1f} of {number_of(len(exam), 'question')}"
                ),
                asked,
            )
        if scored is None:
            return None
        evaluation = Evaluation(
            name=self.opened.name_at(step),
            source=self.opened.source,
            step=step,
            fingerprint=exam.fingerprint,
            answers=tuple(scored),
        )
        if dist.get_rank() == 0:
            with writing(Path(self.recipe.run_dir)):
                write_evaluation(self.recipe.run_dir, evaluation)
        return evaluation


@contextmanager
def _answering(engine: Engine) -> Iterator[None]:
    """The modules as they answer, and afterwards as they were; the time is not counted as that of training steps."""
    parts: tuple[torch.nn.Module, ...] = (engine.model.encoder, *engine.model.chunks)
    before = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    try:
        with untimed(engine.model.config):
            yield
    finally:
        for module, training in before:
            module.training = training
