"""
Raw rows of chats with tools, reasoning, loss and options in the forms of many projects, and what each must become.

ROWS: name -> (row, conversation). For test_chat_forms.py; chat_faults.py has the rows that cannot be used.
"""

import json

from utils.models.conversation import Conversation, Message, ToolCall

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "查天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "now", "description": "what time it is"}}
TOOLS, ONE_TOOL = json.dumps([WEATHER, CLOCK], ensure_ascii=False), json.dumps([WEATHER], ensure_ascii=False)
QUESTION, ANSWER = "北京天气？", "北京晴，3 度。"
ARGUMENTS = '{"city": "北京"}'
CALL = ToolCall("get_weather", ARGUMENTS)
NOW = ToolCall("now", "{}")
RESULT = '{"t": 3}'

ASK = {"role": "user", "content": QUESTION}
SAY = {"role": "assistant", "content": ANSWER}
HUMAN, GPT = {"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}
CALL_JSON = json.dumps({"name": "get_weather", "arguments": {"city": "北京"}}, ensure_ascii=False)


def openai_call(name, arguments, call_id="call_1"):
    """A call as OpenAI's API returns it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls_message(*calls, **fields):
    """A message of the assistant with calls and no text."""
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **fields}


def conversation(*messages, tools="", options=()):
    """A conversation that begins with QUESTION."""
    return Conversation((Message("user", QUESTION), *messages), tools, options)


def assistant(content="", reasoning="", calls=(), trained=None):
    """A message of the assistant."""
    return Message("assistant", content, reasoning, tuple(calls), trained)


def result(content):
    """A message with a call's result."""
    return Message("tool", content)


CALLED = (assistant(calls=[CALL]), result(RESULT), assistant(ANSWER))
CALLED_TWICE = (assistant(calls=[CALL, NOW]), result(RESULT), result("9:00"), assistant(ANSWER))
RESULT_MESSAGE = {"role": "tool", "tool_call_id": "call_1", "content": RESULT}
TWO_CALLS = calls_message(openai_call("get_weather", ARGUMENTS, "a"), openai_call("now", "{}", "b"))
LAST_CALL = conversation(assistant(calls=[CALL]), tools=ONE_TOOL)
THINK = "<think>\n先查。\n</think>"

ROWS = {
    # OpenAI's messages
    "openai, arguments as text": (
        {
            "messages": [ASK, calls_message(openai_call("get_weather", ARGUMENTS)), RESULT_MESSAGE, SAY],
            "tools": [WEATHER],
            "parallel_tool_calls": False,
        },
        conversation(*CALLED, tools=ONE_TOOL),
    ),
    "openai, arguments as an object": (
        {
            "messages": [ASK, calls_message(openai_call("get_weather", {"city": "北京"})), RESULT_MESSAGE, SAY],
            "tools": [WEATHER, CLOCK],
        },
        conversation(*CALLED, tools=TOOLS),
    ),
    "the letters of arguments stay": (
        {"messages": [ASK, calls_message(openai_call("get_weather", '{"city":"\\u5317\\u4eac"}'))]},
        conversation(assistant(calls=[ToolCall("get_weather", '{"city":"\\u5317\\u4eac"}')])),
    ),
    "openai, a text beside the calls": (
        {
            "messages": [
                ASK,
                calls_message(openai_call("get_weather", ARGUMENTS), content="我查一下。"),
                RESULT_MESSAGE,
                SAY,
            ]
        },
        conversation(assistant("我查一下。", calls=[CALL]), *CALLED[1:]),
    ),
    "openai, two calls, results in another order": (
        {
            "messages": [
                ASK,
                TWO_CALLS,
                {"role": "tool", "tool_call_id": "b", "content": "9:00"},
                {"role": "tool", "tool_call_id": "a", "content": RESULT},
                SAY,
            ]
        },
        conversation(*CALLED_TWICE),
    ),
    "two calls, results told apart by name": (
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "tool_calls": [{"name": "get_weather", "arguments": {"city": "北京"}}, {"name": "now"}],
                },
                {"role": "tool", "name": "now", "content": "9:00"},
                {"role": "tool", "name": "get_weather", "content": {"t": 3}},
                SAY,
            ]
        },
        conversation(*CALLED_TWICE),
    ),
    "fewer results than calls": (
        {"messages": [ASK, TWO_CALLS, RESULT_MESSAGE, SAY]},
        conversation(assistant(calls=[CALL, NOW]), result(RESULT), assistant(ANSWER)),
    ),
    "openai, the legacy function_call and functions": (
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "get_weather", "arguments": ARGUMENTS},
                },
                {"role": "function", "name": "get_weather", "content": RESULT},
                SAY,
            ],
            "functions": [WEATHER["function"]],
        },
        conversation(*CALLED, tools=ONE_TOOL),
    ),
    "openai, content in parts": (
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "说短些"}]},
                {"role": "user", "content": [{"type": "text", "text": "北京"}, {"type": "text", "text": "天气？"}]},
                calls_message(openai_call("get_weather", ARGUMENTS), content=[]),
                {"role": "tool", "content": [{"type": "text", "text": RESULT}]},
                SAY,
            ]
        },
        Conversation((Message("system", "说短些"), *conversation(*CALLED).messages)),
    ),
    "calls, results and questions over several turns": (
        {
            "messages": [
                *(ASK, calls_message(openai_call("get_weather", ARGUMENTS)), RESULT_MESSAGE),
                *(calls_message(openai_call("now", "")), {"role": "tool", "content": ""}, SAY, ASK, SAY),
            ]
        },
        conversation(
            *(*CALLED[:2], assistant(calls=[NOW]), result(""), assistant(ANSWER)),
            *(Message("user", QUESTION), assistant(ANSWER)),
        ),
    ),
    "fields that a table filled with null": (
        {
            "messages": [
                ASK | {"tool_calls": None, "reasoning_content": None, "tool_call_id": None},
                SAY | {"tool_calls": [], "function_call": None, "loss": None, "refusal": None},
            ],
            "tools": None,
            "enable_thinking": None,
            "chat_template_kwargs": {},
        },
        conversation(assistant(ANSWER)),
    ),
    "a result that is a list": (
        {
            "messages": [
                ASK,
                calls_message(openai_call("now", None)),
                {"role": "tool", "content": [{"type": "雨"}]},
                SAY,
            ]
        },
        conversation(assistant(calls=[NOW]), result('[{"type": "雨"}]'), assistant(ANSWER)),
    ),
    # TRL's prompt and completion
    "trl, two lists of messages": (
        {
            "prompt": [ASK],
            "completion": [calls_message(openai_call("get_weather", {"city": "北京"}))],
            "tools": [WEATHER],
        },
        LAST_CALL,
    ),
    # ShareGPT as LLaMA-Factory writes it
    "llama-factory, a call": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": CALL_JSON},
                {"from": "observation", "value": RESULT},
                GPT,
            ],
            "system": "说短些",
            "tools": json.dumps([WEATHER["function"]], ensure_ascii=False),
        },
        Conversation((Message("system", "说短些"), *conversation(*CALLED).messages), ONE_TOOL),
    ),
    "llama-factory, a list of calls and one result for both": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": f'[{CALL_JSON}, {{"name": "now", "arguments": {{}}}}]'},
                {"from": "observation", "value": '[{"t": 3}, "9:00"]'},
                GPT,
            ]
        },
        conversation(assistant(calls=[CALL, NOW]), result('[{"t": 3}, "9:00"]'), assistant(ANSWER)),
    ),
    "llama-factory, a thought before the call": (
        {"conversations": [HUMAN, {"from": "function_call", "value": f"{THINK}\n\n{CALL_JSON}"}]},
        conversation(assistant(THINK, calls=[CALL])),
    ),
    "llama-factory, alpaca with tools": (
        {
            "instruction": QUESTION,
            "input": "",
            "output": ANSWER,
            "history": [["一", "二"]],
            "tools": ONE_TOOL,
            "system": "短",
        },
        Conversation(
            (
                *(Message("system", "短"), Message("user", "一"), assistant("二")),
                *(Message("user", QUESTION), assistant(ANSWER)),
            ),
            ONE_TOOL,
        ),
    ),
    # ms-swift
    "ms-swift, calls and results in turns of their own": (
        {
            "tools": TOOLS,
            "messages": [
                ASK,
                {"role": "tool_call", "content": CALL_JSON},
                {"role": "tool_call", "content": '{"name": "now", "arguments": "{}"}'},
                {"role": "tool_response", "content": RESULT},
                {"role": "tool_response", "content": "9:00"},
                SAY,
            ],
        },
        conversation(*CALLED_TWICE, tools=TOOLS),
    ),
    "ms-swift, a text before the call": (
        {"messages": [ASK, {"role": "assistant", "content": THINK}, {"role": "tool_call", "content": CALL_JSON}]},
        conversation(assistant(THINK, calls=[CALL])),
    ),
    "ms-swift, sharegpt in pairs": (
        {
            "system": "短",
            "conversation": [{"human": "一", "assistant": "二"}, {"human": QUESTION, "assistant": ANSWER}],
        },
        Conversation(
            (
                *(Message("system", "短"), Message("user", "一"), assistant("二")),
                *(Message("user", QUESTION), assistant(ANSWER)),
            )
        ),
    ),
    "ms-swift, query, response and history": (
        {
            "system": "短",
            "query": QUESTION,
            "response": ANSWER,
            "history": [["一", "二"]],
            "tools": [CLOCK["function"]],
        },
        Conversation(
            (
                *(Message("system", "短"), Message("user", "一"), assistant("二")),
                *(Message("user", QUESTION), assistant(ANSWER)),
            ),
            json.dumps([CLOCK], ensure_ascii=False),
        ),
    ),
    # ChatGLM3
    "chatglm3, call and result in one message": (
        {
            "tools": [WEATHER["function"]],
            "conversations": [
                ASK,
                {"role": "assistant", "content": "我查一下。"},
                {"role": "tool", "name": "get_weather", "parameters": {"city": "北京"}, "observation": {"t": 3}},
                SAY,
            ],
        },
        conversation(assistant("我查一下。", calls=[CALL]), *CALLED[1:], tools=ONE_TOOL),
    ),
    "chatglm3, metadata and code": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"},
                {"role": "<|observation|>", "content": RESULT},
                SAY | {"metadata": ""},
            ]
        },
        conversation(*CALLED),
    ),
    # GLM-4
    "glm-4, tools in the system message": (
        {
            "messages": [
                {"role": "system", "content": "", "tools": [WEATHER]},
                ASK,
                {"role": "assistant", "content": CALL_JSON},
                {"role": "observation", "content": RESULT},
                SAY,
            ]
        },
        conversation(*CALLED, tools=ONE_TOOL),
    ),
    "glm-4, metadata": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": "我查一下。"},
                {"role": "assistant", "metadata": "get_weather", "content": ARGUMENTS},
                {"role": "observation", "content": RESULT},
                SAY,
            ]
        },
        conversation(assistant("我查一下。", calls=[CALL]), *CALLED[1:]),
    ),
    "glm-4, the name and the arguments as text": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": f"get_weather\n{ARGUMENTS}"},
                {"role": "observation", "content": RESULT},
                SAY,
            ]
        },
        conversation(*CALLED),
    ),
    # thinking
    "reasoning_content": (
        {"messages": [ASK, SAY | {"reasoning_content": "看看天。"}], "enable_thinking": True},
        conversation(assistant(ANSWER, "看看天。"), options=(("enable_thinking", True),)),
    ),
    "reasoning before a call, as vLLM returns it": (
        {
            "messages": [
                ASK,
                calls_message(openai_call("get_weather", ARGUMENTS), reasoning="查。", reasoning_content="查。"),
            ]
        },
        conversation(assistant(reasoning="查。", calls=[CALL])),
    ),
    "a thought in the content": (
        {"messages": [ASK, {"role": "assistant", "content": f"{THINK}\n{ANSWER}"}]},
        conversation(assistant(f"{THINK}\n{ANSWER}")),
    ),
    "reasoning beside a prompt and an answer": (
        {"prompt": QUESTION, "reasoning_content": "看看天。", "response": ANSWER},
        conversation(assistant(ANSWER, "看看天。")),
    ),
    "options in chat_template_kwargs": (
        {
            "messages": [ASK, SAY],
            "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "high"},
            "clear_thinking": False,
        },
        conversation(
            assistant(ANSWER),
            options=(("clear_thinking", False), ("enable_thinking", False), ("reasoning_effort", "high")),
        ),
    ),
    "thinking off, in words": (
        {"messages": [ASK, SAY], "thinking": "off"},
        conversation(assistant(ANSWER), options=(("enable_thinking", False),)),
    ),
    "thinking as in the public API": (
        {"messages": [ASK, SAY], "thinking": {"type": "enabled", "clear_thinking": True}},
        conversation(assistant(ANSWER), options=(("clear_thinking", True), ("enable_thinking", True))),
    ),
    # loss
    "loss of each message": (
        {"messages": [ASK | {"loss": True}, SAY | {"loss": True}, ASK | {"weight": 0.5}, SAY | {"weight": 0}]},
        conversation(assistant(ANSWER, trained=True), Message("user", QUESTION), assistant(ANSWER, trained=False)),
    ),
    "loss of calls": (
        {
            "messages": [
                *(ASK, {"role": "tool_call", "content": CALL_JSON, "loss": False}),
                *({"role": "tool_response", "content": RESULT, "loss": True}, SAY),
            ]
        },
        conversation(assistant(calls=[CALL], trained=False), result(RESULT), assistant(ANSWER)),
    ),
    "chatglm3, loss of a call": (
        {
            "conversations": [
                ASK,
                {"role": "tool", "name": "now", "parameters": {}, "observation": "9:00", "loss": False},
                SAY | {"loss": True},
            ]
        },
        conversation(assistant(calls=[NOW], trained=False), result("9:00"), assistant(ANSWER, trained=True)),
    ),
}
