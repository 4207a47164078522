"""The command line: each module registers its verbs with the one application.

The one idea: a verb only reads its arguments, calls one function of another package, and prints the result; nothing
heavy is imported before the arguments make sense. Begin with `app.py` (errors and exit codes) and `catalogue.py` (all
verbs in their order, with examples); the verbs are in the modules `*_verbs.py`.
"""

from megatron_deepstack.cli import (
    ask_verbs,
    data_verbs,
    evaluate_verbs,
    first_verbs,
    launch_verbs,
    plan_verbs,
    reference_verbs,
    run_verbs,
    store_verbs,
)
from megatron_deepstack.cli.app import app, main
from megatron_deepstack.cli.paths import expand_homes

__all__ = [
    "app",
    "ask_verbs",
    "data_verbs",
    "evaluate_verbs",
    "first_verbs",
    "launch_verbs",
    "main",
    "plan_verbs",
    "reference_verbs",
    "run_verbs",
    "store_verbs",
]

expand_homes(app)
