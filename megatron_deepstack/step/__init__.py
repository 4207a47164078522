"""One optimisation step: encode, route, schedule, route back."""
