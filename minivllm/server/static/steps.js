// The picture of the latest steps: a row is a request, time goes to the right. It can be paused, scrolled back, and hovered.
//
// A run of equal decode steps is folded into one *column*, so that the prefill of a request stays in sight while it decodes:
//
//     steps     P D D D D D D D D D D D D P' D D        P: a request's prompt, D: one token for each running request
//     columns   P [D x 12           ] P' [D x 2]        a column is at most MAX_UNITS units wide
const MAX_COLUMNS = 1500; // kept to scroll back
const MAX_LANES = 40;
const MARGIN = 34; // pixels for the requests' numbers
const UNIT = 9; // pixels of one step
const MAX_UNITS = 6;

let columns = []; // {number, id, lastId, count, work, ms, longest, used, view, skipped}
let numbered = 0; // columns so far: each keeps its number when older ones are dropped
let paused = null; // the number of the chosen column; null: the picture follows the newest step
let right = 0; // number of the column at the right edge while paused
let pointer = null; // x position of the pointer over the picture
let drawn = []; // {x, width, column}: what the picture shows now
let repaint = () => {};

const $ = (id) => document.getElementById(id);

// -- the columns --------------------------------------------------------------------------------------------------------

export function addSteps(view) {
  if (view.skipped) push({ skipped: view.skipped, work: [], view });
  for (const [id, work, ms, used] of view.steps) {
    const last = columns.at(-1);
    if (last && canFold(last, work)) Object.assign(last, { lastId: id, count: last.count + 1, ms: last.ms + ms, used, view,
      longest: Math.max(last.longest, ms) });
    else push({ id, lastId: id, count: 1, work, ms, longest: ms, used, view });
  }
}

function push(column) {
  if (paused !== null && columns.length >= 2 * MAX_COLUMNS) return; // a long pause: what is in sight must not be dropped
  columns.push({ number: numbered++, ...column });
  if (paused === null && columns.length > MAX_COLUMNS) columns = columns.slice(-MAX_COLUMNS);
}

const canFold = (last, work) => !last.skipped && !last.isSealed && last.work.length === work.length
  && last.work.every(([owner, tokens, isPrompt], i) => !isPrompt && !work[i][2] && owner === work[i][0] && tokens === work[i][1]);

export function forgetSteps() {
  columns = [];
  paused = null;
}

const at = (number) => columns[Math.min(columns.length - 1, Math.max(0, number - columns[0].number))];

// The column that is looked at: the one under the pointer, the chosen one, or the newest.
const current = () => hovered() ?? (columns.length ? at(paused ?? numbered) : null);
const hovered = () => drawn.find(({ x, width }) => pointer >= x && pointer < x + width)?.column;

// The view of the engine that belongs to the chosen column; null: the newest.
export const chosenView = () => (paused === null || !columns.length ? null : at(paused).view);

const total = (work, isPrompt) => work.reduce((sum, item) => sum + (Boolean(item[2]) === isPrompt ? item[1] : 0), 0);

function describe({ id, lastId, count, work, ms, longest, used, skipped }) {
  if (skipped) return `${skipped} steps that the view left out`;
  const number = (count, unit) => `${count} ${unit}${count === 1 ? "" : "s"}`;
  const [prompt, decode] = [total(work, true), total(work, false)];
  const parts = [prompt && `${number(prompt, "prompt token")} (prefill)`, decode && number(decode, "decode token")];
  const [rows, tokens] = [number(work.length, "row"), parts.filter(Boolean).join(" + ")];
  return count === 1
    ? `Step ${id}: ${rows}, ${tokens || "no tokens"}, ${used} blocks used, ${ms.toFixed(1)} ms`
    : `Steps ${id} to ${lastId}, ${count} equal ones: ${rows}, ${tokens} each, ${used} blocks used at the end, `
      + `${(ms / count).toFixed(1)} ms each, the longest ${longest.toFixed(1)} ms`;
}

// -- pausing and scrolling ----------------------------------------------------------------------------------------------

function choose(number) {
  if (!columns.length) return;
  if (paused === null) {
    right = columns.at(-1).number;
    columns.at(-1).isSealed = true; // what is looked at no longer changes
  }
  paused = at(number).number;
  right = Math.max(right, paused);
  while (right > paused && layout(right, $("lanes").clientWidth)[0].column.number > paused) right--; // scrolls back
  repaint();
}

function resume() {
  paused = null;
  columns = columns.slice(-MAX_COLUMNS);
  repaint();
}

export function startSteps(paint) {
  repaint = paint;
  const canvas = $("lanes");
  const point = (x) => { pointer = x; repaint(); };
  canvas.addEventListener("pointermove", (event) => point(event.offsetX));
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("click", () => hovered() && choose(hovered().number));
  $("scroll").addEventListener("input", () => choose(Number($("scroll").value)));
  $("pause").addEventListener("click", () => (paused === null ? choose(numbered) : resume()));
}

// -- the picture --------------------------------------------------------------------------------------------------------

export const isDark = () => variable("--paper").startsWith("#1");
export const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const color = (owner) => `hsl(${(owner * 137.508) % 360} ${isDark() ? "48% 60%" : "52% 48%"})`; // the golden angle: neighbors differ

// Resizes a canvas to its element, in device pixels.
export function prepare(canvas, height) {
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

// The columns that fit, the newest at the right edge or right of the column with the number `last`.
function layout(last, width) {
  const found = [];
  let x = width;
  for (let i = last - (columns[0]?.number ?? 0); i >= 0 && columns[i]; i--) {
    const wide = UNIT * Math.min(MAX_UNITS, columns[i].count ?? 1);
    if (x - wide < MARGIN) break;
    x -= wide;
    found.unshift({ x, width: wide, column: columns[i] });
  }
  return found;
}

export function paintSteps() {
  const [context, width, height] = prepare($("lanes"));
  drawn = layout(paused === null ? numbered - 1 : right, width);
  const owners = [...new Set(drawn.flatMap(({ column }) => column.work.map((work) => work[0])))].sort((a, b) => a - b).slice(-MAX_LANES);
  const lane = Math.min(26, (height - 4) / Math.max(owners.length, 1));
  const top = new Map(owners.map((owner, i) => [owner, 2 + i * lane]));
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  paintLanes(context, width, lane, top);
  const seen = paused !== null || hovered() ? current() : null;
  for (const { x, width: wide, column } of drawn) {
    if (column === seen || column.skipped) {
      context.fillStyle = variable(column === seen ? "--chosen" : "--free");
      context.fillRect(x, 0, wide, height);
    }
    paintColumn(context, x, wide, column, lane, top);
  }
  if (lane >= 13) for (const shown of drawn) paintLabels(context, shown, width, lane, top); // last, so that nothing covers them
  if (!drawn.length) {
    context.fillStyle = variable("--soft");
    context.textAlign = "left";
    context.fillText("no step yet", 0, 10);
  }
  paintControls();
}

function paintLanes(context, width, lane, top) {
  const labelStep = Math.ceil(13 / lane); // every labelStep-th row has room for its number
  context.textAlign = "right";
  [...top].forEach(([owner, y], i) => {
    context.fillStyle = variable("--free");
    context.fillRect(MARGIN, y + lane - 1, width - MARGIN, 0.5);
    if (i % labelStep) return;
    context.fillStyle = variable("--soft");
    context.fillText(String(owner), MARGIN - 6, y + lane / 2);
  });
}

function paintColumn(context, x, width, column, lane, top) {
  const tokens = new Map(); // the children of one request share a lane
  for (const [owner, count, isPrompt] of column.work) {
    const [sum, wasPrompt] = tokens.get(owner) || [0, false];
    tokens.set(owner, [sum + count, wasPrompt || Boolean(isPrompt)]);
  }
  const full = Math.max(1, lane - 2);
  for (const [owner, [, isPrompt]] of tokens) {
    const y = top.get(owner);
    if (y === undefined) continue;
    const tall = isPrompt ? full : Math.max(1, full * 0.38);
    context.fillStyle = color(owner);
    if (column.count > MAX_UNITS) context.fillRect(x, y + full - tall, width - 1, tall);
    else for (let i = 0; i < column.count; i++) context.fillRect(x + i * UNIT, y + full - tall, UNIT - 1, tall);
  }
}

// The sizes of prompt chunks, and the lengths of long runs.
function paintLabels(context, { x, width, column }, end, lane, top) {
  const labels = column.work.filter((work) => work[2]).map(([owner, count]) => [owner, String(count), x + width + 2]);
  if (column.count > MAX_UNITS) labels.push([column.work[0][0], `× ${column.count}`, x + 4]);
  context.textAlign = "left";
  for (const [owner, text, begin] of labels) {
    const y = top.get(owner);
    if (y === undefined) continue;
    const wide = context.measureText(text).width;
    const left = begin + wide > end ? x - wide - 3 : begin; // no room at the right edge
    context.fillStyle = variable("--card");
    context.fillRect(left - 1, y + 1, wide + 2, lane * 0.5);
    context.fillStyle = variable("--ink");
    context.fillText(text, left, y + 1 + lane * 0.28);
  }
}

function paintControls() {
  const column = current();
  const text = column ? describe(column) : "No step yet";
  $("step").textContent = text;
  $("pause").textContent = paused === null ? "Pause" : "Resume";
  const scroll = $("scroll");
  scroll.disabled = !columns.length;
  scroll.min = columns[0]?.number ?? 0;
  scroll.max = columns.at(-1)?.number ?? 0;
  scroll.value = paused ?? scroll.max;
  scroll.setAttribute("aria-valuetext", text);
  $("lanes").setAttribute("aria-label", text);
}
