"""Raw rows of chats that cannot be used, and words of the message that says why; for test_chat_forms.py."""

from chat_rows import (
    ANSWER,
    ASK,
    CALL_JSON,
    CLOCK,
    GPT,
    HUMAN,
    QUESTION,
    RESULT_MESSAGE,
    SAY,
    WEATHER,
    calls_message,
    openai_call,
)

# name -> (row, words)
FAULTS = {
    "arguments of no JSON": (
        {"messages": [ASK, calls_message(openai_call("now", "{'a': 1}"))]},
        'the arguments of call 1 of message 2 of "messages" are text, but not JSON',
    ),
    "arguments of a list": (
        {"messages": [ASK, calls_message(openai_call("now", "{}"), openai_call("now", [1]))]},
        'the arguments of call 2 of message 2 of "messages" must be an object or its JSON text, not list',
    ),
    "arguments of JSON of no object": (
        {"messages": [ASK, calls_message(openai_call("now", "[1]"))]},
        "must be JSON of an object, not of list",
    ),
    "arguments that hold NaN": (
        {"messages": [ASK, calls_message(openai_call("now", '{"a": NaN}'))]},
        "are text, but not JSON",
    ),
    "a call without a name": (
        {"messages": [ASK, calls_message({"id": "1"})]},
        'call 1 of message 2 of "messages" has no name of a tool: write a call as {"name"',
    ),
    "a call that is text": (
        {"conversations": [HUMAN, {"from": "function_call", "value": "get_weather(北京)"}]},
        'message 2 of "conversations" is no call: it must be JSON such as {"name"',
    ),
    "calls of the user": (
        {"messages": [ASK | {"tool_calls": [{"name": "now"}]}, SAY]},
        '"tool_calls" in message 1 of "messages" is not empty, but only a message of the assistant has it',
    ),
    "reasoning of the user": (
        {"messages": [ASK | {"reasoning_content": "嗯"}, SAY]},
        '"reasoning_content" in message 1 of "messages" is not empty, but only a message of the assistant has it',
    ),
    "reasoning alone": (
        {"messages": [ASK, {"role": "assistant", "content": "", "reasoning_content": "嗯"}]},
        'message 2 of "messages" has reasoning, but neither an answer nor a call after it',
    ),
    "two reasonings": (
        {"messages": [ASK, SAY | {"reasoning_content": "嗯", "thinking": "哦"}]},
        'reasoning_content and thinking in message 2 of "messages" hold different texts: keep one of them',
    ),
    "reasoning beside a chat": (
        {"messages": [ASK, SAY], "reasoning_content": "嗯"},
        '"reasoning_content" is not empty: in a chat it is a field of the assistant\'s message',
    ),
    "a tool without a name": (
        {"messages": [ASK, SAY], "tools": [WEATHER, {"type": "function", "function": {"description": "x"}}]},
        'tool 2 of "tools" has no "name"',
    ),
    "tools in words": (
        {"messages": [ASK, SAY], "tools": "get_weather: 查天气"},
        '"tools" is text, but no JSON list of tools: put a description in words into the system text',
    ),
    "tools of no list": ({"messages": [ASK, SAY], "tools": {"get_weather": {}}}, '"tools" must be a list, not dict'),
    "two lists of tools": (
        {"messages": [{"role": "system", "content": "", "tools": [CLOCK]}, ASK, SAY], "tools": [WEATHER]},
        "the row and its system message hold different tools: keep one of them",
    ),
    "a result without a call": (
        {"messages": [ASK, SAY, RESULT_MESSAGE, SAY]},
        "in \"messages\" a tool's result follows no call: the assistant's message before it needs tool_calls",
    ),
    "more results than calls": (
        {"messages": [ASK, calls_message(openai_call("now", "{}")), RESULT_MESSAGE, RESULT_MESSAGE, SAY]},
        'in "messages" are more results of tools than calls before them',
    ),
    "a question after a result": (
        {"messages": [ASK, calls_message(openai_call("now", "{}")), RESULT_MESSAGE, ASK, SAY]},
        "must alternate between user and assistant, the user first, and results of tools come before an answer",
    ),
    "two answers": ({"messages": [ASK, SAY, SAY]}, "must alternate between user and assistant"),
    "a call before the question": (
        {"conversations": [{"from": "function_call", "value": CALL_JSON}, HUMAN, GPT]},
        "must alternate between user and assistant, the user first",
    ),
    "a call of other loss than the text before it": (
        {"messages": [ASK, SAY | {"loss": True}, {"role": "tool_call", "content": CALL_JSON, "loss": False}]},
        "are one message, but differ in whether they are trained on: give both the same loss",
    ),
    "a fraction of loss": ({"messages": [ASK, SAY | {"weight": 0.5}]}, '"weight" in message 2 of "messages" is 0.5'),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAY]},
        "a part of the type 'image_url' in message 1 of \"messages\": only text can be used",
    ),
    "an unknown option": (
        {"messages": [ASK, SAY], "chat_template_kwargs": {"add_generation_prompt": True}},
        "'add_generation_prompt' in \"chat_template_kwargs\" cannot be used: the options of a row are enable_thinking",
    ),
    "an option given twice": (
        {"messages": [ASK, SAY], "enable_thinking": True, "thinking": "off"},
        '"thinking" gives "enable_thinking" a second value: keep one of them',
    ),
    "an option of no such value": (
        {"messages": [ASK, SAY], "enable_thinking": "maybe"},
        "is 'maybe': it must be true",
    ),
    "calls beside a prompt": (
        {"prompt": QUESTION, "response": ANSWER, "tool_calls": [{"name": "now"}]},
        '"tool_calls" is not empty: calls and results are messages: write the row as a chat, in "messages"',
    ),
    "an unknown role": (
        {"messages": [{"role": "robot", "content": "x"}]},
        'message 1 of "messages" needs a "role" (or "from") of system, user, assistant or tool, not \'robot\'',
    ),
    "code of ChatGLM3's interpreter": (
        {"messages": [ASK, {"role": "assistant", "metadata": "interpreter", "content": "print(1)"}]},
        '"metadata" in message 2 of "messages" names the tool \'interpreter\', but its text is not',
    ),
}
