// The live view of the engine. The stream is open only while the page is visible, so a hidden page costs the engine nothing.
import { call, events } from "./api.js";
import { element } from "./markdown.js";
import { addSteps, chosenView, color, forgetSteps, paintSteps, prepare, startSteps, variable } from "./steps.js";

const $ = (id) => document.getElementById(id);
const MAX_ROWS = 12;
const RATE_SECONDS = 2; // period over which rates are measured
const RETRY_MS = 3000;

let past = []; // views of the last RATE_SECONDS
let last = null;
let constants = null;
let watching = false;
let painting = false;

// Follows the engine until the page is closed. `onReconnect`: the server is back; `onUnauthorized`: it needs another key.
export async function watch({ onReconnect, onUnauthorized }) {
  if (watching) return;
  watching = true;
  for (let isFirst = true; ; isFirst = false) {
    if (document.hidden) await new Promise((go) => document.addEventListener("visibilitychange", go, { once: true }));
    const abort = new AbortController();
    const hide = () => document.hidden && abort.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      const response = await call("v1/engine/live", { signal: abort.signal });
      if (!isFirst) onReconnect();
      showState("live");
      for await (const data of events(response)) take(JSON.parse(data));
      showState("the server has ended the stream");
    } catch (error) {
      showState(abort.signal.aborted ? "paused" : `not connected: ${error.message}`);
      if (error.status === 401) {
        watching = false;
        return onUnauthorized();
      }
    } finally {
      document.removeEventListener("visibilitychange", hide);
    }
    past = [];
    if (!document.hidden) await new Promise((go) => setTimeout(go, RETRY_MS));
  }
}

function showState(text) {
  $("live-state").textContent = text;
}

function take(view) {
  if (view.cells === undefined) {
    constants = view;
    return;
  }
  if (last && view.num_steps < last.num_steps) forgetSteps(); // the server was restarted
  last = view;
  past.push(view);
  while (past.length > 2 && view.time - past[1].time > RATE_SECONDS) past.shift();
  view.rates = rates(past[0], view);
  addSteps(view);
  repaint();
}

function rates(first, view) {
  const seconds = view.time - first.time;
  const isIdle = !view.num_running && !view.num_waiting;
  const rate = (name) => (isIdle || seconds <= 0 ? 0 : (view[name] - first[name]) / seconds);
  return { tokens: rate("generation_tokens"), steps: rate("num_steps") };
}

// -- the picture --------------------------------------------------------------------------------------------------------

function repaint() {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => { painting = false; paint(); });
}

function paint() {
  if (!last) return;
  paintSteps();
  const view = chosenView() ?? last; // while paused, all of the panel shows the chosen moment
  figures(view);
  memory(view);
  blocks(view);
  requests(view);
}

function figures({ rates: { tokens, steps }, num_running, num_waiting, prefix_queries, prefix_hits, preemptions, drafts }) {
  $("rate").textContent = tokens >= 100 ? Math.round(tokens).toLocaleString("en") : tokens.toFixed(1);
  $("steps").textContent = steps.toFixed(1);
  $("running").textContent = num_running;
  $("waiting").textContent = num_waiting;
  $("hits").textContent = prefix_queries ? `${Math.round((100 * prefix_hits) / prefix_queries)} %` : "–";
  $("preemptions").textContent = preemptions;
  $("drafts").parentElement.hidden = !drafts; // without speculative decoding there are none
  if (drafts) {
    const [steps, , ...accepted] = drafts;
    $("drafts").textContent = accepted.map((count) => `${Math.round((100 * count) / Math.max(1, steps))}`).join(" ") || "–";
  }
}

function size(bytes) {
  return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

function memory({ used_blocks: used, cached_blocks: cached }) {
  const { num_blocks: all, kv_cache_bytes: cacheBytes, weight_bytes: weightBytes } = constants;
  const counts = { used, cached, free: all - used - cached };
  for (const [name, count] of Object.entries(counts)) $(`memory-${name}`).style.flexGrow = count;
  const share = all ? ` (${Math.round((100 * used) / all)} %)` : "";
  const [inUse, kept, free, total] = [used, cached, counts.free, all].map((count) => count.toLocaleString("en"));
  $("memory").textContent = `${inUse} in use${share}, ${kept} cached, ${free} free, of ${total} blocks`
    + (cacheBytes ? `. KV cache ${size(cacheBytes)}` : "") + (weightBytes ? `, weights ${size(weightBytes)}` : "");
}

function blocks({ cells, shared: sharedCells, per_cell, used_blocks, cached_blocks }) {
  const canvas = $("blocks");
  const width = canvas.clientWidth;
  const side = Math.max(5, Math.min(18, Math.floor(Math.sqrt((width * 170) / Math.max(1, cells.length)))));
  const perRow = Math.max(1, Math.floor(width / side));
  const [context] = prepare(canvas, Math.ceil(cells.length / perRow) * side);
  const shared = new Set(sharedCells);
  const [free, cached, ink] = [variable("--free"), variable("--cached"), variable("--ink")];
  const colors = new Map(); // computing a style for each of 2,048 squares takes longer than drawing them
  const gap = side > 8 ? 2 : 1;
  cells.forEach((state, i) => {
    const x = (i % perRow) * side;
    const y = Math.floor(i / perRow) * side;
    if (state > 0 && !colors.has(state)) colors.set(state, color(state));
    context.fillStyle = state > 0 ? colors.get(state) : state < 0 ? cached : free;
    context.fillRect(x, y, side - gap, side - gap);
    if (shared.has(i)) {
      context.fillStyle = ink;
      context.beginPath();
      context.moveTo(x + side - gap, y);
      context.lineTo(x + side - gap, y + side - gap);
      context.lineTo(x, y + side - gap);
      context.fill();
    }
  });
  const each = per_cell > 1 ? `A square is ${per_cell} blocks` : "A square is a block";
  $("blocks-note").textContent = `${each} of ${constants.block_size} tokens, in the color of its request.`;
  canvas.setAttribute("aria-label",
    `${used_blocks} of ${constants.num_blocks} blocks in use, ${shared.size} squares shared, ${cached_blocks} cached`);
}

function requests({ running, waiting, num_running, num_waiting }) {
  const rows = [...running.map((row) => [row, row[4] < row[2] ? "prefill" : "decode"]),
    ...waiting.map((row) => [row, row[7] ? "preempted" : "waiting"])];
  const lines = rows.slice(0, MAX_ROWS).map(([[owner, child, prompt, tokens, , cached, blockCount], state]) => {
    const line = element("tr");
    const name = element("td", "", child ? `${owner}.${child}` : String(owner));
    const swatch = element("span", "swatch");
    swatch.style.background = state === "waiting" ? variable("--free") : color(owner);
    name.prepend(swatch);
    line.append(name, ...[state, prompt, cached, tokens - prompt, blockCount].map((value) => element("td", "", String(value))));
    return line;
  });
  const all = num_running + num_waiting;
  if (all === 0 || all > MAX_ROWS) {
    const only = element("td", "", all ? `and ${all - MAX_ROWS} more` : "none");
    only.colSpan = 6;
    const line = element("tr");
    line.append(only);
    lines.push(line);
  }
  $("requests").replaceChildren(...lines);
}

startSteps(repaint);
new ResizeObserver(repaint).observe(document.body);
new MutationObserver(repaint).observe(document.documentElement, { attributes: true });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
