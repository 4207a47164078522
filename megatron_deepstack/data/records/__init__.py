"""Records: LLaVA-style conversations about images, from JSON, JSON lines and tar shards."""
