// Keeps the conversation in this browser across reloads. Where storage is off or full, nothing is kept.
import { newTurn } from "./turn.js";

const NAME = "minivllm.chat";
const MAX_CHARACTERS = 1_000_000; // of JSON; the oldest turns are left out beyond that

export function save(turns, settings) {
  try {
    let kept = turns;
    let text = JSON.stringify({ turns: kept, settings });
    while (text.length > MAX_CHARACTERS && kept.length > 2) {
      kept = kept.slice(2);
      text = JSON.stringify({ turns: kept, settings });
    }
    if (!turns.length || text.length > MAX_CHARACTERS) localStorage.removeItem(NAME);
    else localStorage.setItem(NAME, text);
  } catch {
    // storage is off or full
  }
}

// {turns, settings} as saved. What has another form, perhaps from another version of this page, is left out.
export function load() {
  try {
    const { turns, settings } = JSON.parse(localStorage.getItem(NAME));
    const complete = turns.map((turn) => ({ ...newTurn(""), ...turn }));
    const isValid = (turn) => ["user", "assistant"].includes(turn.role) && typeof turn.content === "string"
      && typeof turn.reasoning === "string" && Array.isArray(turn.calls);
    return complete.every(isValid) ? { turns: complete, settings: Object(settings) } : { turns: [], settings: {} };
  } catch {
    return { turns: [], settings: {} };
  }
}
