"""Conversations to token ids and loss masks: templates and tokenizers.

The one idea: a template writes a conversation as spans of tokens, and each span is either learned or not. Begin with
`conversation.py` (`encode_conversation`, `encode_prompt`); `chat.py` holds the chat formats, and `tokenizer.py` what
every tokenizer offers. `tokenizer_files.py` loads one from a path.
"""
