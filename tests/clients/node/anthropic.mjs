// anthropic-typescript.
import Anthropic from "@anthropic-ai/sdk"
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod"
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod"
import { CITY, counting, heard, KEY, PERSON, PIXEL, PROMPT, raised, TALK, tell, url, USER } from "./common.mjs"

const anthropic = new Anthropic({ baseURL: `${url}/anthropic`, apiKey: KEY })
const { messages } = anthropic
const asked = (model, prompt = PROMPT) => ({ model, max_tokens: 100, messages: [{ role: "user", content: prompt }] })
const person = (model) => ({ ...asked(model), output_config: { format: zodOutputFormat(PERSON) } })

const textOf = (event) => event.type === "content_block_delta" ? event.delta.text : ""

function said({ content, stop_reason, stop_sequence, usage }) {
  return { content, stop_reason, stop_sequence, usage }
}

async function streamed(model, prompt) {
  const pieces = []
  const stream = messages.stream(asked(model, prompt)).on("text", (text) => pieces.push(text))
  try {
    return { pieces, ...said(await stream.finalMessage()) }
  } catch (error) {
    return { pieces, ...raised(error) }
  }
}

const cases = {
  "message": async () => {
    const { id, ...message } = await messages.create(asked("echo"))
    return { kind: id.split("_")[0], ...message }
  },
  "message streamed": () => streamed("echo"),
  "events": async () => {
    const types = []
    await heard(await messages.create({ ...asked("echo"), stream: true }), (event) => { types.push(event.type) })
    return types
  },
  "conversation": async () => said(await messages.create({ model: "parrot", max_tokens: 100, system: "Be brief.",
                                                           messages: TALK })).content[0].text,
  "system in blocks": async () => said(await messages.create({ ...asked("parrot"), system: [
    { type: "text", text: "Be brief.", cache_control: { type: "ephemeral" } }] })).content[0].text,
  "counted": async () => said(await messages.create(asked("claude"))),
  "counted streamed": () => streamed("claude"),
  "thoughts streamed": async () => heard(await messages.create({ ...asked("claude"), stream: true }),
                                         (event) => event.delta?.thinking),
  "cut": async () => said(await messages.create(asked("claude", "too long"))).stop_reason,
  "stop": async () => said(await messages.create({ ...asked("echo"), stop_sequences: [" three"] })),
  "count": async () => messages.countTokens({ model: "echo", messages: USER }),
  "tools": async () => {
    const { data, response } = await messages.create({ ...asked("echo"), tools: [
      { name: "weather", input_schema: { type: "object", properties: { city: { type: "string" } } } }] }).withResponse()
    return { text: data.content[0].text, ignored: response.headers.get("x-clinvk-ignored") }
  },
  "tool runner": async () => (await anthropic.beta.messages.toolRunner({ ...asked("echo"), tools: [betaZodTool({
    name: "weather", description: "The weather", inputSchema: CITY, run: () => "sunny" })] })).content[0].text,
  "tool results": async () => said(await messages.create({ model: "parrot", max_tokens: 100, messages: [
    ...USER, { role: "assistant", content: [{ type: "tool_use", id: "call_1", name: "weather",
                                              input: { city: "Rome" } }] },
    { role: "user", content: [{ type: "tool_result", tool_use_id: "call_1", content: "sunny" }] }] })).content[0].text,
  "models": async () => {
    const ids = []
    for await (const model of anthropic.models.list()) ids.push(model.id)
    return ids
  },
  "one model": async () => (await anthropic.models.retrieve("claude/opus")).id,
  "unknown model": () => messages.create(asked("nothing-known")),
  "unknown model retrieved": () => anthropic.models.retrieve("nothing-known"),
  "bad request": () => messages.create({ ...asked("echo"), max_tokens: 0 }),
  "failed": () => messages.create(asked("fails", "anthropic whole")),
  "failed streamed": () => messages.stream(asked("fails", "anthropic streamed")).finalMessage(),
  "broken": () => streamed("breaks"),
  "limited": () => messages.create(asked("claude", "limited anthropic")),
  "logged out": () => messages.create(asked("claude", "logged out")),
  "retried": async () => {
    const fetch = counting()
    const patient = new Anthropic({ baseURL: `${url}/anthropic`, apiKey: KEY, fetch, maxRetries: 1 })
    return patient.messages.create(asked("missing")).catch((error) => ({ ...raised(error), times: fetch.times }))
  },
  "left": async () => {
    for await (const event of await messages.create({ ...asked("hangs", "anthropic left"), stream: true })) {
      if (textOf(event)) return textOf(event)  // which ends the connection
    }
  },

  // schema
  "parsed": async () => (await messages.parse(person("person"))).parsed_output,
  "parsed from a fence": async () => (await messages.parse(person("fenced"))).parsed_output,
  "parsed streamed": async () => (await messages.stream(person("person")).finalMessage()).parsed_output,


  // images
  "image": async () => said(await messages.create({ model: "claude", max_tokens: 100, messages: [
    { role: "user", content: [{ type: "text", text: "What is it?" }, { type: "image", source: {
      type: "base64", media_type: "image/png", data: PIXEL } }] }] })).content.at(-1).text,
}
await tell(cases)
