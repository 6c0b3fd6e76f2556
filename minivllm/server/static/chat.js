// The conversation: sending, streaming, stopping, continuing, regenerating, editing.
import { ServerError, call, events } from "./api.js";
import { button, copy } from "./markdown.js";
import * as storage from "./storage.js";
import { TurnView, isEmpty, newTurn, parts } from "./turn.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = { system: "system", temperature: "temperature", max_tokens: "max-tokens" }; // name -> field of the page
let views = []; // a TurnView for each turn
let running = null; // AbortController of the current answer
let model = null; // {id, max_model_len}
let onUnauthorized = () => {};

export function showError(message) {
  $("problem").textContent = message || "";
  $("problem").hidden = !message;
}

export function useModel(card) {
  model = card;
  showContext();
}

// -- requests ---------------------------------------------------------------------------------------------------------

function request(view, isContinued) {
  const system = $("system").value.trim();
  const before = views.slice(0, views.indexOf(view)).map(({ turn }) => ({ role: turn.role, content: turn.content }));
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...before, ...(isContinued ? [unfinished(view.turn)] : [])];
  const body = { messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  if (model) body.model = model.id;
  if (isContinued) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  for (const field of ["temperature", "max_tokens"]) {
    if ($(SETTINGS[field]).value !== "") body[field] = Number($(SETTINGS[field]).value);
  }
  return body;
}

// The message that the server continues. Earlier reasoning is not sent back, but this answer follows from its own.
function unfinished({ role, content, reasoning }) {
  return reasoning ? { role, content, reasoning_content: reasoning } : { role, content };
}

// Adds one event of the stream to a turn. Returns whether it had a part of the answer.
function take(body, turn) {
  if (body.error) throw new ServerError(body.error.message);
  const { content, reasoning = "", tool_calls: calls } = body.choices?.[0]?.delta ?? {};
  turn.content += content ?? "";
  turn.reasoning += reasoning ?? "";
  for (const piece of calls ?? []) {
    const made = (turn.calls[piece.index] ??= { name: "", arguments: "" });
    made.name += piece.function?.name ?? "";
    made.arguments += piece.function?.arguments ?? "";
  }
  if (body.usage) turn.usage = body.usage;
  return Boolean(content || reasoning || calls);
}

// Runs one request, and writes what arrives into the view's turn. `undo` is called if nothing has arrived.
async function answer(view, undo, isContinued = false) {
  const own = (running = new AbortController());
  const { turn } = view;
  const [before, begin] = [turn.tokens, performance.now()];
  let first = 0;
  let finish = "";
  Object.assign(turn, { end: "", problem: "" });
  showError("");
  view.show("Waiting for the first token …");
  refresh();
  try {
    const response = await call("v1/chat/completions", { body: request(view, isContinued), signal: own.signal });
    for await (const data of events(response)) {
      if (running !== own) return; // a new chat was started meanwhile
      if (data === "[DONE]") break;
      const body = JSON.parse(data);
      if (take(body, turn)) first ||= performance.now();
      finish = body.choices?.[0]?.finish_reason || finish;
      turn.tokens = before + (turn.usage?.completion_tokens ?? 0);
      if (first) view.show(`${turn.tokens} tokens`);
      showContext();
    }
    turn.end = finish || "failed";
    if (!finish) turn.problem = "The server closed the connection.";
  } catch (error) {
    turn.end = error.name === "AbortError" ? "stopped" : "failed";
    turn.problem = error.message;
    if (error.status === 401) onUnauthorized();
  }
  if (running !== own) return;
  running = null;
  turn.pace = pace(turn.usage, begin, first || performance.now());
  if (turn.end === "failed") showError(turn.problem);
  if (!first && ["failed", "stopped"].includes(turn.end)) undo();
  view.show(note(turn));
  refresh();
  save();
  if (document.activeElement === document.body && matchMedia("(pointer: fine)").matches) $("message").focus();
}

function pace(usage, begin, first) {
  const perSecond = (1000 * ((usage?.completion_tokens ?? 0) - 1)) / (performance.now() - first);
  return `first after ${Math.round(first - begin)} ms${perSecond > 0 ? `, ${perSecond.toFixed(1)} tokens/s` : ""}`;
}

// -- what the page shows ------------------------------------------------------------------------------------------------

const isFull = ({ usage }) => Boolean(model && usage && usage.total_tokens >= model.max_model_len);

function note(turn) {
  const { end, problem, usage } = turn;
  const hasAnswer = parts(turn)[1] || turn.calls.length;
  const ending = {
    stop: hasAnswer ? "" : "The model ended without an answer.", tool_calls: "", stopped: "Stopped.", failed: `Broken off: ${problem}`,
    length: `Cut at ${turn.tokens} tokens${isFull(turn) ? ": the context is full" : ""}${hasAnswer ? "" : ", before the answer began"}.`,
    abort: "Ended by the server.",
  }[end] ?? `Ended: ${end}.`;
  if (!usage) return ending;
  const cached = usage.prompt_tokens_details?.cached_tokens;
  return `${ending} ${usage.prompt_tokens} tokens in${cached ? `, ${cached} of them cached` : ""}; ${turn.tokens} out; ${turn.pace}`.trim();
}

function actions({ turn }, i) {
  const isLast = i === views.length - 1;
  const canContinue = !["stop", "tool_calls"].includes(turn.end) && !isEmpty(turn) && !turn.calls.length && !isFull(turn);
  return [
    ...(turn.role === "assistant" && isLast && canContinue ? [button("Continue", proceed)] : []),
    ...(parts(turn)[1] ? [button("Copy", (own) => copy(parts(turn)[1], own))] : []),
    ...(turn.role === "assistant" && isLast ? [button("Regenerate", regenerate)] : []),
    ...(turn.role === "user" && i === views.length - 2 ? [button("Edit", edit)] : []),
  ];
}

function refresh() {
  $("send").disabled = running !== null;
  $("stop").hidden = running === null;
  $("log").setAttribute("aria-busy", running !== null);
  $("empty").hidden = views.length > 0;
  const shown = new Set(views.map((view) => view.element));
  for (const turn of [...$("turns").children]) if (!shown.has(turn)) turn.remove();
  views.forEach((view, i) => { // an element that stays is not added again, because a screen reader reads additions out
    if ($("turns").children[i] !== view.element) $("turns").insertBefore(view.element, $("turns").children[i] ?? null);
    view.setActions(running ? [] : actions(view, i));
  });
  showContext();
}

function showContext() {
  const size = model?.max_model_len ?? 0;
  const used = views.findLast(({ turn }) => turn.usage)?.turn.usage.total_tokens ?? 0;
  $("context").max = size || 1;
  $("context").high = 0.9 * size; // above it the meter's color changes
  $("context").value = used;
  $("context-text").textContent = size ? `${used.toLocaleString("en")} of ${size.toLocaleString("en")} tokens` : "";
}

function save() {
  storage.save(views.map(({ turn }) => turn), Object.fromEntries(Object.entries(SETTINGS).map(([name, id]) => [name, $(id).value])));
}

function restore() {
  const { turns, settings } = storage.load();
  for (const [name, id] of Object.entries(SETTINGS)) $(id).value = settings[name] ?? "";
  if (turns.at(-1)?.role === "user") $("message").value = turns.pop().content; // it was not answered
  views = turns.map((turn) => {
    if (turn.role === "assistant") turn.end ||= "stopped"; // the page was closed while it was running
    const view = new TurnView(turn);
    view.show(turn.role === "assistant" ? note(turn) : "");
    return view;
  });
  refresh();
}

// -- what the user does -------------------------------------------------------------------------------------------------

function send() {
  const text = $("message").value.trim();
  if (!text || running) return;
  const [question, view] = [new TurnView(newTurn("user", text)), new TurnView(newTurn("assistant"))];
  $("message").value = "";
  views.push(question, view);
  answer(view, () => {
    views = views.filter((shown) => shown !== question && shown !== view);
    $("message").value ||= text; // so that it can be sent again
  });
}

function regenerate() {
  const old = views.pop();
  const view = new TurnView(newTurn("assistant"));
  views.push(view);
  answer(view, () => views.splice(-1, 1, old));
}

function proceed() {
  const view = views.at(-1);
  const { end, problem } = view.turn;
  answer(view, () => Object.assign(view.turn, { end, problem }), true);
}

function edit() {
  const [question] = views.splice(-2);
  $("message").value = question.turn.content;
  $("message").focus();
  refresh();
  save();
}

const stop = () => running?.abort();

function clear() {
  stop();
  running = null;
  views = [];
  showError("");
  refresh();
  save();
  $("message").focus();
}

export function startChat(options) {
  onUnauthorized = options.onUnauthorized;
  $("ask").addEventListener("submit", (e) => { e.preventDefault(); send(); });
  $("message").addEventListener("keydown", (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (e) => { if (e.key === "Escape") stop(); });
  $("stop").addEventListener("click", stop);
  $("clear").addEventListener("click", clear);
  for (const id of Object.values(SETTINGS)) $(id).addEventListener("change", () => views.length && save());
  for (const event of ["beforeunload", "pagehide"]) addEventListener(event, stop); // what has arrived is saved
  stayAtEnd($("log"), $("turns"));
  restore();
}

// Keeps a log at its end while it grows or is resized, until the user scrolls up. The browser scrolls too, for instance when an element
// closes, so a scroll event counts as the user's only after input.
function stayAtEnd(log, content) {
  let isAtEnd = true;
  let input = -1e9;
  for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) {
    log.addEventListener(kind, () => { input = performance.now(); }, { passive: true });
  }
  log.addEventListener("scroll", () => {
    const isNear = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    if (isNear || performance.now() - input < 1000) isAtEnd = isNear;
  });
  const observer = new ResizeObserver(() => { if (isAtEnd) log.scrollTop = log.scrollHeight; });
  for (const observed of [log, content]) observer.observe(observed);
}
