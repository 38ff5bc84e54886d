// The Vercel AI SDK with each of its ways to clinvk; the name of a case begins with the way.
import { createAnthropic } from "@ai-sdk/anthropic"
import { createOpenAI } from "@ai-sdk/openai"
import { createOpenAICompatible } from "@ai-sdk/openai-compatible"
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai"
import { CITY, KEY, PERSON, PIXEL, PROMPT, raised, TALK, tell, url } from "./common.mjs"

globalThis.AI_SDK_LOG_WARNINGS = false
const openai = createOpenAI({ baseURL: `${url}/openai/v1`, apiKey: KEY })
const compatible = createOpenAICompatible({ name: "clinvk", baseURL: `${url}/openai/v1`, apiKey: KEY })
const strict = createOpenAICompatible({ name: "clinvk", baseURL: `${url}/openai/v1`, apiKey: KEY, includeUsage: true,
                                        supportsStructuredOutputs: true })
const anthropic = createAnthropic({ baseURL: `${url}/anthropic/v1`, apiKey: KEY })
// It asks Anthropic's API for a schema only of models that it knows; of others it wants the call of a tool.
const KNOWN = { person: "claude-opus-4-5", prose: "claude-opus-5" }
const WAYS = { responses: openai, chat: openai.chat, compatible, strict, anthropic }
const IMAGE = [{ role: "user", content: [
  { type: "text", text: "What is it?" },
  { type: "image", image: Buffer.from(PIXEL, "base64"), mediaType: "image/png" }] }]
const RESULTS = [
  { role: "user", content: PROMPT },
  { role: "assistant", content: [{ type: "tool-call", toolCallId: "call_1", toolName: "weather",
                                   input: { city: "Rome" } }] },
  { role: "tool", content: [{ type: "tool-result", toolCallId: "call_1", toolName: "weather",
                              output: { type: "text", value: "sunny" } }] }]
const WEATHER = { weather: tool({ description: "The weather", inputSchema: CITY, execute: () => "sunny" }) }

function counts({ inputTokens, outputTokens, totalTokens, cachedInputTokens, reasoningTokens }) {
  return { inputTokens, outputTokens, totalTokens, cachedInputTokens, reasoningTokens }
}

async function streamed(given) {
  const pieces = [], thoughts = [], errors = []
  const stream = streamText({ ...given, onError: () => {} })
  for await (const part of stream.fullStream) {
    if (part.type === "text-delta") pieces.push(part.text)
    if (part.type === "reasoning-delta") thoughts.push(part.text)
    if (part.type === "error") errors.push(part.error)
  }
  if (errors.length) return { pieces, errors: errors.map((error) => ({ ...raised(error) })) }
  return { pieces, thoughts: thoughts.join(""), finish_reason: await stream.finishReason,
           usage: counts(await stream.usage) }
}

async function streamedObject(given) {
  const partial = []
  const stream = streamObject({ ...given, onError: () => {} })
  for await (const object of stream.partialObjectStream) partial.push(object)
  return { object: await stream.object, last: partial.at(-1) }
}

function casesOf(way, model) {
  const structured = (name) => model(way === "anthropic" ? KNOWN[name] : name)
  const text = async (given) => (await generateText(given)).text
  const cases = {
    "text": async () => {
      const { text, finishReason, usage } = await generateText({ model: model("echo"), prompt: PROMPT })
      return { text, finish_reason: finishReason, usage: counts(usage) }
    },
    "text streamed": () => streamed({ model: model("echo"), prompt: PROMPT }),
    "conversation": () => text({ model: model("parrot"), system: "Be brief.", messages: TALK }),
    "counted": async () => {
      const told = await generateText({ model: model("claude"), prompt: PROMPT })
      return { text: told.text, thoughts: told.reasoningText, finish_reason: told.finishReason,
               usage: counts(told.usage) }
    },
    "counted streamed": () => streamed({ model: model("claude"), prompt: PROMPT }),
    "cut": async () => (await generateText({ model: model("claude"), prompt: "too long" })).finishReason,
    "tools": () => text({ model: model("echo"), prompt: PROMPT, tools: WEATHER, stopWhen: stepCountIs(3) }),
    "tools streamed": async () => (await streamed({ model: model("echo"), prompt: PROMPT, tools: WEATHER })).pieces,
    "tool results": () => text({ model: model("parrot"), messages: RESULTS, tools: WEATHER }),
    "unknown model": () => text({ model: model("nothing-known"), prompt: PROMPT }),
    "failed": () => text({ model: model("fails"), prompt: `vercel ${way} whole` }),
    "failed streamed": () => streamed({ model: model("fails"), prompt: `vercel ${way} streamed` }),
    "broken": () => streamed({ model: model("breaks"), prompt: PROMPT }),

    "object": async () => (await generateObject({ model: structured("person"), schema: PERSON,
                                                  prompt: PROMPT })).object,
    "object streamed": () => streamedObject({ model: structured("person"), schema: PERSON, prompt: PROMPT }),
    "output": async () => (await generateText({ model: structured("person"), prompt: PROMPT,
                                                output: Output.object({ schema: PERSON }) })).output,
    "no object": () => generateObject({ model: structured("prose"), schema: PERSON, prompt: PROMPT }),
    "image": () => text({ model: model("claude"), messages: IMAGE }),
  }
  return Object.fromEntries(Object.entries(cases).map(([name, run]) => [`${way}: ${name}`, run]))
}

await tell(...Object.entries(WAYS).map(([way, model]) => casesOf(way, model)), {
  "anthropic: object by tool": () => generateObject({ model: anthropic("person"), schema: PERSON, prompt: PROMPT }),
  "completion": async () => (await generateText({ model: openai.completion("echo"), prompt: PROMPT })).text,
  "completion streamed": () => streamed({ model: compatible.completionModel("echo"), prompt: PROMPT }),
})
