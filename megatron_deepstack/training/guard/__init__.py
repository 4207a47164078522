"""Looking after a run: heartbeats, watchdog, slow ranks, losses that look wrong, requests to stop.

The one idea: a run must never wait silently. Ranks show signs of life, a thread of each rank looks for steps that do
not end, and numbers that look wrong are reported with the samples they came from.

Begin with `watchdog`, then `health`.
"""
