"""Chats, templates and a tokenizer for tests of what is learned of them."""

from __future__ import annotations

import memsinks as ms

_BEGIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
_END = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = _BEGIN + "{{ m.content + '<|im_end|>\n' }}" + _END
MARKED = (
    _BEGIN
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    + "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    + _END
)
LAST_ONLY = (
    _BEGIN
    + "{{ ('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content + '<|im_end|>\n' }}"
    + _END
)
"""A template that renders an answer otherwise once more messages follow."""

CHAT = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "\nA cat."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In the yard."},
)


def chat_tokenizer(template: str | None = PLAIN):
    """A byte-level tokenizer with a chat template."""
    tokenizer = ms.train_tokenizer(["the cat crossed the yard\n\n", *(x["content"] for x in CHAT)], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer
