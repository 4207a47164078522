"""The verbs in the order of the work, in groups, each with examples for its help.

A new verb is registered in one of the `*_verbs` modules and gets its place here; a verb without a place is listed last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PROGRAM: Final = "megatron-deepstack"


@dataclass(frozen=True, slots=True)
class Group:
    """Verbs that are listed together in `--help`."""

    title: str
    verbs: tuple[str, ...]


GROUPS: Final = (
    Group("Before anything starts", ("doctor", "recipes", "plan")),
    Group("Data", ("draw", "preprocess", "store")),
    Group("Training", ("train", "launch", "status", "stop")),
    Group("A trained run", ("generate", "ask", "evaluate", "report", "export", "convert")),
    Group("Comparison with the published implementation", ("check-reference",)),
    Group("Comparison with transformers", ("check-parity",)),
    Group("Look at a store", ("store verify", "store show", "store stats")),
    Group("Make stores of stores", ("store merge", "store split")),
)

EXAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "doctor": ("doctor", "doctor --json"),
    "recipes": ("recipes", "recipes deepstack_l_7b_finetune", "recipes demo train.steps=100"),
    "plan": ("plan demo", "plan deepstack_l_7b_finetune parallel.pipeline=4 --ranks 8", "plan demo --svg plan.svg"),
    "draw": ("draw demo-run/data", "draw small --num-train 200 --num-heldout 20"),
    "preprocess": (
        "preprocess demo",
        "preprocess my.yaml data.store=my-run/train.zarr --workers 0",
        "preprocess my.yaml --address auto",
    ),
    "store": ("store stats my-run/train.zarr", "store show my-run/train.zarr --recipe my.yaml"),
    "store verify": ("store verify my-run/train.zarr", "store verify s3://bucket/train.zarr --json"),
    "store show": (
        "store show my-run/train.zarr --recipe my.yaml",
        "store show my-run/train.zarr --sample 3 --sample 17 -o two.html",
    ),
    "store stats": ("store stats my-run/train.zarr", "store stats my-run/train.zarr --recipe my.yaml --svg sizes.svg"),
    "store merge": ("store merge both.zarr first.zarr second.zarr",),
    "store split": ("store split all.zarr train.zarr heldout.zarr --fraction 0.02",),
    "train": (
        "train demo",
        "train my.yaml optimizer.lr=2e-5 train.steps=1000",
        "train my.yaml --restarts 3",
    ),
    "launch": ("launch my.yaml --address auto --dry-run", "launch my.yaml --address auto --ranks 8"),
    "status": ("status my-run",),
    "stop": ("stop my-run", "stop my-run --now"),
    "generate": (
        "generate my-run",
        "generate my-run --store other.zarr --limit 20",
        "generate my-run --json data.tokenizer=/elsewhere/tokenizer.model",
    ),
    "ask": (
        'ask my-run photo.jpg "What is in the picture?"',
        "ask my-run --file questions.jsonl --images photos --json",
        "ask my-run photo.jpg --temperature 0.7 --top-p 0.9",
        'ask exported photo.jpg "What is in the picture?"',
    ),
    "evaluate": (
        "evaluate my-run",
        "evaluate my-run --file questions.jsonl --images photos --ranks 8",
        "evaluate my-run --store other.zarr --limit 200 --json",
    ),
    "report": ("report my-run", "report my-run other-run --output both.html"),
    "export": (
        "export my-run exported",
        "export my-run exported --naming hugging_face data.tokenizer=/elsewhere/tokenizer.model",
        "export my-run adapters --naming hugging_face --adapters alone",
    ),
    "check-parity": ("check-parity models/qwen3-vl-2b", "check-parity my-export --tp 2 --pp 2 --sequence-parallel"),
    "convert": (
        "convert exported for-transformers",
        "convert for-transformers published --to paper",
        "convert downloaded my-run --to checkpoint --check",
    ),
    "check-reference": (
        "check-reference reference/cases/plain.safetensors --pp 2",
        "check-reference reference/cases/plain.safetensors --through-export",
        "check-reference --crops reference/crops --photos reference/photos",
    ),
}


def place_of(verb: str) -> tuple[int, int]:
    """The place of a verb in the lists of `--help`.

    Args:
        verb: Such as `train` or `store show`.

    Returns:
        The number of its group, and its place within the group.
    """
    for number, group in enumerate(GROUPS):
        if verb in group.verbs:
            return number, group.verbs.index(verb)
    return len(GROUPS), 0


def group_of(verb: str) -> str:
    """The title of a verb's group."""
    number, _ = place_of(verb)
    return GROUPS[number].title if number < len(GROUPS) else "More"


def examples_text(verb: str) -> str | None:
    """The examples as the end of a verb's help; None if it has none. Blank lines keep them on separate lines."""
    examples = EXAMPLES.get(verb)
    if not examples:
        return None
    return "\n\n".join(["Examples:", *(f"  {PROGRAM} {example}" for example in examples)])
