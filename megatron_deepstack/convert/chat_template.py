"""Conversation templates in transformers' language (Jinja), so that its prompts have the tokens of the training.

A message's content is a text, or a list of texts and images. A single image is put in front of its text, as in the
published data; several stay where they are.
"""

from __future__ import annotations

import json

from megatron_deepstack.config.choices import Template
from megatron_deepstack.data.records.tools import (
    AFTER_TOOLS,
    BEFORE_TOOLS,
    CALL_BEGIN,
    CALL_END,
    RESPONSE_BEGIN,
    RESPONSE_END,
)
from megatron_deepstack.data.records.turns import image_first
from megatron_deepstack.data.text.chat import ChatFormat
from megatron_deepstack.data.text.conversation import CHATS, V1_ANSWER, V1_QUESTION, V1_SYSTEM
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN

_SAID = """\
{%- macro said(content) -%}
  {%- set found = namespace(text='') -%}
  {%- if content is string -%}
    {%- set found.text = content -%}
  {%- else -%}
    {%- for item in content -%}
      {%- if item['type'] == 'text' -%}
        {%- set found.text = found.text + item['text'] -%}
      {%- elif item['type'] in ('image', 'image_url') -%}
        {%- set found.text = found.text + IMAGE_ITEM -%}
      {%- elif item['type'] == 'video' and VIDEO_ITEM -%}
        {%- set found.text = found.text + VIDEO_ITEM -%}
      {%- else -%}
        {{- raise_exception('content of type ' + item['type'] + ' is not read here, only KNOWN_ITEMS') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if FIRST_IMAGE and found.text.count('<image>') == 1 -%}
    {%- set found.text = ('<image>\\n' + found.text.replace('<image>', '').strip()).strip() -%}
  {%- endif -%}
  {{- found.text.replace('<image>', AROUND) -}}
{%- endmacro -%}
{%- set talk = messages -%}
{%- set system = SYSTEM -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = said(messages[0]['content']) -%}
  {%- set talk = messages[1:] -%}
{%- endif -%}
"""
_V1 = """\
{{- bos_token + system + ' ' -}}
{%- for message in talk -%}
  {%- if message['role'] == 'user' -%}
    {{- QUESTION + said(message['content']) + ANSWER -}}
  {%- else -%}
    {{- ' ' + said(message['content']) + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
_PLAIN = """\
{{- bos_token -}}
{%- for message in talk if message['role'] == 'user' -%}
  {{- IMAGE * said(message['content']).count(IMAGE) -}}
{%- endfor -%}
"""
_CHAT = """\
{%- macro turn(role, text) -%}{{- BEGIN + role + NAMED + text + END -}}{%- endmacro -%}
{{- FIRST_TOKEN -}}
{%- if system -%}{{- turn('system', system) -}}{%- endif -%}
{%- for message in talk -%}
  {{- turn(message['role'], said(message['content'])STRIP) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- BEGIN + 'assistant' + NAMED -}}{%- endif -%}
"""
_OFFER = """\
{%- if tools -%}
  {%- set offer = namespace(text=BEFORE_TOOLS) -%}
  {%- for tool in tools -%}{%- set offer.text = offer.text + '\\n' + (tool | tojson) -%}{%- endfor -%}
  {%- set system = (system + '\\n\\n' if system else '') + offer.text + AFTER_TOOLS -%}
{%- endif -%}
"""
_CHAT_WITH_TOOLS = """\
{%- macro spoken(message) -%}
  {%- set found = namespace(text=said(message['content'] or '')) -%}
  {%- for one in message['tool_calls'] or [] -%}
    {%- set call = one['function'] or one -%}
    {%- set given = call['arguments'] if call['arguments'] is string else call['arguments'] | tojson -%}
    {%- set written = CALL_BEGIN + call['name'] + '", "arguments": ' + given + CALL_END -%}
    {%- set found.text = found.text + ('\\n' if found.text else '') + written -%}
  {%- endfor -%}
  {{- found.text -}}
{%- endmacro -%}
{%- macro turn(role, text) -%}{{- BEGIN + role + NAMED + text + END -}}{%- endmacro -%}
{{- FIRST_TOKEN -}}
OFFER
{%- if system -%}{{- turn('system', system) -}}{%- endif -%}
{%- for message in talk -%}
  {%- if message['role'] == 'tool' -%}
    {%- set response = RESPONSE_BEGIN + said(message['content']) + RESPONSE_END -%}
    {%- if loop.first or talk[loop.index0 - 1]['role'] != 'tool' -%}{{- BEGIN + 'user' + NAMED -}}
    {%- else -%}{{- '\\n' -}}{%- endif -%}
    {{- response -}}
    {%- if loop.last or talk[loop.index0 + 1]['role'] != 'tool' -%}{{- END -}}{%- endif -%}
  {%- else -%}
    {{- turn(message['role'], spoken(message)) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- BEGIN + 'assistant' + NAMED -}}{%- endif -%}
"""


def chat_template(template: Template, *, image_token: str = IMAGE_TOKEN, video_token: str | None = None) -> str:
    """The Jinja text of a template.

    Args:
        template: The run's `data.template`.
        image_token: The token that stands for an image, which transformers' processor expands.
        video_token: The same for a video; None if the model takes none.

    Returns:
        Content of chat_template.jinja. It writes the begin of the sequence itself where the template has one.
    """
    if template is Template.PLAIN:
        return _filled(_SAID + _PLAIN, image_token, SYSTEM="", IMAGE=image_token)
    if template is Template.V1:
        return _filled(_SAID + _V1, image_token, SYSTEM=V1_SYSTEM, QUESTION=V1_QUESTION, ANSWER=V1_ANSWER)
    return _chat(CHATS[template], image_token, video_token)


def _chat(form: ChatFormat, image_token: str, video_token: str | None) -> str:
    chat = _CHAT_WITH_TOOLS.replace("OFFER\n", _OFFER) if form.writes_tools else _CHAT
    text = (_SAID + chat).replace("FIRST_TOKEN", "bos_token" if form.has_begin else "''")
    text = text.replace("STRIP", ".strip()" if form.clean is str.strip else "")
    named, end = form.after_name + form.gap, form.end + form.after_end
    edges = form.around_image or ("", "")
    return _filled(
        text,
        image_token,
        SYSTEM=form.system,
        BEGIN=form.begin,
        NAMED=named,
        END=end,
        IMAGE_ITEM=IMAGE_TOKEN + form.after_image,
        VIDEO_ITEM="" if video_token is None else video_token.join(edges),
        AROUND=image_token.join(edges),
        FIRST_IMAGE=form.arrange is image_first,
        BEFORE_TOOLS=BEFORE_TOOLS,
        AFTER_TOOLS=AFTER_TOOLS,
        CALL_BEGIN=CALL_BEGIN,
        CALL_END=CALL_END,
        RESPONSE_BEGIN=RESPONSE_BEGIN,
        RESPONSE_END=RESPONSE_END,
    )


def _filled(text: str, image_token: str, **words: str | bool) -> str:
    """The text with its capital words replaced, longer ones before those that they hold."""
    text = text.replace("KNOWN_ITEMS", "text, image and video" if words.get("VIDEO_ITEM") else "text and image")
    words = {
        "IMAGE_ITEM": f"{IMAGE_TOKEN}\n",
        "VIDEO_ITEM": "",
        "AROUND": image_token,
        "FIRST_IMAGE": True,
        **words,
    }
    words = {name: words[name] for name in sorted(words, key=len, reverse=True)}
    for name, word in words.items():
        text = text.replace(name, json.dumps(word))
    return text
