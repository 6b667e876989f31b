"use strict";
// The page asks the same API as OpenAI's client. What comes from the server is set as text alone.

const at = (id) => document.getElementById(id);
const sides = [...document.querySelectorAll(".side")].map((side) => ({
  select: side.querySelector("select"), talk: side.querySelector(".talk"), messages: [],
}));
const OVER = ["succeeded", "failed", "cancelled"];
let key = sessionStorage.getItem("key") || "";
let chosen = "";

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function say(error) {
  at("error").textContent = error ? error.message || String(error) : "";
  at("error").hidden = !error;
}

async function ask(path, options = {}) {
  const headers = { authorization: `Bearer ${key}`, ...options.headers };
  const response = await fetch(`v1${path}`, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message || `the server answered ${response.status}`);
}

const get = async (path) => (await ask(path)).json();
const post = (path, body) => ask(path, {
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body || {}),
});

// Runs what a form or a button does, and shows its error.
function on(id, event, act) {
  at(id).addEventListener(event, async (happened) => {
    happened.preventDefault();
    say(null);
    try { await act(happened); } catch (error) { say(error); }
  });
}

function fill(select, names, none = "") {
  const before = select.value;
  select.replaceChildren(...(none ? [new Option(none, "")] : []), ...names.map(([id, text]) => new Option(text, id)));
  if (names.some(([id]) => id === before)) select.value = before;
}

async function showModels() {
  const models = (await get("/models")).data.map((model) => [model.id, model.id]);
  fill(at("base"), models);
  const isNew = sides[1].select.length < models.length;
  for (const side of sides) fill(side.select, models);
  if (isNew) sides[1].select.selectedIndex = models.length - 1;
}

async function showFiles() {
  const files = (await get("/files")).data;
  const inputs = files.filter((file) => file.purpose === "fine-tune").map((file) => [file.id, file.filename]);
  fill(at("training"), inputs);
  fill(at("validation"), inputs, "none");
  at("files").replaceChildren(...files.map((file) => {
    const row = element("tr");
    const remove = element("button", "Delete");
    remove.onclick = () => ask(`/files/${file.id}`, { method: "DELETE" }).then(showFiles, say);
    row.append(...[file.filename, `${file.bytes} bytes`, file.purpose, file.id].map((text) => element("td", text)));
    row.append(element("td"));
    row.lastChild.append(remove);
    return row;
  }));
}

async function showJobs() {
  const jobs = (await get("/fine_tuning/jobs?limit=50")).data;
  at("jobs").replaceChildren(...jobs.map((job) => {
    const row = element("tr", "", job.id === chosen ? "chosen" : "");
    const cells = [job.status, job.model, job.method.type, job.fine_tuned_model || job.error?.message || "", job.id];
    row.append(...cells.map((text) => element("td", text)));
    row.onclick = () => { chosen = job.id; refresh(); };
    return row;
  }));
  if (!chosen && jobs.length) chosen = jobs[0].id;
  const job = jobs.find((job) => job.id === chosen);
  at("job").hidden = !job;
  if (job) await showJob(job);
  return jobs;
}

async function showJob(job) {
  const events = (await get(`/fine_tuning/jobs/${job.id}/events?limit=2000`)).data;
  at("job-name").textContent = `${job.id}: ${job.status}`;
  at("pause").disabled = !["queued", "running"].includes(job.status);
  at("resume").disabled = job.status !== "paused";
  at("cancel").disabled = OVER.includes(job.status);
  at("events").replaceChildren(...events.slice(0, 200).map((event) => {
    const time = new Date(event.created_at * 1000).toLocaleTimeString();
    return element("li", `${time}  ${event.message}`);
  }));
  const figures = events.filter((event) => event.type === "metrics").map((event) => event.data);
  draw(figures.reverse(), job.method.type === "reinforcement" ? "reward" : "loss");
}

function shape(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

// A figure of training and of the held-out file by step.
function draw(figures, name) {
  const svg = at("curve");
  svg.replaceChildren();
  const lines = ["train", "valid"].map((split) => [split, figures
    .filter((figure) => Number.isFinite(figure[`${split}_${name}`]))
    .map((figure) => [figure.step, figure[`${split}_${name}`]])
    .sort((one, other) => one[0] - other[0])]);
  const points = lines.flatMap(([, line]) => line);
  if (!points.length) return;
  const steps = Math.max(...figures.map((figure) => figure.total_steps || figure.step));
  const high = Math.max(...points.map(([, value]) => value));
  const low = Math.min(0, ...points.map(([, value]) => value));
  const x = (step) => 45 + 540 * step / steps;
  const y = (value) => 195 - 180 * (value - low) / (high - low || 1);
  for (const value of [low, (low + high) / 2, high]) {
    svg.append(shape("text", { x: 4, y: y(value) + 4 }, value.toPrecision(3)));
  }
  svg.append(shape("text", { x: 560, y: 212 }, `step ${steps}`));
  lines.forEach(([split, line], number) => {
    if (!line.length) return;
    svg.append(shape("polyline", { class: split, points: line.map(([step, value]) => `${x(step)},${y(value)}`).join(" ") }));
    svg.append(shape("text", { x: 440 + 70 * number, y: 14, class: `key-${split}` }, `${split} ${name}`));
    if (split === "valid") line.forEach(([step, value]) => svg.append(shape("circle", { cx: x(step), cy: y(value), r: 2.5 })));
  });
}

// The events of a streamed answer, as objects.
async function* read(response) {
  const decoder = new TextDecoder();
  let text = "";
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer(side, message) {
  side.messages.push({ role: "user", content: message });
  side.talk.append(element("p", message, "user"));
  const paragraph = element("p", "", "assistant");
  side.talk.append(paragraph);
  const response = await post("/chat/completions", {
    model: side.select.value, messages: side.messages, stream: true, logprobs: true, top_logprobs: 5,
    temperature: Number(at("temperature").value), max_completion_tokens: Number(at("tokens").value),
  });
  let whole = "";
  let tokens = [];  // those whose text has not come yet, such as parts of a character
  for await (const chunk of read(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    const text = choice?.delta.content || "";
    whole += text;
    tokens.push(...(choice?.logprobs?.content || []));
    if (!text) continue;
    paragraph.append(shown(text, tokens));
    tokens = [];
  }
  paragraph.dataset.ended = "true";
  side.messages.push({ role: "assistant", content: whole });
}

function shown(text, tokens) {
  const span = element("span", text, "token");
  span.dataset.likely = tokens.map((token) => token.top_logprobs.map((one) =>
    `${(100 * Math.exp(one.logprob)).toFixed(1).padStart(5)}%  ${JSON.stringify(one.token)}`).join("\n")).join("\n\n");
  return span;
}

document.addEventListener("mouseover", (event) => {
  const likely = event.target.dataset?.likely;
  at("likely").hidden = !likely;
  if (!likely) return;
  const box = event.target.getBoundingClientRect();
  at("likely").textContent = likely;
  at("likely").style.left = `${box.left + scrollX}px`;
  at("likely").style.top = `${box.bottom + scrollY + 4}px`;
});

async function refresh() {
  const jobs = await showJobs();
  await showModels();
  return jobs.some((job) => !OVER.includes(job.status));
}

async function watch() {
  const busy = await refresh().catch(say);
  setTimeout(watch, busy ? 1000 : 4000);
}

async function open() {
  await showModels();
  sessionStorage.setItem("key", key);
  at("content").hidden = false;
  at("login").hidden = true;
  await showFiles();
  await watch();
}

on("login", "submit", async () => { key = at("key").value.trim(); await open(); });
on("ask", "submit", async () => {
  const message = at("message").value;
  at("message").value = "";
  await Promise.all(sides.map((side) => answer(side, message)));
});
on("clear", "click", () => sides.forEach((side) => { side.messages = []; side.talk.replaceChildren(); }));
on("upload", "submit", async () => {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", at("file").files[0]);
  await ask("/files", { method: "POST", body: form });
  await showFiles();
});
const SETTINGS = { epochs: "n_epochs", batch: "batch_size", rate: "learning_rate_multiplier", beta: "beta" };
const hyperparameters = () => Object.fromEntries(Object.entries(SETTINGS)
  .filter(([id]) => at(id).value && !at(id).closest("[hidden]"))
  .map(([id, name]) => [name, Number(at(id).value)]));

function grader() {
  const [how] = at("compare").selectedOptions;
  const type = how.parentNode.label;
  const setting = type === "string_check" ? "operation" : "evaluation_metric";
  return { type, [setting]: how.value, input: at("input").value, reference: at("reference").value };
}

on("method", "change", () => {
  at("grader").hidden = at("method").value !== "reinforcement";
  at("of-dpo").hidden = at("method").value !== "dpo";
});
on("start", "submit", async () => {
  const method = at("method").value;
  const settings = { hyperparameters: hyperparameters() };
  if (method === "reinforcement") settings.grader = grader();
  const job = { model: at("base").value, training_file: at("training").value, method: { type: method, [method]: settings } };
  if (at("validation").value) job.validation_file = at("validation").value;
  if (at("suffix").value) job.suffix = at("suffix").value;
  chosen = (await (await post("/fine_tuning/jobs", job)).json()).id;
  await refresh();
});
for (const verb of ["pause", "resume", "cancel"]) {
  on(verb, "click", async () => { await post(`/fine_tuning/jobs/${chosen}/${verb}`); await refresh(); });
}
if (key) open().catch(() => sessionStorage.removeItem("key"));
