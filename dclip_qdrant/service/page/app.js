// The search page: asks /api/*, draws hits. No framework, nothing from elsewhere.
"use strict";
const $ = (id) => document.getElementById(id);
const state = { image: null, labels: new Set(), collections: [], asked: 0 };
let token = sessionStorage.getItem("token");

async function api(path, body) {
  const headers = token ? { Authorization: "Bearer " + token } : {};
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  if (answer.status === 401) {
    await login();
    return api(path, body);
  }
  if (path.startsWith("/api/picture")) {
    if (!answer.ok) throw new Error("no picture");
    return answer.blob();
  }
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error || answer.statusText);
  return said;
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

function status(text, bad) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", Boolean(bad));
}

function option(value, text) {
  const o = document.createElement("option");
  o.value = value;
  o.textContent = text;
  return o;
}

async function start() {
  const info = await api("/api/info");
  state.collections = info.collections;
  if (!info.collections.length && info.unavailable.length) {
    status(info.unavailable.join("; "), true);
    return;
  }
  if (!info.collections.length) {
    status("No collection here was filled by " + info.students.map((s) => s.name).join(", ") + ". Start the service with --edge or --url after dclip-qdrant ingest.", true);
    return;
  }
  for (const c of info.collections) {
    const text = `${c.name} (${c.points.toLocaleString()})`;
    $("left").append(option(c.name, text));
    $("right").append(option(c.name, text));
  }
  $("right").prepend(option("", "nothing"));
  const wanted = new URLSearchParams(location.search);
  if (wanted.get("in")) $("left").value = wanted.get("in");
  $("right").value = wanted.get("beside") || "";
  if (wanted.get("mode")) for (const r of document.querySelectorAll("[name=mode]")) r.checked = r.value === wanted.get("mode");
  status(`${info.collections.length === 1 ? "One collection" : info.collections.length + " collections"}, ${info.students.length === 1 ? "one student" : info.students.length + " students"}.`);
  await labels();
  if (wanted.get("q")) {
    $("text").value = wanted.get("q");
    await search();
  }
}

async function labels() {
  state.labels.clear();
  $("labels").replaceChildren();
  const found = (await api("/api/labels/" + encodeURIComponent($("left").value))).labels;
  for (const { label, count } of found) {
    const b = document.createElement("button");
    b.type = "button";
    b.textContent = `${label} ${count.toLocaleString()}`;
    b.setAttribute("aria-pressed", "false");
    b.addEventListener("click", () => {
      const on = !state.labels.has(label);
      on ? state.labels.add(label) : state.labels.delete(label);
      b.setAttribute("aria-pressed", String(on));
      if ($("text").value.trim() || state.image) search();
    });
    $("labels").append(b);
  }
}

function mode() {
  return document.querySelector("[name=mode]:checked").value;
}

async function search() {
  const text = $("text").value.trim();
  if (!text && !state.image) return status("Type some words, or choose a picture.", true);
  if (state.image && mode() === "hybrid") return status("A picture has no words: choose “Whole picture” or “Best region”.", true);
  const mine = ++state.asked;
  const where = [$("left").value, $("right").value].filter((c, i, all) => c && all.indexOf(c) === i);
  status("Searching…");
  const body = { mode: mode(), limit: 24, filters: [...state.labels].map((l) => "labels=" + l) };
  if (state.image) body.image = state.image; else body.text = text;
  try {
    const answers = await Promise.all(where.map((collection) => api("/api/search", { ...body, collection })));
    if (mine !== state.asked) return; // a newer question is on its way
    $("panels").replaceChildren(...answers.map((a, i) => panel(where[i], a)));
    const hits = answers[0].hits.length;
    status(hits ? `${hits} hits in ${answers.map((a) => a.milliseconds + " ms").join(" and ")}.` : "Nothing found" + (state.labels.size ? " with these filters." : "."));
    const link = new URLSearchParams({ in: where[0], mode: mode() });
    if (where[1]) link.set("beside", where[1]);
    if (!state.image) link.set("q", text);
    history.replaceState(null, "", "?" + link);
  } catch (e) {
    if (mine === state.asked) status(e.message, true);
  }
}

function panel(collection, answer) {
  const section = document.createElement("section");
  section.className = "panel";
  const h = document.createElement("h2");
  h.textContent = collection + " ";
  const small = document.createElement("small");
  small.textContent = answer.student;
  h.append(small);
  const grid = document.createElement("div");
  grid.className = "grid";
  grid.append(...answer.hits.map((hit, i) => figure(collection, hit, i)));
  section.append(h, grid);
  return section;
}

function figure(collection, hit, rank) {
  const f = document.createElement("figure");
  f.className = "hit";
  const frame = document.createElement("button");
  frame.type = "button";
  frame.className = "frame";
  const holder = document.createElement("span");
  holder.className = "holder";
  const img = document.createElement("img");
  img.alt = hit.caption ? hit.caption.split("\n")[0] : hit.key;
  img.width = hit.width;
  img.height = hit.height;
  img.style.width = "auto";
  img.style.height = "auto";
  picture(img, collection, hit.id);
  holder.append(img);
  const region = hit.region;
  if (region) holder.append(box(region.box, hit));
  frame.append(holder);
  frame.addEventListener("click", () => zoom(img, hit));
  const said = document.createElement("figcaption");
  const what = document.createElement("span");
  what.className = "what";
  what.textContent = img.alt;
  const score = document.createElement("span");
  score.className = "score";
  score.textContent = `${rank + 1} · ${hit.score.toFixed(3)}` + (region ? ` · ${region.label}` : "");
  said.append(what, score);
  f.append(frame, said);
  return f;
}

async function picture(img, collection, id) {
  const path = `/api/picture/${encodeURIComponent(collection)}/${encodeURIComponent(id)}`;
  try {
    img.src = token ? URL.createObjectURL(await api(path)) : path;
    await img.decode();
  } catch {
    img.classList.add("gone");
    img.removeAttribute("src");
  }
}

function box([x0, y0, x1, y1], hit) {
  const b = document.createElement("span");
  b.className = "box";
  const part = (v, all) => (100 * Math.min(Math.max(v, 0), all)) / all + "%";
  b.style.left = part(x0, hit.width);
  b.style.top = part(y0, hit.height);
  b.style.width = part(x1 - x0, hit.width);
  b.style.height = part(y1 - y0, hit.height);
  return b;
}

function zoom(img, hit) {
  if (!img.src) return;
  $("zoom-image").src = img.src;
  $("zoom-image").alt = img.alt;
  $("zoom-text").textContent = `${hit.key}: ${(hit.caption || "").replaceAll("\n", " / ")}`;
  $("zoom").showModal();
}

async function use(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) return status(`${file.name} is not a picture.`, true);
  const url = await new Promise((done, fail) => {
    const r = new FileReader();
    r.onload = () => done(r.result);
    r.onerror = () => fail(r.error);
    r.readAsDataURL(file);
  });
  state.image = url;
  $("example-image").src = url;
  $("example-name").textContent = file.name;
  $("example").hidden = false;
  $("text").value = "";
  await search();
}

function forget() {
  state.image = null;
  $("example").hidden = true;
  $("file").value = "";
}

$("query").addEventListener("submit", (e) => { e.preventDefault(); search(); });
$("text").addEventListener("input", () => { if (state.image && $("text").value) forget(); });
$("file").addEventListener("change", () => use($("file").files[0]));
$("pick").addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); $("file").click(); } });
$("example-clear").addEventListener("click", forget);
$("zoom-close").addEventListener("click", () => $("zoom").close());
for (const r of document.querySelectorAll("[name=mode]")) r.addEventListener("change", () => { if ($("text").value.trim() || state.image) search(); });
$("left").addEventListener("change", async () => { await labels(); if ($("text").value.trim() || state.image) search(); });
$("right").addEventListener("change", () => { if ($("text").value.trim() || state.image) search(); });
addEventListener("dragover", (e) => { e.preventDefault(); document.body.classList.add("drop"); });
addEventListener("dragleave", (e) => { if (!e.relatedTarget) document.body.classList.remove("drop"); });
addEventListener("drop", (e) => { e.preventDefault(); document.body.classList.remove("drop"); use(e.dataTransfer.files[0]); });
start().catch((e) => status(e.message, true));
