"""
The chat formats as Jinja templates, for merged checkpoints that other programs serve.

A served chat must have the tokens that rows were trained with. A Jinja template makes one text, in which a tokenizer
finds special tokens wherever a message spells them. Two characters that no text has (Unicode noncharacters) prevent
that: NO_TOKEN inside a spelled token, APART between a role's newline and a text that begins with white space.
`keep_apart` makes a tokenizer drop both. `utils/inference/merge_export.py` compares the result with `encode_prompt`.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from utils.models.chat_formats import AlpacaTemplate, ChatGLM2Template
from utils.models.family import generation_of
from utils.models.turn_formats import ChatGLM3Template, GLM4Template

NO_TOKEN, APART = "\ufdd0", "\ufdd1"
FIRST_LINE = "{#- The FORM form that rows were trained with -#}"  # marks templates that were made here
# Defines `text(content)`, and `chat.plain`: false if the chat has what a form cannot express, which is then an error.
HEAD = r"""
{%- set chat = namespace(plain=true, text='') -%}
{%- macro text(content) -%}
    {%- if content is not string or '\ufdd0' in content or '\ufdd1' in content -%}
        {{- raise_exception('The content of a message must be one text.') -}}
    {%- endif -%}
    {%- set chat.text = content -%}
    {%- for token in TOKENS if token in content -%}
        {%- set chat.text = chat.text | replace(token, token[0] ~ '\ufdd0' ~ token[1:]) -%}
    {%- endfor -%}
    {{- chat.text -}}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message['role'] not in ('system', 'user', 'assistant') -%}{%- set chat.plain = false -%}{%- endif -%}
    {%- for key in message if key not in ('role', 'content') and message[key] -%}
        {%- set chat.plain = false -%}
    {%- endfor -%}
{%- endfor -%}
{%- if tools or documents -%}{%- set chat.plain = false -%}{%- endif -%}
"""
REFUSE = "{{- raise_exception('Tools, documents and roles but system, user and assistant are not supported.') -}}"
TOOLS_ARGUMENT = r"""
{%- if tools or documents -%}
    {{- raise_exception('Give the tools as the "tools" of a system message.') -}}
{%- endif -%}
"""
# ChatGLM3-6B and GLM-4-9B: each message follows its role token.
TURNS = r"""
{{- 'PREFIX' -}}
{%- for message in messages -%}
    {{- '<|' ~ message['role'] ~ '|>\n' -}}
    {%- if message['content'] -%}BETWEEN{%- endif -%}
    {{- text(message['content']) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
# Forms that are one text: the system's text precedes the first question.
ONE_TEXT = r"""
{{- 'PREFIX' -}}
{%- set system = messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if system else messages -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}
        {{- raise_exception('After a system message, user and assistant must alternate, the user first.') -}}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- text(message['content']) ~ '\n\n' -}}
    {%- else -%}
        {{- BEFORE -}}
        {%- if system and loop.first -%}{{- text(messages[0]['content']) ~ '\n' -}}{%- endif -%}
        {{- text(message['content']) ~ AFTER -}}
    {%- endif -%}
{%- endfor -%}
"""
# In ChatGLM3-6B each text is encoded apart and opens with a blank; in GLM-4-9B the newline is apart, which matters
# before a text that begins with white space.
BLANK = "{{- ' ' -}}"
BREAK = r"{%- if message['content'] is string and not message['content'][:1] | trim -%}{{- '\ufdd1' -}}{%- endif -%}"
# The native form of each chat template that merged checkpoints can have.
NATIVE_BODIES = {
    ChatGLM2Template: ONE_TEXT.replace("BEFORE", r"'[Round ' ~ (loop.index0 // 2 + 1) ~ ']\n\n问：'").replace(
        "AFTER", r"'\n\n答：'"
    ),
    ChatGLM3Template: TURNS.replace("BETWEEN", BLANK),
    GLM4Template: TURNS.replace("BETWEEN", BREAK),
}
ALPACA_BODY = ONE_TEXT.replace("BEFORE", r"""('INSTRUCTION' if loop.first else '') ~ '### Input:\n'""").replace(
    "AFTER", r"'\n\n### Response:'"
)
PROBE = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def chat_template(
    tokenizer: PreTrainedTokenizerBase, special_tokens: Sequence[str], alpaca_instruction: str | None = None
) -> str:
    """
    The Jinja template of a merged checkpoint, in native or alpaca form.

    Args:
        tokenizer: the base's. Its own template renders chats with tools if it can; otherwise they are refused.
        special_tokens: those that the merged tokenizer would find in a text.
        alpaca_instruction: `AlpacaTemplate.instruction` for the alpaca form, else None.
    """
    native = generation_of(tokenizer).chat_template
    prefix = "".join(native.opening_tokens)
    if alpaca_instruction is None:
        form, body = "native", NATIVE_BODIES[native]
    else:
        form, body = AlpacaTemplate.name, ALPACA_BODY.replace("INSTRUCTION", alpaca_instruction.replace("\n", r"\n"))
        if native.opening_tokens[-1].isalpha():  # "sop" must not run into the first word
            prefix += r"\ufdd0"
    first_line, base = FIRST_LINE.replace("FORM", form), tokenizer.chat_template
    if isinstance(base, str) and base.startswith(first_line):  # the base is a merged checkpoint of the same form
        return base
    head = HEAD.strip().replace("TOKENS", repr(list(special_tokens)))
    body = body.strip().replace("PREFIX", prefix)

    def complete(other: str) -> str:
        return f"{first_line}{head}{{%- if chat.plain -%}}{body}{{%- else -%}}{other}{{%- endif -%}}"

    def render(template: str) -> str:
        return tokenizer.apply_chat_template(PROBE, chat_template=template, tokenize=False)

    with_tools = _tools_branch(base)
    if with_tools:
        try:
            if render(complete(with_tools)) == render(complete(REFUSE)):
                return complete(with_tools)
        except TemplateError:  # transformers cannot compile the base's template
            pass
    return complete(REFUSE)


def is_made_here(template: Any) -> bool:
    """Whether a chat template is one that `chat_template` made."""
    return isinstance(template, str) and template.startswith(FIRST_LINE.partition("FORM")[0])


def _tools_branch(template: Any) -> str | None:
    """
    The base's own template as the branch that renders chats with tools.

    None if that template knows no tools. It is parsed, and not run.
    """
    if not isinstance(template, str) or is_made_here(template):
        return None
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        as_argument = "tools" in meta.find_undeclared_variables(parsed)
    except (TemplateError, RecursionError):
        return None
    if as_argument:
        return template
    of_messages = any(
        getattr(node, "attr", None) == "tools" or getattr(getattr(node, "arg", None), "value", None) == "tools"
        for node in parsed.find_all((nodes.Getattr, nodes.Getitem))
    )
    return TOOLS_ARGUMENT.strip() + template if of_messages else None


def keep_apart(tokenizer: Tokenizer) -> None:
    """Make `tokenizer` drop NO_TOKEN and APART, in place."""
    if NO_TOKEN in tokenizer.to_str():
        return
    drop = normalizers.Replace(NO_TOKEN, "")
    tokenizer.normalizer = normalizers.Sequence([drop, tokenizer.normalizer]) if tokenizer.normalizer else drop
    if tokenizer.pre_tokenizer:  # SentencePiece's have none, and need no APART
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(APART, "removed"), tokenizer.pre_tokenizer]
        )
