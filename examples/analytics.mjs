// Mean reward and tool calls of a live run, minute by minute from its start, as analytics.py does:
//   npm install && node analytics.mjs runs/NAME

import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { setTimeout } from "node:timers/promises";
import { decode } from "@msgpack/msgpack";
import { connect, nkeyAuthenticator } from "@nats-io/transport-node";

const folder = process.argv[2];
const login = JSON.parse(readFileSync(`${folder}/endpoint.json`)).logins.by_role.analytics; // may read the log only
const client = await connect({
  servers: login.url,
  authenticator: nkeyAuthenticator(new TextEncoder().encode(login.seed)),
  inboxPrefix: "_INBOX.analytics",
});
let [kind, seq, minute, rewards, calls] = ["", 0, "", [], 0];
while (kind !== "ended") {
  const query = { seq: seq + 1, next_by_subj: `log.${basename(folder)}.>` };
  const message = await client.request("$JS.API.DIRECT.GET.LOG", JSON.stringify(query));
  if (!message.headers.has("Nats-Sequence")) { // status 404: that was all until now
    await setTimeout(500);
    continue;
  }
  seq = Number(message.headers.last("Nats-Sequence"));
  const now = message.headers.last("Nats-Time-Stamp").slice(0, 16);
  const event = decode(message.data, { useBigInt64: true }); // seeds have 63 bits
  kind = event.kind;
  if (minute && (now !== minute || kind === "ended")) {
    const mean = rewards.length ? (rewards.reduce((a, b) => a + b) / rewards.length).toFixed(3) : "-";
    console.log(`${minute}  reward ${mean} of ${rewards.length}  ${calls} tool calls`);
    [rewards, calls] = [[], 0];
  }
  minute = now;
  calls += kind === "result";
  if (kind === "scored") rewards.push(event.reward);
}
await client.close();
