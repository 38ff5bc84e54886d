"""pydantic-ai: its models for OpenAI's chat completions and responses and for Anthropic's messages."""

import asyncio
from typing import Any, List

from pydantic_ai import Agent, BinaryContent, NativeOutput, PromptedOutput
from pydantic_ai.models.anthropic import AnthropicModel, AnthropicModelSettings
from pydantic_ai.models.openai import (OpenAIChatModel, OpenAIChatModelSettings, OpenAIResponsesModel,
                                       OpenAIResponsesModelSettings)
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from told import ANTHROPIC, HELLO, KEY, OPENAI, PNG, WHO, Json, Person, add, failing, tell

MODELS = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel, "anthropic": AnthropicModel}
REASONING = {"chat": OpenAIChatModelSettings(openai_reasoning_effort="low"),
             "responses": OpenAIResponsesModelSettings(openai_reasoning_effort="low"),
             "anthropic": AnthropicModelSettings(anthropic_thinking={"type": "enabled", "budget_tokens": 1024})}


def agent(way: str, name: str = "echo", **options: Any) -> Any:
    provider = AnthropicProvider if way == "anthropic" else OpenAIProvider
    base = ANTHROPIC if way == "anthropic" else OPENAI
    return Agent(MODELS[way](name, provider=provider(base_url=base, api_key=KEY)), **options)


def shown(run: Any) -> Json:
    usage, response = run.usage, run.all_messages()[-1]
    return {"text": response.text, "usage": [usage.input_tokens, usage.output_tokens], "model": response.model_name,
            "finish": response.finish_reason}


def whole(way: str) -> Json:
    return shown(agent(way).run_sync(HELLO))


async def streamed(asked: Any, prompt: str) -> Json:
    async with asked.run_stream(prompt) as run:
        pieces: List[str] = [text async for text in run.stream_text(delta=True, debounce_by=None)]
        return {**shown(run), "pieces": pieces}


def stream(way: str) -> Json:
    return asyncio.run(streamed(agent(way), HELLO))


def system(way: str) -> str:
    return agent(way, "scripted", system_prompt="Be brief.", instructions="Be kind.").run_sync("do:repeat").output


def conversation(way: str) -> str:
    asked, said = agent(way), []
    for prompt in ("One?", "Two?"):
        run = asked.run_sync(prompt, message_history=said)
        said = run.all_messages()
        said[-1].parts[0].content = prompt.replace("?", ".")  # in place of an echo that grows and grows
    return asked.run_sync("Three?", message_history=said).output


def failure(way: str) -> Any:
    return agent(way, "scripted").run_sync(failing("pydantic_ai", way, "whole"))


def failure_streamed(way: str) -> Any:
    return asyncio.run(streamed(agent(way, "scripted"), failing("pydantic_ai", way, "stream")))


def typo(way: str) -> Any:
    return agent(way, "ecko").run_sync(HELLO)


def tools(way: str) -> str:
    return agent(way, tools=[add]).run_sync(HELLO).output


def forced_tool(way: str) -> Any:
    return agent(way, output_type=Person).run_sync(HELLO)  # the answer is to come as the arguments of a tool


def reasoning(way: str) -> str:
    return agent(way, model_settings=REASONING[way]).run_sync(HELLO).output


def native(way: str) -> Json:
    return agent(way, "scripted", output_type=NativeOutput(Person)).run_sync(WHO).output.model_dump()


def known_native(way: str) -> Json:
    """pydantic-ai sends Anthropic a schema only for a model that it knows."""
    return agent(way, "claude-opus-4-5", output_type=NativeOutput(Person)).run_sync(WHO).output.model_dump()


def prompted(way: str) -> Json:
    return agent(way, "scripted", output_type=PromptedOutput(Person)).run_sync(WHO).output.model_dump()


def image(way: str) -> str:
    return agent(way, "claude").run_sync(["What is it?", BinaryContent(PNG, media_type="image/png")]).output


tell(["chat", "responses", "anthropic"], [whole, stream, system, conversation, failure, failure_streamed, typo, tools,
                                          forced_tool, reasoning, native, known_native, prompted, image])
