"""Run the benchmarks of speed and of the planner, keep their figures, and draw them.

    python tools/benchmarks_page.py              run both, then write docs/benchmarks.json and docs/benchmarks.svg
    python tools/benchmarks_page.py bench_plan   run one of them; the others' figures stay as they were, with their days
    python tools/benchmarks_page.py --busy       run what does not depend on how busy the machine is, then draw
    python tools/benchmarks_page.py --draw       draw what docs/benchmarks.json holds
    python tools/benchmarks_page.py --check      only compare the drawing with the figures

Each tool prints one JSON object as its last line. A number is one bar; a pair of numbers is what was measured, and
below it what the planner predicted. Machine, versions and day stand beside each tool's figures. Run it on an otherwise
idle machine: the tools measure times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_deepstack.report.drawing.svg import FAINT, INK, LINE, PALETTE, PAPER, Markup, drawing, element, rect, text

ROOT = Path(__file__).parent.parent
FIGURES, PICTURE = ROOT / "docs" / "benchmarks.json", ROOT / "docs" / "benchmarks.svg"
TOOLS = {"bench_speed": "Speed, as ratios within one run", "bench_plan": "The planner, against what was measured"}
"""The tools that are drawn, and what stands above their bars."""
_WIDTH, _LEFT, _ROW, _BAR = 960, 470, 24, 12


def measured(tool: str, *arguments: str) -> dict[str, Any]:
    """Run a tool with one thread, and return its figures with day, machine and versions."""
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout, end="")
    return {
        "day": date.today().isoformat(),
        "machine": machine(),
        "figures": json.loads(done.stdout.splitlines()[-1]),
    }


def machine() -> str:
    """Name processor, cores and versions."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    cores = f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
    return f"{cores}, Python {platform.python_version()}, {packages}"


def picture(results: dict[str, dict[str, Any]]) -> str:
    """Draw the figures of all tools, one panel below the other."""
    y, parts = 30.0, []
    for tool, title in TOOLS.items():
        if tool in results:
            panel, y = _panel(title, results[tool], y)
            parts += panel
    size = (_WIDTH, y)
    return (
        str(drawing(*size, "Benchmarks: ratios measured and predicted", rect(0, 0, *size, fill=PAPER), *parts)) + "\n"
    )


def _panel(title: str, result: dict[str, Any], y: float) -> tuple[list[Markup], float]:
    """A title, where and when, a line of bars for each figure, and where the next panel begins."""
    figures: dict[str, Any] = result["figures"]
    pairs = {name: value if isinstance(value, list) else [value] for name, value in figures.items()}
    largest = max((number for values in pairs.values() for number in values), default=1.0)
    scale = (_WIDTH - _LEFT - 70) / max(largest, 1.0)
    parts = [
        text(20, y, title, size=16, text_anchor="start", font_weight="bold"),
        text(20, y + 18, f"{result['day']}; {result['machine']}", size=11, text_anchor="start", fill=FAINT),
    ]
    begin = y = y + 34
    for name, values in pairs.items():
        parts += _bars(name, values, y, scale)
        y += _ROW + (len(values) - 1) * _BAR
    one = _LEFT + scale
    parts.append(element("line", x1=one, x2=one, y1=begin - 4, y2=y, stroke=LINE, stroke_dasharray="4 3"))
    return parts, y + 40


def _bars(name: str, values: Sequence[float], y: float, scale: float) -> list[Markup]:
    middle = y + len(values) * _BAR / 2 + 4
    parts = [text(_LEFT - 10, middle, name, size=12, text_anchor="end")]
    for place, value in enumerate(values):
        top, width = y + place * _BAR, value * scale
        parts += [
            rect(_LEFT, top, width, _BAR - 2, fill=PALETTE[place]),
            text(_LEFT + width + 5, top + _BAR - 3, f"{value:.3g}", size=10, text_anchor="start", fill=INK),
        ]
    return parts


def main() -> int:
    """Run, keep and draw; 1 if `--check` finds an old drawing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", choices=[[], *TOOLS], default=[], help="which to run; all if none is named")
    parser.add_argument("--busy", action="store_true", help="simulated ratios of bench_speed and bytes written alone")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--check", action="store_true", help="run nothing and write nothing")
    asked = parser.parse_args()
    results = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    if asked.check:
        current = PICTURE.read_text() if PICTURE.is_file() else ""
        return _said(f"{PICTURE} is old: run python {sys.argv[0]} --draw") if picture(results) != current else 0
    if not asked.draw:
        for tool in ["bench_speed"] if asked.busy else asked.tools or TOOLS:
            results[tool] = measured(tool, *["--bytes"] * asked.busy)
            FIGURES.write_text(json.dumps(results, indent=1) + "\n")
    PICTURE.write_text(picture(results))
    return 0


def _said(problem: str) -> int:
    print(problem, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
