"""From records and images to a store, and from a store to samples. numpy only: no torch, no ranks."""
