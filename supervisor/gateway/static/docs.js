// Shows /openapi.json for people: every operation with its right, its values, its answers and a line to paste.

const METHODS = ["get", "put", "post", "delete"];

/** An element; strings become text, in which `code` is code. */
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  for (const child of children.flat()) {
    if (typeof child !== "string") made.append(child);
    else for (const [at, part] of child.split("`").entries()) made.append(at % 2 ? code(part) : part);
  }
  return made;
}

function code(text) {
  const made = document.createElement("code");
  made.textContent = text;
  return made;
}

function section(title, ...children) {
  return el("div", {}, el("h3", {}, title), ...children);
}

function rows(list) {
  return el("div", { class: "rows" }, list.map(([left, right]) => el("div", {}, el("div", {}, left), el("div", {}, right))));
}

class Documented {
  constructor(document_) {
    this.document = document_;
  }

  resolve(schema) {
    const path = schema.$ref?.slice(2).split("/");
    return path ? path.reduce((place, part) => place[part], this.document) : schema;
  }

  /** The type in a few words. */
  kind(schema) {
    if (schema.$ref) return this.kind(this.resolve(schema));
    if (schema.anyOf) return schema.anyOf.map((one) => this.kind(one)).join(" or ");
    if ("const" in schema) return JSON.stringify(schema.const);
    if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(", ");
    if (schema.type === "array") return `list of ${this.kind(schema.items ?? {})}`;
    const bounds = [
      ["minimum", "≥"],
      ["exclusiveMinimum", ">"],
      ["maximum", "≤"],
    ].flatMap(([key, sign]) => (key in schema ? [`${sign} ${schema[key]}`] : []));
    const name = schema.format === "date-time" ? "time (RFC 3339)" : schema.title ?? schema.type ?? "anything";
    return [name, ...bounds].join(" ");
  }

  fields(schema) {
    const { properties = {}, required = [] } = this.resolve(schema);
    return Object.entries(properties).map(([name, field]) => {
      const said = field.description ?? field.anyOf?.find((one) => one.description)?.description ?? "";
      const initial = "default" in field && !required.includes(name) ? `, default ${JSON.stringify(field.default)}` : "";
      return [[code(name)], [el("span", { class: "kind" }, this.kind(field) + initial), said && el("div", {}, said)].filter(Boolean)];
    });
  }
}

function told(description) {
  const parts = description.split("\n");
  const items = parts.filter((part) => part.startsWith("* ")).map((part) => el("li", {}, part.slice(2)));
  const plain = parts.filter((part) => !part.startsWith("* ")).join(" ");
  return [plain && el("div", {}, plain), items.length && el("ul", {}, items)].filter(Boolean);
}

function paste(method, path, operation) {
  if (operation.responses["101"]) {
    const at = location.origin.replace(/^http/, "ws") + path.replace("{path}", "").replace("{tenant}", "TENANT");
    return `# any WebSocket client\n${at}?token=$TENANTRY_TOKEN`;
  }
  const verb = method === "get" ? "" : ` -X ${method.toUpperCase()}`;
  const token = operation.security?.some((one) => one.token) ? ` -H "Authorization: Bearer $TENANTRY_TOKEN"` : "";
  const body = operation.requestBody ? ` --json '{}'` : "";
  return `curl${verb}${token}${body} ${location.origin}${path.replace(/{(\w+)}/g, (_, name) => name.toUpperCase())}`;
}

function rightOf(operation, path) {
  const match = /Needs scope `(\w+)` ([^.]*)\./.exec(operation.description);
  if (match) return `scope ${match[1]} ${match[2]}`;
  return operation.security?.length ? "a token, not always" : "no token";
}

function operationOf(documented, method, path, operation) {
  const inside = el("div", { class: "inside" }, el("p", {}, operation.description));
  inside.append(el("p", {}, el("span", { class: "right" }, rightOf(operation, path))));
  if (operation.parameters.length) {
    inside.append(section("Values in the address", rows(operation.parameters.map(({ name, schema, description = "" }) => {
      const initial = "default" in schema ? `, default ${JSON.stringify(schema.default)}` : "";
      return [[code(name)], [el("span", { class: "kind" }, documented.kind(schema) + initial), el("div", {}, description)]];
    }))));
  }
  const body = operation.requestBody?.content["application/json"].schema;
  const fields = body ? documented.fields(body) : [];
  if (fields.length) inside.append(section("Body, JSON, all of it optional", rows(fields)));
  const good = Object.entries(operation.responses).filter(([status]) => status < 400);
  const bad = Object.entries(operation.responses).filter(([status]) => status >= 400);
  inside.append(section("Answers", rows(good.map(([status, answer]) => {
    const schema = answer.content?.["application/json"]?.schema;
    const kinds = Object.keys(answer.content ?? {}).filter((kind) => kind !== "application/json");
    const shown = schema ? [rows(documented.fields(schema))] : kinds.length ? [kinds.join(", ")] : [];
    return [[code(status)], [el("div", {}, answer.description), ...shown]];
  }))));
  inside.append(section("Problems", rows(bad.map(([status, answer]) => [[code(status)], told(answer.description)]))));
  const line = el("pre", { tabindex: "0", "aria-label": "Example" });
  line.textContent = paste(method, path, operation);
  inside.append(section("To paste", line));
  return el(
    "details",
    { class: "card operation", id: operation.operationId },
    el(
      "summary",
      {},
      el("span", { class: "verb", "data-verb": method.toUpperCase() }, method.toUpperCase()),
      el("span", { class: "where" }, path),
      el("span", { class: "what" }, operation.summary),
    ),
    inside,
  );
}

function show(document_) {
  const documented = new Documented(document_);
  const shown = [
    el("h1", {}, `${document_.info.title} ${document_.info.version}`),
    el("p", { class: "lead" }, document_.info.summary),
    el("p", {}, "Bodies are JSON. What fails is a problem (RFC 9457): its `code` is for programs, its `detail` says what " +
      "to do, `retryable` whether the same request can succeed later by itself."),
  ];
  const contents = [];
  for (const tag of document_.tags) {
    const operations = Object.entries(document_.paths).flatMap(([path, methods]) =>
      METHODS.filter((method) => methods[method]?.tags.includes(tag.name)).map((method) => [method, path, methods[method]]));
    shown.push(el("section", {}, el("h2", {}, tag.description.replace(/\.$/, "")),
      operations.map((one) => operationOf(documented, ...one))));
    contents.push(el("h2", {}, tag.description.replace(/\.$/, "")), el("ul", {}, operations.map(([method, path, operation]) =>
      el("li", {}, el("a", { href: `#${operation.operationId}` },
        el("span", { class: "verb", "data-verb": method.toUpperCase() }, method.toUpperCase()),
        el("span", {}, operation.operationId.replaceAll("_", " ")))))));
  }
  document.getElementById("contents").replaceChildren(...contents);
  const place = document.getElementById("document");
  place.replaceChildren(...shown);
  place.setAttribute("aria-busy", "false");
}

function openNamed() {
  const named = location.hash && document.getElementById(location.hash.slice(1));
  if (named?.tagName !== "DETAILS") return;
  named.open = true;
  named.scrollIntoView();
}

addEventListener("hashchange", openNamed);
try {
  const answer = await fetch("/openapi.json");
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  show(await answer.json());
  openNamed();
} catch (error) {
  document.getElementById("document").replaceChildren(el("p", {}, `The description could not be read: ${error.message}.`));
}
