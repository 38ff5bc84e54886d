"""LangChain: ChatOpenAI on chat completions and on responses, ChatAnthropic."""

from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from told import ANTHROPIC, HELLO, KEY, OPENAI, PNG_TEXT, WHO, Json, Person, add, failing, tell


def model(way: str, name: str = "echo", **options: Any) -> Any:
    if way == "anthropic":
        return ChatAnthropic(model=name, base_url=ANTHROPIC, api_key=KEY, **options)
    return ChatOpenAI(model=name, base_url=OPENAI, api_key=KEY, use_responses_api=way == "responses", **options)


def shown(answer: AIMessage) -> Json:
    told, usage = answer.response_metadata, answer.usage_metadata
    return {"text": answer.text, "finish": told.get("finish_reason") or told.get("stop_reason") or told.get("status"),
            "usage": [usage["input_tokens"], usage["output_tokens"]], "model": told["model_name"], "role": answer.type}


def whole(way: str) -> Json:
    return shown(model(way).invoke(HELLO))


def stream(way: str) -> Json:
    pieces = list(model(way, stream_usage=True).stream(HELLO))
    answer = pieces[0]
    for piece in pieces[1:]:
        answer += piece
    return {**shown(answer), "pieces": [piece.text for piece in pieces if piece.text]}


def system(way: str) -> str:
    return model(way, "scripted").invoke([("system", "Be brief."), ("user", "do:repeat")]).text


def conversation(way: str) -> str:
    said = [("user", "One?"), ("ai", "One."), ("user", "Two?"), ("ai", "Two."), ("user", "Three?")]
    return model(way).invoke(said).text


def failure(way: str) -> Any:
    return model(way, "scripted").invoke(failing("langchain", way, "whole"))


def failure_streamed(way: str) -> Any:
    return list(model(way, "scripted").stream(failing("langchain", way, "stream")))


def typo(way: str) -> Any:
    return model(way, "ecko").invoke(HELLO)


def tools(way: str) -> Json:
    answer = model(way).bind_tools([add]).invoke(HELLO)
    return {"text": answer.text, "calls": answer.tool_calls}


def forced_tool(way: str) -> Any:
    return model(way).bind_tools([add], tool_choice="add").invoke(HELLO)


def reasoning(way: str) -> str:
    options: Json = {"chat": {"reasoning_effort": "low"}, "responses": {"reasoning": {"effort": "low"}},
                     "anthropic": {"thinking": {"type": "enabled", "budget_tokens": 1024}}}
    return model(way, **options[way]).invoke(HELLO).text


def schema(way: str) -> Json:
    asked = model(way, "scripted").with_structured_output(Person, method="json_schema")
    return asked.invoke(WHO).model_dump()


def json_mode(way: str) -> Json:
    return model(way, "scripted").with_structured_output(Person, method="json_mode").invoke(WHO).model_dump()


def image(way: str) -> str:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image", "base64": PNG_TEXT, "mime_type": "image/png"}]
    return model(way, "claude").invoke([{"role": "user", "content": parts}]).text


tell(["chat", "responses", "anthropic"], [whole, stream, system, conversation, failure, failure_streamed, typo, tools,
                                          forced_tool, reasoning, schema, json_mode, image])
