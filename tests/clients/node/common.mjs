// What the scripts of the clients have in common. A script is started with the server's URL and prints one line of
// JSON: for each of its cases what the client made of the answer, or what it raised.
import { z } from "zod"

export const url = process.argv[2]
export const KEY = "unused"  // the server has none
export const PROMPT = "one two three"
export const USER = [{ role: "user", content: PROMPT }]
export const TALK = [{ role: "user", content: "What?" }, { role: "assistant", content: "That." },
                     { role: "user", content: "Why?" }]
export const PERSON = z.object({ name: z.string(), age: z.number().int() })
export const CITY = z.object({ city: z.string() })
export const PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

// Asks all cases of a group at once, one group after the other.
export async function tell(...groups) {
  const told = {}
  for (const cases of groups) {
    await Promise.all(Object.entries(cases).map(async ([name, run]) => {
      told[name] = await run().catch(raised)
    }))
  }
  console.log(JSON.stringify(told))
}

export function raised(error) {
  const { status, statusCode, code, param, message } = error
  return { raised: error.constructor.name, status: status ?? statusCode, code: code ?? undefined,
           param: param ?? undefined, message }
}

// The texts of a stream, and what it raised, if it did.
export async function heard(stream, textOf) {
  const pieces = []
  try {
    for await (const event of stream) {
      const text = textOf(event)
      if (text) pieces.push(text)
    }
  } catch (error) {
    return { pieces, ...raised(error) }
  }
  return { pieces }
}

// A fetch that counts its calls: how often a client asks.
export function counting() {
  const asked = (...given) => {
    asked.times += 1
    return fetch(...given)
  }
  asked.times = 0
  return asked
}
