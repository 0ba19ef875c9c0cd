// The page: a tenant's state as it changes, and a connection to its agent. Looking never wakes; connecting does.

import { call, forgetToken, hasToken, keepToken, Problem, takeFragment, tenantPath, tokenClaims } from "./api.js";
import { Screen } from "./screen.js";
import { Shell } from "./shell.js";

const LOOK_EVERY_MS = 1000;
const STATES = {
  asleep: "Asleep",
  starting: "Starting",
  running: "Running",
  draining: "Draining",
  failed: "Failed",
  missing: "Not there yet",
  unreachable: "No answer",
  unknown: "Looking …",
};
const EXITS = {
  exited: "by itself",
  reset: "started anew",
  abandoned: "nobody waited",
  sleep: "put to sleep",
  delete: "deleted",
  drain: "drained",
};
const CLOSES = {
  1000: "the agent has finished",
  1001: "the tenant was put to sleep",
  1002: "a protocol error",
  1003: "the agent does not take this kind of message",
  1005: "closed without a reason",
  1006: "the connection broke, or was refused",
  1007: "a message was no valid text",
  1008: "the token is no longer valid",
  1009: "a message was too large",
  1011: "the agent failed",
  1012: "the agent is restarting",
  1013: "over capacity, try again later",
};

const FACTS = ["generation", "pid", "connections", "restarts", "why", "sleeps", "exit"];

const $ = (id) => document.getElementById(id);
const screen = new Screen($("screen"), $("lines"));
const history_ = { lines: [], at: 0 };
let tenant = "";
let seen = null;
let socket = null;
let shell = null;
let connectedBefore = false;
let attempt = 0;

// ---- the tenant's state ----

function showState(state, told = "") {
  $("state").dataset.state = state;
  if ($("state-word").textContent !== STATES[state]) $("state-word").textContent = STATES[state] ?? state;
  $("state-told").textContent = told;
  $("wake").disabled = ["running", "starting", "unreachable"].includes(state);
  $("sleep").disabled = !["running", "starting", "failed"].includes(state);
  document.title = tenant ? `${tenant} · ${STATES[state] ?? state} · Tenantry` : "Tenantry";
}

function showTenant(now) {
  showState(now.state, `for ${span(Date.now() - Date.parse(now.since))}`);
  fact("generation", now.generation);
  fact("pid", now.pid);
  fact("connections", now.connections);
  fact("restarts", now.restarts);
  fact("why", now.why_awake.join(", "));
  fact("sleeps", now.sleeps_at && `in ${span(Date.parse(now.sleeps_at) - Date.now())}`);
  fact("exit", now.last_exit && exitTold(now.last_exit));
  if (seen !== null && (seen.state !== now.state || seen.generation !== now.generation)) {
    screen.tell("notice", `${STATES[now.state]?.toLowerCase() ?? now.state}, generation ${now.generation}`);
  }
  seen = now;
}

function fact(name, value) {
  const empty = value === null || value === "";
  $(`fact-${name}`).textContent = empty ? "–" : value;
  $(`fact-${name}`).parentElement.toggleAttribute("data-empty", empty);
}

function exitTold({ reason, returncode, signal, time }) {
  const status = signal ? `killed by signal ${signal}` : returncode === null ? "unknown status" : `status ${returncode}`;
  return `${EXITS[reason] ?? reason}, ${status}, ${span(Date.now() - Date.parse(time))} ago`;
}

function span(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} days`;
}

async function look() {
  if (document.hidden || !tenant || !$("sign-in").hidden) return;
  const asked = tenant;
  try {
    const now = await call("GET", tenantPath(asked));
    if (asked === tenant) showTenant(now);
  } catch (problem) {
    if (asked === tenant) showNoTenant(problem);
  }
}

function showNoTenant(problem) {
  if (problem.code === "unknown_tenant") showState("missing", "connecting creates it");
  else if (problem.status === 401) askForToken(problem.message);
  else if (problem.code === "unreachable") showState("unreachable", "trying again");
  else showState("unknown", problem.message);
  for (const name of FACTS) fact(name, null);
  if (problem.code === "unknown_tenant") seen = null;
}

async function lookForever() {
  for (;;) {
    await look();
    await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY_MS));
  }
}

async function act(action) {
  try {
    const now = await call("POST", tenantPath(tenant, action), {});
    showTenant(now);
  } catch (problem) {
    tellProblem(problem);
  }
}

function tellProblem(problem) {
  if (!(problem instanceof Problem)) throw problem;
  if (problem.status === 401) askForToken(problem.message);
  else screen.tell("error", problem.message);
}

// ---- the connection ----

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function showLink(link, told) {
  $("link").dataset.link = link;
  $("link").textContent = told;
  const open = link === "open";
  $("connect").textContent = open ? "Disconnect" : link === "opening" ? "Cancel" : connectedBefore ? "Reconnect" : "Connect";
  $("connect").classList.toggle("main", !open && link !== "opening");
  $("connect").disabled = !tenant;
  $("line").disabled = !open;
  $("line").placeholder = open ? "" : "Connect to type";
  for (const choice of document.querySelectorAll("input[name=mode]")) choice.disabled = link !== "closed";
  $("path").disabled = link !== "closed";
  showPrompt();
}

function showPrompt() {
  const raw = mode() === "raw";
  $("path-field").hidden = !raw;
  $("interrupt").hidden = !shell?.process;
  $("prompt").textContent = raw ? "→" : shell?.busy ? "…" : `${shell?.place ? `${shell.place} ` : ""}$`;
  $("prompt").setAttribute("aria-label", raw ? "Message" : shell?.process ? "Input of the command" : "Command");
}

async function connect() {
  const mine = ++attempt;
  const raw = mode() === "raw";
  const path = raw ? `/${$("path").value.trim().replace(/^\/+/, "")}` : "/";
  showLink("opening", "Waking the agent …");
  let ticket;
  try {
    // Asked for in so many words, since a browser does not tell why a WebSocket was refused.
    showTenant(await call("POST", tenantPath(tenant, "wake"), {}));
    ({ ticket } = await call("POST", tenantPath(tenant, "tickets"), {}));
  } catch (problem) {
    if (mine === attempt) {
      showLink("closed", "Not connected");
      tellProblem(problem);
    }
    return;
  }
  if (mine !== attempt) return;
  const url = new URL(tenantPath(tenant, "connect") + path, location.href);
  url.searchParams.set("ticket", ticket);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  open(url, raw);
}

function open(url, raw) {
  showLink("opening", "Connecting …");
  const ours = new WebSocket(url);
  socket = ours;
  ours.binaryType = "arraybuffer";
  ours.onopen = () => {
    connectedBefore = true;
    shell = raw ? null : new Shell((text) => ours.send(text), listener);
    showLink("open", "Connected");
    screen.tell("notice", `connected to ${tenant}${raw ? `, path ${url.pathname.split("/connect")[1] || "/"}` : ""}`);
    $("line").focus();
  };
  ours.onmessage = ({ data }) => {
    if (shell !== null && typeof data === "string") shell.receive(data);
    else screen.tell("received", typeof data === "string" ? data : hex(data));
  };
  ours.onclose = ({ code, reason }) => ended(code, closeTold(code, reason));
}

function ended(code, words) {
  socket = null;
  shell?.end();
  shell = null;
  showLink("closed", `Closed: ${words}`);
  screen.tell([1000, 1001, 1005].includes(code) ? "notice" : "error", `closed with ${code}: ${words}`);
}

function closeTold(code, reason) {
  return reason || (CLOSES[code] ?? (code >= 3000 ? "the agent's own code" : "an unusual code"));
}

function hex(data) {
  const bytes = new Uint8Array(data);
  const shown = [...bytes.subarray(0, 64)].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
  return `${bytes.length} bytes: ${shown}${bytes.length > 64 ? " …" : ""}`;
}

function disconnect() {
  attempt += 1;
  const left = socket;
  if (left === null) return showLink("closed", "Not connected");
  // Whatever still comes of it is of no interest.
  left.onopen = left.onmessage = left.onclose = null;
  left.close(1000);
  if ($("link").dataset.link === "open") ended(1000, "you left");
  else {
    socket = null;
    showLink("closed", "Not connected");
  }
}

const listener = {
  output: (kind, text) => screen.write(kind, text),
  notice: (text) => screen.tell("notice", text),
  foreign: (text) => {
    screen.tell("received", text);
    screen.tell("notice", "this agent does not speak the bundled agent's JSON-RPC: disconnect, and take Raw");
  },
  changed: showPrompt,
};

function enter() {
  const text = $("line").value;
  if (socket?.readyState !== WebSocket.OPEN) return;
  if (shell !== null) {
    if (shell.starting) return;
    if (!text && !shell.process) return;
    screen.tell("sent", `${shell.process ? "" : `${shell.place ? `${shell.place} ` : ""}$ `}${text}`);
    shell.line(text);
  } else {
    screen.tell("sent", text);
    socket.send(text);
  }
  if (text) history_.lines = [...history_.lines.filter((line) => line !== text), text].slice(-200);
  history_.at = history_.lines.length;
  $("line").value = "";
}

function walk(step) {
  const at = history_.at + step;
  if (at < 0 || at > history_.lines.length) return;
  history_.at = at;
  $("line").value = history_.lines[at] ?? "";
}

// ---- the token, and which tenant ----

function askForToken(why) {
  const refused = hasToken();
  forgetToken();
  if (refused && why) $("sign-in-why").textContent = `The token was refused: ${why}.`;
  $("sign-in").hidden = false;
  $("console").hidden = true;
  $("sign-out").hidden = true;
  showState("unknown");
  if (document.activeElement === document.body) $("token").focus();
}

function choose(name) {
  if (name === tenant) return;
  disconnect();
  seen = null;
  connectedBefore = false;
  tenant = name;
  $("name").value = name;
  showState("unknown");
  showLink("closed", "Not connected");
  history.replaceState(null, "", `${location.pathname}?tenant=${encodeURIComponent(name)}`);
  look();
}

async function begin(asked) {
  $("sign-in").hidden = true;
  $("console").hidden = false;
  $("sign-out").hidden = !hasToken();
  const own = tokenClaims().tenant ?? null;
  let names = [];
  if (own === null) {
    try {
      names = (await call("GET", "/v1/tenants?limit=200")).tenants.map((one) => one.name);
    } catch (problem) {
      if (problem.status === 401) return askForToken(problem.message);
    }
  }
  $("names").replaceChildren(...names.map((name) => Object.assign(document.createElement("option"), { value: name })));
  $("name").readOnly = own !== null;
  $("choose").querySelector("button").hidden = own !== null;
  tenant = "";
  showLink("closed", "Not connected");
  choose(own ?? asked ?? names[0] ?? "demo");
  $("connect").focus();
}

$("choose").addEventListener("submit", (event) => {
  event.preventDefault();
  choose($("name").value);
});
$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken($("token").value);
  $("token").value = "";
  begin(tenant || null);
});
$("sign-out").addEventListener("click", () => {
  disconnect();
  forgetToken();
  askForToken("");
});
$("wake").addEventListener("click", () => act("wake"));
$("sleep").addEventListener("click", () => act("sleep"));
$("clear").addEventListener("click", () => screen.clear());
$("mode").addEventListener("change", showPrompt);
$("interrupt").addEventListener("click", () => shell?.interrupt());
$("connect").addEventListener("click", () => {
  if ($("link").dataset.link === "closed") connect();
  else disconnect();
});
$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  enter();
});
$("line").addEventListener("keydown", (event) => {
  const bare = $("line").selectionStart === $("line").selectionEnd;
  if (event.key === "ArrowUp") walk(-1);
  else if (event.key === "ArrowDown") walk(1);
  else if (event.key === "c" && event.ctrlKey && bare && shell?.process) shell.interrupt();
  else if (event.key === "d" && event.ctrlKey && shell?.process) shell.endInput();
  else return;
  event.preventDefault();
});
document.addEventListener("visibilitychange", look);
$("screen").addEventListener("click", () => {
  if (getSelection().isCollapsed) $("line").focus();
});

const asked = takeFragment();
addEventListener("hashchange", () => {
  if (location.hash.includes("token=")) begin(takeFragment());
});
showState("unknown");
showLink("closed", "Not connected");
begin(asked);
lookForever();
