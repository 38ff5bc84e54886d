// openai-node.
import OpenAI from "openai"
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod"
import { counting, heard, KEY, PERSON, PIXEL, PROMPT, raised, TALK, tell, url, USER } from "./common.mjs"

const openai = new OpenAI({ baseURL: `${url}/openai/v1`, apiKey: KEY })
const { completions } = openai.chat
const WEATHER = { type: "function", function: { name: "weather", parameters: {
  type: "object", properties: { city: { type: "string" } }, required: ["city"] } } }
const IMAGE = [{ role: "user", content: [
  { type: "text", text: "What is it?" }, { type: "image_url", image_url: { url: `data:image/png;base64,${PIXEL}` } }] }]
const person = (model) => ({ model, messages: USER, response_format: zodResponseFormat(PERSON, "person") })
const personText = (model) => ({ model, input: PROMPT, text: { format: zodTextFormat(PERSON, "person") } })

const textOf = (chunk) => chunk.choices[0]?.delta.content
const outputOf = (event) => event.type === "response.output_text.delta" ? event.delta : ""

function said({ choices: [{ message, finish_reason }], usage }) {
  return { text: message.content, finish_reason, usage }
}

async function streamed(model, messages = USER) {
  let usage, reason
  const stream = await completions.create({ model, messages, stream: true, stream_options: { include_usage: true } })
  return { ...await heard(stream, (chunk) => {
    usage = chunk.usage ?? usage
    reason = chunk.choices[0]?.finish_reason ?? reason
    return textOf(chunk)
  }), finish_reason: reason, usage }
}

const cases = {
  "chat": async () => {
    const { id, created, system_fingerprint, ...answer } = await completions.create({ model: "echo", messages: USER })
    return { kind: id.split("-")[0], ...answer }
  },
  "chat streamed": () => streamed("echo"),
  "chat helper": async () => {
    const pieces = []
    const stream = completions.stream({ model: "echo", messages: USER }).on("content", (text) => pieces.push(text))
    const { choices: [{ message, finish_reason }] } = await stream.finalChatCompletion()
    return { pieces, message, finish_reason }
  },
  "conversation": async () => said(await completions.create({ model: "parrot", messages: [
    { role: "system", content: "Be brief." }, { role: "developer", content: "Be kind." }, ...TALK] })).text,
  "counted": async () => said(await completions.create({ model: "claude", messages: USER })),
  "counted streamed": () => streamed("claude"),
  "thoughts": async () => (await completions.create({ model: "claude", messages: USER })).choices[0].message,
  "thoughts streamed": async () => heard(await completions.create({ model: "claude", messages: USER, stream: true }),
                                         (chunk) => chunk.choices[0]?.delta.reasoning_content),
  "cut": async () => said(await completions.create({ model: "claude", messages: [
    { role: "user", content: "too long" }] })).finish_reason,
  "stop": async () => said(await completions.create({ model: "echo", messages: USER, stop: [" three"] })).text,
  "tools": async () => {
    const { data, response } = await completions.create({ model: "echo", messages: USER, tools: [WEATHER],
                                                          tool_choice: "auto" }).withResponse()
    return { text: said(data).text, ignored: response.headers.get("x-clinvk-ignored"),
             backend: response.headers.get("x-clinvk-backend") }
  },
  "tool runner": () => completions.runTools({ model: "echo", messages: USER, tools: [{ type: "function", function: {
    ...WEATHER.function, parse: JSON.parse, function: () => "sunny" } }] }).finalContent(),
  "tool results": async () => said(await completions.create({ model: "parrot", messages: [
    ...USER, { role: "assistant", content: null, tool_calls: [
      { id: "call_1", type: "function", function: { name: "weather", arguments: '{"city":"Rome"}' } }] },
    { role: "tool", tool_call_id: "call_1", content: "sunny" }] })).text,
  "models": async () => {
    const ids = []
    for await (const model of openai.models.list()) ids.push(model.id)
    return ids
  },
  "one model": async () => (await openai.models.retrieve("claude/opus")).id,
  "unknown model": () => completions.create({ model: "nothing-known", messages: USER }),
  "unknown model retrieved": () => openai.models.retrieve("nothing-known"),
  "bad request": () => completions.create({ model: "echo", messages: [{ role: "nobody", content: "Hi" }] }),
  "failed": () => completions.create({ model: "fails", messages: [{ role: "user", content: "openai whole" }] }),
  "failed streamed": () => completions.create({ model: "fails", stream: true, messages: [
    { role: "user", content: "openai streamed" }] }),
  "broken": () => streamed("breaks"),
  "limited": () => completions.create({ model: "claude", messages: [{ role: "user", content: "limited openai" }] }),
  "logged out": () => completions.create({ model: "claude", messages: [{ role: "user", content: "logged out" }] }),
  "retried": async () => {
    const asked = counting()
    const patient = new OpenAI({ baseURL: `${url}/openai/v1`, apiKey: KEY, fetch: asked, maxRetries: 1 })
    return patient.chat.completions.create({ model: "missing", messages: USER }).catch(
      (error) => ({ ...raised(error), times: asked.times }))
  },
  "left": async () => {
    for await (const chunk of await completions.create({ model: "hangs", stream: true, messages: [
      { role: "user", content: "openai left" }] })) {
      if (textOf(chunk)) return textOf(chunk)  // which ends the connection
    }
  },

  // schema
  "parsed": async () => (await completions.parse(person("person"))).choices[0].message,
  "parsed from a fence": async () => (await completions.parse(person("fenced"))).choices[0].message,
  "refused": async () => (await completions.parse(person("prose"))).choices[0].message,
  "parsed streamed": async () => {
    const pieces = []
    const stream = completions.stream(person("person")).on("content", (text) => pieces.push(text))
    return { message: (await stream.finalChatCompletion()).choices[0].message, text: pieces.join("") }
  },
  "json object": async () => JSON.parse(said(await completions.create({
    model: "fenced", messages: USER, response_format: { type: "json_object" } })).text),

  // images
  "image": async () => said(await completions.create({ model: "claude", messages: IMAGE })).text,
  "image from afar": () => completions.create({ model: "claude", messages: [{ role: "user", content: [
    { type: "image_url", image_url: { url: "https://example.com/a.png" } }] }] }),

  // choices
  "choices": async () => {
    const { choices, usage } = await completions.create({ model: "echo", messages: USER, n: 3 })
    return { choices: choices.map(({ index, message }) => [index, message.content]), usage }
  },
  "choices streamed": async () => {
    const answer = await completions.stream({ model: "echo", messages: USER, n: 3 }).finalChatCompletion()
    return answer.choices.map(({ index, message, finish_reason }) => [index, message.content, finish_reason])
  },

  // completions
  "completion": async () => {
    const { object, choices, usage } = await openai.completions.create({ model: "echo", prompt: PROMPT })
    return { object, choices, usage }
  },
  "completion streamed": async () => {
    let reason
    const stream = await openai.completions.create({ model: "echo", prompt: PROMPT, stream: true })
    return { ...await heard(stream, ({ choices: [choice] }) => {
      reason = choice?.finish_reason ?? reason
      return choice?.text
    }), finish_reason: reason }
  },
  "completion failed": () => openai.completions.create({ model: "fails", prompt: "openai completion" }),

  // responses
  "response": async () => {
    const { id, status, model, output_text, output, usage, error } = await openai.responses.create(
      { model: "echo", input: PROMPT })
    return { kind: id.split("_")[0], status, model, output_text, types: output.map((item) => item.type), usage, error }
  },
  "response streamed": async () => {
    const types = []
    const stream = await openai.responses.create({ model: "echo", input: PROMPT, stream: true })
    return { ...await heard(stream, (event) => {
      types.push(event.type)
      return outputOf(event)
    }), types }
  },
  "response helper": async () => {
    const pieces = []
    const stream = openai.responses.stream({ model: "echo", input: PROMPT })
    stream.on("response.output_text.delta", (event) => pieces.push(event.delta))
    const { status, output_text } = await stream.finalResponse()
    return { pieces, status, output_text }
  },
  "response conversation": async () => (await openai.responses.create(
    { model: "parrot", instructions: "Be brief.", input: TALK })).output_text,
  "response counted": async () => (await openai.responses.create({ model: "claude", input: PROMPT })).usage,
  "response parsed": async () => (await openai.responses.parse(personText("person"))).output_parsed,
  "response parsed streamed": async () => (await openai.responses.stream(personText("person")).finalResponse())
    .output_parsed,
  "response image": async () => (await openai.responses.create({ model: "claude", input: [{ role: "user", content: [
    { type: "input_text", text: "What is it?" },
    { type: "input_image", detail: "auto", image_url: `data:image/png;base64,${PIXEL}` }] }] })).output_text,
  "response failed": () => openai.responses.create({ model: "fails", input: "openai response" }),
  "response failed streamed": async () => openai.responses.create(
    { model: "fails", input: "openai response streamed", stream: true }),
  "response broken": async () => {
    const stream = await openai.responses.create({ model: "breaks", input: PROMPT, stream: true })
    let last
    return { ...await heard(stream, (event) => {
      last = event
      return outputOf(event)
    }), last: last.type, code: last.response?.error?.code }
  },
  "response of an unknown model": () => openai.responses.create({ model: "nothing-known", input: PROMPT }),
  "response to an earlier one": () => openai.responses.create(
    { model: "echo", input: PROMPT, previous_response_id: "resp_1" }),
}
await tell(cases)
