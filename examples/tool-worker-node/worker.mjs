// Serves one tool of a live run until SIGTERM, or until the run ends:
//   node worker.mjs runs/NAME ./word_count.mjs [QUEUE]
// At a server of your own: NATS_URL=FOLDER/toolbox.json node worker.mjs NAME …, FOLDER as `actors nats-conf` has made it.
// QUEUE is the tool's name, or word_count@VERSION as `actors tools add` prints it. docs/wire.md says what goes over the
// wire, and why; the numbers of its sections are in brackets here.

import { readFileSync } from "node:fs";
import { hostname } from "node:os";
import { basename, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { decode, encode } from "@msgpack/msgpack";
import { connect, createInbox, headers, nkeyAuthenticator } from "@nats-io/transport-node";

const [folder, module, queueName] = process.argv.slice(2);
const tool = await import(pathToFileURL(resolve(module)));
const run = basename(resolve(folder));
const queue = queueName ?? tool.name;
const host = hostname();
const replica = `toolbox-${host.replace(/[^A-Za-z0-9_-]/g, "_")}-${process.pid}`;

const SLOTS = 4;
const PULL_MS = 2000;
const KEEP_MS = 1500; // the server gives a message to another when it hears nothing of it for 5 s
const MOVED = 10071; // "wrong last sequence"
const MAX_DELIVERIES = 10;

const INBOX = "_INBOX.toolbox";
const json = (path) => JSON.parse(readFileSync(path));
const own = process.env.NATS_URL;
const login = own ? json(own) : json(`${folder}/endpoint.json`).logins.by_role.toolbox; // [1]
const client = await connect({
  servers: login.url,
  authenticator: nkeyAuthenticator(new TextEncoder().encode(login.seed)),
  inboxPrefix: INBOX,
  tls: login.ca ? { caFile: login.ca } : undefined,
  name: replica,
  maxReconnectAttempts: 120,
  reconnectTimeWait: 250,
});
const read = (data) => decode(data, { useBigInt64: true }); // seeds have 63 bits

// -- the log -------------------------------------------------------------------------------------------

const opened = await client.request(`$JS.API.DIRECT.GET.LOG.log.${run}.r.opened`);
if (opened.headers.code) throw new Error(`there is no run ${run}`);
const { recipe } = read(opened.data);

// A stored message's sequence; 0 when the log has moved past the sequence that it expected. [4]
async function store(subject, data, fields) {
  const head = headers();
  for (const [name, value] of Object.entries(fields)) head.set(name, String(value));
  for (;;) {
    try {
      const { seq, error } = (await client.request(subject, data, { timeout: 3000, headers: head })).json();
      if (!error) return seq;
      if (error.err_code === MOVED) return 0;
      console.error(`${subject}: ${error.description}; trying again`);
    } catch (error) {
      if (client.isClosed()) throw error;
      console.error(`${subject}: ${error.message}; trying again`);
    }
    await sleep(250);
  }
}

// The trajectory as the log has it, or null. [3]
async function readTrajectory(id) {
  const state = { admitted: null, turns: [], results: [], scored: null, end: null, seq: 0 };
  for (;;) {
    const query = { seq: state.seq + 1, next_by_subj: `log.${run}.t.${id}.*` };
    const stored = await client.request("$JS.API.DIRECT.GET.LOG", JSON.stringify(query), { timeout: 3000 });
    if (!stored.headers.has("Nats-Sequence")) return state.admitted && state; // status 404: that was all
    state.seq = Number(stored.headers.last("Nats-Sequence")); // also of junk: the next append expects it
    const kind = stored.headers.last("Nats-Subject").split(".").at(-1);
    try {
      const event = read(stored.data);
      if (event.kind === kind && event.trajectory === id) fold(state, event);
    } catch (error) {
      console.error(`junk in the log at ${state.seq}: ${error.message}`);
    }
  }
}

function fold(state, event) {
  if (event.kind === "admitted") state.admitted ??= event;
  if (!state.admitted || state.end) return;
  if (["evaluated", "expired", "failed", "dropped", "finished"].includes(event.kind)) state.end = event;
  if (state.scored) return;
  if (event.kind === "turn") state.turns.push(event);
  if (event.kind === "result") state.results.push(event);
  if (event.kind === "scored") state.scored = event;
}

// The first call of the last turn that has no result yet, and its index.
function pending(state) {
  const turn = state.turns.length - 1;
  const index = state.results.filter((result) => result.turn === turn).length;
  return { turn, index, call: state.turns[turn]?.calls[index] };
}

const queueOf = (call) => (call.version ? `${call.tool}@${call.version}` : call.tool);

// -- work ----------------------------------------------------------------------------------------------

// Wake whoever takes the trajectory's next hop, if anybody does. [5]
async function wake(state, failures = 0) {
  if (!state || state.scored || state.end || (recipe.asynchrony.barriers && !failures)) return;
  const { call } = pending(state);
  let subject = state.admitted.purpose === "external" ? null : `gen.${run}`;
  if (state.turns.at(-1)?.last || state.results.at(-1)?.last) subject = `score.${run}`;
  else if (call) subject = `tool.${run}.${queueOf(call)}`;
  if (subject === null) return;
  const { trajectory } = state.admitted;
  const work = encode({ trajectory, seq: state.seq, failures });
  await store(subject, work, { "Nats-Msg-Id": `${run}.${trajectory}.${state.seq}.${failures}` });
}

// A dead letter instead of the message; the dispatcher ends the trajectory. [7]
async function putAside(message, work, boundary, code, error) {
  const letter = { stage: "tool", run, error, payload: message.data, boundary, code, replica };
  await store(`dead.tool.${run}`, encode({ ...letter, trajectory: work.trajectory ?? "", seq: work.seq ?? 0 }), {});
}

const held = new Map(); // message → trajectory, its sequence, and since when

class HeldHere extends Error {}

async function advance(message) {
  let work;
  try {
    work = read(message.data);
    work.seq = Number(work.seq);
    if (typeof work.trajectory !== "string" || !(work.seq >= 0)) throw new Error("no trajectory and seq");
  } catch (error) {
    return putAside(message, {}, "bus", "bad_message", error.message);
  }
  const field = message.reply.split(".");
  const deliveries = Number(field.length > 9 ? field[6] : field[4]); // [2]
  const trusted = work.state && !work.failures && deliveries === 1;
  const state = trusted ? work.state : await readTrajectory(work.trajectory);
  if (state === null || Number(state.seq) !== work.seq) return wake(state); // it has moved on: make sure that the next stage knows
  const { turn, index, call } = pending(state);
  if (!call || queueOf(call) !== queue) return;
  if (deliveries > MAX_DELIVERIES) {
    return putAside(message, work, "tool", "holder_died", `given out ${deliveries - 1} times`);
  }
  if ([...held.values()].some((one) => one.trajectory === work.trajectory && one.seq === work.seq)) {
    if (deliveries === 1) return; // the dispatcher asked again
    throw new HeldHere(`${work.trajectory} is worked on here`);
  }
  held.set(message, { trajectory: work.trajectory, seq: work.seq, since: performance.now() });
  const begun = performance.now();
  let seen;
  try {
    seen = await observe(call, state);
  } catch (error) {
    const failures = (work.failures ?? 0) + 1;
    console.error(`${work.trajectory}: ${error.stack}`);
    if (failures < recipe.deadlines.handler_failures) return wake(state, failures);
    return putAside(message, work, "tool", "crashed", String(error));
  }
  const result = {
    kind: "result", replica, trajectory: work.trajectory, turn, call: index,
    text: seen.text, ok: seen.ok ?? true, duration_ms: performance.now() - begun,
  };
  const seq = await store(`log.${run}.t.${work.trajectory}.result`, encode(result), { // [4]
    "Nats-Expected-Last-Subject-Sequence": state.seq,
    "Nats-Expected-Last-Subject-Sequence-Subject": `log.${run}.t.${work.trajectory}.*`,
  });
  const after = { ...state, results: [...state.results, result], seq };
  await wake(seq ? after : await readTrajectory(work.trajectory)); // the loser of a race reads the winner
}

// What the policy will see: within the time and the length that the recipe allows.
async function observe(call, state) {
  const { timeout_s, observation_chars } = recipe.tools;
  const signal = AbortSignal.timeout(timeout_s * 1000);
  const late = new Promise((done) => {
    signal.onabort = () => done({ text: `Timed out after ${timeout_s} s.`, ok: false });
  });
  const context = { task: state.admitted.public.extra, state, signal };
  const seen = await Promise.race([tool.call(call.arguments, context), late]);
  const characters = Array.from(seen.text);
  if (characters.length <= observation_chars) return seen;
  return { ...seen, text: `${characters.slice(0, observation_chars).join("")}\n(cut)` };
}

async function hop(message) {
  const keep = setInterval(() => message.respond("+WPI"), KEEP_MS);
  try {
    await advance(message);
    message.respond("+ACK");
  } catch (error) {
    console.error(`hop given back: ${error.stack}`); // the bus; another takes it
    message.respond(`-NAK {"delay": ${(error instanceof HeldHere ? 10 : 1) * 1e9}}`);
  } finally {
    clearInterval(keep);
    held.delete(message);
  }
}

// -- a replica -----------------------------------------------------------------------------------------

let stopping = false;

const isWork = (message) => Boolean(message.reply?.startsWith("$JS.ACK."));

// One call at a time. What comes bears the subject of its queue, so a request's own inbox would not know it.
async function serve() {
  const inbox = createInbox(INBOX);
  let take = null;
  client.subscribe(inbox, {
    callback: (_, message) => {
      if (take) take(message);
      else if (isWork(message)) message.respond("-NAK");
      take = null;
    },
  });
  const query = JSON.stringify({ batch: 1, expires: PULL_MS * 1e6 });
  while (!stopping && !client.isClosed()) {
    client.publish(`$JS.API.CONSUMER.MSG.NEXT.TOOL.${run}=${queue}`, query, { reply: inbox }); // [2]
    const came = new Promise((done) => { take = done; });
    const message = await Promise.race([came, sleep(PULL_MS + 1000)]); // no answer: the server was restarted
    take = null;
    if (message && isWork(message)) { // else status 404, 408: nothing came
      if (stopping) message.respond("-NAK");
      else await hop(message);
    } else if (message?.headers?.code === 503) {
      console.error(`there is no consumer ${run}=${queue}`);
      await sleep(1000);
    }
  }
}

function beat() { // [6]
  const now = performance.now();
  const holds = [...held.values()].map(({ trajectory, since }) => ({ trajectory, stage: "tool", for_s: (now - since) / 1000 }));
  const phase = stopping ? "draining" : "";
  client.publish(`hb.toolbox.${replica}`, encode({
    run, role: "toolbox", replica, host, pid: process.pid, up_s: process.uptime(), phase,
    held: holds, held_count: holds.length, rss_bytes: process.memoryUsage.rss(),
  }));
}

async function drain() { // [8]
  if (stopping) return;
  stopping = true;
  const limit = sleep(recipe.deadlines.drain_s * 1000, undefined, { ref: false });
  await Promise.race([slots, limit]);
  for (const message of held.keys()) message.respond("-NAK");
  await client.drain();
  console.log("drained");
  process.exit(0);
}

const slots = Promise.all(Array.from({ length: SLOTS }, serve));
setInterval(beat, 1000);
for (const kind of ["stopping", "ended"]) client.subscribe(`log.${run}.r.${kind}`, { callback: drain });
for (const signal of ["SIGTERM", "SIGINT"]) process.on(signal, drain);
console.log(`${replica} serves ${queue} of run ${run}`);
const lost = await client.closed();
if (!stopping) {
  console.error(`the link is lost: ${lost?.message ?? "closed"}`);
  process.exit(75);
}
