"""What a run did, for people: the stage plan in the terminal and a self-contained HTML page."""
