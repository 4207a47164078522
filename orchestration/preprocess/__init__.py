"""From records and images to a store: a plan of parts, workers that write them, a ledger that says which are done."""
