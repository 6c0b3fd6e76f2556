// Requests to the server. The API key is kept in this variable only.
let key = "";

export const setKey = (value) => { key = value; };
export const hasKey = () => key !== "";

export class ServerError extends Error {
  constructor(message, status = 0) { // status 0: no response
    super(message);
    this.status = status;
  }
}

// The response to a request. `body`: sent as JSON by POST. Throws ServerError, or AbortError after an abort of `signal`.
export async function call(path, { body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const post = body && { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { headers, ...post, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw new ServerError(await errorText(response), response.status);
  return response;
}

async function errorText(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

// The data of each server-sent event.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("The connection to the server was lost.");
  }
}
