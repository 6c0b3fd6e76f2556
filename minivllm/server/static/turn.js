// One turn of the conversation: its data and its elements.
//
//   turn   {role, content, reasoning, calls: [{name, arguments}], end, problem, usage, tokens, pace}
//   end    "": still running; a finish reason of the server; "stopped" by the user; "failed", then `problem` says why
import { MarkdownView, element } from "./markdown.js";

export const newTurn = (role, content = "") => (
  { role, content, reasoning: "", calls: [], end: "", problem: "", usage: null, tokens: 0, pace: "" });

export const isEmpty = (turn) => !turn.content && !turn.reasoning && !turn.calls.length;

// [reasoning, answer] as they are shown. A server without a reasoning parser sends <think> as a part of the text.
export function parts({ role, content, reasoning }) {
  const found = role === "assistant" && !reasoning && /^\s*<think>([^]*?)(?:<\/think>\s*|$)/.exec(content);
  return found ? [found[1].trim(), content.slice(found[0].length)] : [reasoning, content];
}

export class TurnView {
  constructor(turn) {
    this.turn = turn;
    this.element = element("div", `turn ${turn.role}`);
    this.reasoning = element("details", "reasoning");
    this.summary = element("summary");
    const thoughts = element("div", "markdown");
    this.reasoning.append(this.summary, thoughts);
    this.summary.addEventListener("click", () => { this.chosen = true; }); // from now on the user opens and closes it
    const text = element("div", turn.role === "user" ? "text" : "text markdown");
    [this.calls, this.note, this.actions] = ["calls", "note", "actions"].map((name) => element("div", name));
    this.actions.ariaLive = "off"; // the log's other additions are read out
    this.element.append(element("div", "author", turn.role === "user" ? "You" : "Model"), this.reasoning, text, this.calls, this.note,
      this.actions);
    if (turn.role === "user") text.textContent = turn.content;
    else [this.thoughtsView, this.textView] = [new MarkdownView(thoughts), new MarkdownView(text)];
    this.show("");
  }

  // Shows the turn's present state. While the answer is running, texts are drawn with the next frame.
  show(note) {
    const { turn } = this;
    this.note.textContent = note;
    const [reasoning, answer] = parts(turn);
    this.reasoning.hidden = !reasoning;
    if (turn.role === "user") return;
    const hasAnswer = answer || turn.calls.length;
    this.summary.textContent = turn.end || hasAnswer ? "Reasoning" : "Reasoning …";
    if (!this.chosen) this.reasoning.open = !hasAnswer;
    for (const [view, text] of [[this.thoughtsView, reasoning], [this.textView, answer]]) {
      if (turn.end) view.finish(text);
      else if (view.text !== text) view.update(text);
    }
    this.calls.replaceChildren(...turn.calls.map((made) => {
      const box = element("div", "call", `Tool call: ${made.name}`);
      box.append(element("pre", "", made.arguments));
      return box;
    }));
  }

  setActions(buttons) {
    this.actions.replaceChildren(...buttons);
  }
}
