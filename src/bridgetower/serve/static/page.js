// The page: everything that is shown comes from the routes under v1/ and is set as text, never as markup.

import { $, el, encodedKey } from "./elements.js";

const ID = /^[0-9a-f]{64}$/;
const SMALL = 360, LARGE = 1600; // pixels of the longer side
const KEPT = 400; // images that are kept for showing them again
const TRUNCATE = ', or send "truncate": true to cut it'; // for which the page has no field

// ---------------------------------------------------------------------------------------------- numbers

function percent(probability) {
  const value = 100 * probability;
  if (value > 0 && value < 0.01) return "< 0.01\u00a0%";
  return `${value.toFixed(value >= 9.95 ? 0 : value >= 0.95 ? 1 : 2)}\u00a0%`;
}

const decimal = (value) => value.toFixed(3).replace(/^-0\.000$/, "0.000").replace("-", "\u2212");
const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
const counted = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

const isMoment = (hit) => (hit.start ?? null) !== null; // of a video

/** Returns the file name of a hit; of a moment of a video with its times. */
function nameOf(hit) {
  const name = (isMoment(hit) ? hit.path.replace(/#t=[^#]*$/, "") : hit.path).split(/[\\/]/).pop();
  return isMoment(hit) ? `${name}, ${clock(hit.start)}\u2013${clock(hit.end)}` : name;
}

/** Returns how well a pair matches: its calibrated probability or, without a calibration, its score; else null. */
function matchOf({ probability, score }) {
  if (probability !== undefined) return { share: probability, shown: percent(probability) };
  return score === undefined ? null : { share: score, shown: `score ${decimal(score)}` };
}

function bar(share) {
  const filled = el("i");
  filled.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`;
  return el("span", { className: "bar", "aria-hidden": "true" }, filled);
}

// ---------------------------------------------------------------------------------------------- asking the server

/** What could not be done, in words. */
class Problem extends Error {
  constructor(title, message, { status = 0, wait = null } = {}) {
    super(message);
    Object.assign(this, { title, status, wait });
  }
}

const TITLES_OF_CODES = {
  index_unavailable: "The index cannot be read", no_images: "The images cannot be opened",
  not_ready: "The server is not ready yet", timeout: "There was no answer in time",
};
const TITLES = {
  400: "The server cannot use this", 401: "The key is missing or wrong", 403: "The server refuses this page",
  404: "There is no such thing here", 408: "It took too long to send", 413: "This is too large",
  429: "The server is busy", 431: "This is too large", 502: "The server cannot be reached",
  503: "The server is not available", 504: "There was no answer in time",
};
const PASSING = [0, 408, 429, 502, 503, 504]; // statuses after which the same request may succeed; 0: no answer

async function problemOf(response) {
  let message = `status ${response.status}`;
  let code = null;
  try {
    ({ message, code } = (await response.json()).error);
  } catch { /* what answered was not this server: a proxy before it, perhaps */ }
  const wait = Number(response.headers.get("retry-after")) || null;
  const known = Object.hasOwn(TITLES_OF_CODES, code) ? TITLES_OF_CODES[code] : TITLES[response.status];
  return new Problem(known ?? "The server failed", message.replace(TRUNCATE, ""), { status: response.status, wait });
}

let asking = null; // for the key, once for all requests that wait for it

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-problem").hidden = !wrong;
    $("key-problem").textContent = "The server does not take this key.";
    $("key").value = "";
    dialog.onclose = () => {
      asking = null;
      resolve(sessionStorage.getItem("key") !== null);
    };
    dialog.showModal();
  });
  return asking;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key-dialog").close();
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("forget").addEventListener("click", () => {
  sessionStorage.removeItem("key");
  location.reload();
});

/** Sends a request, asking for the key if the server does, and returns the response if it is a good one. */
async function send(path, { body = null, signal = null } = {}) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = key === null ? {} : { Authorization: `Bearer ${encodedKey(key)}` };
    if (body !== null) headers["Content-Type"] = "application/json";
    let response;
    try {
      const options = { method: body === null ? "GET" : "POST", headers, signal };
      response = await fetch(path, body === null ? options : { ...options, body: JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached", "Check that it still runs, and try again.");
    }
    if (response.ok) {
      $("forget").hidden = key === null;
      return response;
    }
    if (response.status !== 401) throw await problemOf(response);
    if (sessionStorage.getItem("key") !== key) continue; // another request has got a new one
    sessionStorage.removeItem("key");
    if (!(await askForKey(key !== null))) throw await problemOf(response);
  }
}

const json = async (path, options) => (await send(path, options)).json();
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

// ---------------------------------------------------------------------------------------------- images

const paths = new Map(); // id of an image of the index → its path, as far as it was told
const indexed = (id) => ({ id, path: paths.get(id) ?? "image of the index" });
const shown = new Map(); // address of an image → promise of a URL of its content

/** Returns a URL of an image of the index; it is fetched, as an <img> cannot send the key. */
function imageUrl(id, size) {
  const address = `v1/images/${id}?size=${size}`;
  const known = shown.get(address) ?? fetchedUrl(address);
  shown.delete(address);
  shown.set(address, known);
  known.catch(() => shown.delete(address));
  for (const [oldest, url] of shown) {
    if (shown.size <= KEPT) break;
    shown.delete(oldest);
    url.then(URL.revokeObjectURL, () => {});
  }
  return known;
}

async function fetchedUrl(address) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return URL.createObjectURL(await (await send(address)).blob());
    } catch (problem) {
      if (problem.status !== 429 || attempt === 4) throw problem;
      await pause(problem.wait ?? 1);
    }
  }
}

/** Returns a frame in which an image of the index appears, or why it cannot. */
function frame(id, size, alt) {
  const holder = el("span", { className: "frame" });
  fill(holder, id, size, alt);
  return holder;
}

/** Takes out what a frame shows, and ends and frees a video that was fetched for it. */
function clear(holder, id = "") {
  holder.dataset.id = id;
  holder.release?.();
  holder.release = null;
  holder.replaceChildren();
}

async function fill(holder, id, size, alt) {
  clear(holder, id);
  try {
    const url = await imageUrl(id, size);
    if (holder.dataset.id === id) holder.replaceChildren(el("img", { src: url, alt }));
  } catch (problem) {
    if (holder.dataset.id === id) holder.replaceChildren(el("span", { className: "missing" }, problem.message));
  }
}

/** Plays the video of a moment from there; where the browser cannot, its frame is shown. */
async function play(holder, hit) {
  clear(holder, hit.id);
  const release = () => {};
  holder.release = release;
  const isLeft = () => holder.release !== release; // another image, or the same again
  const fallBack = () => { if (holder.dataset.id === hit.id) fill(holder, hit.id, LARGE, hit.path); };
  try {
    const poster = await imageUrl(hit.id, LARGE);
    if (isLeft()) return;
    const src = hit.link.slice(hit.link.indexOf("v1/videos/")); // has a token if there is a key, which a <video> cannot send
    holder.replaceChildren(el("video", { poster, controls: true, preload: "metadata", src, onerror: fallBack }));
  } catch {
    if (!isLeft()) fallBack();
  }
}

/** Sends a request with images; where those of the index make it too large, they are sent smaller. */
async function askWith(slots, path, bodyOf, signal) {
  const ask = async (size) => {
    const images = await Promise.all(slots.map((slot) => slot.uri(signal, size)));
    return json(path, { body: bodyOf(images), signal });
  };
  try {
    return await ask(null);
  } catch (problem) {
    if (problem.status !== 413 || slots.every((slot) => slot.id === null)) throw problem;
    return ask(LARGE);
  }
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    const kind = /^image\/[\w.+-]+$/.test(blob.type) ? blob.type : "image/unknown";
    reader.onload = () => resolve(`data:${kind};base64,${reader.result.slice(reader.result.indexOf(",") + 1)}`);
    reader.onerror = () => reject(new Problem("The file cannot be read", "Choose it again."));
    reader.readAsDataURL(blob);
  });
}

/** Where an image is given: chosen, dropped, pasted, or one of the index. */
class Slot {
  constructor(place, { name, title, wide = false, changed }) {
    Object.assign(this, { place, name, title, wide, changed, image: null });
    place.classList.add("slot", wide ? "wide" : "tight");
    this.draw();
  }

  get id() {
    return this.image?.id ?? null;
  }

  setFile(file) {
    this.set({ file, path: file.name || "pasted image", url: URL.createObjectURL(file) });
  }

  set(image) {
    if (this.image?.url) URL.revokeObjectURL(this.image.url);
    this.image = image;
    this.draw();
    this.changed?.();
  }

  /** Returns the image as requests hold it; of one of the index the file itself is sent, or the image in a given size. */
  async uri(signal, size = null) {
    if (this.image.file) return dataUri(this.image.file);
    const query = size === null ? "" : `?size=${size}`;
    return dataUri(await (await send(`v1/images/${this.id}${query}`, { signal })).blob());
  }

  draw() {
    const choose = el("input", {
      type: "file", accept: "image/*", "aria-label": `${this.name}: choose a file`,
      onchange: (event) => event.target.files.length && this.setFile(event.target.files[0]),
    });
    const parts = this.title ? [el("h2", {}, this.title)] : [];
    if (this.image === null) {
      const label = this.wide ? [el("strong", {}, "Choose an image"), el("span", {}, "or drop or paste one anywhere")] : ["+ Image"];
      parts.push(el("span", { className: "button choose", title: "Choose, drop or paste an image" }, label));
      this.place.replaceChildren(...parts, choose);
      return;
    }
    const { id, url, path } = this.image;
    const alt = `${this.name}: ${path}`;
    const seen = url ? el("img", { src: url, alt, onerror: (event) => event.target.replaceWith(path) }) : frame(id, SMALL, alt);
    if (!url && !this.wide) seen.className = "";
    if (!url && this.wide) seen.classList.add("given");
    const clear = el("button", {
      type: "button", className: "clear", "aria-label": `Remove ${this.name.toLowerCase()}`,
      onclick: () => {
        this.set(null);
        this.place.querySelector("input").focus();
      },
    }, "✕");
    const holder = el("span", { className: "slot" }, seen, choose);
    const below = this.wide ? el("p", { className: "note" }, path) : null;
    this.place.replaceChildren(...parts, ...[el("div", { className: "slot" }, holder, clear), below].filter(Boolean));
  }
}

// ---------------------------------------------------------------------------------------------- states

/** Runs one request at a time for a part of the page: a new one ends the older, and so does the button. */
class Work {
  constructor(state, results) {
    Object.assign(this, { results, running: null });
    this.said = el("p", { role: "status", "aria-live": "polite" });
    this.cancel = el("button", { type: "button", hidden: true, onclick: () => this.stop("Cancelled.") }, "Cancel");
    this.link = el("button", { type: "button", hidden: true, onclick: () => this.copy() }, "Copy link");
    this.problems = el("div", { className: "problems" });
    state.append(this.said, this.cancel, this.link, this.problems);
  }

  stop(said = "") {
    this.running?.abort();
    this.running = null;
    this.show(said);
  }

  show(said, { busy = false, link = false } = {}) {
    this.said.textContent = said;
    this.said.className = busy ? "note busy" : "note";
    this.cancel.hidden = !busy;
    this.link.hidden = !link || !navigator.clipboard;
    this.results.forEach((part) => part.setAttribute("aria-busy", String(busy)));
  }

  async copy() {
    await navigator.clipboard.writeText(location.href);
    this.link.textContent = "Copied";
    await pause(2);
    this.link.textContent = "Copy link";
  }

  fail(problem, again = null) {
    this.results.forEach((part) => part.replaceChildren());
    this.show("");
    showProblem(this.problems, problem, again);
  }

  /** Does something with the signal that ends it; returns whether it was finished. */
  async run(said, work) {
    this.stop();
    const own = new AbortController();
    this.running = own;
    this.problems.replaceChildren();
    this.show(said, { busy: true });
    try {
      const finished = await work(own.signal);
      if (this.running === own) this.show(finished, { link: true });
    } catch (error) {
      if (this.running !== own) return;
      if (!(error instanceof Problem)) {
        this.fail(new Problem("The page failed", String(error)));
        throw error;
      }
      this.fail(error, PASSING.includes(error.status) ? () => this.run(said, work) : null);
    } finally {
      if (this.running === own) this.running = null;
    }
  }
}

function showProblem(place, problem, again = null) {
  const retry = again && el("button", { type: "button", onclick: again }, "Try again");
  place.replaceChildren(
    el("div", { className: "problem", role: "alert" }, el("strong", {}, problem.title), problem.message, retry && el("p", {}, retry)),
  );
}

// ---------------------------------------------------------------------------------------------- links

const LONGEST = 200_000; // characters of a link; a text has at most 20,000, each of which may be encoded in nine
const views = {
  search: { show: showSearch, restore: restoreSearch, get work() { return searching; } },
  playground: { show: showPlayground, restore: restorePlayground, get work() { return examining; } },
};
let view = null;

function address(name, values) {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? `#${name}?${new URLSearchParams(given)}` : `#${name}`;
}

function remember(hash, { replace = false } = {}) {
  if (location.hash === hash) return;
  history[replace ? "replaceState" : "pushState"](null, "", hash);
}

/** Shows what a link says, or in words why it cannot be shown. */
function restore() {
  const [name, values = ""] = location.hash.slice(1).split(/\?(.*)/s);
  const chosen = Object.hasOwn(views, name) && (name === "playground" || index) ? name : index ? "search" : "playground";
  show(chosen);
  views[chosen].restore(new URLSearchParams(isWhole(values) ? values : ""));
  if (isWhole(values)) return;
  views[chosen].work.stop();
  views[chosen].work.fail(new Problem("The link is damaged", "Copy the whole link again, or ask anew."));
}

/** Tells whether what is encoded in a link can be read, and is no longer than what the page itself writes. */
function isWhole(values) {
  try {
    return values.length <= LONGEST && typeof decodeURIComponent(values) === "string";
  } catch {
    return false;
  }
}

function show(name) {
  view = name;
  for (const other of Object.keys(views)) {
    $(other).hidden = other !== name;
    if (other === name) $(`to-${other}`).setAttribute("aria-current", "page");
    else $(`to-${other}`).removeAttribute("aria-current");
  }
  views[name].show();
}

const idOf = (values, name) => (ID.test(values.get(name) ?? "") ? values.get(name) : null);

// ---------------------------------------------------------------------------------------------- search

let index = null; // what can be searched
let hits = [];
let cards = [];
const searching = new Work($("search-state"), [$("hits")]);
const like = new Slot($("search-image"), { name: "Image to search with" });

function showSearch() {
  document.title = "Search · BridgeTower";
}

function searchLink(values) {
  const count = values.n === "24" ? null : values.n;
  return address("search", { ...values, n: count });
}

const searchValues = () => ({
  q: $("query").value.trim(), like: like.id, n: $("count").value, where: $("where").value.trim(), against: $("against").value,
  rerank: $("rerank").value,
});

function restoreSearch(values) {
  $("query").value = values.get("q") ?? "";
  $("where").value = values.get("where") ?? "";
  $("count").value = ["12", "48", "96"].includes(values.get("n")) ? values.get("n") : "24";
  $("against").value = ["images", "captions", "pairs", "words", "hybrid"].includes(values.get("against")) ? values.get("against") : "";
  $("rerank").value = ["64", "0"].includes(values.get("rerank")) ? values.get("rerank") : "";
  $("options").open = ["where", "against", "rerank"].some((name) => values.get(name));
  const id = idOf(values, "like");
  if (id !== like.id || like.image?.file) like.set(id && indexed(id));
  if ($("query").value || id) search({ open: idOf(values, "open") });
  else {
    searching.stop();
    searching.problems.replaceChildren();
    showHits([]);
    $("starters").hidden = false;
    $("viewer").close();
  }
}

async function search({ open = null } = {}) {
  const values = searchValues();
  let where = null;
  try {
    if (values.where) where = JSON.parse(values.where);
  } catch {
    searching.stop();
    searching.fail(new Problem("The condition cannot be read", 'Write it as JSON, such as {"width": {"gte": 800}}.'));
    return;
  }
  const started = performance.now();
  $("viewer").close();
  if (!values.q && like.image === null) {
    searching.stop();
    searching.fail(new Problem("There is nothing to search for", "Type what should be seen, or add an image."));
    $("query").focus();
    return;
  }
  remember(searchLink(values.q || values.like ? { ...values, open } : {}));
  $("starters").hidden = true;
  await searching.run(`Searching ${counted(index.images, "image")}…`, async (signal) => {
    const body = { query: values.q || null, where, top: Number(values.n), against: values.against || null };
    if (values.q && values.rerank) body.rerank = Number(values.rerank);
    const withImage = ([image]) => (image ? { ...body, image } : body);
    const found = (await askWith(like.image ? [like] : [], "v1/search", withImage, signal)).data;
    showHits(found);
    const number = found.findIndex((hit) => hit.id === open);
    if (number >= 0) openViewer(number);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    if (!found.length) return `No image ${where ? "meets the condition" : values.against === "captions" ? "has a caption" : "has these words"}. See Options.`;
    const mixed = found.some((hit) => hit.against !== found[0].against);
    const order = mixed ? "by transcript and by image in turn" : matchOf(found[0]) ? "best first" : "nearest first";
    const alone = like.image?.file ? " Your own image is not part of the link." : "";
    const weak = found.every((hit) => hit.weak) ? " All are weak: unrelated texts find images that are just as near." : "";
    return `${counted(found.length, found.every(isMoment) ? "moment" : "image")}, ${order}, in ${seconds} s.${weak}${alone}`;
  });
}

function showHits(found) {
  hits = found;
  found.forEach((hit) => paths.set(hit.id, hit.path));
  cards = found.map((hit, number) => el("button", { type: "button", className: "card", onclick: () => openViewer(number) },
    frame(hit.id, SMALL, ""),
    el("span", { className: "told" },
      hit.captions.length ? el("span", { className: "caption" }, hit.captions[0]) : null,
      el("span", { className: "path", title: hit.path }, nameOf(hit))),
    el("span", { className: "rank" }, el("span", { className: "hidden" }, "Rank "), String(number + 1)),
    hit.weak ? el("span", { className: "weak" }, "weak") : null));
  $("hits").replaceChildren(...cards.map((card) => el("li", {}, card)));
}

$("hits").addEventListener("keydown", (event) => {
  const place = cards.indexOf(document.activeElement);
  const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: cards.length - 1 }[event.key];
  if (place < 0 || next === undefined || !cards[next]) return;
  event.preventDefault();
  cards[next].focus();
});

$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});

// ---------------------------------------------------------------------------------------------- one image, large

const COMPARED = { images: "image", captions: "caption or transcript", pairs: "image with caption", words: "image" };
let current = -1;

function openViewer(number) {
  const hit = hits[number];
  current = number;
  $("viewer-place").textContent = `${number + 1} of ${hits.length}`;
  $("viewer-path").textContent = nameOf(hit);
  $("viewer-path").title = hit.path;
  const folder = hit.path.slice(0, Math.max(hit.path.lastIndexOf("/"), 0));
  $("viewer-size").textContent = `${folder ? `in ${folder}, ` : ""}${hit.width} × ${hit.height} pixels`;
  $("previous").disabled = number === 0;
  $("next").disabled = number === hits.length - 1;
  if (hit.link?.includes("/v1/videos/")) play($("viewer-image"), hit);
  else fill($("viewer-image"), hit.id, LARGE, hit.captions[0] ?? hit.path);
  const scores = [];
  const match = matchOf(hit);
  if (match) {
    const about = hit.probability === undefined
      ? "By the matching head, which reads text and image together, from 0 to 1. It is not calibrated: no probability."
      : "How likely text and image belong together, read by the model together and calibrated in validation.";
    scores.push(el("div", {}, el("dt", {}, "Match", el("span", {}, match.shown)), el("dd", {}, bar(match.share), about)));
  }
  const weak = hit.weak ? " Weak: one in twenty unrelated texts finds an image that is just as near." : "";
  scores.push(el("div", {}, el("dt", {}, "Cosine", el("span", {}, decimal(hit.cosine))),
    el("dd", {}, bar(hit.cosine), `How near the vectors of query and ${COMPARED[hit.against]} are; 1 is the same direction.${weak}`)));
  if (hit.against === "words" && $("against").value === "words") {
    const about = "BM25 of the words that the query shares with captions or transcript.";
    scores.unshift(el("div", {}, el("dt", {}, "Words", el("span", {}, decimal(hit.rank_score))), el("dd", {}, about)));
  }
  $("viewer-scores").replaceChildren(...scores);
  const captions = hit.captions.map((caption) => el("li", {}, caption));
  $("viewer-captions").replaceChildren(...(captions.length ? [el("h2", {}, isMoment(hit) ? "Transcript" : counted(captions.length, "caption")), el("ul", {}, captions)] : []));
  $("viewer-links").replaceChildren(...viewerLinks(hit));
  if (!$("viewer").open) $("viewer").showModal();
  remember(searchLink({ ...searchValues(), open: hit.id }), { replace: true });
}

function viewerLinks(hit) {
  const text = $("query").value.trim();
  const link = (label, hash) => el("a", { className: "button", href: hash }, label);
  const download = el("button", {
    type: "button",
    onclick: async () => {
      try {
        const url = URL.createObjectURL(await (await send(`v1/images/${hit.id}`)).blob());
        el("a", { href: url, download: hit.path.split(/[\\/]/).pop() }).click();
        setTimeout(() => URL.revokeObjectURL(url), 60_000);
      } catch (problem) {
        download.replaceWith(problem.message);
      }
    },
  }, "Download");
  return [
    link("Find similar", address("search", { like: hit.id })),
    text ? link("Attention map", address("playground", { use: "look", image: hit.id, text })) : null,
    link("Playground", address("playground", { image: hit.id })),
    download,
  ].filter(Boolean);
}

$("viewer").addEventListener("close", () => {
  clear($("viewer-image")); // a video stops
  if (view === "search" && hits[current]) {
    remember(searchLink(searchValues()), { replace: true });
    cards[current].focus();
  }
  current = -1;
});
$("viewer").addEventListener("click", (event) => {
  if (event.target === $("viewer")) $("viewer").close(); // the ground around it
  if (event.target.closest("a")) {
    current = -1; // the link says what comes next
    $("viewer").close();
  }
});
$("viewer").addEventListener("keydown", (event) => {
  const next = current + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0);
  if (next !== current && hits[next]) openViewer(next);
});
$("close").addEventListener("click", () => $("viewer").close());
$("previous").addEventListener("click", () => openViewer(current - 1));
$("next").addEventListener("click", () => openViewer(current + 1));

// ---------------------------------------------------------------------------------------------- one image, in the playground

let mask = "<mask>";
let use = null;
const examining = new Work($("playground-state"), [$("result"), $("maps")]);
const first = new Slot($("first-image"), { name: "Image", wide: true });
const second = new Slot($("second-image"), { name: "Second image", title: "Second image", wide: true });

const USES = {
  ask: {
    needs: "answer", label: "Ask", field: "Question", example: "what colour is it?", button: "Ask",
    help: "Answers a question about the image with the likeliest of the answers that the model has learnt.",
    path: "v1/answer", body: (images, text) => ({ images, questions: text }),
    show: ({ data }) => [ranking("Answers, each with its own probability", data[0].answers, "label")],
  },
  match: {
    needs: "match", label: "Match", field: "Texts, one per line", example: "a red flag\na smiling face", button: "Match", lines: 4,
    help: "Says for each text how well it matches the image.",
    path: "v1/match", body: (images, text) => ({ images, texts: linesOf(text), all_pairs: true }),
    show: ({ data }, text) => {
      const rows = data.map((row) => ({ ...row, label: linesOf(text)[row.text] }));
      const caption = rows[0].probability === undefined ? "Scores of matching, not calibrated" : "Probability that text and image belong together";
      return [ranking(caption, rows.sort((a, b) => matchOf(b).share - matchOf(a).share), "label")];
    },
  },
  fill: {
    needs: "fill-mask", label: "Fill in", field: "Text with a missing word", example: "", button: "Fill in",
    help: "Names the likeliest words for what is missing in a text about the image.",
    path: "v1/fill-mask", body: (images, text) => ({ images, texts: text }),
    show: ({ data }) => data[0].masks.map((words, number, all) => (
      ranking(all.length > 1 ? `Words for gap ${number + 1}` : "Words for the gap", words, "word"))),
  },
  check: {
    needs: "entail", label: "Check", field: "Statement", example: "two dogs play outside", button: "Check",
    help: "Says whether the image shows that a statement is true (entailment), false (contradiction), or leaves it open (neutral).",
    path: "v1/entail", body: (images, text) => ({ images, statements: text }),
    show: ({ data }) => [ranking("Judgements", data[0].judgements, "label")],
  },
  compare: {
    needs: "reason", label: "Compare two", field: "Statement about both images", example: "both show a dog", button: "Judge", two: true,
    help: "Says whether a statement about two images is true.",
    path: "v1/reason", body: (images, text, other) => ({ images, images_2: other, statements: text }),
    show: ({ data }) => [ranking("Judgements", data[0].judgements, "label")],
  },
  label: {
    needs: "embeddings", label: "Label", field: "Labels, one per line", example: "a flag\na smiling face", button: "Label", lines: 4,
    help: "Compares the image with labels of yours (zero-shot). The probabilities of all labels sum to one.",
    path: "v1/classify", body: (images, text) => ({ images, labels: linesOf(text) }),
    show: ({ data }) => [ranking("Labels", data[0].classes, "label")],
  },
  classify: {
    needs: "classify", label: "Classify", field: "Text beside the image, if there is one", example: "", button: "Classify", optional: true,
    help: "Names the likeliest of the classes that the model was trained on.",
    path: "v1/classify", body: (images, text) => (text ? { images, texts: text } : { images }),
    show: ({ data }) => [ranking("Classes", data[0].classes, "label")],
  },
  look: {
    needs: "explain", label: "Attention", field: "Text", example: "a white cross on red", button: "Show",
    help: "Draws the cross-attention of each word of a text over the image, layer by layer.",
    path: "v1/explain", body: (image, text) => ({ image, text, view: true }),
    show: showMaps,
  },
  decide: {
    needs: "match", label: "What decides the match", field: "Text", example: "a white cross on red", button: "Show",
    help: "Draws the Grad-CAM of the matching head: which attention to the image raises the match.",
    path: "v1/explain", body: (image, text) => ({ image, text, method: "gradcam", view: true }),
    show: showMaps,
  },
};

async function showMaps(answer) {
  const image = el("img", { src: answer.view, alt: "" });
  await image.decode();
  drawMaps(answer, image);
  return [];
}

const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

function ranking(caption, rows, name) {
  return el("table", { className: "ranking" }, el("caption", {}, caption), el("tbody", {}, rows.map((row) => el("tr", {},
    el("th", { scope: "row" }, row[name]),
    el("td", { className: "number" }, matchOf(row).shown),
    el("td", {}, bar(matchOf(row).share))))));
}

function showPlayground() {
  document.title = "Playground · BridgeTower";
}

function choose(name) {
  const chosen = USES[name];
  const text = $("text")?.value ?? "";
  examining.stop();
  examining.problems.replaceChildren();
  $("result").replaceChildren();
  $("maps").replaceChildren();
  use = name;
  $(`use-${name}`).checked = true;
  $("use-help").textContent = chosen.help;
  $("text-label").textContent = chosen.field;
  const shared = { id: "text", value: text, placeholder: chosen.example, maxLength: 20000, spellcheck: false };
  const field = chosen.lines ? el("textarea", { ...shared, rows: chosen.lines }) : el("input", { ...shared, type: "text" });
  $("text-place").replaceChildren(field);
  $("run").textContent = chosen.button;
  $("insert-mask").hidden = name !== "fill";
  $("second-image").hidden = !chosen.two;
}

function restorePlayground(values) {
  $("viewer").close();
  const wanted = values.get("use");
  const offered = Object.keys(USES).filter((name) => $(`use-${name}`));
  if (!offered.length) return;
  choose(offered.includes(wanted) ? wanted : use ?? offered[0]);
  for (const [slot, name] of [[first, "image"], [second, "image2"]]) {
    const id = idOf(values, name);
    if (id !== null && id !== slot.id) slot.set(indexed(id));
  }
  if (values.has("text")) $("text").value = values.get("text");
  if (values.get("text") && first.id && values.has("image")) examine();
}

const playgroundValues = () => ({
  use, image: first.id, image2: USES[use].two ? second.id : null, text: $("text").value.trim(),
});

async function examine() {
  const chosen = USES[use];
  const values = playgroundValues();
  const missing = [
    first.image === null || (chosen.two && second.image === null) ? (chosen.two ? "both images" : "an image") : null,
    values.text || chosen.optional ? null : `a text (${chosen.field.toLowerCase()})`,
  ].filter(Boolean);
  if (missing.length) {
    examining.stop();
    examining.fail(new Problem("Something is missing", `Give ${missing.join(" and ")}.`));
    return;
  }
  const own = Boolean(first.image.file || (chosen.two && second.image.file));
  if (!own) remember(address("playground", values));
  await examining.run("The model reads the image…", async (signal) => {
    const bodyOf = ([image, other]) => chosen.body(image, values.text, other);
    const answer = await askWith([first, ...(chosen.two ? [second] : [])], chosen.path, bodyOf, signal);
    $("maps").replaceChildren();
    $("result").replaceChildren(...(await chosen.show(answer, values.text)));
    return `Answered by ${answer.model}.${own ? " Your own image is not part of a link." : ""}`;
  });
}

$("playground-form").addEventListener("submit", (event) => {
  event.preventDefault();
  examine();
});
$("insert-mask").addEventListener("click", () => {
  const field = $("text");
  field.setRangeText(mask, field.selectionStart, field.selectionEnd, "end");
  field.focus();
});

// ---------------------------------------------------------------------------------------------- attention

const HEAT = ["000004", "1b0c41", "4a0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9b06", "f7d13d", "fcffa4"]
  .map((colour) => [0, 2, 4].map((place) => parseInt(colour.slice(place, place + 2), 16)));

function heat(value) {
  const place = Math.min(Math.max(value, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[low].map((part, channel) => part + (place - low) * (HEAT[low + 1][channel] - part));
}

const HEATS = Array.from({ length: 256 }, (_, value) => heat(value / 255));

/** Draws a map over the image: where it is 0 the image is dark, where it is 1 it glows. */
function drawMap(canvas, image, map, peak) {
  const [rows, columns] = [map.length, map[0].length];
  const coarse = new OffscreenCanvas(columns, rows);
  const pen = coarse.getContext("2d");
  const grid = pen.createImageData(columns, rows);
  map.flat().forEach((value, place) => grid.data.set([255 * value / peak, 0, 0, 255], 4 * place));
  pen.putImageData(grid, 0, 0);
  const ink = canvas.getContext("2d", { willReadFrequently: true });
  const { width, height } = canvas;
  ink.imageSmoothingQuality = "high";
  ink.drawImage(coarse, 0, 0, width, height);
  const values = ink.getImageData(0, 0, width, height).data;
  ink.drawImage(image, 0, 0, width, height);
  const pixels = ink.getImageData(0, 0, width, height);
  for (let place = 0; place < values.length; place += 4) {
    const opacity = 0.85 * (values[place] / 255) ** 0.7;
    const [red, green, blue] = pixels.data.subarray(place, place + 3);
    const grey = 0.3 * red + 0.59 * green + 0.11 * blue;
    for (let channel = 0; channel < 3; channel += 1) {
      const dark = 0.35 * (0.6 * grey + 0.4 * pixels.data[place + channel]);
      pixels.data[place + channel] = (1 - opacity) * dark + opacity * HEATS[values[place]][channel];
    }
  }
  ink.putImageData(pixels, 0, 0);
}

function drawMaps(answer, image) {
  const layers = answer.maps.length;
  const gradcam = answer.method === "gradcam"; // of the last layer, it has the class token only
  const shown = gradcam ? layers - 1 || 1 : layers;
  const peaks = answer.maps[shown - 1].map((map) => Math.max(...map.flat()));
  let word = peaks.indexOf(Math.max(...peaks));
  const large = el("canvas", { width: 480, height: 480, role: "img" });
  const about = el("figcaption", { className: "note" });
  const chips = answer.words.map((name, number) => el("button", { type: "button", onclick: () => choose(number) }, name));
  const tiles = answer.words.map((name, number) => {
    const canvas = el("canvas", { width: 176, height: 176, "aria-hidden": "true" });
    const share = el("small");
    const tile = el("button", { type: "button", onclick: () => choose(number) }, canvas, el("span", { className: "told" }, name, share));
    return { canvas, share, tile };
  });
  const layerName = el("label", { htmlFor: "layer" });
  const layer = el("input", { id: "layer", type: "range", min: 1, max: layers, value: shown, oninput: () => draw() });

  function choose(number) {
    word = number;
    draw();
  }

  function draw() {
    const number = Number(layer.value) - 1;
    const maps = answer.maps[number];
    const peak = Math.max(...maps.flat(2)) || 1;
    layerName.textContent = `Layer ${number + 1} of ${layers}`;
    drawMap(large, image, maps[word], peak);
    large.setAttribute("aria-label", `${gradcam ? "Grad-CAM" : "attention"} of “${answer.words[word]}” in layer ${number + 1}`);
    const share = (place) => percent(answer.prefix_shares[number][place]);
    const most = Math.max(...maps[word].flat());
    about.textContent = `“${answer.words[word]}” in layer ${number + 1}: brightest `
      + (gradcam ? `where attention to a patch adds ${most.toPrecision(2)} to the log-odds of a match.` : `at ${percent(most)} of its attention on one patch.`)
      + ` ${share(word)} went to the class token instead.`;
    chips.forEach((chip, place) => chip.setAttribute("aria-pressed", String(place === word)));
    tiles.forEach(({ canvas, share: told, tile }, place) => {
      drawMap(canvas, image, maps[place], peak);
      told.textContent = `class token ${share(place)}`;
      tile.setAttribute("aria-pressed", String(place === word));
    });
  }

  const match = matchOf(answer) ? `Text and image match with ${matchOf(answer).shown}. ` : "";
  $("maps").replaceChildren(
    el("div", { className: "looking" },
      el("figure", {}, large, about),
      el("div", {},
        el("h2", {}, "Words"), el("p", { className: "words" }, chips),
        layerName, layer,
        el("p", { className: "note" }, `${match}Each map is a word's cross-attention over the image, the mean over the heads`
          + (gradcam ? ", times the gradient of the match; a layer has one scale." : "; a layer has one scale. It shows where a word attends, not what decides the match.")))),
    el("ul", { className: "tiles", "aria-label": "All words in this layer" }, tiles.map(({ tile }) => el("li", {}, tile))),
  );
  draw();
}

// ---------------------------------------------------------------------------------------------- dropping and pasting

/** Takes an image that was dropped or pasted to where the view that is shown wants one. */
function take(files) {
  const file = [...files].find((one) => one.type.startsWith("image/")) ?? files[0];
  if (!file || view === null) return;
  if (view === "search") {
    like.setFile(file);
    search();
    return;
  }
  (USES[use].two && first.image !== null && second.image === null ? second : first).setFile(file);
  if ($("text").value.trim()) examine();
  else $("text").focus();
}

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => { if (hasFiles(event)) $("veil").hidden = false; });
addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
addEventListener("dragleave", (event) => { if (event.relatedTarget === null) $("veil").hidden = true; });
addEventListener("drop", (event) => {
  $("veil").hidden = true;
  if (!hasFiles(event)) return;
  event.preventDefault();
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  const files = event.clipboardData.files;
  if (!files.length || $("key-dialog").open) return;
  event.preventDefault();
  $("viewer").close();
  take(files);
});

// ---------------------------------------------------------------------------------------------- light and dark

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  $("theme").replaceChildren(isDark() ? "☀" : "☾", el("span", {}, isDark() ? "Light" : "Dark"));
  $("theme").setAttribute("aria-label", isDark() ? "Light theme" : "Dark theme");
}

$("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  localStorage.setItem("theme", theme);
  setTheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(null));
setTheme(["light", "dark"].includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : null);

// ---------------------------------------------------------------------------------------------- the start

/** Returns short captions of the examples, no two alike, as queries to try. */
function queriesOf(examples) {
  const found = examples.map((one) => one.captions.filter((text) => text.length <= 80).sort((a, b) => a.length - b.length)[0]);
  return [...new Set(found.filter(Boolean))].slice(0, 6);
}

function offerExamples() {
  index.examples.forEach((one) => paths.set(one.id, one.path));
  const thumb = (one, action, alt) => el("li", {}, el("button", { type: "button", title: one.path, "aria-label": alt, onclick: action }, frame(one.id, SMALL, "")));
  const name = (one) => one.captions[0] ?? one.path;
  $("examples").replaceChildren(...index.examples.map((one) => thumb(one, () => {
    like.set(indexed(one.id));
    $("query").value = "";
    search();
  }, `Look for images like “${name(one)}”`)));
  $("bench-examples").replaceChildren(...index.examples.map((one) => thumb(one, () => {
    (USES[use].two && first.image !== null && second.image === null ? second : first).set(indexed(one.id));
    if ($("text").value.trim()) examine();
  }, `Ask about “${name(one)}”`)));
  const queries = queriesOf(index.examples);
  $("queries-part").hidden = queries.length === 0;
  $("queries").replaceChildren(...queries.map((text) => el("li", {}, el("button", {
    type: "button",
    onclick: () => {
      $("query").value = text;
      like.set(null);
      search();
    },
  }, text))));
  $("bench-examples-part").hidden = index.examples.length === 0;
  $("search-intro").textContent = `${counted(index.images, "image")} can be searched with words, with an image (choose, drop or paste one), or with both.`;
}

async function start() {
  const [{ data: models }, found] = await Promise.all([
    json("v1/models"),
    json("v1/index").catch((problem) => {
      if (problem.status === 404) return null;
      throw problem;
    }),
  ]);
  index = found;
  mask = models[0].mask_token;
  USES.fill.example = `a flag with a ${mask} band`;
  USES.fill.field = `Text with ${mask} where a word is missing`;
  const has = new Set(models.flatMap((model) => model.uses));
  const offered = Object.entries(USES).filter(([, { needs }]) => has.has(needs));
  $("uses").append(...offered.map(([name, { label }]) => el("label", {},
    el("input", { type: "radio", name: "use", id: `use-${name}`, onchange: () => choose(name) }), label)));
  $("insert-mask").textContent = `Insert ${mask}`;
  $("playground-intro").textContent = "Give an image and a text, and choose what the model does with them.";
  const names = models.map((model) => model.id.split("/").slice(-2).join("/")); // of a hub id all, of a path its end
  $("about").textContent = `Model: ${names.join(", and for questions ")}`;
  $("to-search").hidden = index === null;
  if (index) offerExamples();
  $("loading").hidden = true;
  addEventListener("hashchange", restore);
  restore();
  if (!$("starters").hidden && view === "search") $("query").focus(); // autofocus would not: the field was hidden
}

async function begin() {
  $("start-problem").replaceChildren();
  try {
    await start();
  } catch (problem) {
    $("loading").hidden = true;
    showProblem($("start-problem"), problem, begin);
    if (!(problem instanceof Problem)) throw problem;
  }
}

begin();
