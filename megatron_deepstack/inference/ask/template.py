"""Whether a folder's own chat template writes a question as `data.template` does, token by token.

A folder that `export` wrote says its template. Of others the one of their kind is taken, and a template that differs
(one that lets the model think first, for example) would give the model prompts that it does not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from megatron_deepstack.config.choices import Template
from megatron_deepstack.convert.hf_whole_folder import folder_template
from megatron_deepstack.data.text.conversation import encode_prompt
from megatron_deepstack.data.text.hf_tokenizer import TOKENIZER_FILE, HuggingFaceTokenizer
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID

_QUESTION: Final = "What is it?"


def template_difference(folder: Path, template: Template, tokenizer: Tokenizer, image_token: str) -> str | None:
    """Say how a folder's chat template differs from a template of ours, tried on a question about one image.

    Args:
        folder: A folder of transformers.
        template: The template that is taken for it.
        tokenizer: Its tokenizer.
        image_token: The token by which its processor writes an image.

    Returns:
        What a user should know, also where transformers, which runs templates, is not installed; None if both give the
        same tokens, or if the folder has no template or no tokenizer.json.
    """
    text = folder_template(folder)
    if text is None or not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ModuleNotFoundError as error:
        return f"{error}: its chat template was not compared with data.template={template}; install transformers"
    backend = Backend.from_buffer(tokenizer.files[TOKENIZER_FILE])
    names: dict[str, Any] = {
        f"{role}_token": backend.id_to_token(number)
        for role, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id))
        if number is not None
    }
    content: list[Any] = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    message = {"role": "user", "content": content}
    try:
        rendered: Any = render_jinja_template([[message]], chat_template=text, add_generation_prompt=True, **names)
        written: str = rendered[0][0]
    except Exception as error:  # a template may raise anything
        return (
            f"its chat template cannot write a question about an image ({error}), so it was not compared with "
            f"data.template={template}"
        )
    image = backend.token_to_id(image_token)
    ids = backend.encode(written, add_special_tokens=False).ids
    theirs = [IMAGE_TOKEN_ID if number == image else number for number in ids]
    ours = encode_prompt(_QUESTION, template, tokenizer, num_images=1).tolist()
    if theirs == ours:
        return None
    shown = backend.decode([image or 0 if number == IMAGE_TOKEN_ID else number for number in ours], False)
    return (
        f"its chat template writes a question as {written!r}, and data.template={template} as {shown!r}; the model has "
        "learned the former. If another template of ours writes it, name that one with data.template=NAME"
    )
