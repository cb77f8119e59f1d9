"""A model's chat format as the Jinja template that transformers, vLLM and others render prompts with."""

from __future__ import annotations

import json

from mmchat.data.chat_format import ChatFormat


def jinja_template(chat: ChatFormat, system: str | None, image_token: str, image_suffix: str) -> str:
    """The template of conversations whose turns are text, or lists of text and pictures in any order.

    It writes what ChatTemplate renders, with one `image_token` for each picture.

    Args:
        system: said first where a conversation has no system turn; None says nothing.
        image_suffix: text after a picture.
    """
    fallback = "" if system is None else system
    opening = _q(chat.begin)
    if chat.system is not None:
        before, after = _q(chat.begin_system + chat.system[0]), _q(chat.system[1])
        head = [
            f"{{%- if lead.text or messages[0]['role'] == 'system' -%}}{{{{- {before} + lead.text + {after} -}}}}"
            f"{{%- else -%}}{{{{- {opening} -}}}}{{%- endif -%}}",
            "{%- set lead.text = '' -%}",
        ]
    else:  # said at the head of the first user turn
        head = [
            f"{{{{- {opening} -}}}}",
            "{%- if lead.text -%}{%- set lead.text = lead.text + '\\n\\n' -%}{%- endif -%}",
        ]
    # A blank at the end belongs to the first word of the answer, where both are tokenised in one piece.
    answer = chat.assistant[0].rstrip(" ") if chat.joins else chat.assistant[0]
    lines = [
        f"{{%- set lead = namespace(text={_q(fallback)}) -%}}",
        "{%- if messages[0]['role'] == 'system' -%}",
        "{%- set lead.text = '' -%}",
        "{%- if messages[0]['content'] is string -%}{%- set lead.text = messages[0]['content'] -%}",
        "{%- else -%}{%- for part in messages[0]['content'] -%}"
        "{%- set lead.text = lead.text + part['text'] -%}{%- endfor -%}",
        "{%- endif -%}",
        "{%- endif -%}",
        *head,
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}",
        "{%- if not loop.first -%}{{- raise_exception('only the first turn may be the system\\'s') -}}{%- endif -%}",
        "{%- else -%}",
        f"{{%- if message['role'] == 'user' -%}}{{{{- {_q(chat.user[0])} + lead.text -}}}}",
        f"{{%- else -%}}{{{{- {_q(chat.assistant[0])} -}}}}{{%- endif -%}}",
        "{%- set lead.text = '' -%}",
        "{%- if message['content'] is string -%}{{- message['content'] -}}",
        "{%- else -%}",
        "{%- for part in message['content'] -%}",
        f"{{%- if part['type'] == 'image' -%}}{{{{- {_q(image_token + image_suffix)} -}}}}",
        "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}",
        "{%- else -%}{{- raise_exception('this model takes text and pictures, found ' + part['type']) -}}{%- endif -%}",
        "{%- endfor -%}",
        "{%- endif -%}",
        f"{{%- if message['role'] == 'user' -%}}{{{{- {_q(chat.user[1])} -}}}}",
        f"{{%- else -%}}{{{{- {_q(chat.assistant[1] + chat.assistant[2])} -}}}}{{%- endif -%}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {_q(answer)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines) + "\n"


def _q(text: str) -> str:
    """A text as a Jinja literal."""
    return json.dumps(text, ensure_ascii=False)
