"""Chat templates by the names that merge files have for them, and the one that most models have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from weightops.io.yaml_document import Document

_CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}\
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
_LLAMA3 = """\
{%- for message in messages %}
{%- if loop.first %}{{- bos_token }}{%- endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
_MISTRAL = """\
{%- set said = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{{- bos_token }}
{%- for message in messages if message['role'] != 'system' %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and assistant must take turns, after a system message that there may be') }}
{%- endif %}
{%- if message['role'] == 'user' %}
{{- ' [INST] ' + (said if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}
"""
_ALPACA = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- message['content'] | trim + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
{%- else %}{{- '### Response:\\n' + message['content'] | trim + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}
"""
_EXAONE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}{{- '[|system|][|endofturn|]\\n' }}{%- endif %}
{{- '[|' + message['role'] + '|]' + message['content'] }}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[|assistant|]' }}{%- endif %}
"""
TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}


def chosen_template(document: Document, wanted: str, templates: Sequence[str]) -> str:
    """The template that `wanted` means: a name, a text in Jinja, or with `auto` the commonest of the models'.

    Raises `UsageError` for what is none of them.
    """
    if wanted == "auto":
        if not templates:
            document.fail(("chat_template",), "no model has a template", hint=f"name one: {', '.join(TEMPLATES)}")
        counts = Counter(templates)
        return max(templates, key=lambda template: counts[template])
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if "{" not in wanted:
        hint = f"auto, {', '.join(TEMPLATES)}, or a template in Jinja"
        document.fail(("chat_template",), "is neither the name of a template nor a template", hint=hint)
    return wanted
