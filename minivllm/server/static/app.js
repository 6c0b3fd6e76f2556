// Starts the page: the models, the API key, the theme, the chat, and the live view.
import { call, hasKey, setKey } from "./api.js";
import { showError, startChat, useModel } from "./chat.js";
import { element } from "./markdown.js";
import { watch } from "./live.js";

const $ = (id) => document.getElementById(id);
let cards = []; // of the served models

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

// Runs at the start, with a new key, and when the server is back after a restart.
async function start() {
  try {
    cards = (await (await call("v1/models")).json()).data;
  } catch (error) {
    if (error.status === 401) askForKey();
    if (error.status !== 401 || hasKey()) showError(error.status === 401 ? "The server rejected this key." : error.message);
    return;
  }
  const chosen = $("choice").value;
  $("choice").replaceChildren(...cards.map((card) => element("option", "", card.id)));
  if (cards.some((card) => card.id === chosen)) $("choice").value = chosen;
  $("choice").hidden = cards.length < 2;
  showModel();
  $("key-form").hidden = true;
  showError("");
  watch({ onReconnect: start, onUnauthorized: askForKey });
}

function showModel() {
  const card = cards.find(({ id }) => id === $("choice").value) ?? cards[0];
  $("model").textContent = `${cards.length < 2 ? `${card.id}, ` : ""}context of ${card.max_model_len.toLocaleString("en")} tokens`;
  useModel(card);
}

$("choice").addEventListener("change", showModel);
$("key-form").addEventListener("submit", (e) => {
  e.preventDefault();
  const key = $("key").value.trim();
  $("key").value = "";
  if (/[^\x21-\x7e]/.test(key)) return showError("An API key consists of ASCII characters without spaces.");
  setKey(key);
  start();
});

const themes = ["auto", "light", "dark"];
$("theme").addEventListener("click", () => {
  const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "auto") + 1) % 3];
  document.documentElement.dataset.theme = next;
  $("theme").textContent = `Theme: ${next}`;
});

startChat({ onUnauthorized: askForKey });
start();
