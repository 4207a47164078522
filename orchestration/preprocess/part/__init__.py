"""Parts, the unit of work: planned, worked on, recorded, and put together at the end."""
