"""The paper's nine benchmarks with one command, and the paper's row beside ours (arXiv 2406.04334, table 1).

    python tools/paper_scores.py --run my-run --row DeepStack-L-7B --output scores

runs lmms-eval on the run, with its own data sets, and prints both rows. `--results FILE` prints them for results that
lmms-eval has written before. It needs lmms-eval in the same environment (`pip install lmms-eval`), network for its data
sets, and for MM-Vet, which another model judges, OPENAI_API_KEY. Differences to expect: the paper's VQAv2, DocVQA and
InfoVQA are of test splits that only their servers score, ours are of the validation splits; its TextVQA has the words
that an OCR system found in the prompt. POPE is the F1 score of all three settings. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_deepstack.errors import DataError

BENCHMARKS = {
    "VQAv2": ("vqav2_val", "exact_match"),
    "GQA": ("gqa", "exact_match"),
    "TextVQA": ("textvqa_val", "exact_match"),
    "DocVQA": ("docvqa_val", "anls"),
    "InfoVQA": ("infovqa_val", "anls"),
    "SEED": ("seedbench", "seed_all"),
    "POPE": ("pope", "pope_f1_score"),
    "MMMU": ("mmmu_val", "mmmu_acc"),
    "MM-Vet": ("mmvet", "gpt_eval_score"),
}
"""The paper's columns, with lmms-eval's task and metric."""
PAPER = {
    "LLaVA-1.5-7B": (78.5, 62.0, 58.2, 28.1, 25.8, 58.6, 85.9, 35.3, 30.5),
    "LLaVA-1.5-13B": (80.0, 63.3, 61.3, 30.3, 28.4, 61.6, 85.9, 34.8, 35.4),
    "LLaVA-Next-7B": (81.8, 64.2, 64.9, 74.4, 37.1, 64.7, 86.5, 35.1, 44.1),
    "LLaVA-Next-13B": (82.8, 65.4, 66.9, 77.5, 44.5, 65.6, 86.2, 35.9, 49.1),
    "DeepStack-V-7B": (80.4, 64.1, 63.5, 41.0, 30.0, 62.3, 87.6, 34.9, 33.0),
    "DeepStack-V-13B": (81.1, 64.2, 63.9, 41.7, 33.1, 63.0, 86.6, 34.7, 31.1),
    "DeepStack-L-7B": (79.5, 63.1, 62.4, 39.1, 29.8, 60.6, 86.7, 35.7, 29.9),
    "DeepStack-L-13B": (80.9, 64.2, 64.6, 41.5, 33.0, 63.5, 87.7, 35.2, 35.9),
    "DeepStack-L-HD-7B": (82.0, 65.2, 66.7, 78.8, 41.2, 63.6, 86.5, 35.6, 37.5),
    "DeepStack-L-HD-13B": (83.0, 66.2, 68.7, 81.0, 45.2, 65.1, 86.7, 33.4, 39.3),
}
"""Table 1 of the paper, in percent, in the order of `BENCHMARKS`."""


def command(run: Path, output: Path, options: list[str]) -> list[str]:
    """The command of lmms-eval for a run.

    Args:
        run: The run folder.
        output: Folder for lmms-eval's results.
        options: Further options of lmms-eval, such as `--limit 8`.

    Returns:
        The words of the command.
    """
    tasks = ",".join(task for task, _ in BENCHMARKS.values())
    return [
        *(sys.executable, "-m", "lmms_eval", "--model", "megatron_deepstack", "--model_args", f"run={run}"),
        *("--tasks", tasks, "--batch_size", "8", "--output_path", str(output), *options),
    ]


def newest_results(output: Path) -> Path:
    """The newest file of results below a folder. Raises DataError if there is none."""
    found = sorted(output.rglob("*results.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise DataError(f"{output}: holds no results of lmms-eval (*results.json); see what it printed")
    return found[-1]


def our_row(results: Mapping[str, Any]) -> list[float | None]:
    """Our scores in percent, in the order of `BENCHMARKS`.

    Args:
        results: What lmms-eval has written: `results`, by task and by metric with its filter.

    Returns:
        The scores; None where a task or its metric is missing.
    """
    row: list[float | None] = []
    for task, metric in BENCHMARKS.values():
        scores = results.get("results", {}).get(task, {})
        found = [v for name, v in scores.items() if name.split(",")[0] == metric and isinstance(v, (int, float))]
        row.append(None if not found else 100.0 * found[0] if abs(found[0]) <= 1.0 else float(found[0]))
    return row


def table(paper: str, ours: list[float | None]) -> str:
    """Both rows and their difference as plain text."""
    shown = [f"{'':<20}" + "".join(f"{name:>9}" for name in BENCHMARKS)]
    shown.append(f"{paper:<20}" + "".join(f"{value:9.1f}" for value in PAPER[paper]))
    shown.append(f"{'this run':<20}" + "".join("        -" if value is None else f"{value:9.1f}" for value in ours))
    changes = [None if value is None else value - theirs for value, theirs in zip(ours, PAPER[paper], strict=True)]
    shown.append(
        f"{'difference':<20}" + "".join("        -" if value is None else f"{value:+9.1f}" for value in changes)
    )
    return "\n".join(shown)


def main() -> None:
    """Run lmms-eval if a run is named, print the rows, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a run with a checkpoint")
    source.add_argument("--results", type=Path, help="file of results that lmms-eval has written")
    parser.add_argument("--row", choices=list(PAPER), default="DeepStack-L-7B", help="row of the paper's table 1")
    parser.add_argument("--output", type=Path, default=Path("paper-scores"), help="folder for lmms-eval's results")
    asked, options = parser.parse_known_args()
    if asked.run is not None:
        subprocess.run(command(asked.run, asked.output, options), check=True)
    file = asked.results or newest_results(asked.output)
    ours = our_row(json.loads(file.read_text(encoding="utf-8")))
    print(table(asked.row, ours))
    print(json.dumps({"row": asked.row, "paper": PAPER[asked.row], "ours": ours}))


if __name__ == "__main__":
    main()
