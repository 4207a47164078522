"""Conversation templates in transformers' language (Jinja), so that its prompts have the tokens of the training.

A message's content is a text, or a list of texts and images. A single image is put in front of its text, as in the
published data; several stay where they are.
"""

from __future__ import annotations

import json

from megatron_deepstack.config.choices import Template
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
      {%- else -%}
        {{- raise_exception('content of type ' + item['type'] + ' is not read here, only text and image') -}}
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


def chat_template(template: Template) -> str:
    """The Jinja text of a template.

    Args:
        template: The run's `data.template`.

    Returns:
        Content of chat_template.jinja. It writes the begin of the sequence itself where the template has one.
    """
    if template is Template.PLAIN:
        return _filled(_SAID + _PLAIN, SYSTEM="", IMAGE=IMAGE_TOKEN)
    if template is Template.V1:
        return _filled(_SAID + _V1, SYSTEM=V1_SYSTEM, QUESTION=V1_QUESTION, ANSWER=V1_ANSWER)
    return _chat(CHATS[template], begins=template not in (Template.QWEN, Template.QWEN3_VL))


def _chat(form: ChatFormat, *, begins: bool) -> str:
    text = (_SAID + _CHAT).replace("FIRST_TOKEN", "bos_token" if begins else "''")
    text = text.replace("STRIP", ".strip()" if form.clean is str.strip else "")
    named, end = form.after_name + form.gap, form.end + form.after_end
    around = IMAGE_TOKEN.join(form.around_image or ("", ""))
    return _filled(
        text,
        SYSTEM=form.system,
        BEGIN=form.begin,
        NAMED=named,
        END=end,
        IMAGE_ITEM=IMAGE_TOKEN + form.after_image,
        AROUND=around,
        FIRST_IMAGE=form.arrange is image_first,
    )


def _filled(text: str, **words: str | bool) -> str:
    """The text with its capital words replaced."""
    words = {"IMAGE_ITEM": f"{IMAGE_TOKEN}\n", "AROUND": IMAGE_TOKEN, "FIRST_IMAGE": True, **words}
    for name, word in words.items():
        text = text.replace(name, json.dumps(word))
    return text
