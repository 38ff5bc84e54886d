"""litellm: its openai/ and anthropic/ providers, and its responses."""

from typing import Any

import litellm
from told import ANTHROPIC, HELLO, KEY, OPENAI, PNG_TEXT, WHO, Json, Person, failing, tell

litellm.suppress_debug_info = True  # it goes to stdout
BASES = {"openai": OPENAI, "anthropic": ANTHROPIC}


def ask(way: str, content: Any, name: str = "echo", **options: Any) -> Any:
    messages = [{"role": "user", "content": content}] if not isinstance(content, list) else content
    return litellm.completion(f"{way}/{name}", messages, api_base=BASES[way], api_key=KEY, **options)


def shown(answer: Any) -> Json:
    choice = answer.choices[0]
    return {"text": choice.message.content, "finish": choice.finish_reason, "role": choice.message.role,
            "usage": [answer.usage.prompt_tokens, answer.usage.completion_tokens], "model": answer.model}


def whole(way: str) -> Json:
    return shown(ask(way, HELLO))


def stream(way: str) -> Json:
    chunks = list(ask(way, HELLO, stream=True, stream_options={"include_usage": True}))
    said = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    return {**shown(litellm.stream_chunk_builder(chunks)), "pieces": [text for text in said if text]}


def system(way: str) -> str:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "do:repeat"}]
    return ask(way, said, "scripted").choices[0].message.content


def conversation(way: str) -> str:
    said = [{"role": role, "content": text} for role, text in (
        ("user", "One?"), ("assistant", "One."), ("user", "Two?"), ("assistant", "Two."), ("user", "Three?"))]
    return ask(way, said).choices[0].message.content


def failure(way: str) -> Any:
    return ask(way, failing("litellm", way, "whole"), "scripted")


def failure_streamed(way: str) -> Any:
    return list(ask(way, failing("litellm", way, "stream"), "scripted", stream=True))


def typo(way: str) -> Any:
    return ask(way, HELLO, "ecko")


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}}]


def tools(way: str) -> Json:
    message = ask(way, HELLO, tools=TOOLS).choices[0].message
    return {"text": message.content, "calls": message.tool_calls}


def forced_tool(way: str) -> Any:
    return ask(way, HELLO, tools=TOOLS, tool_choice="required")


def reasoning(way: str) -> str:
    return ask(way, HELLO, reasoning_effort="low", drop_params=True).choices[0].message.content


def schema(way: str) -> Json:
    answer = ask(way, WHO, "scripted", response_format=Person)
    return Person.model_validate_json(answer.choices[0].message.content).model_dump()


def known_schema(way: str) -> Json:
    """With a name that litellm knows it sends the schema; with others a tool that the model must call."""
    answer = ask(way, WHO, "claude-opus-4-5", response_format=Person)
    return Person.model_validate_json(answer.choices[0].message.content).model_dump()


def json_object(way: str) -> Json:
    answer = ask(way, WHO, "scripted", response_format={"type": "json_object"})
    return Person.model_validate_json(answer.choices[0].message.content).model_dump()


def image(way: str) -> str:
    parts = [{"type": "text", "text": "What is it?"},
             {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG_TEXT}"}}]
    return ask(way, [{"role": "user", "content": parts}], "claude").choices[0].message.content


def responses(way: str) -> Json:
    answer = litellm.responses(HELLO, f"{way}/echo", api_base=BASES[way], api_key=KEY)
    return {"text": answer.output[0].content[0].text, "usage": [answer.usage.input_tokens, answer.usage.output_tokens]}


def responses_stream(way: str) -> Any:
    events = litellm.responses(HELLO, f"{way}/echo", api_base=BASES[way], api_key=KEY, stream=True)
    return [event.delta for event in events if event.type == "response.output_text.delta"]


def responses_schema(way: str) -> Json:
    answer = litellm.responses(WHO, f"{way}/scripted", api_base=BASES[way], api_key=KEY, text_format=Person)
    return Person.model_validate_json(answer.output[0].content[0].text).model_dump()


def completions(way: str) -> str:
    return litellm.text_completion(HELLO, "text-completion-openai/echo", api_base=OPENAI, api_key=KEY).choices[0].text


tell(["openai", "anthropic"], [whole, stream, system, conversation, failure, failure_streamed, typo, tools,
                               forced_tool, reasoning, schema, known_schema, json_object, image, responses,
                               responses_stream, responses_schema, completions])
