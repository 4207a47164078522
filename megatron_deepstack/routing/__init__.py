"""Sending rows to the ranks that add them, and returning their gradients.

This is the only package with point-to-point and all-to-all calls. The one idea: a step exchanges all its rows once
before the pipeline schedule and all gradients once after it, so no call can block the schedule. Which row goes to which
rank is planned before, without communication, in `planning.exchange`.

Begin with `exchange.send_rows`; `exchange.return_gradients` is its reverse.
"""
