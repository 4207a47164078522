"""Work on finished stores: verify, show, count, merge and split them."""
