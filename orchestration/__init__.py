"""Work on many processes and machines: the only room that knows Ray."""
