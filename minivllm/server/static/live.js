// The live view of the engine. The stream is open only while the page is visible, so a hidden page costs the engine nothing.
const $ = (id) => document.getElementById(id);
const SHOWN_STEPS = 72;
const MAX_LANES = 40;
const MAX_ROWS = 12;
const RATE_SECONDS = 2; // period over which rates are measured

let steps = []; // [step id, [[owner, tokens, is prompt]...]]
let past = []; // views of the last RATE_SECONDS
let last = null;
let constants = null;
let watching = false;
let painting = false;

const dark = () => getComputedStyle(document.documentElement).getPropertyValue("--paper").trim().startsWith("#1");
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = (owner) => `hsl(${(owner * 137.508) % 360} ${dark() ? "48% 60%" : "52% 48%"})`; // the golden angle gives neighbors different colors

export async function watch(headers, events) {
  if (watching) return;
  watching = true;
  for (;;) {
    if (document.hidden) {
      await new Promise((go) => document.addEventListener("visibilitychange", go, { once: true }));
      continue;
    }
    const abort = new AbortController();
    const hide = () => document.hidden && abort.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      const response = await fetch("/v1/engine/live", { headers: headers(), signal: abort.signal });
      if (!response.ok) throw new Error(response.status === 429 ? "too many live views are open" : `the server answered ${response.status}`);
      $("live-state").textContent = "live";
      for await (const data of events(response)) take(JSON.parse(data));
      $("live-state").textContent = "the server has ended the stream";
    } catch (error) {
      $("live-state").textContent = abort.signal.aborted ? "paused" : `not connected (${error.message})`;
    }
    document.removeEventListener("visibilitychange", hide);
    past = [];
    if (!document.hidden) await new Promise((go) => setTimeout(go, 3000));
  }
}

function take(view) {
  if (view.cells === undefined) {
    constants = view;
    return;
  }
  last = view;
  past.push(view);
  while (past.length > 2 && view.time - past[1].time > RATE_SECONDS) past.shift();
  if (view.skipped) steps.push([null, [], view.skipped]);
  steps.push(...view.steps);
  steps = steps.slice(-SHOWN_STEPS);
  if (!painting) {
    painting = true;
    requestAnimationFrame(() => { painting = false; paint(); });
  }
}

function paint() {
  if (!past.length) return;
  figures();
  lanes();
  blocks();
  requests();
}

function figures() {
  const first = past[0];
  const seconds = last.time - first.time;
  const idle = !last.num_running && !last.num_waiting;
  const rate = (name) => (idle ? 0 : seconds > 0 ? (last[name] - first[name]) / seconds : 0);
  const tokens = rate("generation_tokens");
  $("rate").textContent = tokens >= 100 ? Math.round(tokens).toLocaleString("en") : tokens.toFixed(1);
  $("steps").textContent = rate("num_steps").toFixed(1);
  $("running").textContent = last.num_running;
  $("waiting").textContent = last.num_waiting;
  $("used").textContent = constants.num_blocks ? `${Math.round((100 * last.used_blocks) / constants.num_blocks)} %` : "–";
  $("hits").textContent = last.prefix_queries ? `${Math.round((100 * last.prefix_hits) / last.prefix_queries)} %` : "–";
}

// Resizes a canvas to its element, in device pixels.
function prepare(canvas, height) {
  const width = canvas.clientWidth;
  const scale = window.devicePixelRatio || 1;
  if (height) canvas.style.height = `${height}px`;
  const tall = height || canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(tall * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(tall * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, tall);
  return [context, width, tall];
}

function lanes() {
  const owners = [...new Set(steps.flatMap((step) => step[1].map((work) => work[0])))].sort((a, b) => a - b);
  const shown = owners.slice(-MAX_LANES);
  const [context, width, height] = prepare($("lanes"));
  const margin = 34;
  const column = (width - margin) / SHOWN_STEPS;
  const lane = Math.min(26, (height - 4) / Math.max(shown.length, 1));
  const laneTop = new Map(shown.map((owner, i) => [owner, 2 + i * lane]));
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const labelStep = Math.ceil(13 / lane); // every labelStep-th row has room for its number
  for (const [owner, y] of laneTop) {
    context.fillStyle = variable("--free");
    context.fillRect(margin, y + lane - 1, width - margin, 0.5);
    if (shown.indexOf(owner) % labelStep) continue;
    context.fillStyle = variable("--soft");
    context.textAlign = "right";
    context.fillText(String(owner), margin - 6, y + lane / 2);
  }
  const offset = SHOWN_STEPS - steps.length;
  steps.forEach((step, i) => {
    const x = margin + (offset + i) * column;
    if (step[0] === null) { // steps that the view left out
      context.fillStyle = variable("--free");
      context.fillRect(x, 0, Math.max(1, column - 1), height);
      return;
    }
    const tokens = new Map(); // the children of one request share a lane
    for (const [owner, count, isPrompt] of step[1]) {
      const known = tokens.get(owner) || [0, false];
      tokens.set(owner, [known[0] + count, known[1] || Boolean(isPrompt)]);
    }
    for (const [owner, [count, isPrompt]] of tokens) {
      const y = laneTop.get(owner);
      if (y === undefined) continue;
      const full = Math.max(1, lane - 2);
      const tall = isPrompt ? full : Math.max(1, full * 0.38);
      context.fillStyle = color(owner);
      context.fillRect(x, y + full - tall, Math.max(1, column - 1), tall);
    }
  });
  if (!steps.length) {
    context.fillStyle = variable("--soft");
    context.textAlign = "left";
    context.fillText("no step yet", 0, 10);
  }
  const byStep = (step) => step[1].filter((work) => work[2]);
  context.textAlign = "left"; // the sizes of prompt chunks are drawn last, so that nothing covers them
  steps.forEach((step, i) => {
    if (lane < 13) return;
    for (const [owner, count] of byStep(step)) {
      const y = laneTop.get(owner);
      if (y === undefined) continue;
      const text = String(count);
      const wide = context.measureText(text).width;
      let x = margin + (offset + i + 1) * column + 2;
      if (x + wide > width) x = margin + (offset + i) * column - wide - 3; // no room at the right edge
      context.fillStyle = variable("--card");
      context.fillRect(x - 1, y + 1, wide + 2, lane * 0.5);
      context.fillStyle = variable("--ink");
      context.fillText(text, x, y + 1 + lane * 0.28);
    }
  });
  const newest = steps.findLast((step) => step[0] !== null);
  if (newest) {
    const prompt = byStep(newest).reduce((sum, work) => sum + work[1], 0);
    const all = newest[1].reduce((sum, work) => sum + work[1], 0);
    describe("lanes", `Step ${newest[0]}: ${newest[1].length} sequences, ${prompt} prompt tokens, ${all - prompt} decode tokens`);
  }
}

function blocks() {
  const canvas = $("blocks");
  const count = last.cells.length;
  const width = canvas.clientWidth;
  const size = Math.max(5, Math.min(18, Math.floor(Math.sqrt((width * 170) / Math.max(1, count)))));
  const columns = Math.floor(width / size);
  const [context] = prepare(canvas, Math.ceil(count / columns) * size);
  const shared = new Set(last.shared);
  const [free, cached, ink] = [variable("--free"), variable("--cached"), variable("--ink")];
  const gap = size > 8 ? 2 : 1;
  last.cells.forEach((state, i) => {
    const x = (i % columns) * size;
    const y = Math.floor(i / columns) * size;
    context.fillStyle = state > 0 ? color(state) : state < 0 ? cached : free;
    context.fillRect(x, y, size - gap, size - gap);
    if (shared.has(i)) {
      context.fillStyle = ink;
      context.beginPath();
      context.moveTo(x + size - gap, y);
      context.lineTo(x + size - gap, y + size - gap);
      context.lineTo(x, y + size - gap);
      context.fill();
    }
  });
  const each = last.per_cell > 1 ? `A square is ${last.per_cell} blocks` : "A square is a block";
  $("blocks-note").textContent = `${each} of ${constants.block_size} tokens, in the color of its request.`;
  describe("blocks", `${last.used_blocks} of ${constants.num_blocks} blocks in use, ${shared.size} squares shared, ${last.cached_blocks} cached`);
}

const described = {};
function describe(id, text) { // at most every 2 s, so that a screen reader can finish reading
  const now = performance.now();
  if (now - (described[id] || -1e9) < 2000 && last.num_running) return;
  described[id] = now;
  $(id).setAttribute("aria-label", text);
}

function requests() {
  const rows = [...last.running.map((row) => [row, row[4] < row[2] ? "prefill" : "decode"]),
    ...last.waiting.map((row) => [row, row[7] ? "preempted" : "waiting"])];
  const body = $("requests");
  body.replaceChildren(...rows.slice(0, MAX_ROWS).map(([row, state]) => {
    const [owner, child, prompt, tokens, , cached, blockCount] = row;
    const line = document.createElement("tr");
    const name = document.createElement("td");
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = state === "waiting" ? variable("--free") : color(owner);
    name.append(swatch, child ? `${owner}.${child}` : String(owner));
    line.append(name);
    for (const value of [state, prompt, cached, tokens - prompt, blockCount]) line.append(cell(value));
    return line;
  }));
  const total = last.num_running + last.num_waiting;
  if (total === 0 || total > MAX_ROWS) {
    const line = document.createElement("tr");
    const only = cell(total ? `and ${total - MAX_ROWS} more` : "none");
    only.colSpan = 6;
    line.append(only);
    body.append(line);
  }
}

function cell(value) {
  const made = document.createElement("td");
  made.textContent = value;
  return made;
}

new ResizeObserver(paint).observe(document.body);
new MutationObserver(paint).observe(document.documentElement, { attributes: true });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
