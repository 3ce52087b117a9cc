// The page at /docs: what /openapi.json says, and a form to try each operation. Nothing is fetched from elsewhere.

const MAX_REPLY_CHARACTERS = 200_000;

let api;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== undefined && child !== ""));
  return made;
}

// Text with `code` in it, as the document's descriptions have it.
function marked(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function resolved(value) {
  if (!value?.$ref) return value ?? {};
  const target = value.$ref.slice(2).split("/").reduce((within, key) => within[key], api);
  return { ...target, ...(value.description ? { description: value.description } : {}) };
}

function typeName(schema) {
  if (schema.$ref) return schema.$ref.split(".").at(-1);
  if (schema.type === "array") return `list of ${typeName(schema.items)}`;
  if (schema.additionalProperties && schema.type === "object") return `map to ${typeName(schema.additionalProperties)}`;
  if (schema.anyOf) return schema.anyOf.map((one) => one.type ?? "text").join(" or ").replace("number or text", "number");
  return schema.format ?? [schema.type ?? "any JSON"].flat().join(" or ");
}

// A body to begin with: what its comment calls required, else the first field; of every "one of" the first choice.
function sample(schema, depth = 0) {
  const whole = resolved(schema);
  if (whole.examples) return whole.examples[0];
  if (whole.enum) return whole.enum.length > 1 ? whole.enum[1] : whole.enum[0];
  if (whole.anyOf) return sample(whole.anyOf[0], depth);
  const type = [whole.type].flat()[0];
  if (type === "object" && whole.properties) {
    if (depth > 2) return {};
    const rivals = new Set(
      (whole.allOf ?? []).flatMap((choice) => choice.oneOf.slice(1).flatMap((one) => one.required ?? [])),
    );
    const all = Object.entries(whole.properties).filter(([name]) => !rivals.has(name));
    const required = all.filter(([, property]) => /\brequired\b/i.test(property.description ?? ""));
    const kept = required.length ? required : all.slice(0, 1);
    return Object.fromEntries(kept.map(([name, property]) => [name, sample(property, depth + 1)]));
  }
  if (type === "array") return depth > 2 ? [] : [sample(whole.items, depth + 1)];
  return { string: "", integer: whole.minimum > 0 ? whole.minimum : 0, number: 0, boolean: false, object: {} }[type] ?? null;
}

function fieldsOf(schema, within = []) {
  const reference = schema.$ref ?? schema.items?.$ref ?? schema.additionalProperties?.$ref;
  const whole = resolved(reference ? { $ref: reference } : schema);
  if (whole.enum) return element("p", { class: "quiet" }, whole.enum.join(", "));
  if (!whole.properties || within.includes(reference)) return undefined;
  const rows = Object.entries(whole.properties).map(([name, property]) => {
    const title = [
      element("code", {}, name), " ", element("span", { class: "quiet" }, typeName(property)), " ",
      ...marked(property.description ?? resolved(property).description ?? ""),
    ];
    const inner = fieldsOf(property, [...within, reference]);
    return inner ? element("details", {}, element("summary", {}, ...title), inner) : element("p", {}, ...title);
  });
  return element("div", { class: "fields" }, ...rows);
}

function pathValue(text, parameter) {
  const encoded = encodeURIComponent(text);
  return parameter["x-spans-segments"] ? encoded.replaceAll("%2F", "/") : encoded;
}

function requestOf(path, verb, inputs, body, accept) {
  let target = path;
  const query = new URLSearchParams();
  const headers = { accept };
  for (const { parameter, input } of inputs) {
    if (input.value === "") continue;
    if (parameter.in === "path") target = target.replace(`{${parameter.name}}`, pathValue(input.value, parameter));
    else if (parameter.in === "header") headers[parameter.name] = input.value;
    else if (parameter.schema.type === "array") input.value.split(",").forEach((one) => query.append(parameter.name, one.trim()));
    else query.append(parameter.name, input.value);
  }
  if (body !== undefined) headers["content-type"] = "application/json";
  return [target + (query.size ? `?${query}` : ""), { method: verb.toUpperCase(), headers, body }];
}

async function show(reply, output, status, began) {
  status.textContent = `${reply.status} ${reply.statusText}, id ${reply.headers.get("x-request-id")}`;
  status.classList.toggle("bad", !reply.ok);
  const isWhole = reply.headers.get("content-type")?.startsWith("application/json");
  if (isWhole) {
    output.textContent = JSON.stringify(await reply.json(), null, 2);
  } else {
    for await (const text of reply.body.pipeThrough(new TextDecoderStream())) {
      output.textContent = (output.textContent + text).slice(-MAX_REPLY_CHARACTERS);
      output.scrollTop = output.scrollHeight;
    }
  }
  status.textContent += `, ${Math.round(performance.now() - began)} ms`;
}

function form(path, verb, operation) {
  const inputs = (operation.parameters ?? []).map((given) => {
    const parameter = resolved(given);
    const hint = (resolved(parameter.schema).examples ?? [typeName(parameter.schema)])[0];
    return { parameter, input: element("input", { placeholder: hint, "aria-label": parameter.name, required: parameter.required }) };
  });
  const schema = operation.requestBody?.content["application/json"].schema;
  const body = schema && element("textarea", { "aria-label": "body", spellcheck: "false" });
  if (body) body.value = JSON.stringify(sample(schema), null, 2);
  const kinds = Object.keys(operation.responses["200"].content);
  const accept = element("select", { "aria-label": "form of the reply" }, ...kinds.map((kind) => element("option", {}, kind)));
  const output = element("pre", { class: "reply", hidden: true, tabindex: "0" });
  const status = element("span", { class: "quiet", role: "status" });
  const stop = element("button", { type: "button", disabled: true }, "Stop");
  const send = element("button", { type: "submit" }, "Send");

  async function submit(event) {
    event.preventDefault();
    const aborter = new AbortController();
    const began = performance.now();
    stop.onclick = () => aborter.abort();
    send.disabled = true;
    stop.disabled = output.hidden = false;
    output.textContent = status.textContent = "";
    try {
      const [target, request] = requestOf(path, verb, inputs, body?.value, accept.value);
      await show(await fetch(target, { ...request, signal: aborter.signal }), output, status, began);
    } catch (error) {
      status.textContent += aborter.signal.aborted ? ", stopped" : ` ${error.message}`;
    } finally {
      send.disabled = false;
      stop.disabled = true;
    }
  }

  const rows = inputs.map(({ parameter, input }) =>
    element("label", { class: "parameter" },
      element("span", {}, element("code", {}, parameter.name), " ", element("span", { class: "quiet" }, parameter.in)),
      element("span", {}, input, element("span", { class: "quiet" }, ...marked(parameter.description ?? "")))));
  return element("form", { onsubmit: submit }, ...rows, body,
    element("div", { class: "send" }, send, kinds.length > 1 ? accept : "", stop, status), output);
}

function operationView(path, verb, operation) {
  const content = Object.values(operation.responses["200"].content)[0].schema;
  const schema = operation.requestBody?.content["application/json"].schema;
  const view = element("details", { class: "operation", id: operation.operationId },
    element("summary", {},
      element("span", { class: `verb ${verb}` }, verb.toUpperCase()), element("span", { class: "path" }, path), " ",
      element("span", { class: "quiet" }, operation.summary)));
  view.dataset.words = `${verb} ${path} ${operation.operationId} ${operation.description}`.toLowerCase();
  view.addEventListener("toggle", () => {
    if (view.open) history.replaceState(null, "", `#${operation.operationId}`);
    if (view.childElementCount > 1) return;
    const request = schema && element("details", {}, element("summary", {}, "Request"), fieldsOf(schema) ?? "");
    const reply = element("details", {}, element("summary", {}, "Reply"), fieldsOf(content) ?? "");
    view.append(element("div", {}, element("p", {}, ...marked(operation.description)), request ?? "", reply, form(path, verb, operation)));
  });
  return view;
}

function showAll() {
  document.getElementById("version").textContent = api.info.version;
  document.getElementById("about").replaceChildren(...marked(api.info.description));
  const operations = Object.entries(api.paths).flatMap(([path, verbs]) =>
    Object.entries(verbs).map(([verb, operation]) => ({ path, verb, operation })));
  const sections = api.tags.map((tag) => element("section", {},
    element("h2", {}, tag.name), element("p", { class: "quiet" }, tag.description ?? ""),
    ...operations.filter(({ operation }) => operation.tags.includes(tag.name))
      .map(({ path, verb, operation }) => operationView(path, verb, operation))));
  document.getElementById("operations").replaceChildren(...sections);
  openLinked();
}

// The operation that the address names after "#" is open.
function openLinked() {
  let id = location.hash.slice(1);
  try {
    id = decodeURIComponent(id);
  } catch {
    // "#100%": it names no operation either way
  }
  const linked = document.getElementById(id);
  if (linked?.matches("details")) {
    linked.open = true;
    linked.scrollIntoView();
  }
}

document.getElementById("find").addEventListener("input", ({ target }) => {
  for (const view of document.querySelectorAll("details.operation")) {
    view.hidden = !view.dataset.words.includes(target.value.toLowerCase());
  }
});

addEventListener("hashchange", openLinked);

try {
  api = await (await fetch("/openapi.json")).json();
  showAll();
} catch (error) {
  document.getElementById("operations").textContent = `The document could not be read: ${error.message}`;
}
