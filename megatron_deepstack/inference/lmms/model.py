"""A run or a folder of weights as a model of lmms-eval: answers, likelihoods of given ones, and tasks of rounds.

A task's pictures reach the model as the bytes of a PNG, which loses nothing, so they are processed like files.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lmms_eval.api.model import lmms
from PIL import Image

from megatron_deepstack.errors import ConfigError
from megatron_deepstack.inference.answerer import answerer_at
from megatron_deepstack.inference.ask.launch import Manner, OpenRanks
from megatron_deepstack.inference.ask.preparation import Asked
from megatron_deepstack.inference.sampling import Sampling
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN
from megatron_deepstack.platform.progress import WorkProgress

_LONGEST_ANSWER: Final = 1024
"""Longest answer where a task says nothing, as in the harness's own LLaVA."""
_LAYOUT: Final = ("tensor", "pipeline", "virtual_pipeline", "context")


class MegatronDeepStack(lmms):  # type: ignore[misc]
    """`--model megatron_deepstack --model_args run=RUN,pipeline=1`: a run or folder, in any layout."""

    is_simple = True

    def __init__(self, run: str, batch_size: int | str = 1, **options: Any) -> None:
        """Start the ranks.

        Args:
            run: Folder of a run with a checkpoint, or a folder of weights, such as `export` writes.
            batch_size: Questions that are prepared together; their pictures are in memory meanwhile.
            **options: Of `--model_args`: `tensor`, `pipeline`, `virtual_pipeline`, `context` (the layout, by default
                the run's), `tokenizer` (its path, if it has moved) and `precision` (`fp32` or `bf16`). What lmms-eval
                adds itself is passed over.

        Raises:
            ConfigError: The run cannot be asked.
        """
        super().__init__()
        overrides = [f"parallel.{axis}={options[axis]}" for axis in _LAYOUT if axis in options]
        overrides += [f"data.tokenizer={options['tokenizer']}"] if "tokenizer" in options else []
        overrides += [f"train.precision={options['precision']}"] if "precision" in options else []
        answerer = answerer_at(Path(run), overrides)
        answerer.require_weights()
        preparation = answerer.preparation("lmms-eval", print)
        self.batch_size = max(int(batch_size), 1)
        self._ranks = OpenRanks(answerer, preparation, Manner())

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer questions.

        Args:
            requests: Each with `args`: context, generation options, function for the pictures, number of the document,
                task, split.

        Returns:
            The answers, in order.
        """
        answers: list[str] = []
        with WorkProgress("lmms-eval", len(requests), "questions", quiet=self.rank != 0) as progress:
            for options, batch in self._batches([request.args for request in requests]):
                asked = [self._asked(context, self._pictures(*where)) for context, _, *where in batch]
                answers += self._answers(asked, options)
                progress.at(len(answers))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """How likely given answers are. (lmms-eval 0.7.3 turns such pairs into texts and then fails, for every model.)

        Args:
            requests: Each with `args`: context, answer or a function that gives it, function for the pictures, number
                of the document, task, split.

        Returns:
            For each the logarithm of the probability, and whether greedy decoding gives the answer.
        """
        found: list[tuple[float, bool]] = []
        for first in range(0, len(requests), self.batch_size):
            batch = []
            for request in requests[first : first + self.batch_size]:
                context, answer, *where = request.args
                text = answer(self._document(*where[1:])) if callable(answer) else answer
                batch.append((self._asked(context, self._pictures(*where)), str(text).strip()))
            found += self._ranks.conversation.score(batch)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer tasks that ask again after each answer, until they say that it is enough.

        Args:
            requests: Each with `args` as of `generate_until`, and after the pictures' function the one that gives the
                next round's pictures and context.

        Returns:
            The answers of all rounds of each request.
        """
        found = []
        for request in requests:
            context, options, to_visual, next_round, *where = request.args
            document = self._document(*where)
            pictures = _as_files(to_visual(document))
            said: list[str] = []
            facts = None
            while True:
                said += self._answers([self._asked(context, pictures)], options)
                visuals, context, ended, earlier, facts = next_round(
                    document, previous_output=list(said), round_idx=len(said), previous_round_info=facts
                )
                if ended:
                    found.append(list(earlier))
                    break
                pictures = _as_files(visuals)
        return found

    def clean(self) -> None:
        """End the ranks; lmms-eval calls it after the last task."""
        self._ranks.close()

    def _batches(self, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Mapping[str, Any], list[Any]]]:
        """Neighbouring requests with the same options, at most `batch_size` of them."""
        first = 0
        while first < len(arguments):
            options, stop = arguments[first][1], first + 1
            while stop < min(len(arguments), first + self.batch_size) and arguments[stop][1] == options:
                stop += 1
            yield options, list(arguments[first:stop])
            first = stop

    def _answers(self, asked: Sequence[Asked], options: Mapping[str, Any]) -> list[str]:
        conversation = self._ranks.conversation
        conversation.manner = _manner(options)
        replies = conversation.ask_all(asked)
        for reply in replies:
            if reply.error is not None:
                raise ConfigError([f"lmms-eval: a question cannot be asked: {reply.error}"])
        return [reply.answer for reply in replies]

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _pictures(self, to_visual: Any, number: int, task: str, split: str) -> tuple[str | bytes, ...]:
        return _as_files(to_visual(self._document(number, task, split)))

    @staticmethod
    def _asked(context: str, pictures: tuple[str | bytes, ...]) -> Asked:
        """A context that names another number of pictures than it has gets them in front, and keeps its words."""
        text = context if context.count(IMAGE_TOKEN) == len(pictures) else context.replace(IMAGE_TOKEN, "").strip()
        return Asked(text, pictures)


def _manner(options: Mapping[str, Any]) -> Manner:
    """A task's generation options. More than one beam is refused, since another decoding gives another score."""
    if int(options.get("num_beams") or 1) > 1:
        raise ConfigError([f"lmms-eval: found num_beams={options['num_beams']}, expected 1; greedy and draws only"])
    until = options.get("until") or ()
    temperature = float(options.get("temperature") or 0.0)
    drawn = temperature > 0.0 and options.get("do_sample") is not False
    return Manner(
        max_new_tokens=int(options.get("max_new_tokens") or _LONGEST_ANSWER),
        sampling=Sampling(temperature=temperature if drawn else 0.0, top_p=float(options.get("top_p") or 1.0)),
        stop=tuple(word for word in ([until] if isinstance(until, str) else until) if word),
    )


def _as_files(visuals: Any) -> tuple[str | bytes, ...]:
    """A task's pictures as paths or as the bytes of files."""
    return tuple(_as_file(visual) for visual in visuals or ())


def _as_file(visual: Any) -> str | bytes:
    if isinstance(visual, (str, Path)):
        return str(visual)
    if not isinstance(visual, Image.Image):
        raise ConfigError([f"lmms-eval: found {type(visual).__name__} among a task's visuals, expected pictures only"])
    buffer = io.BytesIO()
    visual.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
