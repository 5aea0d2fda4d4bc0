// The search page: asks /api/*, draws hits. No framework, nothing from elsewhere.
"use strict";
const $ = (id) => document.getElementById(id);
// image: a picture of the user's own, as a data: URI. like, unlike: ids of points. asked: the newest question.
const state = { image: null, imageName: "", like: [], unlike: [], labels: new Set(), asked: 0, shown: [] };
let token = sessionStorage.getItem("token");

// --- the service

async function api(path, body) {
  const headers = token ? { Authorization: "Bearer " + token } : {};
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The service doesn't answer. Is dclip-qdrant serve still running? Nothing is shown, because it would be old.");
  }
  if (answer.status === 401) {
    await login();
    return api(path, body);
  }
  if (path.startsWith("/api/picture")) {
    if (!answer.ok) throw new Error("no picture");
    return answer.blob();
  }
  let parsed;
  try {
    parsed = await answer.json();
  } catch {
    throw new Error(`The service answered ${answer.status} with something that is no JSON: is there a proxy in between?`);
  }
  if (!answer.ok) throw new Error(parsed.error || answer.statusText);
  return parsed;
}

function login() {
  return new Promise((done) => {
    $("login").showModal();
    $("login").addEventListener("close", () => {
      token = $("token").value.trim();
      sessionStorage.setItem("token", token);
      done();
    }, { once: true });
  });
}

// --- small parts

function element(kind, className, text) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, label, act) {
  const made = element("button", "", text);
  made.type = "button";
  if (label) {
    made.setAttribute("aria-label", label);
    made.title = label;
  }
  made.addEventListener("click", act);
  return made;
}

function status(text, bad) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", Boolean(bad));
}

function failed(error) {
  $("panels").replaceChildren(); // what is there would be taken for the answer
  state.shown = [];
  status(error.message, true);
}

function option(value, text) {
  const o = element("option", "", text);
  o.value = value;
  return o;
}

function mode() {
  return document.querySelector("[name=mode]:checked").value;
}

function asks() {
  return Boolean($("text").value.trim() || state.image || state.like.length);
}

// --- the address: everything but a picture of the user's own

function address() {
  const link = new URLSearchParams({ in: $("left").value });
  const set = { q: $("text").value.trim(), beside: $("right").value, mode: mode() === "dense" ? "" : mode(), minus: $("minus").value.trim(), only: $("filter").value.trim() };
  for (const [name, value] of Object.entries(set)) if (value) link.set(name, value);
  for (const label of state.labels) link.append("label", label);
  for (const id of state.like) link.append("like", id);
  for (const id of state.unlike) link.append("unlike", id);
  return "?" + link;
}

async function fromAddress() {
  const wanted = new URLSearchParams(location.search);
  const collection = wanted.get("in");
  if (collection && [...$("left").options].some((o) => o.value === collection)) $("left").value = collection;
  $("right").value = wanted.get("beside") || "";
  $("text").value = wanted.get("q") || "";
  $("minus").value = wanted.get("minus") || "";
  $("filter").value = wanted.get("only") || "";
  for (const r of document.querySelectorAll("[name=mode]")) r.checked = r.value === (wanted.get("mode") || "dense");
  state.labels = new Set(wanted.getAll("label"));
  state.like = wanted.getAll("like");
  state.unlike = wanted.getAll("unlike");
  state.image = null;
  drawExamples();
  await drawLabels();
  await (asks() ? search(false) : welcome());
}

// --- before a search

async function start() {
  const info = await api("/api/info");
  if (!info.collections.length && info.unavailable.length) return status(info.unavailable.join("; "), true);
  if (!info.collections.length) {
    return status("No collection here was filled by " + info.students.map((s) => s.name).join(", ") + ". Start the service with --edge or --url after dclip-qdrant ingest.", true);
  }
  for (const c of info.collections) {
    const text = `${c.name} (${c.points.toLocaleString()})`;
    $("left").append(option(c.name, text));
    $("right").append(option(c.name, text));
  }
  $("right").prepend(option("", "nothing"));
  await fromAddress();
}

async function welcome() {
  const mine = ++state.asked;
  const collection = $("left").value;
  const begin = await api("/api/start/" + encodeURIComponent(collection));
  if (mine !== state.asked) return;
  $("tries").replaceChildren(...begin.examples.map((text) => button(text, "", () => {
    $("text").value = text;
    search();
  })));
  $("tries").hidden = !begin.examples.length;
  status(begin.hits.length ? `Some of the pictures in ${collection}.${begin.examples.length ? " Searches to try:" : ""}` : `${collection} is empty: dclip-qdrant ingest fills it.`);
  draw([{ collection, answer: begin }]);
}

async function drawLabels() {
  const found = (await api("/api/labels/" + encodeURIComponent($("left").value))).labels;
  const there = new Set(found.map((f) => f.label));
  for (const label of state.labels) if (!there.has(label)) found.push({ label, count: 0 });
  $("labels").replaceChildren(...found.map(({ label, count }) => {
    const b = button(`${label} ${count.toLocaleString()}`, "", () => {
      state.labels.has(label) ? state.labels.delete(label) : state.labels.add(label);
      b.setAttribute("aria-pressed", String(state.labels.has(label)));
      again();
    });
    b.setAttribute("aria-pressed", String(state.labels.has(label)));
    return b;
  }));
}

// --- examples

function drawExamples() {
  const collection = $("left").value;
  const chips = [];
  if (state.image) chips.push(example(state.imageName, "", (img) => { img.src = state.image; img.id = "example-image"; }, () => { state.image = null; $("file").value = ""; }));
  for (const [kind, word] of [["like", "like"], ["unlike", "not like"]]) {
    for (const id of state[kind]) chips.push(example(word, kind, (img) => picture(img, collection, id), () => { state[kind] = state[kind].filter((other) => other !== id); }));
  }
  $("examples").replaceChildren(...chips);
  $("examples").hidden = !chips.length;
}

function example(text, kind, fill, remove) {
  const chip = element("span", "example " + kind);
  const img = element("img");
  img.alt = "";
  fill(img);
  chip.append(img, element("span", "", text), button("✕", `Remove this example (${text})`, () => {
    remove();
    drawExamples();
    asks() ? search() : welcome().catch(failed);
  }));
  return chip;
}

function take(kind, id) {
  const other = kind === "like" ? "unlike" : "like";
  state[other] = state[other].filter((one) => one !== id);
  if (!state[kind].includes(id)) state[kind].push(id);
  drawExamples();
  if (!asks()) return status("Less like this: of what? Type words, or choose a picture that you do want.", true);
  if (mode() === "hybrid" && !$("text").value.trim()) document.querySelector("[value=dense]").checked = true;
  search();
  scrollTo({ top: 0 });
}

// --- a search

function again() {
  if (asks()) search();
}

async function search(remember = true) {
  const text = $("text").value.trim();
  if (!asks()) return status("Type some words, or choose a picture.", true);
  if (!text && mode() === "hybrid") return status("A picture has no words: choose “Whole picture” or “Best region”.", true);
  const mine = ++state.asked;
  const where = [$("left").value, $("right").value].filter((c, i, all) => c && all.indexOf(c) === i);
  status("Searching…");
  $("tries").hidden = true;
  const filters = [...state.labels].map((l) => "labels=" + l);
  if ($("filter").value.trim()) filters.push($("filter").value.trim());
  const body = { mode: mode(), limit: 24, filters, like: state.like, unlike: state.unlike };
  if (text) body.text = text;
  if (state.image) body.image = state.image;
  if ($("minus").value.trim()) body.minus = $("minus").value.trim();
  try {
    const answers = await Promise.all(where.map(async (collection) => ({ collection, answer: await api("/api/search", { ...body, collection }) })));
    if (mine !== state.asked) return; // a newer question is on its way
    if (remember && address() !== location.search) history.pushState(null, "", address());
    draw(answers);
    status(outcome(answers, filters));
  } catch (e) {
    if (mine === state.asked) failed(e);
  }
}

function outcome(answers, filters) {
  const { hits, cutoff } = answers[0].answer;
  if (!hits.length) return "Nothing found" + (filters.length ? " with these filters." : ".");
  const took = answers.map((a) => a.answer.milliseconds + " ms").join(" and ");
  const fitting = hits.filter((hit) => hit.probability === undefined || hit.probability >= cutoff).length;
  if (!fitting) return `Nothing here seems to fit; the ${hits.length} nearest pictures are greyed (${took}).`;
  const rest = fitting < hits.length ? `, ${hits.length - fitting} more below what seems to fit` : "";
  return `${fitting} hits in ${took}${rest}.`;
}

// --- drawing

function draw(answers) {
  const first = new Map(answers[0].answer.hits.map((hit, rank) => [hit.key, rank]));
  state.shown = [];
  $("panels").replaceChildren(...answers.map(({ collection, answer }, n) => {
    const section = element("section", "panel");
    const h = element("h2", "", collection + " ");
    h.append(element("small", "", answer.student));
    const grid = element("div", "grid");
    grid.append(...answer.hits.map((hit, rank) => {
      const moved = n === 0 || hit.score === 0 ? "" : change(first.get(hit.key), rank);
      const made = figure(collection, hit, rank, moved);
      if (hit.probability !== undefined && hit.probability < answer.cutoff) made.classList.add("unlikely");
      return made;
    }));
    section.append(h, grid);
    return section;
  }));
}

// how a hit's rank differs from the one in the first panel
function change(before, rank) {
  if (before === undefined) return " · new";
  if (before === rank) return " · =";
  return before > rank ? ` · ▲${before - rank}` : ` · ▼${rank - before}`;
}

function figure(collection, hit, rank, moved) {
  const f = element("figure", "hit");
  const frame = element("button", "frame");
  frame.type = "button";
  const holder = element("span", "holder");
  const img = element("img");
  img.alt = hit.caption ? hit.caption.split("\n")[0] : hit.key;
  img.width = hit.width;
  img.height = hit.height;
  img.style.width = "auto";
  img.style.height = "auto";
  picture(img, collection, hit.id);
  holder.append(img);
  if (hit.region) holder.append(box(hit.region.box, hit));
  frame.append(holder);
  const number = state.shown.push({ img, hit, collection }) - 1;
  frame.addEventListener("click", () => zoom(number));
  frame.addEventListener("keydown", (e) => walk(e, number));
  const caption = element("figcaption");
  const foot = element("span", "foot");
  caption.append(element("span", "what", img.alt), foot);
  if (hit.score) {
    const chance = hit.probability === undefined ? "" : ` · ${Math.round(hit.probability * 100)}%`;
    foot.append(element("span", "score", `${rank + 1} · ${hit.score.toFixed(3)}` + chance + (hit.region ? ` · ${hit.region.label}` : "") + moved));
  }
  if (collection === $("left").value) {
    const acts = element("span", "acts");
    acts.append(button("+", "More like this", () => take("like", hit.id)), button("−", "Less like this", () => take("unlike", hit.id)));
    foot.append(acts);
  }
  f.append(frame, caption);
  return f;
}

async function picture(img, collection, id) {
  const path = `/api/picture/${encodeURIComponent(collection)}/${encodeURIComponent(id)}`;
  try {
    img.src = token ? URL.createObjectURL(await api(path)) : path;
    await img.decode();
  } catch {
    gone(img);
  }
}

// A picture that can't be shown is its words, not a broken frame.
function gone(img) {
  const holder = img.closest(".holder");
  if (!holder) return img.remove();
  holder.replaceChildren(element("span", "gone", "not where it was ingested from (serve --pictures DIR says where it is now)"));
}

function box([x0, y0, x1, y1], hit) {
  const b = element("span", "box");
  const part = (v, all) => (100 * Math.min(Math.max(v, 0), all)) / all + "%";
  b.style.left = part(x0, hit.width);
  b.style.top = part(y0, hit.height);
  b.style.width = part(x1 - x0, hit.width);
  b.style.height = part(y1 - y0, hit.height);
  return b;
}

// --- one picture, and the keys between them

const ARROWS = { ArrowLeft: -1, ArrowRight: 1 };

function walk(event, number) {
  const frames = [...document.querySelectorAll(".frame")];
  let next = number + (ARROWS[event.key] || 0);
  if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    const columns = getComputedStyle(frames[number].closest(".grid")).gridTemplateColumns.split(" ").length;
    next = number + (event.key === "ArrowDown" ? columns : -columns);
  }
  if (next === number || !frames[next]) return;
  event.preventDefault();
  frames[next].focus();
}

function zoom(number) {
  const shown = state.shown[number];
  if (!shown || !shown.img.src) return;
  state.zoomed = number;
  $("zoom-image").src = shown.img.src;
  $("zoom-image").alt = shown.img.alt;
  $("zoom-text").textContent = `${shown.hit.key}: ${(shown.hit.caption || "").replaceAll("\n", " / ")}`;
  $("zoom-like").hidden = shown.collection !== $("left").value;
  if (!$("zoom").open) $("zoom").showModal();
}

function step(by) {
  for (let n = state.zoomed + by; state.shown[n]; n += by) {
    if (state.shown[n].img.isConnected && state.shown[n].img.src) return zoom(n);
  }
}

// --- a picture of the user's own

async function use(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) return status(`${file.name} is not a picture.`, true);
  state.image = await new Promise((done, fail) => {
    const r = new FileReader();
    r.onload = () => done(r.result);
    r.onerror = () => fail(r.error);
    r.readAsDataURL(file);
  });
  state.imageName = file.name;
  drawExamples();
  await search();
}

// --- what the controls do

$("query").addEventListener("submit", (e) => { e.preventDefault(); search(); });
$("file").addEventListener("change", () => use($("file").files[0]));
$("pick").addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); $("file").click(); } });
$("zoom-close").addEventListener("click", () => $("zoom").close());
$("zoom-before").addEventListener("click", () => step(-1));
$("zoom-after").addEventListener("click", () => step(1));
$("zoom-like").addEventListener("click", () => { $("zoom").close(); take("like", state.shown[state.zoomed].hit.id); });
$("zoom").addEventListener("keydown", (e) => { if (ARROWS[e.key]) { e.preventDefault(); step(ARROWS[e.key]); } });
for (const r of document.querySelectorAll("[name=mode]")) r.addEventListener("change", again);
for (const id of ["right", "minus", "filter"]) $(id).addEventListener("change", again);
$("left").addEventListener("change", async () => {
  state.like = state.unlike = []; // points of the other collection
  state.labels.clear();
  drawExamples();
  try {
    await drawLabels();
    await (asks() ? search() : welcome());
  } catch (e) {
    failed(e);
  }
});
addEventListener("popstate", () => fromAddress().catch(failed));
addEventListener("dragover", (e) => { e.preventDefault(); document.body.classList.add("drop"); });
addEventListener("dragleave", (e) => { if (!e.relatedTarget) document.body.classList.remove("drop"); });
addEventListener("drop", (e) => { e.preventDefault(); document.body.classList.remove("drop"); use(e.dataTransfer.files[0]); });
$("controls").open = matchMedia("(min-width: 40.01rem)").matches; // folded on a phone
start().catch(failed);
