"""Conversations to token ids and loss masks: templates and tokenizers."""
