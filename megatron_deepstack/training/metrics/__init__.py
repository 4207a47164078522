"""What a run says about itself while it trains: console, files, traces.

The one idea: a step is one record, written by rank 0 to several places; nothing is computed twice for the display.

Begin with `record` (what is known of a step), then `writers` (where it goes).
"""
