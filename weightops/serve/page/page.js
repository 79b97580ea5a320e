// Models side by side: columns with their own settings, one prompt to all, one stream for all of them.
// Everything that comes from models and people is set as text. Rendered Markdown comes as nodes, built one by one.

const $ = (selector, within = document) => within.querySelector(selector);
const KEPT = "weightops-page-1";
const SETTINGS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "stop", "template"];
const TAGS = new Set(("p br hr h1 h2 h3 h4 h5 h6 em strong s code pre blockquote ul ol li table thead tbody tr th td a").split(" "));
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;

let data = null; // what the server has
let columns = []; // {id, model, settings, turns: [{role, text, finish, note, error}]}
let votes = []; // {time, prompt, models, best: model | "tie" | "bad"}
let running = null; // {stream, ids}
let blind = false;
let order = []; // while blind: the letters' columns
const views = new Map(); // id -> elements

const visible = (text) => text.replace(HIDDEN, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
const state = (text, error = false) => { const e = $("#state"); e.textContent = text; e.classList.toggle("error", error); };
const letter = (i) => String.fromCharCode(65 + i);
const card = (name) => data.models.find((m) => m.name === name);

function shown(column) {
  return blind ? `Model ${letter(order.indexOf(column.id))}` : column.model;
}

async function ask(path, body) {
  const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(await sentence(answer));
  return answer;
}

async function sentence(answer) {
  try { return (await answer.json()).error.message; } catch { return `the server answered ${answer.status}`; }
}

// --- keeping ---------------------------------------------------------------------------------------------------------

function keep() {
  const kept = { columns, votes, system: $("#system").value, markdown: $("#markdown").checked };
  try { localStorage.setItem(KEPT, JSON.stringify(kept)); } catch { state("The browser keeps no more: export, and clear all", true); }
}

function recall() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}"); } catch { /* not ours, or cut short */ }
  columns = (Array.isArray(kept.columns) ? kept.columns : []).filter((c) => card(c.model) && Array.isArray(c.turns));
  votes = Array.isArray(kept.votes) ? kept.votes : [];
  $("#system").value = kept.system ?? "";
  $("#markdown").checked = kept.markdown ?? false;
  for (const column of columns) for (const turn of column.turns) if (turn.finish === undefined && turn.role === "assistant") turn.finish = "cancelled";
  if (!columns.length) columns = data.models.slice(0, 4).map((m) => fresh(m.name));
}

const fresh = (model) => ({ id: crypto.randomUUID(), model, settings: {}, turns: [] });

// --- drawing ---------------------------------------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  element.append(...children);
  return element;
}

function draw() {
  order = columns.map((c) => c.id);
  if (blind) shuffle(order);
  views.clear();
  const list = blind ? order.map((id) => columns.find((c) => c.id === id)) : columns;
  $("#columns").replaceChildren(...list.map(drawColumn));
  drawVotes();
  busy();
}

function shuffle(list) {
  for (let i = list.length - 1; i > 0; i--) {
    const j = crypto.getRandomValues(new Uint32Array(1))[0] % (i + 1);
    [list[i], list[j]] = [list[j], list[i]];
  }
}

function drawColumn(column) {
  const article = $("#column").content.firstElementChild.cloneNode(true);
  const view = { article, turns: $(".turns", article), facts: $(".facts", article), stop: $(".stop", article), again: $(".again", article) };
  views.set(column.id, view);
  const name = shown(column);
  $("h2", article).textContent = visible(name);
  article.setAttribute("aria-label", visible(name));
  view.turns.setAttribute("aria-label", `Answers of ${visible(name)}`);
  const model = card(column.model);
  const length = model.max_positions ? `${model.max_positions} positions` : "";
  view.facts.textContent = blind ? "" : [length, model.has_template ? "" : "no template of its own", visible(model.note)].filter(Boolean).join(" · ");
  view.stop.addEventListener("click", () => stop(column.id));
  view.again.addEventListener("click", () => regenerate([column]));
  $(".remove", article).addEventListener("click", () => { columns = columns.filter((c) => c !== column); keep(); draw(); });
  drawSettings(column, $(".settings", article), model);
  drawTurns(column);
  return article;
}

function drawSettings(column, element, model) {
  if (blind) { element.hidden = true; return; }
  const select = $("select", element);
  const own = model.has_template ? [["its own", "own"]] : [];
  for (const [label, value] of [...own, ["none: the text as it is", ""], ...data.templates.map((t) => [t, t])]) select.append(make("option", { value, textContent: label }));
  column.settings.template ??= model.has_template ? "own" : "";
  for (const input of element.querySelectorAll("input, select")) {
    const value = column.settings[input.name];
    input.value = value ?? (input.name === "temperature" ? data.defaults.temperature : input.name === "seed" ? data.defaults.seed : "");
    input.addEventListener("change", () => {
      if (!input.reportValidity()) return;
      column.settings[input.name] = input.value === "" && input.tagName === "INPUT" ? undefined : input.type === "number" ? Number(input.value) : input.value;
      keep();
    });
  }
}

function drawTurns(column) {
  const view = views.get(column.id);
  view.turns.replaceChildren(...column.turns.map((turn, i) => drawTurn(column, turn, i)));
  view.turns.scrollTop = view.turns.scrollHeight;
}

function drawTurn(column, turn, i) {
  const text = make("div", { className: "text" });
  const who = make("div", { className: "who" }, turn.role === "user" ? "You" : visible(shown(column)));
  if (turn.role === "user") {
    who.append(make("button", { type: "button", textContent: "Edit", onclick: () => edit(column, i) }));
  }
  const element = make("div", { className: `turn ${turn.role}` }, who, text);
  turn.text ??= "";
  text.textContent = visible(turn.text);
  if (turn.role === "assistant") {
    text.classList.toggle("busy", turn.finish === undefined && !turn.error);
    const note = make("p", { className: turn.error ? "note error" : "note", textContent: turn.error ? visible(turn.error) : ending(turn) });
    if (turn.error) note.setAttribute("role", "alert");
    element.append(note);
    if (turn.finish && $("#markdown").checked) renderInto(text, turn.text);
  }
  return element;
}

function ending(turn) {
  if (turn.finish === undefined) return "";
  const why = { eos: "", stop: "", length: "cut at its longest", cancelled: "stopped" }[turn.finish] ?? turn.finish;
  const first = turn.first_token_s == null ? "" : `first token ${turn.first_token_s.toFixed(2)} s`;
  const rate = turn.tokens_per_s == null ? "" : `${turn.tokens_per_s.toFixed(1)} tokens/s`;
  return [why, turn.new_tokens == null ? "" : `${turn.new_tokens} tokens`, first, blind ? "" : rate].filter(Boolean).join(" · ");
}

async function renderInto(element, text) {
  try {
    const { nodes } = await (await ask("render", { text })).json();
    element.replaceChildren(...nodes.map(build));
    element.classList.add("rendered");
  } catch (error) { state(error.message, true); }
}

function build(node) {
  if (typeof node === "string") return document.createTextNode(visible(node));
  const [tag, attributes, children] = node;
  if (!TAGS.has(tag)) return document.createTextNode("");
  const element = make(tag, {}, ...children.map(build));
  if (tag === "a" && /^(https?:|mailto:)/i.test(attributes.href ?? "")) {
    element.href = attributes.href;
    element.rel = "noopener noreferrer";
    element.target = "_blank";
  }
  return element;
}

function busy() {
  const ids = running ? running.ids : new Set();
  $("#send").disabled = Boolean(running);
  $("#stop").disabled = !running;
  for (const [id, view] of views) {
    view.stop.disabled = !ids.has(id);
    view.again.disabled = Boolean(running) || !columns.find((c) => c.id === id)?.turns.length;
  }
  const voting = !running && columns.length > 1 && columns.every((c) => c.turns.at(-1)?.role === "assistant" && !c.turns.at(-1).voted);
  const appears = voting && $("#ballot").hidden;
  $("#ballot").hidden = !voting;
  if (voting) drawBallot();
  // It takes room from the columns, whose last lines would slip away.
  if (appears) for (const { turns } of views.values()) turns.scrollTop = turns.scrollHeight;
}

// --- asking ----------------------------------------------------------------------------------------------------------

function messages(column) {
  const system = $("#system").value.trim();
  const turns = column.turns.filter((t) => !t.error).map((t) => ({ role: t.role, content: t.text }));
  while (turns.at(-1)?.role === "assistant") turns.pop();
  return [...(system ? [{ role: "system", content: system }] : []), ...turns];
}

function wire(column) {
  const body = { id: column.id, model: column.model, messages: messages(column) };
  for (const name of SETTINGS) {
    const value = column.settings[name];
    if (value === undefined || value === null || (name === "template" && value === "own")) continue;
    body[name] = value;
  }
  if (!(body.temperature > 0)) for (const name of ["top_p", "top_k", "min_p"]) delete body[name];
  return body;
}

async function run(list) {
  if (running || !list.length) return;
  running = { stream: null, ids: new Set(list.map((c) => c.id)) };
  for (const column of list) { column.turns.push({ role: "assistant", text: "" }); drawTurns(column); }
  busy();
  state(`Asking ${list.length === 1 ? "one model" : `${list.length} models`}…`);
  try {
    const { stream } = await (await ask("compare", { columns: list.map(wire) })).json();
    running.stream = stream;
    if (running.stopped) stop();
    for (let closed = false, after = 0; !closed; ) {
      // A second of events at a time, so that many tabs share the few connections that a browser opens.
      const answer = await ask("events", { stream, after });
      for await (const event of events(answer.body)) {
        after = event.number;
        if (event.event === "closed") closed = true;
        else take(event);
      }
    }
    state("Ready");
  } catch (error) {
    for (const column of list) {
      const turn = column.turns.at(-1);
      if (turn.finish === undefined && !turn.error) turn.error = error.message;
    }
    state(error.message, true);
  }
  running = null;
  for (const column of list) {
    const turn = column.turns.at(-1);
    if (turn?.role === "assistant" && turn.finish === undefined && !turn.error) turn.finish = "cancelled";
    if (views.has(column.id)) drawTurns(column);
  }
  keep();
  busy();
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      const line = rest.slice(0, end);
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

function take(event) {
  const column = columns.find((c) => c.id === event.column);
  if (!column) return;
  const turn = column.turns.at(-1);
  const view = views.get(column.id);
  const text = view.turns.lastElementChild && $(".text", view.turns.lastElementChild);
  const note = view.turns.lastElementChild && $(".note", view.turns.lastElementChild);
  if (event.event === "token") {
    turn.text += event.text;
    const near = view.turns.scrollHeight - view.turns.scrollTop - view.turns.clientHeight < 40;
    text.append(visible(event.text));
    if (near) view.turns.scrollTop = view.turns.scrollHeight;
  } else if (event.event === "waiting") {
    note.textContent = { queue: "waiting for its turn", memory: "waiting for memory", loading: "loading" }[event.reason] ?? "";
  } else if (event.event === "reading") {
    note.textContent = `reading ${event.tokens} of ${event.prompt_tokens} tokens`;
  } else if (event.event === "started") {
    note.textContent = "";
  } else if (event.event === "finished") {
    Object.assign(turn, { finish: event.finish, new_tokens: event.new_tokens, prompt_tokens: event.prompt_tokens, first_token_s: event.first_token_s, tokens_per_s: event.tokens_per_s });
    turn.text = event.text;
    running.ids.delete(column.id);
    drawTurns(column);
    busy();
  } else if (event.event === "failed") {
    turn.error = event.hint ? `${event.message}; ${event.hint}` : event.message;
    running.ids.delete(column.id);
    drawTurns(column);
    busy();
  }
}

async function stop(column) {
  if (!running) return;
  if (!running.stream) { running.stopped = true; return; }
  try { await ask("stop", { stream: running.stream, column }); } catch (error) { state(error.message, true); }
}

// The page goes: whoever asked is gone, and its texts with it.
addEventListener("pagehide", () => {
  if (running?.stream) fetch("stop", { method: "POST", headers: headers(), body: JSON.stringify({ stream: running.stream }), keepalive: true });
});

function regenerate(list) {
  for (const column of list) while (column.turns.at(-1)?.role === "assistant") column.turns.pop();
  run(list.filter((c) => c.turns.length));
}

function edit(column, i) {
  if (running) return;
  const text = column.turns[i].text;
  // The same prompt went to all: it is taken back from all that have it at this place.
  for (const other of columns) if (other.turns[i]?.role === "user" && other.turns[i].text === text) other.turns.length = i;
  $("#prompt").value = text;
  $("#prompt").focus();
  keep();
  draw();
}

function dropOldest() {
  let dropped = 0;
  for (const column of columns) {
    const next = column.turns.findIndex((t, i) => i > 0 && t.role === "user");
    if (next > 0) { dropped += next; column.turns.splice(0, next); }
  }
  keep();
  draw();
  state(dropped ? `Dropped ${dropped} messages` : "There is no older turn to drop");
}

// --- votes -----------------------------------------------------------------------------------------------------------

function drawBallot() {
  const list = order.map((id) => columns.find((c) => c.id === id));
  const choices = [...list.map((c) => [`${visible(shown(c))} is better`, c.model]), ["Tie", "tie"], [columns.length === 2 ? "Both are bad" : "All are bad", "bad"]];
  $("#ballot").replaceChildren(...choices.map(([label, best]) => make("button", { type: "button", textContent: label, onclick: () => vote(best) })));
}

function vote(best) {
  const prompt = columns[0].turns.findLast((t) => t.role === "user")?.text ?? "";
  votes.push({ time: new Date().toISOString(), prompt, models: columns.map((c) => c.model), best, blind });
  for (const column of columns) column.turns.at(-1).voted = true;
  const was = order.map((id, i) => `${letter(i)} is ${columns.find((c) => c.id === id).model}`).join(", ");
  if (blind) { blind = false; $("#blind").checked = false; }
  keep();
  draw();
  state(`Voted. ${visible(was)}`);
}

function drawVotes() {
  $("#votes").hidden = !votes.length || blind;
  const rows = new Map();
  for (const { models, best } of votes) for (const model of models) {
    const row = rows.get(model) ?? [0, 0, 0];
    row[0] += best === model; row[1] += best === "tie"; row[2] += best === "bad";
    rows.set(model, row);
  }
  $("#votes tbody").replaceChildren(...[...rows].map(([model, row]) => make("tr", {}, make("th", { scope: "row", textContent: visible(model) }), ...row.map((n) => make("td", { textContent: n })))));
}

// --- export ----------------------------------------------------------------------------------------------------------

function save(name, kind, text) {
  const url = URL.createObjectURL(new Blob([text], { type: kind }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function exportJson() {
  const document_ = { schema: "weightops-conversation/1", version: data.version, time: new Date().toISOString(), system: $("#system").value, columns, votes };
  save("weightops.json", "application/json", JSON.stringify(document_, null, 2));
}

function exportMarkdown() {
  const fence = (text) => { let ticks = "```"; while (text.includes(ticks)) ticks += "`"; return `${ticks}\n${text}\n${ticks}`; };
  const parts = columns.flatMap((c) => [`# ${c.model}`, ...c.turns.flatMap((t) => [`## ${t.role}`, fence(t.error ?? t.text), t.finish ? ending(t) : ""])]);
  save("weightops.md", "text/markdown", parts.filter(Boolean).join("\n\n") + "\n");
}

// --- begin -----------------------------------------------------------------------------------------------------------

function send(event) {
  event.preventDefault();
  const prompt = $("#prompt").value;
  if (!prompt || running) return;
  if (blind) draw();
  for (const column of columns) column.turns.push({ role: "user", text: prompt });
  $("#prompt").value = "";
  keep();
  run(columns);
}

async function begin() {
  for (;;) {
    const answer = await fetch("page", { headers: headers() }).catch(() => null);
    if (answer?.ok) { data = await answer.json(); break; }
    state(answer ? await sentence(answer) : "The server does not answer", true);
    if (answer?.status === 401) { await new Promise((done) => $("#key").addEventListener("change", done, { once: true })); continue; }
    await new Promise((done) => setTimeout(done, 1000));
  }
  for (const model of data.models) $("#add").append(make("option", { value: model.name, textContent: visible(model.name) }));
  recall();
  draw();
  state("Ready");
}

function headers() {
  const key = sessionStorage.getItem("weightops-key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

$("#ask").addEventListener("submit", send);
$("#prompt").addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) send(e); });
document.addEventListener("keydown", (e) => { if (e.key === "Escape" && running) stop(); });
$("#stop").addEventListener("click", () => stop());
$("#add").addEventListener("change", (e) => { if (e.target.value) { columns.push(fresh(e.target.value)); e.target.value = ""; keep(); draw(); } });
$("#blind").addEventListener("change", (e) => { blind = e.target.checked; draw(); });
$("#markdown").addEventListener("change", () => { keep(); if (!running) draw(); });
$("#export-json").addEventListener("click", exportJson);
$("#export-markdown").addEventListener("click", exportMarkdown);
$("#drop").addEventListener("click", () => { if (!running) dropOldest(); });
$("#clear").addEventListener("click", () => { if (running) return; for (const c of columns) c.turns = []; votes = []; keep(); draw(); state("Cleared"); });
$("#key").addEventListener("change", (e) => sessionStorage.setItem("weightops-key", e.target.value));
begin();
