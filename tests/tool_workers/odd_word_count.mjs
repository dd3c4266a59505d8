// The example's tool, which also fails, waits for ever or says too much when the text asks for it, and when it is told
// to by HANGS_AFTER hangs from so many calls on.

import { call as count } from "./word_count.mjs";

export const name = "word_count";

let calls = 0;

export async function call(args, context) {
  calls += 1;
  const hangs = calls > Number(process.env.HANGS_AFTER ?? Infinity);
  if (hangs || args.text === "hang") await new Promise(() => {});
  if (args.text === "crash") throw new Error("the dictionary is away");
  if (args.text === "long") return { text: "é".repeat(100_000) };
  if (args.text === "task") return { text: String(context.task.unit) };
  return count(args);
}
