// How the page talks to its server.

/** The reason that the server gives for a refusal. @param {Response} response */
async function failure(response) {
  const { status } = response;
  try {
    return Object.assign(new Error((await response.json()).error.message), { status });
  } catch {
    return Object.assign(new Error(`The server answered ${status}.`), { status });
  }
}

/** Why there is no answer at all: browsers only say that fetching failed. @param {Error} error */
const unreached = (error) =>
  error.name === "AbortError"
    ? error
    : new Error("The server cannot be reached; see whether it still runs.");

/**
 * @param {string} method
 * @param {string} path
 * @param {unknown} [body] a Blob is sent as it is, everything else as JSON
 * @param {AbortSignal} [signal]
 */
export async function call(method, path, body, signal) {
  const binary = body instanceof Blob;
  const type = binary ? "application/octet-stream" : "application/json";
  const response = await fetch(path, {
    method,
    headers: body === undefined ? {} : { "Content-Type": type },
    signal,
    body: binary || body === undefined ? body : JSON.stringify(body),
  }).catch((error) => {
    throw unreached(error);
  });
  if (response.status === 401) location.reload(); // the session has ended: the server asks for the key
  if (!response.ok) throw await failure(response);
  return response;
}

/**
 * @param {string} method
 * @param {string} path
 * @param {unknown} [body]
 * @returns {Promise<any>}
 */
export const json = async (method, path, body) => (await call(method, path, body)).json();

/**
 * Server-sent events of a request, one JSON value each.
 * @param {string} method
 * @param {string} path
 * @param {unknown} [body]
 * @param {AbortSignal} [signal]
 * @returns {AsyncGenerator<any>}
 */
export async function* events(method, path, body, signal) {
  const response = await call(method, path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part
        .split("\n")
        .find((line) => line.startsWith("data: "))
        ?.slice(6);
      if (!data || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
