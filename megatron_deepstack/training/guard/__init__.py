"""Looking after a run: heartbeats, watchdog, slow ranks, sick losses, requests to stop."""
