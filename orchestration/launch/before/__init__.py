"""Before a launched run starts: where its ranks go, and whether every node can carry them."""
