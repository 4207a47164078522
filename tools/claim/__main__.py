"""The claim shown: DeepStack against its baselines, trained from scratch on drawn documents. `make claim` runs it."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from tools.claim.draw import draw
from tools.claim.experiment import Experiment, read_experiment
from tools.claim.page import write_pages
from tools.claim.runs import Job, check_arms, run_all
from tools.claim.scores import tuned_rate
from tools.claim.stores import make_stores
from tools.claim.verbs import VerbError


def main() -> None:
    """Draw, preprocess, train, ask, and write the result; what is there already is not done again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", type=Path, default=Path(__file__).with_name("claim.yaml"), help="what is compared")
    parser.add_argument("--folder", type=Path, help="where everything is kept (default: runs/claim, or -quick)")
    parser.add_argument("--publish", type=Path, help="write the page, picture and JSON here too")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    parser.add_argument("--quick", action="store_true", help="a few arms, one seed, few steps")
    arguments = parser.parse_args()
    experiment = read_experiment(arguments.arms, quick=arguments.quick)
    folder = arguments.folder or Path("runs/claim-quick" if arguments.quick else "runs/claim")
    try:
        show(folder.absolute(), experiment, arguments.parallel, arguments.publish, quick=arguments.quick)
    except (VerbError, KeyboardInterrupt) as error:
        raise SystemExit(f"claim: {str(error) or 'stopped'}\nThe same command goes on from here.") from None


def show(folder: Path, experiment: Experiment, parallel: int, publish: Path | None, *, quick: bool) -> None:
    """Do everything, in `folder`."""
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"claim: {time.monotonic() - began:5.0f} s  {line}", flush=True)

    check_arms(experiment)
    say(f"pages in {folder / 'data'}")
    draw(folder / "data", experiment.pages.items())
    make_stores(folder, experiment, say)
    rates, first = experiment.learning_rates, experiment.seeds[0]
    jobs = [Job(arm, rate, first) for arm in experiment.arms for rate in rates]
    say(f"{len(jobs)} runs to choose learning rates, {parallel} at a time")
    found = iter(run_all(folder, experiment, jobs, parallel, say))
    sweep = {arm.name: [next(found) for _ in rates] for arm in experiment.arms}
    # Seed after seed, so that arms can be compared with fewer seeds when this is stopped.
    chosen = [Job(arm, tuned_rate(sweep[arm.name]), seed) for seed in experiment.seeds for arm in experiment.arms]
    say(f"{len(chosen)} runs at the chosen rates, of which {len(experiment.arms)} are there")
    results: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in experiment.arms}
    for result in run_all(folder, experiment, chosen, parallel, say):
        results[result["arm"]].append(result)
    command = "make claim QUICK=yes" if quick else "make claim"
    for target in (folder, *([publish] if publish else [])):
        write_pages(target, experiment, results, sweep, command)
    say(f"the result is {folder / 'claim.md'}")


if __name__ == "__main__":
    main()
