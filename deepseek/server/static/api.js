// How the page talks to its server.

export const byId = (id) => document.getElementById(id);

export function element(name, fields = {}, ...children) {
  const made = Object.assign(document.createElement(name), fields);
  made.append(...children);
  return made;
}

export function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

async function failure(response) {
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`The server answered ${response.status}.`);
  }
}

export async function call(method, path, body, signal) {
  const binary = body instanceof Blob;
  const headers = body === undefined ? {} : { "Content-Type": binary ? "application/octet-stream" : "application/json" };
  const response = await fetch(path, { method, headers, signal, body: binary || body === undefined ? body : JSON.stringify(body) });
  if (response.status === 401) location.reload(); // the session has ended: the server asks for the key
  if (!response.ok) throw await failure(response);
  return response;
}

export const json = async (method, path, body) => (await call(method, path, body)).json();

// Server-sent events of a request, one JSON value each.
export async function* events(method, path, body, signal) {
  const reader = (await call(method, path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (!data || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
