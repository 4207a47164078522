"""The command line; each module registers its verbs with the one application."""

from megatron_deepstack.cli import data_verbs, launch_verbs, reference_verbs, run_verbs, store_verbs
from megatron_deepstack.cli.app import app, main
from megatron_deepstack.cli.paths import expand_homes

__all__ = ["app", "data_verbs", "launch_verbs", "main", "reference_verbs", "run_verbs", "store_verbs"]

expand_homes(app)
