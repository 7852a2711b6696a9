/* Lists, controls, keys, and the start. */

const charts = { matrix, retention, waterfall, stream, orders, plane, cost, seconds, parameters, memory };

function lede() {
  const v = view(), box = byId("lede"), m = v.measures, say = (t, strong) => box.append(make(strong ? "strong" : "span", t));
  box.replaceChildren();
  if (!v.rows) return say("No task has been evaluated yet.");
  say(`After ${v.rows} of ${v.steps} tasks the ${words(v).last} is `);
  say(fmt(m[words(v).best]), true);
  const worst = v.forgotten.map((f, j) => [f, j]).filter(([f]) => isNumber(f)).sort((a, b) => b[0] - a[0])[0];
  if (!worst || !isNumber(m.forgetting)) return say(".");
  if (v.multiLabel) { say(`; ${words(v).average} is `); say(fmt(m.average_accuracy), true); }
  say(`; ${words(v).forgetting} is `);
  say(fmt(m.forgetting), true);
  say(" on average over old tasks");
  if (worst[0] <= 0) return say(", and no task is below its peak.");
  say(", most on ");
  say(taskName(v, worst[1]), true);
  return say(` with ${fmt(worst[0])}. Shown: ${v.label}.`);
}

function forgotten() {
  const v = view(), box = byId("forgotten");
  const worst = v.forgotten.map((f, j) => [f, j]).filter(([f]) => isNumber(f)).sort((a, b) => b[0] - a[0]).slice(0, 10);
  if (!worst.length) return box.replaceChildren(make("p", "undefined: there is no old task yet, or a cell was not measured", "about"));
  const table = make("table"), head = make("tr"), top = Math.max(worst[0][0], 1e-9), section = make("thead"), body = make("tbody");
  for (const [text, right] of [["task"], ["learned", 1], ["now", 1], ["forgetting", 1], [""]]) head.append(make("th", text, right ? "n" : ""));
  section.append(head);
  for (const [f, j] of worst) {
    const line = make("tr"), bar = make("td"), stripe = make("i", "", "lost");
    line.dataset.task = String(j);
    stripe.style.width = `${Math.max(0, (64 * f) / top)}px`;
    bar.append(stripe);
    line.append(make("th", taskName(v, j)), make("td", fmt(v.learned[j]), "n"), make("td", fmt(v.final[j]), "n"), make("td", fmt(f), "n"), bar);
    body.append(line);
  }
  table.append(section, body);
  box.replaceChildren(table);
  const alerts = v.runs.flatMap((r) => r.alerts), list = make("ul");
  for (const a of alerts.slice(-12)) list.append(make("li", isNumber(a.task) ? `${taskName(v, a.task)}: ${a.text}` : a.text));
  byId("alerts").replaceChildren(...(alerts.length ? [list] : []));
  return box;
}

/* One task at a time is highlighted everywhere; a click or a key pins it. */
let queued = false;
function mark() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    for (const chart of Object.values(charts)) chart.mark(state.task);
    for (const line of document.querySelectorAll("tr[data-task]")) line.classList.toggle("on", Number(line.dataset.task) === state.task);
    readout();
  });
}
function readout() {
  const v = view(), j = state.task, box = byId("readout");
  if (j < 0 || j >= v.tasks) { box.textContent = "Point at a task anywhere to follow it through all charts."; return; }
  const at = state.row >= 0 && state.row < v.rows ? `, after task ${state.row}: ${isNumber(cell(v, state.row, j)) ? fmt(cell(v, state.row, j)) : "not measured"}` : "";
  box.textContent = `${taskName(v, j)}: ${v.multiLabel ? "label accuracy " : ""}learned ${fmt(v.learned[j])}, now ${fmt(v.final[j])}, forgetting ${fmt(v.forgotten[j])}${at}`;
}
function focus(task, row) {
  if (state.pinned || (task === state.task && row === state.row)) return;
  state.task = task;
  state.row = row;
  mark();
}
function leave() {
  noTip();
  if (!state.pinned) focus(-1, -1);
}
function pin(task, row = state.row) {
  state.pinned = false;
  focus(task, row);
  state.pinned = task >= 0;
  byId("task").value = String(task);
}

function tasksList() {
  const v = view(), box = byId("task");
  box.replaceChildren(new Option("none chosen", "-1"), ...v.names.slice(0, 2000).map((_, j) => new Option(taskName(v, j), String(j))));
  box.value = state.pinned && state.task < v.tasks ? String(state.task) : "-1";
}

function references() {
  const box = byId("reference"), others = PAGE.selections.filter((s) => s !== state.selection && view(s).multiLabel === view().multiLabel); // one quantity on an axis
  box.replaceChildren(...others.map((s) => new Option(view(s).label, s)));
  if (!others.includes(state.reference)) state.reference = others[0] ?? "";
  box.value = state.reference;
  byId("reference-label").hidden = state.mode !== "difference" || !others.length;
}

function draw() {
  const v = view();
  speak();
  if (state.task >= v.tasks) { state.task = -1; state.pinned = false; }
  for (const tiles of document.querySelectorAll(".tiles")) tiles.hidden = tiles.dataset.selection !== state.selection;
  if (charts.drift0) byId("drift-about").textContent = driftNote(v);
  if (charts.panel0) byId("panels-about").textContent = !v.runs[0].panels.length ? "This method reports nothing about itself." : v.runs.length > 1 ? `What the plugins report; one run: ${v.runs[0].label}.` : "What the plugins report after each task.";
  for (const chart of Object.values(charts)) chart.draw();
  lede();
  forgotten();
  tasksList();
  mark();
}

function keys(event) {
  const v = view(), step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.key === "Escape") { pin(-1, -1); return noTip(); }
  if (!step || !v.rows) return undefined;
  event.preventDefault();
  const task = state.task < 0 ? 0 : Math.min(v.tasks - 1, Math.max(0, state.task + step[0]));
  const row = state.row < 0 ? v.rows - 1 : Math.min(v.rows - 1, Math.max(0, state.row + step[1]));
  pin(task, row);
  const box = event.currentTarget.getBoundingClientRect();
  [pointer.x, pointer.y] = [box.left + box.width / 2, box.top + 40];
  return matrix.tell(row, task);
}

function choices() {
  const selection = byId("selection");
  selection.replaceChildren();
  PAGE.groups.forEach((g, k) => {
    const options = PAGE.selections.filter((s) => s === `g${k}` || (s[0] === "r" && g.members.includes(Number(s.slice(1)))));
    const section = document.createElement("optgroup");
    section.label = g.label;
    section.append(...options.map((s) => new Option(s[0] === "g" ? `${g.label}: mean of ${g.members.length} runs` : `${g.method}, ${PAGE.runs[Number(s.slice(1))].label}`, s)));
    selection.append(section);
  });
  selection.value = state.selection;
}

function wire() {
  byId("selection").addEventListener("change", (e) => { state.selection = e.target.value; references(); draw(); });
  byId("mode").addEventListener("change", (e) => { state.mode = e.target.value; references(); matrix.draw(); mark(); });
  byId("reference").addEventListener("change", (e) => { state.reference = e.target.value; matrix.draw(); });
  byId("axis").addEventListener("change", (e) => { state.axis = e.target.value; retention.draw(); mark(); });
  byId("task").addEventListener("change", (e) => pin(Number(e.target.value), -1));
  byId("matrix-table").addEventListener("toggle", () => matrix.table());
  byId("confusion-row").addEventListener("input", () => confusion.show());
  byId("forgotten").addEventListener("mouseover", (e) => { const line = e.target.closest("tr[data-task]"); if (line) focus(Number(line.dataset.task), -1); });
  byId("forgotten").addEventListener("mouseleave", leave);
  byId("forgotten").addEventListener("click", (e) => { const line = e.target.closest("tr[data-task]"); if (line) pin(Number(line.dataset.task), -1); });
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { theme(); draw(); });
  let resize = 0;
  addEventListener("resize", () => { clearTimeout(resize); resize = setTimeout(() => { matrix.draw(); waterfall.draw(); charts.inside?.draw(); mark(); }, 200); });
}

async function copy(kind) {
  const box = byId("copied"), area = box.querySelector("textarea");
  area.value = PAGE.copies[kind];
  box.hidden = false;
  let done = false;
  try {
    await navigator.clipboard.writeText(area.value);
    done = true;
  } catch {
    area.select();
    done = document.execCommand("copy");
  }
  byId("copied-about").textContent = done ? `${kind} copied.` : `Select and copy the ${kind} below.`;
}

function listen(name) {
  const box = byId(`plot-${name}`), plot = plots[name];
  box.addEventListener("mousemove", (e) => { [pointer.x, pointer.y] = [e.clientX, e.clientY]; }, true);
  box.addEventListener("mouseleave", leave);
  box.addEventListener("keydown", keys);
  box.addEventListener("blur", noTip);
  plot.on_event("mousemove", (e) => charts[name].hover(e.x, e.y));
  plot.on_event("tap", () => (state.pinned ? pin(-1, -1) : pin(state.task)));
}

async function start() {
  const { documents, items } = JSON.parse(byId("page-documents").textContent);
  await Bokeh.embed.embed_items(documents, items);
  for (const root of Bokeh.documents[0].roots()) plots[root.name] = root;
  cividis = Array.from(part(plots.matrix, "cells").glyph.color_mapper.palette, hex);
  if (plots.confusion) Object.assign(charts, { confusion, recency });
  if (plots.transfer) charts.transfer = transfer;
  if (plots.inside) charts.inside = inside;
  for (let k = 0; plots[`panel${k}`]; k++) charts[`panel${k}`] = panel(k);
  for (let k = 0; plots[`drift${k}`]; k++) charts[`drift${k}`] = panel(k, "drift");
  if (view().tasks > MOST_LINES) byId("axis").value = state.axis = "age";
  choices();
  wire();
  theme();
  references();
  draw();
  for (const name of Object.keys(plots)) listen(name);
  for (let k = 0; k < 2; k++) await new Promise((done) => { requestAnimationFrame(() => setTimeout(done)); }); // the charts are painted
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

const ready = start().catch((error) => console.error(`the charts could not be drawn: ${error.stack}`));
