"""What learns and how: parameter groups, AdamW, learning rate, steps left out."""
