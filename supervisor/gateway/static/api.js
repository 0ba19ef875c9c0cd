// The supervisor's HTTP surface, as this page uses it: a token that stays in this tab, and problems as errors.

const KEY = "tenantry.token";
const ANSWER_MS = 60_000;

export class Problem extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

/** Takes `#token=…` (and `tenant=…`) out of the address bar before anything else can see it. */
export function takeFragment() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.has("token")) {
    keepToken(given.get("token"));
    history.replaceState(null, "", location.pathname + location.search);
  }
  return given.get("tenant") ?? new URLSearchParams(location.search).get("tenant");
}

export function keepToken(token) {
  sessionStorage.setItem(KEY, token.trim());
}

export function forgetToken() {
  sessionStorage.removeItem(KEY);
}

export function hasToken() {
  return sessionStorage.getItem(KEY) !== null;
}

/** What the token says of itself; the supervisor judges it, this only spares typing. */
export function tokenClaims() {
  try {
    const part = sessionStorage.getItem(KEY).split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    return JSON.parse(atob(part));
  } catch {
    return {};
  }
}

export async function call(method, path, body) {
  const headers = {};
  if (hasToken()) headers.Authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      signal: AbortSignal.timeout(ANSWER_MS),
    });
  } catch {
    throw new Problem(0, "unreachable", "The supervisor does not answer.");
  }
  if (answer.status === 204) return null;
  let told;
  try {
    told = await answer.json();
  } catch {
    throw new Problem(answer.status, "no_json", `The answer with status ${answer.status} is no JSON.`);
  }
  if (!answer.ok) throw new Problem(answer.status, told.code, told.detail);
  return told;
}

export function tenantPath(name, action = "") {
  return `/v1/tenants/${encodeURIComponent(name)}${action && `/${action}`}`;
}
