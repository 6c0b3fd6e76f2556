// The chat: history, streaming, stop, settings, and the API key, which is kept in this variable only.
import { watch } from "./live.js";

const $ = (id) => document.getElementById(id);
let key = "";
let history = []; // {role, content}
let running = null; // AbortController of the current answer

export const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

// -- server-sent events -----------------------------------------------------------------------------------------------

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function errorText(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function showError(message) {
  $("problem").textContent = message || "";
  $("problem").hidden = !message;
}

// -- the conversation -------------------------------------------------------------------------------------------------

function addTurn(role, text) {
  $("empty").hidden = true;
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  for (const [name, content] of [["author", role === "user" ? "You" : "Model"], ["text", text], ["note", ""]]) {
    const part = document.createElement("div");
    part.className = name;
    part.textContent = content;
    turn.append(part);
  }
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return turn;
}

function setBusy(on) {
  $("send").disabled = on;
  $("stop").hidden = !on;
  $("log").setAttribute("aria-busy", on);
}

function request() {
  const system = $("system").value.trim();
  const body = { messages: [...(system ? [{ role: "system", content: system }] : []), ...history], stream: true,
    stream_options: { include_usage: true } };
  for (const [field, id] of [["temperature", "temperature"], ["max_tokens", "max-tokens"]]) {
    if ($(id).value !== "") body[field] = Number($(id).value);
  }
  return body;
}

async function send() {
  const text = $("message").value.trim();
  if (!text || running) return;
  showError("");
  $("message").value = "";
  history.push({ role: "user", content: text });
  const question = addTurn("user", text);
  const own = (running = new AbortController());
  setBusy(true);
  let turn = null;
  let answer = "";
  try {
    const begin = performance.now();
    const response = await fetch("/v1/chat/completions", { method: "POST", signal: own.signal, body: JSON.stringify(request()),
      headers: { "Content-Type": "application/json", ...headers() } });
    if (!response.ok) {
      if (response.status === 401) askForKey();
      throw new Error(await errorText(response));
    }
    turn = addTurn("assistant", "");
    const node = turn.querySelector(".text").appendChild(document.createTextNode(""));
    let first = 0;
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const body = JSON.parse(data);
      if (body.error) throw new Error(body.error.message);
      const piece = body.choices[0]?.delta?.content;
      if (piece) {
        first ||= performance.now();
        answer += piece;
        const atEnd = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
        node.appendData(piece);
        if (atEnd) $("log").scrollTop = $("log").scrollHeight;
      }
      if (body.usage) turn.querySelector(".note").textContent = figures(body.usage, begin, first);
    }
  } catch (error) {
    if (error.name === "AbortError") {
      if (turn) turn.querySelector(".note").textContent = "stopped";
    } else showError(error.message);
  }
  if (running !== own) return; // a new chat was started meanwhile
  if (answer) history.push({ role: "assistant", content: answer });
  else { // there was no answer: put the question back, so that it can be sent again
    history.pop();
    $("message").value ||= text;
    question.remove();
    turn?.remove();
    if (!history.length) $("empty").hidden = false;
  }
  running = null;
  setBusy(false);
  $("message").focus();
}

function figures(usage, begin, first) {
  const cached = usage.prompt_tokens_details?.cached_tokens || 0;
  const seconds = (performance.now() - (first || begin)) / 1000;
  const pace = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  const cachedText = cached ? `, ${cached} of them cached` : "";
  return `${usage.prompt_tokens} tokens in${cachedText}; ${usage.completion_tokens} out; first after ${Math.round((first || begin) - begin)} ms${pace}`;
}

$("ask").addEventListener("submit", (e) => { e.preventDefault(); send(); });
$("message").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); }
});
document.addEventListener("keydown", (e) => { if (e.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  running = null;
  history = [];
  setBusy(false);
  showError("");
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("message").focus();
});

// -- key and theme ----------------------------------------------------------------------------------------------------

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

async function start() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (response.status === 401) {
      if (key) showError("The server rejected this key.");
      return askForKey();
    }
    if (!response.ok) throw new Error(await errorText(response));
    const card = (await response.json()).data[0];
    $("model").textContent = `${card.id}, context of ${card.max_model_len.toLocaleString("en")} tokens`;
    $("key-form").hidden = true;
    showError("");
    watch(headers, events);
  } catch (error) {
    showError(error.message);
  }
}

$("key-form").addEventListener("submit", (e) => {
  e.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  start();
});

const themes = ["auto", "light", "dark"];
$("theme").addEventListener("click", () => {
  const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "auto") + 1) % 3];
  document.documentElement.dataset.theme = next;
  $("theme").textContent = `Theme: ${next}`;
});

start();
