"""LlamaIndex: OpenAILike on chat completions, on completions and on responses."""

from typing import Any

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses
from told import HELLO, KEY, OPENAI, PNG, WHO, Json, Person, add, failing, tell


def model(way: str, name: str = "echo", **options: Any) -> Any:
    kind = OpenAILikeResponses if way == "responses" else OpenAILike
    return kind(model=name, api_base=OPENAI, api_key=KEY, is_chat_model=way != "completions", context_window=8192,
                **options)


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def whole(way: str) -> Json:
    answer = model(way).chat([user(HELLO)])
    told, usage = answer.message, answer.raw.usage.model_dump()
    names = ("input_tokens", "output_tokens") if way == "responses" else ("prompt_tokens", "completion_tokens")
    return {"text": told.content, "role": told.role.value, "model": answer.raw.model,
            "usage": [usage[name] for name in names]}


def complete(way: str) -> str:
    return model(way).complete(HELLO).text


def stream(way: str) -> Json:
    answers = list(model(way).stream_chat([user(HELLO)]))
    return {"text": answers[-1].message.content, "pieces": [answer.delta for answer in answers if answer.delta]}


def stream_complete(way: str) -> Json:
    answers = list(model(way).stream_complete(HELLO))
    return {"text": answers[-1].text, "pieces": [answer.delta for answer in answers if answer.delta]}


def system(way: str) -> str:
    said = [ChatMessage(role="system", content="Be brief."), user("do:repeat")]
    return model(way, "scripted").chat(said).message.content


def conversation(way: str) -> str:
    said = [ChatMessage(role=role, content=text) for role, text in (
        ("user", "One?"), ("assistant", "One."), ("user", "Two?"), ("assistant", "Two."), ("user", "Three?"))]
    return model(way).chat(said).message.content


def failure(way: str) -> Any:
    """LlamaIndex itself asks max_retries times (its default is 3) on every 5xx, whatever the answer's headers say; with
    1 it does not, while the SDK below it would."""
    return model(way, "scripted", max_retries=1).complete(failing("llama_index", way, "whole"))


def failure_streamed(way: str) -> Any:
    return list(model(way, "scripted").stream_complete(failing("llama_index", way, "stream")))


def typo(way: str) -> Any:
    return model(way, "ecko").complete(HELLO)


def tools(way: str) -> Json:
    asked = model(way, is_function_calling_model=True)
    answer = asked.chat_with_tools([FunctionTool.from_defaults(add)], HELLO)
    return {"text": answer.message.content, "calls": asked.get_tool_calls_from_response(answer, False)}


def forced_tool(way: str) -> Any:
    return model(way, is_function_calling_model=True).as_structured_llm(Person).complete(WHO)


def schema(way: str) -> Json:
    asked = model(way, "scripted", should_use_structured_outputs=True)
    return asked.as_structured_llm(Person).complete(WHO).raw.model_dump()


def schema_in_the_prompt(way: str) -> Json:
    """It asks for a tool call, too, but names no tools."""
    return model(way, "scripted").as_structured_llm(Person).complete(WHO).raw.model_dump()


def image(way: str) -> str:
    blocks = [TextBlock(text="What is it?"), ImageBlock(image=PNG, image_mimetype="image/png")]
    return model(way, "claude").chat([ChatMessage(role="user", blocks=blocks)]).message.content


tell(["chat", "completions", "responses"], [whole, complete, stream, stream_complete, system, conversation, failure,
                                            failure_streamed, typo, tools, forced_tool, schema, schema_in_the_prompt,
                                            image])
