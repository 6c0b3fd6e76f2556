// The page /docs: endpoints, fields and examples, made from the server's OpenAPI document.
import { call, hasKey, setKey } from "./api.js";

const $ = (id) => document.getElementById(id);
let needsKey = false; // whether requests need an API key

// An element with attributes and children. A string becomes a text node.
function element(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const modelName = (ref) => ref.split("/").pop();

// A schema in one line, as nodes: names of models are links.
function typeOf(schema) {
  if (!schema) return ["any"];
  if (schema.$ref) return [element("a", { href: `#type-${modelName(schema.$ref)}` }, modelName(schema.$ref))];
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return choices.flatMap((choice, i) => (i ? [" or ", ...typeOf(choice)] : typeOf(choice)));
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" or ")];
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items)];
  return [Array.isArray(schema.type) ? schema.type.join(" or ") : schema.type ?? "any"];
}

// What a field's schema says beside its type.
function remarks(schema) {
  const found = [schema.description, "default" in schema && schema.default !== null && `default ${JSON.stringify(schema.default)}`];
  const part = [schema, ...(schema.anyOf ?? [])].find((one) => "minimum" in one || "maximum" in one);
  if (part) found.push(`from ${part.minimum ?? "any"} to ${part.maximum ?? "any"}`);
  return found.filter(Boolean).join("; ");
}

// A table of a model's fields. Those without effect and those that are not built here come last.
function fields(schema) {
  const required = new Set(schema.required);
  const last = (field) => /^(accepted; has no effect|not supported)/.test(field.description ?? "");
  const rows = Object.entries(schema.properties ?? {}).sort(([a, x], [b, y]) => required.has(b) - required.has(a) || last(x) - last(y));
  const cells = rows.map(([name, field]) => element("tr", {},
    element("td", {}, element("code", {}, name), required.has(name) ? " (required)" : ""),
    element("td", {}, ...typeOf(field)), element("td", {}, remarks(field))));
  const head = element("tr", {}, ...["Field", "Type", ""].map((title) => element("th", {}, title)));
  return element("div", { class: "table" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...cells)));
}

function curl(method, path, body) {
  const url = new URL(`.${path}`, location.href).href;
  const lines = [`curl ${method === "get" ? "" : `-X ${method.toUpperCase()} `}'${decodeURI(url)}'`];
  if (needsKey) lines.push(`-H 'Authorization: Bearer KEY'`);
  if (body) lines.push(`-H 'Content-Type: application/json'`, `-d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`);
  return element("pre", { class: "code" }, element("code", {}, lines.join(" \\\n  ")));
}

function endpoint(path, method, operation) {
  const json = operation.requestBody?.content["application/json"];
  const answer = operation.responses["200"].content["application/json"];
  const errors = Object.entries(operation.responses).filter(([status]) => status !== "200");
  return element("section", { id: `${method}-${path}` },
    element("h2", {}, element("code", {}, `${method.toUpperCase()} ${path}`)),
    element("p", {}, operation.description ?? ""),
    ...(json ? [element("p", {}, "Body: ", ...typeOf(json.schema))] : []),
    element("p", {}, "Response: ", ...(answer ? typeOf(answer.schema) : ["text"]),
      operation.responses["200"].content["text/event-stream"] ? ", or server-sent events with stream: true" : ""),
    ...(answer?.schema.properties ? [fields(answer.schema)] : []), curl(method, path, json?.example),
    element("details", {}, element("summary", {}, "Errors"), element("ul", {},
      ...errors.map(([status, error]) => element("li", {}, `${status}: ${error.description}`)))));
}

async function show() {
  let api;
  try {
    api = await (await call("openapi.json")).json();
  } catch (error) {
    $("key-form").hidden = error.status !== 401;
    $("problem").hidden = error.status === 401 && !hasKey();
    $("problem").textContent = error.message;
    return;
  }
  $("key-form").hidden = $("problem").hidden = true;
  $("version").textContent = `version ${api.info.version}`;
  needsKey = Boolean(api.components.securitySchemes);
  const found = Object.entries(api.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, it]) => [path, method, it]));
  $("paths").replaceChildren(element("ul", {}, ...found.map(([path, method]) =>
    element("li", {}, element("a", { href: `#${method}-${path}` }, `${method.toUpperCase()} ${path}`)))));
  $("endpoints").replaceChildren(...found.map((one) => endpoint(...one)));
  $("types").replaceChildren(...Object.entries(api.components.schemas).map(([name, schema]) => element("section", { id: `type-${name}` },
    element("h2", {}, name), element("p", {}, schema.description ?? ""), fields(schema))));
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

$("key-form").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  show();
});
show();
