// A tool: its name as in word_count.json, and a function from the policy's arguments to what the policy will see.
// A wrong call is an observation with `ok: false`; whatever it throws is infrastructure that failed.

export const name = "word_count";

export async function call({ text }) {
  if (typeof text !== "string") return { text: "Wrong arguments for word_count: `text` must be a string", ok: false };
  return { text: String(text.split(/\s+/).filter(Boolean).length) };
}
