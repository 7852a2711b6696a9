"use strict";
/* The page's data, its state and what all charts share. Names reach the page through textContent alone. */

const PAGE = JSON.parse(document.getElementById("page-data").textContent);
const MOST_LINES = 60;
const MARKERS = ["circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star", "plus"];
const SIGNS = ["●", "■", "▲", "◆", "▼", "⬢", "★", "✚"];
const DASHES = ["solid", "dashed", "dotted", "dotdash"];
const state = { selection: PAGE.selections[0], mode: "accuracy", reference: "", axis: "row", task: -1, row: -1, pinned: false };
const plots = {};
const pointer = { x: 0, y: 0 };

const byId = (id) => document.getElementById(id);
const inks = new Map(); // asking for a style is slow, and bars ask once a task
const css = (name) => {
  if (!inks.has(name)) inks.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return inks.get(name);
};
const isNumber = (v) => v !== null && Number.isFinite(v);
const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

/* A fraction as the tables print it: round half to even on the exact binary value, as Python does. */
function fmt(value, digits = 3) {
  if (!isNumber(value)) return "undefined";
  let text = value.toFixed(digits);
  const scaled = Math.abs(value) * 2 ** (digits + 1);
  if (Number.isInteger(scaled) && scaled % 2 === 1) {
    const low = Math.floor(Math.abs(value) * 10 ** digits);
    text = ((Math.sign(value) * (low % 2 === 0 ? low : low + 1)) / 10 ** digits).toFixed(digits);
  }
  return Number(text) === 0 && text.startsWith("-") ? text.slice(1) : text;
}

const signed = (value, digits = 3) => (isNumber(value) && value > 0 && Number(fmt(value, digits)) > 0 ? "+" : "") + fmt(value, digits);

function amount(value) {
  if (!isNumber(value)) return "undefined";
  return value.toLocaleString("en-US", { maximumFractionDigits: Math.abs(value) >= 1000 || Number.isInteger(value) ? 0 : Math.abs(value) >= 1 ? 2 : 4 });
}

/* Counts as signed numbers, four bytes each where they fit; -1 is "not measured". */
function unpack(packed) {
  if (packed.type === "list") return Float64Array.from(packed.data);
  const text = atob(packed.data), bytes = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) bytes[k] = text.charCodeAt(k);
  const kind = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array }[packed.type], coded = new kind(bytes.buffer);
  const missing = 2 ** (8 * kind.BYTES_PER_ELEMENT) - 1, values = new (packed.type === "u4" ? Float64Array : Int32Array)(coded.length);
  for (let k = 0; k < coded.length; k++) values[k] = coded[k] === missing ? -1 : coded[k];
  return values;
}

/* Counts of a run as full matrices, and the accuracies; NaN where not measured. */
function counts(run) {
  if (run.counts) return run.counts;
  const { rows, tasks, cells } = run;
  const heads = unpack(cells.correct), totals = unpack(cells.total);
  const correct = new heads.constructor(rows * tasks).fill(-1), total = new totals.constructor(rows * tasks).fill(-1);
  const accuracy = new Float64Array(rows * tasks).fill(NaN);
  for (let i = 0, k = 0; i < rows; i++) {
    for (let j = 0; j < cells.lengths[i]; j++, k++) {
      const at = i * tasks + j, all = cells.constant ? totals[j] : totals[k];
      if (heads[k] < 0 || all < 0) continue;
      correct[at] = heads[k];
      total[at] = all;
      if (all > 0) accuracy[at] = heads[k] / all;
    }
  }
  run.counts = { correct, total, accuracy };
  return run.counts;
}

const mean = (values) => values.length && values.every(isNumber) ? values.reduce((a, b) => a + b, 0) / values.length : null;
const meanLists = (lists) => lists.length && lists.every((l) => l.length === lists[0].length) ? lists[0].map((_, k) => mean(lists.map((l) => l[k]))) : [];

/* Mean and standard deviation of each cell over runs. */
function overRuns(runs, rows, tasks) {
  const accuracy = new Float64Array(rows * tasks).fill(NaN), sd = new Float64Array(rows * tasks).fill(NaN);
  const all = runs.map((run) => ({ ...counts(run), rows: run.rows, tasks: run.tasks }));
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < tasks; j++) {
      let sum = 0, squares = 0;
      for (const run of all) sum += i < run.rows && j < run.tasks ? run.accuracy[i * run.tasks + j] : NaN;
      if (!Number.isFinite(sum)) continue;
      const middle = sum / all.length;
      accuracy[i * tasks + j] = middle;
      for (const run of all) squares += (run.accuracy[i * run.tasks + j] - middle) ** 2;
      sd[i * tasks + j] = Math.sqrt(squares / (all.length - 1));
    }
  }
  return { accuracy, sd };
}

/* What is shown: one run, or the mean over the runs of a method. */
const views = new Map();
function view(selection = state.selection) {
  if (views.has(selection)) return views.get(selection);
  const index = Number(selection.slice(1));
  const members = selection[0] === "g" ? PAGE.groups[index].members : [index];
  const runs = members.map((i) => PAGE.runs[i]);
  const rows = Math.max(...runs.map((r) => r.rows)), tasks = Math.max(...runs.map((r) => r.tasks));
  // one run has no deviation; a matrix of a thousand tasks is 8 MB, so none is kept for it
  const { accuracy, sd } = runs.length === 1 ? { accuracy: counts(runs[0]).accuracy, sd: new Float64Array(0) } : overRuns(runs, rows, tasks);
  const lists = runs.map((r) => PAGE.names[r.names]);
  const names = Array.from({ length: tasks }, (_, j) => {
    const own = new Set(lists.map((l) => l[j]));
    return own.size === 1 ? lists[0][j] ?? `task ${j}` : `task ${j} (differs between runs)`;
  });
  const shown = {
    selection, members, runs, rows, tasks, multiLabel: runs[0].multiLabel, steps: Math.max(...runs.map((r) => r.steps)), accuracy, sd, names, learnedAt: runs[0].learnedAt,
    label: selection[0] === "g" ? `${PAGE.groups[index].label}, mean of ${runs.length} runs` : `${PAGE.groups[runs[0].group].label}, ${runs[0].label}`,
  };
  for (const key of ["learned", "final", "forgotten", "waterfall", "curve", "before", "initial"]) shown[key] = runs.length === 1 ? runs[0][key] : meanLists(runs.map((r) => r[key]));
  shown.waterfallRows = runs[0].waterfallRows;
  shown.measures = {};
  for (const key of Object.keys(runs[0].measures)) shown.measures[key] = mean(runs.map((r) => r.measures[key]));
  views.set(selection, shown);
  return shown;
}

/* What is counted and what ranks: with several labels a sample the counts are of labels, and mAP ranks. */
const ONE_LABEL = { cell: "accuracy", learning: "learning accuracy", average: "average accuracy (last row)", forgetting: "forgetting (peak since learned)", transfer: "Transfer (before learning, column first)", forward: "forward transfer (before learning - initial row)", best: "average_accuracy", last: "average accuracy (last row)", row: "average accuracy (row)" };
const MANY_LABELS = { cell: "label accuracy", learning: "learning label accuracy", average: "average label accuracy (last row)", forgetting: "forgetting of label accuracy (peak since learned)", transfer: "Transfer of label accuracy (before learning, column first)", forward: "forward transfer of label accuracy (before learning - initial row)", best: "map", last: "mAP of seen classes (last row)", row: "mAP of seen classes (row)" };
const words = (v) => (v.multiLabel ? MANY_LABELS : ONE_LABEL);

/* Headings and labels of the page's own text, by `data-labels` where samples have several labels. */
function speak() {
  const many = view().multiLabel;
  for (const node of document.querySelectorAll("[data-labels]")) {
    node.dataset.plain ??= node.textContent;
    node.textContent = many ? node.dataset.labels : node.dataset.plain;
  }
  for (const node of document.querySelectorAll("[data-aria-labels]")) {
    node.dataset.ariaPlain ??= node.getAttribute("aria-label");
    node.setAttribute("aria-label", many ? node.dataset.ariaLabels : node.dataset.ariaPlain);
  }
}

const taskName = (v, j) => (v.names[j] === `task ${j}` ? `task ${j}` : `${j}: ${v.names[j]}`);
const cell = (v, i, j) => v.accuracy[i * v.tasks + j];

/* Bokeh */

const part = (plot, name) => plot.renderers.find((r) => r.name === name);
function fill(plot, name, data) {
  part(plot, name).data_source.data = data;
}
/* Bars, with stripes over those that `striped` names by position. */
function fillBars(plot, data, striped) {
  fill(plot, "bars", data);
  fill(plot, "stripes", Object.fromEntries(Object.entries(data).map(([key, values]) => [key, values.filter((_, k) => striped[k])])));
}
function range(plot, x0, x1, y0, y1) {
  plot.x_range.setv({ start: x0, end: x1, reset_start: x0, reset_end: x1 });
  plot.y_range.setv({ start: y0, end: y1, reset_start: y0, reset_end: y1 });
}
function empty(name, text) {
  const box = byId(`plot-${name}`);
  if (text) box.dataset.empty = text;
  else delete box.dataset.empty;
}
function image(values, rows, columns) {
  const { ndarray } = Bokeh.require("core/util/ndarray");
  return ndarray(values, { dtype: "float64", shape: [rows, columns] });
}

function theme() {
  inks.clear();
  const font = getComputedStyle(document.body).fontFamily, ink = css("--ink"), muted = css("--muted"), grid = css("--grid"), accent = css("--accent");
  for (const plot of Object.values(plots)) {
    for (const axis of [...plot.below, ...plot.left]) {
      axis.setv({ axis_label_text_font: font, major_label_text_font: font, axis_label_text_color: muted, major_label_text_color: muted, axis_line_color: css("--hair"), major_tick_line_color: css("--hair") });
    }
    for (const line of plot.center) line.setv?.({ grid_line_color: line.dimension === 1 && !part(plot, "gaps") ? grid : null });
    for (const name of ["tasks", "dots"]) part(plot, name)?.glyph.setv({ line_color: { value: muted }, fill_color: { value: muted } });
    const striped = part(plot, "stripes");
    if (striped) striped.glyph.hatch_color = { value: css("--card") };
    const blank = part(plot, "blank");
    if (blank) blank.glyph.hatch_color = { value: css("--hatch") };
    const labels = part(plot, "labels");
    if (labels) labels.glyph.text_font = { value: font };
    for (const name of ["mark", "mark_points"]) {
      const glyph = part(plot, name)?.glyph;
      if (glyph) glyph.setv(name === "mark_points" ? { line_color: { value: accent }, fill_color: { value: accent } } : { line_color: { value: accent } });
    }
    const gaps = part(plot, "gaps");
    if (gaps) gaps.glyph.line_color = { value: css("--card") };
    for (const name of ["joins", "diagonal", "front", "median", "line"]) {
      const found = part(plot, name);
      if (found) found.glyph.line_color = { value: name === "median" || name === "line" ? ink : muted };
    }
  }
}

/* The tooltip: text only. */
function tip(title, lines) {
  const box = byId("tip");
  box.replaceChildren(make("strong", title));
  for (const [key, value] of lines) {
    const line = make("div");
    line.append(make("span", key), make("span", value));
    box.append(line);
  }
  box.hidden = false;
  const size = box.getBoundingClientRect();
  const left = pointer.x + 16 + size.width > innerWidth ? pointer.x - 16 - size.width : pointer.x + 16;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${Math.max(4, Math.min(pointer.y + 16, innerHeight - size.height - 8))}px`;
}
const noTip = () => { byId("tip").hidden = true; };
