"""
The prompts of `utils/models/templates.py` as chat templates of transformers, for merged checkpoints: a chat that
another program serves has the tokens that rows were trained with.

A template makes one text, in which a tokenizer finds special tokens wherever they are spelled. Two characters that no
text has (Unicode's noncharacters) keep it to the tokens of training: NO_TOKEN inside a spelled token, APART between a
role's newline and a text that begins with white space. `keep_apart` has a tokenizer drop both.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from utils.models.tokenization_chatglm2 import CHATGLM2_PREFIX, ChatGLM2Tokenizer, ChatGLM3Tokenizer
from utils.models.tokenization_glm4 import GLM4_PREFIX

NO_TOKEN, APART = "\ufdd0", "\ufdd1"
OPENING = "{#- The FORM form that rows were trained with -#}"
# Of `messages`: nothing is left out, so what a form cannot say is an error.
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
REFUSED = "{{- raise_exception('Tools, documents and roles but system, user and assistant are not supported.') -}}"
TOOLS_ARGUMENT = r"""
{%- if tools or documents -%}
    {{- raise_exception('Give the tools as the "tools" of a system message.') -}}
{%- endif -%}
"""
# ChatGLM3 and GLM-4: turns, each behind its role.
TURNS = r"""
{{- 'PREFIX' -}}
{%- for message in messages -%}
    {{- '<|' ~ message['role'] ~ '|>\n' -}}
    {%- if message['content'] -%}BETWEEN{%- endif -%}
    {{- text(message['content']) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
# Forms that are one text: the system's stands before the first user's.
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
ROUND = r"'[Round ' ~ (loop.index0 // 2 + 1) ~ ']\n\n问：'", r"'\n\n答：'"
ALPACA = (
    r"""('OPENING' if loop.first else '') ~ '### Input:\n'""",
    r"'\n\n### Response:'",
)
# In ChatGLM3 each text is encoded apart and opens with a blank; in GLM-4 the newline is, which matters before another.
BLANK = "{{- ' ' -}}"
PROBE = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
BREAK = r"{%- if message['content'] is string and not message['content'][:1] | trim -%}{{- '\ufdd1' -}}{%- endif -%}"


def chat_template(
    tokenizer: PreTrainedTokenizerBase, special_tokens: Sequence[str], alpaca_opening: str | None = None
) -> str:
    """
    The chat template of a merged checkpoint: the native form of its generation, or the alpaca template's.

    Args:
        tokenizer: the base's. Its own template renders chats with tools where it can; otherwise they are refused.
        special_tokens: those that the merged tokenizer would find in a text.
        alpaca_opening: the alpaca template's first text, for that form.
    """
    sentencepiece = isinstance(tokenizer, ChatGLM2Tokenizer)
    prefix = "".join(CHATGLM2_PREFIX if sentencepiece else GLM4_PREFIX)
    if alpaca_opening is not None:
        form, (before, after) = "alpaca", ALPACA
        prefix += r"\ufdd0" * sentencepiece  # "sop" must not run into the first word
        body = ONE_TEXT.replace("BEFORE", before.replace("OPENING", alpaca_opening.replace("\n", r"\n")))
        body = body.replace("AFTER", after)
    elif sentencepiece and not isinstance(tokenizer, ChatGLM3Tokenizer):
        form, (before, after) = "native", ROUND
        body = ONE_TEXT.replace("BEFORE", before).replace("AFTER", after)
    else:
        form, body = "native", TURNS.replace("BETWEEN", BLANK if sentencepiece else BREAK)
    opening, base = OPENING.replace("FORM", form), tokenizer.chat_template
    if isinstance(base, str) and base.startswith(opening):  # the base is a merged checkpoint of the same form
        return base
    head = HEAD.strip().replace("TOKENS", repr(list(special_tokens)))
    body = body.strip().replace("PREFIX", prefix)

    def complete(other: str) -> str:
        return f"{opening}{head}{{%- if chat.plain -%}}{body}{{%- else -%}}{other}{{%- endif -%}}"

    def render(template: str) -> str:
        return tokenizer.apply_chat_template(PROBE, chat_template=template, tokenize=False)

    with_tools = _part_for_tools(base)
    if with_tools:
        try:
            if render(complete(with_tools)) == render(complete(REFUSED)):
                return complete(with_tools)
        except TemplateError:  # the base's template is none that transformers can compile
            pass
    return complete(REFUSED)


def _part_for_tools(template: Any) -> str | None:
    """What renders chats with tools by a base's own template; None where it has none. The template is not run."""
    if not isinstance(template, str) or template.startswith(OPENING.partition("FORM")[0]):
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
    """Has `tokenizer` drop the two characters that hold texts and tokens apart."""
    if NO_TOKEN in tokenizer.to_str():
        return
    drop = normalizers.Replace(NO_TOKEN, "")
    tokenizer.normalizer = normalizers.Sequence([drop, tokenizer.normalizer]) if tokenizer.normalizer else drop
    if tokenizer.pre_tokenizer:  # SentencePiece's have none, and need no APART
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(APART, "removed"), tokenizer.pre_tokenizer]
        )
