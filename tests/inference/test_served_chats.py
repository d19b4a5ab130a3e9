"""The chat templates of merged checkpoints: chats that another program serves have the tokens of training."""

import pytest
from conftest import GOLDEN
from jinja2 import TemplateError
from test_merge_export import make_adapter, merge
from transformers import AutoTokenizer

from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.inference.merge_export import read_template
from utils.models.conversation import Message
from utils.models.convert_tokenizer import fast_tokenizer
from utils.models.templates import AlpacaTemplate, encode_prompt, template_for

TEXTS = (
    "你好",
    "",
    "  padded  ",
    "\n\nlines\n",
    " \n x",
    "\t\ttab\n",
    "a<|user|>b [gMASK]sop <sop></s><unk><|endoftext|>eop soprano sop",
    "<|assistant|>",
)


def chats():
    """Yield conversations with each of TEXTS in each role, with and without a system message."""
    for text in TEXTS:
        system, user = Message("system", text), Message("user", text)
        yield [user]
        yield [system, Message("user", "q")]
        yield [Message("system", "s"), user, Message("assistant", text), user]
        yield [Message("user", "a"), Message("assistant", text), user, Message("assistant", "z"), Message("user", "y")]


@pytest.mark.parametrize("template", ["native", "alpaca"])
@pytest.mark.parametrize("name", ("chatglm2-6b-tiny", "chatglm3-6b-tiny", "glm-4-9b-chat-tiny"))
def test_a_served_chat_has_the_tokens_of_training(name, template):
    tokenizer = load_tokenizer(str(GOLDEN / name))
    fast = fast_tokenizer(tokenizer, AlpacaTemplate.instruction if template == "alpaca" else None)
    for chat in chats():
        ids = fast.apply_chat_template(turns_of(chat), add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(tokenizer, chat, template_for(tokenizer, template)), chat


def turns_of(chat):
    return [{"role": message.role, "content": message.content} for message in chat]


TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
WITH_TOOLS = """[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>
# tools{% for tool in item['tools'] %} {{ tool['function']['name'] }}{% endfor %}{% endif %}{% if item['content'] -%}
<|{{ item['role'] }}|>{{ item['metadata'] }}
{{ item['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
WITH_ARGUMENT = (
    "[gMASK]<sop>{% for tool in tools %}{{ tool['function']['name'] }}{% endfor %}{{ messages[-1]['content'] }}"
)
CALL = [
    {"role": "system", "content": "", "tools": TOOLS},
    {"role": "user", "content": "天气"},
    {"role": "assistant", "metadata": "get_weather", "content": "{}"},
    {"role": "observation", "content": "晴"},
]


def test_tools_are_rendered_as_the_base_does_or_refused():
    tokenizer, user = load_tokenizer(str(GOLDEN / "glm-4-9b-chat-tiny")), [{"role": "user", "content": "hello"}]
    endless = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"  # not run by a merge
    for base in (
        None,
        "{{ broken",
        endless,
        "{{ tools | no_such_filter }}",
        "{% macro text(x) %}{% endmacro %}" + "(" * 9999,
    ):
        tokenizer.chat_template = base
        fast = fast_tokenizer(tokenizer)
        for chat, tools in (
            (CALL[:2], None),
            (CALL[1:], None),
            (user, TOOLS),
            ([{"role": "tool", "content": "x"}], None),
        ):
            with pytest.raises(TemplateError, match="Tools, documents and roles"):
                fast.apply_chat_template(chat, tools=tools, tokenize=False)
    for content in (None, ["x"], [{"type": "text", "text": "x"}], "x\ufdd0"):
        with pytest.raises(TemplateError, match="must be one text"):
            fast.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    tokenizer.chat_template = WITH_TOOLS
    fast = fast_tokenizer(tokenizer)
    for chat in (CALL, CALL[:2], CALL[:3]):
        text = fast.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text == fast.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, chat_template=WITH_TOOLS
        )
        assert "get_weather" in text
    with pytest.raises(TemplateError, match='Give the tools as the "tools" of a system message'):
        fast.apply_chat_template(user, tools=TOOLS, tokenize=False)
    assert (
        fast.apply_chat_template(user, return_dict=False) == encode_prompt(tokenizer, [Message("user", "hello")])[:-1]
    )
    tokenizer.chat_template = WITH_ARGUMENT
    assert (
        fast_tokenizer(tokenizer).apply_chat_template(user, tools=TOOLS, tokenize=False).endswith("get_weatherhello")
    )
    rounds = fast_tokenizer(load_tokenizer(str(GOLDEN / "chatglm2-6b-tiny")))
    for chat in ([*user, *user], [{"role": "assistant", "content": "x"}], [*user, {"role": "system", "content": "x"}]):
        with pytest.raises(TemplateError, match="must alternate"):
            rounds.apply_chat_template(chat, tokenize=False)


def test_the_template_of_what_was_merged_before(tmp_path):
    """It stays if the second adapter records none; a template.json of another form is an error of one line."""
    base = str(GOLDEN / "chatglm2-6b-tiny")
    make_adapter(tmp_path / "adapter", "chatglm2-6b-tiny", "alpaca")
    merge(base, tmp_path / "adapter", tmp_path / "once")
    merge(tmp_path / "once", GOLDEN / "adapters" / "v2" / "all", tmp_path / "twice")
    assert read_template(tmp_path / "twice") == "alpaca"
    tokenizer, chat = load_tokenizer(base), [Message("system", "s"), Message("user", "hello")]
    expected = encode_prompt(tokenizer, chat, template_for(tokenizer, "alpaca"))
    for name in ("once", "twice"):
        served = AutoTokenizer.from_pretrained(tmp_path / name)
        assert served.apply_chat_template(turns_of(chat), add_generation_prompt=True, return_dict=False) == expected
    for content, words in (
        ('{"template": "x"}', "is 'x', not native or alpaca"),
        ("[" * 10**5, "nested"),
        ("", "JSON"),
    ):
        (tmp_path / "twice" / "template.json").write_text(content)
        with pytest.raises(UsageError, match=words):
            read_template(tmp_path / "twice")


def test_merging_into_hf(tmp_path):
    """A -hf base with a chat template of its own: chats as in training, tools as its own template renders them."""
    make_adapter(tmp_path / "adapter")
    merge(GOLDEN / "glm-4-9b-chat-tiny", tmp_path / "adapter", tmp_path / "hf")
    (tmp_path / "hf" / "template.json").unlink()
    (tmp_path / "hf" / "chat_template.jinja").write_text(WITH_TOOLS)
    for before, after in (("hf", "merged"), ("merged", "again")):
        merge(tmp_path / before, tmp_path / "adapter", tmp_path / after)
        served, tokenizer = AutoTokenizer.from_pretrained(tmp_path / after), load_tokenizer(str(tmp_path / "hf"))
        for chat in chats():
            ids = served.apply_chat_template(turns_of(chat), add_generation_prompt=True, return_dict=False)
            assert ids == encode_prompt(tokenizer, chat)
        assert "# tools get_weather" in served.apply_chat_template(CALL, tokenize=False)
