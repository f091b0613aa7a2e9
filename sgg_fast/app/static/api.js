// Requests to the server that served the page, with the token of its address.

const hash = () => new URLSearchParams(location.hash.slice(1)).get("token");
let token = hash() ?? sessionStorage.getItem("token") ?? "";

/** Take the token of an address that was just opened in this tab; whether there is another one now. */
export function adopt() {
  const given = hash() ?? token;
  const changed = given !== token;
  token = given;
  sessionStorage.setItem("token", token);
  return changed;
}
adopt();

/** The server cannot be reached. */
export class Gone extends Error {}

/** The server refused; `status` says how. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The answer of the server. Raises `Gone` or `Refused`. */
export async function send(method, path, { json, body, timeout = 15000 } = {}) {
  const headers = { Authorization: `Bearer ${token}` };
  if (json !== undefined) headers["Content-Type"] = "application/json";
  if (body !== undefined) headers["Content-Type"] = "application/octet-stream";
  const content = json !== undefined ? JSON.stringify(json) : body;
  let response;
  try {
    response = await fetch(path, { method, headers, body: content, signal: AbortSignal.timeout(timeout) });
  } catch {
    throw new Gone("the server does not answer");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Refused(response.status, body.error ?? `the server answered ${response.status}`);
  }
  return response;
}

export const get = async (path, options) => (await send("GET", path, options)).json();
export const post = async (path, json) => (await send("POST", path, { json })).json();
