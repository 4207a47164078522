"""The model for lmms-eval: its options, pictures, batches and rounds, without the harness and without ranks.

Against lmms-eval 0.7.3 itself it was tried by hand, on local tasks of files; see docs/training.md.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_deepstack.errors import ConfigError
from megatron_deepstack.inference.ask.launch import Manner, Reply
from megatron_deepstack.inference.ask.preparation import Asked

MODEL = "megatron_deepstack.inference.lmms.model"


class Harness:
    """Stands for lmms-eval's base class."""

    def __init__(self) -> None:
        self.rank, self.task_dict = 0, dict[str, Any]()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lmms_eval.api.model"], "lmms", Harness, raising=False)
    sys.modules.pop(MODEL, None)
    yield importlib.import_module(MODEL)
    sys.modules.pop(MODEL, None)


class Echo:
    """Stands for the ranks: answers with the question, the number of pictures and the longest answer allowed."""

    def __init__(self) -> None:
        self.manner, self.batches, self.closed = Manner(), list[int](), False

    def ask_all(self, batch: Sequence[Asked]) -> list[Reply]:
        self.batches.append(len(batch))
        return [
            Reply(one, f"{one.text} {len(one.pictures)} {self.manner.max_new_tokens}", "stop")
            if one.text != "bad"
            else Reply(one, "", "error", error="too long")
            for one in batch
        ]

    def score(self, batch: Sequence[tuple[Asked, str]]) -> list[tuple[float, bool]]:
        return [(-float(len(answer)), not one.pictures) for one, answer in batch]


@pytest.fixture
def model(module: Any) -> Any:
    made = module.MegatronDeepStack.__new__(module.MegatronDeepStack)
    Harness.__init__(made)
    made.batch_size = 2
    made._ranks = SimpleNamespace(conversation=Echo())
    made.task_dict = {"pets": {"test": [{"picture": Image.new("RGB", (4, 4)), "answer": "dog "}] * 5}}
    return made


def pictures(document: dict[str, Any]) -> list[Any]:
    return [document["picture"]]


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_requests_with_the_same_options_are_asked_together(model: Any) -> None:
    short, long = {"max_new_tokens": 4}, {"max_new_tokens": 9}
    requests = [
        request(f"q{n}", options, pictures, n, "pets", "test") for n, options in enumerate([short] * 3 + [long] * 2)
    ]
    assert model.generate_until(requests) == ["q0 1 4", "q1 1 4", "q2 1 4", "q3 1 9", "q4 1 9"]
    assert model._ranks.conversation.batches == [2, 1, 2]


def test_a_question_that_cannot_be_asked_ends_the_evaluation(model: Any) -> None:
    with pytest.raises(ConfigError, match="a question cannot be asked: too long"):
        model.generate_until([request("bad", {}, pictures, 0, "pets", "test")])


def test_likelihoods_of_given_answers(model: Any) -> None:
    requests = [
        request("q", " cat", pictures, 0, "pets", "test"),
        request("q", lambda document: document["answer"], lambda document: [], 1, "pets", "test"),
        request("q", "horse", pictures, 2, "pets", "test"),
    ]
    assert model.loglikelihood(requests) == [(-3.0, False), (-3.0, True), (-5.0, False)]


def test_rounds_go_on_until_the_task_ends_them(model: Any) -> None:
    def next_round(document: Any, previous_output: list[str], round_idx: int, previous_round_info: Any) -> Any:
        return [], f"round {round_idx}", round_idx == 3, previous_output, None

    arguments = ("round 0", {"max_new_tokens": 4}, pictures, next_round, 0, "pets", "test")
    assert model.generate_until_multi_round([request(*arguments)]) == [["round 0 1 4", "round 1 0 4", "round 2 0 4"]]


@pytest.mark.parametrize(
    ("options", "tokens", "temperature", "stop"),
    [
        ({}, 1024, 0.0, ()),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1, "until": ["\n\n"]},
            16,
            0.0,
            ("\n\n",),
        ),
        ({"temperature": 0.7, "do_sample": True, "until": "</s>"}, 1024, 0.7, ("</s>",)),
        ({"temperature": 0.7, "do_sample": False}, 1024, 0.0, ()),
    ],
)
def test_options_of_tasks(
    module: Any, options: dict[str, Any], tokens: int, temperature: float, stop: tuple[str, ...]
) -> None:
    manner = module._manner(options)
    assert (manner.max_new_tokens, manner.sampling.temperature, manner.stop) == (tokens, temperature, stop)


def test_beams_are_refused(module: Any) -> None:
    with pytest.raises(ConfigError, match="found num_beams=4, expected 1"):
        module._manner({"num_beams": 4})


def test_pictures_lose_nothing_on_their_way(module: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path, file = module._as_files(["a.jpg", Image.fromarray(pixels)])
    assert path == "a.jpg"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), pixels)
    assert module._as_files(None) == ()
    with pytest.raises(ConfigError, match="found int among a task's visuals"):
        module._as_files([3])


@pytest.mark.parametrize(
    ("context", "number", "expected"),
    [("What?", 1, "What?"), ("<image>\nWhat?", 1, "<image>\nWhat?"), ("<image> Both?", 2, "Both?")],
)
def test_placeholders_of_a_task(module: Any, context: str, number: int, expected: str) -> None:
    assert module.MegatronDeepStack._asked(context, ("p",) * number).text == expected
