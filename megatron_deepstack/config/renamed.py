"""Fields that had other names in earlier releases; recipes and checkpoints of those releases are still read.

model.vision.class_token   true or false, now `model.vision.kind: clip` or `siglip`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_deepstack.config.problems import Problem
from megatron_deepstack.config.traits.towers import kind_of_class_token

_CLASS_TOKEN = "model.vision.class_token"


def with_present_names(given: Mapping[Any, Any], problems: list[Problem]) -> dict[Any, Any]:
    """Translate a recipe to the present names of fields.

    Args:
        given: A recipe as nested plain values, before it is checked.
        problems: List to which a value that cannot be translated is appended; that value is left out.

    Returns:
        A translated copy. Sections without a translation are shared with `given`.
    """
    model = given.get("model")
    vision = model.get("vision") if isinstance(model, Mapping) else None
    if not isinstance(vision, Mapping) or "class_token" not in vision:
        return dict(given)
    rest = {key: value for key, value in vision.items() if key != "class_token"}
    class_token = vision["class_token"]
    if not isinstance(class_token, bool):
        text = f"found {class_token!r}, expected true or false; today's name is model.vision.kind: clip or siglip"
        problems.append(Problem(paths=(_CLASS_TOKEN,), text=text))
    elif rest.setdefault("kind", kind_of_class_token(class_token)) != kind_of_class_token(class_token):
        text = (
            f"is {str(class_token).lower()}, which is the earlier name of model.vision.kind: "
            f"{kind_of_class_token(class_token)}, and the recipe also says kind: {rest['kind']}; leave class_token out"
        )
        problems.append(Problem(paths=(_CLASS_TOKEN, "model.vision.kind"), text=text))
    assert isinstance(model, Mapping)
    return {**given, "model": {**model, "vision": rest}}


def saved_model_with_present_names(model: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the section `model` that a checkpoint stores to the present names of fields."""
    problems: list[Problem] = []
    translated = with_present_names({"model": model}, problems)["model"]
    assert not problems, f"a checkpoint was saved from a checked recipe: {problems}"
    return dict(translated)
