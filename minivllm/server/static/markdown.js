// Markdown to elements of the page. A model's output is hostile input, so no HTML is made: the parser's tokens become elements of the
// tags below and text nodes. Links lead to web and mail addresses only, and images are shown as links, so nothing is fetched.
import MarkdownIt from "./vendor/markdown-it.mjs";

const parser = new MarkdownIt({ html: false, linkify: false, breaks: true });
const TAGS = new Set(["p", "ul", "ol", "li", "blockquote", "hr", "br", "em", "strong", "s", "table", "thead", "tbody", "tr", "th", "td"]);
const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export function button(label, onClick, className = "") {
  const made = element("button", className, label);
  made.type = "button";
  made.addEventListener("click", () => onClick(made));
  return made;
}

// Copies a text and says so on the button. The clipboard's interface exists on https and on this machine only.
export async function copy(text, made) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = element("textarea", "hidden");
    field.value = text;
    made.after(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    made.focus();
  }
  made.textContent = done ? "Copied" : "Copying failed";
  setTimeout(() => { made.textContent = "Copy"; }, 2000);
}

// -- tokens to elements -----------------------------------------------------------------------------------------------

function append(root, tokens) {
  const open = [root];
  for (const token of tokens) {
    const parent = open.at(-1);
    if (token.hidden) continue; // the paragraph of an item in a tight list
    if (token.nesting < 0) open.pop();
    else if (token.type === "inline") append(parent, token.children);
    else if (token.nesting > 0) open.push(opened(parent, token));
    else parent.append(single(token, parent));
  }
}

function opened(parent, token) {
  const made = container(token);
  if (token.type !== "table_open") {
    parent.append(made);
    return made;
  }
  const scroller = element("div", "table");
  scroller.tabIndex = 0; // so that the keyboard can scroll a wide table
  scroller.append(made);
  parent.append(scroller);
  return made;
}

function container(token) {
  if (token.type === "heading_open") return element(`h${Math.min(6, Number(token.tag[1]) + 2)}`); // below the page's own headings
  if (token.type === "link_open") return link(token.attrGet("href"));
  const made = element(TAGS.has(token.tag) ? token.tag : "span");
  if (token.tag === "ol") made.start = Number(token.attrGet("start") ?? 1);
  const style = token.attrGet("style"); // of a table's cell: its alignment
  if (style) made.style.textAlign = style.replace("text-align:", "");
  return made;
}

function single(token, parent) {
  switch (token.type) {
    case "fence": return codeBlock(token.content, token.info.trim().split(/\s/)[0]);
    case "code_block": return codeBlock(token.content, "");
    case "code_inline": return element("code", "", token.content);
    case "image": return image(token, parent);
    case "softbreak": case "hardbreak": return element("br");
    case "hr": return element("hr");
    default: return document.createTextNode(token.content);
  }
}

function link(address) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!url || !PROTOCOLS.has(url.protocol)) return element("span");
  const made = element("a");
  made.href = made.title = url.href;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}

function image(token, parent) {
  const made = parent.closest("a") ? element("span") : link(token.attrGet("src"));
  made.textContent = `[image: ${token.content || "no description"}]`;
  return made;
}

function codeBlock(content, language) {
  const code = content.replace(/\n$/, "");
  const made = element("div", "code");
  const bar = element("div", "code-bar");
  bar.append(element("span", "", language || "text"), button("Copy", (own) => copy(code, own)));
  const text = element("pre");
  text.tabIndex = 0;
  text.append(element("code", "", code));
  made.append(bar, text);
  return made;
}

// -- a text that grows --------------------------------------------------------------------------------------------------

// Shows a growing Markdown text, at most once per frame. Only its end is parsed again: a block is settled once a complete line after it
// started another block, so all blocks but the last two are.
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.clear();
  }

  clear() {
    this.settled = 0; // length of the text whose blocks are settled
    this.numSettled = 0; // their elements
    this.references = {}; // link targets, which the parser collects
    this.frame = 0;
    this.due = 0;
    this.root.replaceChildren();
  }

  update(text) {
    this.text = text;
    this.frame ||= requestAnimationFrame(() => this.render());
  }

  render() {
    this.frame = 0;
    const begin = performance.now();
    if (begin < this.due) return this.update(this.text);
    this.renderEnd();
    this.due = performance.now() + 4 * (performance.now() - begin); // a block of many pages is drawn less often
  }

  // The whole text at once. Links whose targets came after them are complete only now.
  finish(text) {
    cancelAnimationFrame(this.frame);
    this.text = text;
    this.clear();
    append(this.root, parser.parse(text, {}));
  }

  renderEnd() {
    const end = this.text.slice(this.settled).replace(/\n[ \t>]*[-=]+$/, ""); // half of a list item or a table is no heading yet
    const tokens = parser.parse(end, this.references);
    const starts = tokens.flatMap((token, i) => (token.level === 0 && token.nesting >= 0 ? [i] : []));
    while (this.root.childNodes.length > this.numSettled) this.root.lastChild.remove();
    append(this.root, tokens);
    if (starts.length < 3) return;
    this.numSettled += starts.length - 2;
    this.settled += lineStart(end, tokens[starts.at(-2)].map[0]);
  }
}

function lineStart(text, line) {
  const ends = /\r\n?|\n/g;
  for (; line > 0; line--) ends.exec(text);
  return ends.lastIndex;
}
