// The reference of the API, made of openapi.json. All of it is set as text, never as markup.

import { $, el, encodedKey } from "./elements.js";

const DEEPEST = 4; // fields of fields that are listed
const LONGEST = 400; // characters of a string that are shown of a response

const keyed = () => {
  const key = sessionStorage.getItem("key");
  return key === null ? {} : { Authorization: `Bearer ${encodedKey(key)}` };
};
/** `code` of a description becomes an element. */
const prose = (text) => (text ?? "").split("`").map((part, number) => (number % 2 ? el("code", {}, part) : part));
const resolved = (schema, all) => (schema?.$ref ? all[schema.$ref.split("/").pop()] : schema) ?? {};

/** The type of a field in words. */
function typeOf(given, all) {
  const schema = resolved(given, all);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return [...new Set(choices.map((choice) => typeOf(choice, all)))].filter((name) => name !== "null").join(", or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items, all)}`;
  const limits = [["minimum", "≥"], ["maximum", "≤"]].filter(([name]) => name in schema).map(([name, sign]) => `${sign} ${schema[name]}`);
  return [schema.type ?? "any", ...limits].join(" ");
}

/** The objects that a value is or holds, each with what stands before the names of its fields. */
function objectsOf(given, all, before) {
  const schema = resolved(given, all);
  const choices = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (choices) return choices.flatMap((choice) => objectsOf(choice, all, before));
  if (schema.type === "array") return objectsOf(schema.items, all, `${before}[]`);
  return schema.properties ? [[schema, before === "" ? "" : `${before}.`]] : [];
}

/** A row for each field, those of fields after it. */
function rowsOf(given, all, before = "", depth = 0) {
  if (depth > DEEPEST) return [];
  return objectsOf(given, all, before).flatMap(([schema, prefix]) =>
    Object.entries(schema.properties).flatMap(([name, field]) => {
      const required = (schema.required ?? []).includes(name);
      const preset = field.default ?? null;
      const notes = [typeOf(field, all), required ? "required" : preset === null ? "" : `default ${JSON.stringify(preset)}`];
      const row = el("tr", {}, el("th", { scope: "row" }, el("code", {}, prefix + name)),
        el("td", {}, notes.filter(Boolean).join("; ")), el("td", {}, prose(field.description ?? resolved(field, all).description)));
      return [row, ...rowsOf(field, all, prefix + name, depth + 1)];
    }));
}

function fields(title, schema, all, open) {
  const rows = rowsOf(schema, all);
  if (!rows.length) return null;
  return el("details", { open }, el("summary", {}, title), el("table", { className: "members" }, el("tbody", {}, rows)));
}

const shortened = (name, value) =>
  typeof value === "string" && value.length > LONGEST ? `${value.slice(0, LONGEST)}… (${value.length} characters)` : value;

/** Sends a request without the browser's password, which it would ask for itself, unless a proxy needs one. */
async function ask(address, options) {
  const response = await fetch(address, { ...options, credentials: "omit" });
  const isOwn = response.status !== 401 || response.headers.get("content-type")?.startsWith("application/json");
  return isOwn ? response : fetch(address, options);
}

async function shown(response) {
  const type = response.headers.get("content-type") ?? "";
  if (type.startsWith("image/")) return [el("img", { src: URL.createObjectURL(await response.blob()), alt: "The image of the response" })];
  const text = await response.text();
  return [el("pre", {}, type.startsWith("application/json") ? JSON.stringify(JSON.parse(text), shortened, 2) : text)];
}

/** Fields for the parameters and the body, and a button that sends them. */
function trial(method, path, operation, all) {
  const parameters = (operation.parameters ?? []).map((parameter) => ({ ...parameter, field: el("input", { type: "text" }) }));
  const body = operation.requestBody && resolved(operation.requestBody.content["application/json"].schema, all);
  const text = body && el("textarea", { className: "code", rows: 6, spellcheck: false,
    value: JSON.stringify(body.examples?.[0] ?? {}, null, 2), "aria-label": `Body of ${path}` });
  const answer = el("div", { role: "status" });

  async function send(event) {
    event.preventDefault();
    const value = ({ field }) => field.value.trim();
    const place = parameters.filter((one) => one.in === "path").reduce(
      (place, one) => place.replace(new RegExp(`\\{${one.name}(:path)?\\}`), encodeURIComponent(value(one))), path.slice(1));
    const query = new URLSearchParams(parameters.filter((one) => one.in === "query" && value(one)).map((one) => [one.name, value(one)]));
    const headers = { ...keyed(), ...(text ? { "Content-Type": "application/json" } : {}) };
    answer.replaceChildren(el("p", { className: "note busy" }, "Sent…"));
    try {
      const response = await ask(query.size ? `${place}?${query}` : place,
        { method: method.toUpperCase(), headers, ...(text ? { body: text.value } : {}) });
      answer.replaceChildren(el("p", { className: "note" }, `Status ${response.status}`), ...(await shown(response)));
    } catch (error) {
      answer.replaceChildren(el("p", { className: "problem" }, `There is no answer: ${error.message}`));
    }
  }

  const inputs = parameters.map((one) => el("label", {}, `${one.name} (${typeOf(one.schema, all)}) `, prose(one.description), one.field));
  return el("form", { onsubmit: send }, inputs, text ? el("label", {}, "Request", text) : null,
    el("p", { className: "row" }, el("button", { type: "submit", "aria-label": `Send ${method.toUpperCase()} ${path}` }, "Send")), answer);
}

function section(method, path, operation, all) {
  const request = operation.requestBody?.content["application/json"].schema;
  const good = operation.responses["200"]?.content?.["application/json"]?.schema;
  const errors = Object.entries(operation.responses).filter(([status]) => status >= "400");
  return el("section", { id: `${method}${path}` },
    el("h2", {}, el("span", { className: "method" }, method.toUpperCase()), " ", el("code", {}, path)),
    el("p", {}, prose(operation.description ?? operation.summary)),
    fields("Fields of the request", request, all, true), fields("Fields of the response", good, all, false),
    errors.length ? el("details", {}, el("summary", {}, "Errors"), el("table", { className: "members" }, el("tbody", {},
      errors.map(([status, error]) => el("tr", {}, el("th", { scope: "row" }, status), el("td", {}, prose(error.description))))))) : null,
    trial(method, path, operation, all));
}

function show(description) {
  $("title").textContent = `${description.info.title} ${description.info.version}: API reference`;
  $("description").textContent = description.info.description;
  const all = description.components.schemas;
  const operations = Object.entries(description.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => [method, path, operation]));
  $("contents").replaceChildren(...operations.map(([method, path]) => el("li", {}, el("a", { href: `#${method}${path}` }, path))));
  $("operations").replaceChildren(...operations.map(([method, path, operation]) => section(method, path, operation, all)));
}

async function start() {
  let response, content;
  try {
    response = await ask("openapi.json", { headers: keyed() });
    content = await response.json();
  } catch (error) {
    $("problem").hidden = false;
    $("problem").textContent = response
      ? `There is no description of the API: something between here and the server answered with status ${response.status}.`
      : `The server cannot be reached: ${error.message}`;
    return;
  }
  $("key-form").hidden = response.status !== 401;
  $("problem").hidden = response.ok || (response.status === 401 && sessionStorage.getItem("key") === null);
  $("problem").textContent = content.error?.message ?? "";
  if (response.ok) show(content);
  else sessionStorage.removeItem("key");
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  start();
});
start();
