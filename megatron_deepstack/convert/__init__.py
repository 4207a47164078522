"""Published and Hugging Face names to ours and back."""
