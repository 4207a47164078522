"""Which row of which view goes to which rank: the plan of a step's exchange."""
