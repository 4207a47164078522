"""The test harness: the oracle, reference cases, and worker processes that check one layout against another."""
