/* Charts of the run or method that is shown: matrix, retention, waterfall, stability against plasticity. */

let cividis = null;
const rgb = (color) => [1, 3, 5].map((k) => parseInt(color.slice(k, k + 2), 16));
const luminance = (color) => {
  const [r, g, b] = rgb(color).map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const hex = (color) => (typeof color === "string" ? color.slice(0, 7) : `#${(color >>> 8).toString(16).padStart(6, "0")}`);

/* Old tasks and new ones: the part of cividis that stands out from the card. */
function taskColor(j, tasks) {
  const share = tasks > 1 ? j / (tasks - 1) : 0;
  return cividis[Math.round(dark() ? 110 + 145 * share : 140 * share)];
}

function ramp(box, palette, low, high, what, missing = true) {
  const stops = Array.from({ length: 17 }, (_, k) => palette[Math.round((k / 16) * (palette.length - 1))]);
  const bar = make("i", "", "ramp");
  bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  box.replaceChildren(make("span", what), make("span", low), bar, make("span", high));
  if (!missing) return;
  const note = make("span", "", "gap");
  note.append(make("i", "", "swatch missing"), make("span", "not measured"));
  box.append(note);
}

/* A heat map with numbers in its cells while they fit. */
function heat(plot, values, rows, columns, palette, low, high, text) {
  part(plot, "cells").glyph.color_mapper.setv({ palette, low, high });
  const flat = rows * columns > 0;
  fill(plot, "cells", flat ? { image: [image(values, rows, columns)], x: [-0.5], y: [-0.5], dw: [columns], dh: [rows] } : { image: [], x: [], y: [], dw: [], dh: [] });
  fill(plot, "blank", flat ? { left: [-0.5], right: [columns - 0.5], bottom: [-0.5], top: [rows - 0.5] } : { left: [], right: [], bottom: [], top: [] });
  const gaps = { x0: [], y0: [], x1: [], y1: [] }, labels = { x: [], y: [], text: [], color: [] };
  if (Math.max(rows, columns) <= 40) {
    for (let j = 1; j < columns; j++) { gaps.x0.push(j - 0.5); gaps.x1.push(j - 0.5); gaps.y0.push(-0.5); gaps.y1.push(rows - 0.5); }
    for (let i = 1; i < rows; i++) { gaps.x0.push(-0.5); gaps.x1.push(columns - 0.5); gaps.y0.push(i - 0.5); gaps.y1.push(i - 0.5); }
  }
  const width = byId(`plot-${plot.name}`).clientWidth - 66;
  if (text && rows <= 16 && width / columns >= 34) {
    for (let k = 0; k < rows * columns; k++) {
      if (!isNumber(values[k])) continue;
      const level = high > low ? Math.min(1, Math.max(0, (values[k] - low) / (high - low))) : 0;
      const color = palette[Math.round(level * (palette.length - 1))];
      labels.x.push(k % columns); labels.y.push(Math.floor(k / columns)); labels.text.push(text(values[k]));
      labels.color.push(luminance(color) > 0.22 ? "#10151a" : "#ffffff");
    }
  }
  fill(plot, "gaps", gaps);
  fill(plot, "labels", labels);
}

const largest = (values) => values.reduce((top, v) => (Number.isFinite(v) && Math.abs(v) > top ? Math.abs(v) : top), 0);
const stepUp = (value) => Math.max(0.05, Math.ceil(value * 20 - 1e-9) / 20);

function since(v) {
  return v.accuracy.map((a, k) => {
    const i = Math.floor(k / v.tasks), j = k % v.tasks, l = v.learnedAt[j];
    return l === null || l === undefined || l >= v.rows || i < l ? NaN : a - cell(v, l, j);
  });
}

const matrix = {
  draw() {
    const v = view(), plot = plots.matrix, scale = byId("matrix-scale");
    range(plot, -0.5, Math.max(v.tasks, 1) - 0.5, Math.max(v.rows, 1) - 0.5, -0.5);
    empty("matrix", v.rows === 0 ? "nothing was evaluated yet" : state.mode === "sd" && v.runs.length < 2 ? "needs several runs of one method: choose their mean above" : "");
    const difference = state.mode === "difference", other = difference && state.reference ? view(state.reference) : null;
    if (difference && !other) empty("matrix", "there is no other run");
    if (state.mode === "accuracy") {
      heat(plot, v.accuracy, v.rows, v.tasks, cividis, 0, 1, (x) => fmt(x, 2));
      ramp(scale, cividis, "0", "1", words(v).cell);
      this.values = v.accuracy;
    } else if (state.mode === "sd") {
      const top = stepUp(largest(v.sd)), several = v.runs.length > 1;
      this.values = several ? v.sd : new Float64Array(v.rows * v.tasks).fill(NaN);
      heat(plot, this.values, v.rows, v.tasks, cividis, 0, top, (x) => fmt(x, 2));
      ramp(scale, cividis, "0", fmt(top, 2), several ? `standard deviation over ${v.runs.length} runs` : "standard deviation");
    } else {
      const values = difference
        ? v.accuracy.map((a, k) => { const i = Math.floor(k / v.tasks), j = k % v.tasks; return other && i < other.rows && j < other.tasks ? a - cell(other, i, j) : NaN; })
        : since(v);
      const top = stepUp(largest(values));
      heat(plot, values, v.rows, v.tasks, PAGE.change, -top, top, (x) => signed(x, 2));
      ramp(scale, PAGE.change, `-${fmt(top, 2)} worse`, `+${fmt(top, 2)} better`, difference ? `difference in ${words(v).cell}` : "change since learned");
      this.values = values;
    }
    if (byId("matrix-table").open) this.table();
  },
  mark(j) {
    const v = view(), box = { left: [], right: [], bottom: [], top: [] };
    if (j >= 0 && v.rows) { box.left.push(j - 0.5); box.right.push(j + 0.5); box.bottom.push(-0.5); box.top.push(v.rows - 0.5); }
    fill(plots.matrix, "mark", box);
  },
  hover(x, y) {
    const v = view(), j = Math.round(x), i = Math.round(y);
    if (j < 0 || i < 0 || j >= v.tasks || i >= v.rows) return leave();
    focus(j, i);
    this.tell(i, j);
  },
  tell(i, j) {
    const v = view(), k = i * v.tasks + j, lines = [["after", taskName(v, i)], [words(v).cell, isNumber(cell(v, i, j)) ? fmt(cell(v, i, j)) : "not measured"]];
    if (v.runs.length === 1 && isNumber(cell(v, i, j))) lines.push(["correct", `${counts(v.runs[0]).correct[k]} of ${counts(v.runs[0]).total[k]}`]);
    if (v.runs.length > 1 && isNumber(v.sd[k])) lines.push([`sd over ${v.runs.length} runs`, fmt(v.sd[k])]);
    const l = v.learnedAt[j];
    if (isNumber(l) && l < v.rows && i > l) lines.push(["since learned", signed(cell(v, i, j) - cell(v, l, j))]);
    if (state.mode === "difference" && state.reference) lines.push(["difference", signed(this.values[k])]);
    tip(taskName(v, j), lines);
  },
  table() {
    const v = view(), box = byId("matrix-table").querySelector("div");
    if (v.tasks > 60 || v.rows > 60) return box.replaceChildren(make("p", "Too many tasks for a table.", "about"));
    const table = make("table", undefined, "grid-table"), head = make("tr");
    head.append(make("th", "after"));
    for (let j = 0; j < v.tasks; j++) head.append(make("th", String(j)));
    table.append(head);
    for (let i = 0; i < v.rows; i++) {
      const line = make("tr");
      line.append(make("th", taskName(v, i)));
      for (let j = 0; j < v.tasks; j++) line.append(make("td", isNumber(this.values[i * v.tasks + j]) ? fmt(this.values[i * v.tasks + j]) : "–"));
      table.append(line);
    }
    box.replaceChildren(table);
    return box;
  },
};

const retention = {
  /* The points of a task: rows from learning on, over rows or over age. */
  line(v, j) {
    const l = v.learnedAt[j], xs = [], ys = [];
    if (!isNumber(l)) return { xs, ys };
    for (let i = l; i < v.rows; i++) if (isNumber(cell(v, i, j))) { xs.push(state.axis === "age" ? i - l : i); ys.push(cell(v, i, j)); }
    return { xs, ys };
  },
  draw() {
    const v = view(), plot = plots.retention, many = v.tasks > MOST_LINES;
    this.lines = Array.from({ length: v.tasks }, (_, j) => this.line(v, j));
    const lines = { xs: [], ys: [], color: [], dash: [], width: [] }, starts = { x: [], y: [], color: [], marker: [] };
    const bands = { x: [], low: [], q1: [], median: [], q3: [], high: [] }, labels = { x: [], y: [], text: [], color: [] };
    if (many) {
      const piles = Array.from({ length: v.rows }, () => []);
      for (const { xs, ys } of this.lines) xs.forEach((x, k) => piles[x].push(ys[k]));
      piles.forEach((pile, x) => {
        if (!pile.length) return;
        const sorted = Float64Array.from(pile).sort();
        const q = (p) => { const at = p * (sorted.length - 1), k = Math.floor(at); return sorted[k] + (at - k) * ((sorted[k + 1] ?? sorted[k]) - sorted[k]); };
        bands.x.push(x); bands.low.push(q(0.1)); bands.q1.push(q(0.25)); bands.median.push(q(0.5)); bands.q3.push(q(0.75)); bands.high.push(q(0.9));
      });
    } else {
      this.lines.forEach(({ xs, ys }, j) => {
        if (!xs.length) return;
        const color = taskColor(j, v.tasks);
        lines.xs.push(xs); lines.ys.push(ys); lines.color.push(color); lines.dash.push(DASHES[j % 4]); lines.width.push(v.tasks > 20 ? 1.4 : 2);
        starts.x.push(xs[0]); starts.y.push(ys[0]); starts.color.push(color); starts.marker.push(MARKERS[j % 6]);
        if (v.tasks <= 12) { labels.x.push(xs.at(-1)); labels.y.push(ys.at(-1)); labels.text.push(String(j)); labels.color.push(color); }
      });
    }
    fill(plot, "band", bands);
    fill(plot, "lines", lines);
    fill(plot, "starts", starts);
    plot.left[0].axis_label = words(v).cell;
    plot.below[0].axis_label = state.axis === "age" ? "tasks since learned" : "after task";
    const pad = Math.max(v.rows * 0.06, 0.25);
    const least = (many ? bands.low : lines.ys.flat()).reduce((a, b) => Math.min(a, b), 1);
    range(plot, -pad / 2, Math.max(v.rows - 1, 1) + pad, least > 0.35 ? least - Math.max(0.02, 0.2 * (1 - least)) : -0.03, 1.015);
    this.spread(labels, plot.y_range);
    fill(plot, "labels", labels);
    empty("retention", v.rows ? "" : "nothing was evaluated yet");
    byId("retention-about").textContent = many
      ? `Median over tasks, with the middle 50 and 80 percent; a chosen task shows its own line. ${v.tasks} tasks.`
      : "Each line follows one task from the moment it was learned.";
  },
  /* Labels at the right end of lines, moved apart where they would overlap. */
  spread(labels, { start, end }) {
    const order = labels.y.map((_, k) => k).sort((a, b) => labels.x[a] - labels.x[b] || labels.y[a] - labels.y[b]), gap = 0.033 * (end - start);
    const together = (a, b) => b !== undefined && labels.x[a] === labels.x[b];
    order.forEach((k, at) => { if (together(k, order[at - 1])) labels.y[k] = Math.max(labels.y[k], labels.y[order[at - 1]] + gap); });
    for (let at = order.length - 1; at >= 0; at--) {
      const k = order[at], above = order[at + 1];
      labels.y[k] = Math.min(labels.y[k], together(k, above) ? labels.y[above] - gap : end - gap / 2);
    }
  },
  mark(j) {
    const own = (j >= 0 && this.lines?.[j]) || { xs: [], ys: [] };
    fill(plots.retention, "mark", { x: own.xs, y: own.ys });
    fill(plots.retention, "mark_points", own.xs.length <= MOST_LINES ? { x: own.xs, y: own.ys } : { x: [], y: [] });
  },
  hover(x, y) {
    const v = view(), at = Math.round(x);
    let best = -1, near = Infinity;
    this.lines.forEach(({ xs, ys }, j) => {
      const k = xs.indexOf(at);
      if (k >= 0 && Math.abs(ys[k] - y) < near) [best, near] = [j, Math.abs(ys[k] - y)];
    });
    if (best < 0 || near > 0.15) return leave();
    const row = state.axis === "age" ? at + v.learnedAt[best] : at;
    focus(best, row);
    matrix.tell(row, best);
  },
};

const waterfall = {
  /* [label, change, first row, last row], neighbors merged above 40 so that all bars stay readable. */
  steps(v) {
    const [start, ...changes] = v.waterfall, size = Math.ceil(changes.length / 40) || 1, merged = [];
    for (let k = 0; k < changes.length; k += size) {
      const own = changes.slice(k, k + size), rows = v.waterfallRows.slice(k, k + size);
      merged.push({ change: own.every(isNumber) ? own.reduce((a, b) => a + b, 0) : null, first: rows[0], last: rows.at(-1) });
    }
    return { start, merged };
  },
  draw() {
    const v = view(), plot = plots.waterfall, { start, merged } = this.steps(v);
    const bars = { x: [], top: [], bottom: [], color: [] }, striped = [], joins = { x0: [], y0: [], x1: [], y1: [] }, labels = { x: [], y: [], text: [], color: [] };
    this.bars = [];
    const good = isNumber(start) && merged.every((s) => isNumber(s.change));
    empty("waterfall", good ? "" : v.runs.length > 1 ? "undefined: the runs stand at different tasks or a cell was not measured" : "undefined: a learned task was not evaluated");
    byId("waterfall-about").textContent = "";
    plot.left[0].axis_label = `${words(v).cell}, mean over tasks`;
    if (good) {
      let level = start, low = start, high = start;
      const add = (x, bottom, top, color, loss, label, data) => {
        bars.x.push(x); bars.bottom.push(Math.min(bottom, top)); bars.top.push(Math.max(bottom, top)); bars.color.push(color); striped.push(loss);
        labels.x.push(x); labels.y.push(Math.max(bottom, top)); labels.text.push(label); labels.color.push(css("--ink"));
        this.bars.push(data);
      };
      for (const s of merged) { level += s.change; low = Math.min(low, level); high = Math.max(high, level); }
      const base = low > 0.35 ? Math.floor((low - 0.06) * 20) / 20 : 0, few = byId("plot-waterfall").clientWidth / (merged.length + 2) > 44;
      add(0, base, start, css("--level"), false, fmt(start), { title: words(v).learning, value: fmt(start) });
      level = start;
      merged.forEach((s, k) => {
        joins.x0.push(k + 0.36); joins.x1.push(k + 0.64); joins.y0.push(level); joins.y1.push(level);
        const next = level + s.change;
        add(k + 1, level, next, css(s.change < 0 ? "--loss" : "--gain"), s.change < 0, few ? signed(s.change) : "", {
          title: s.first === s.last ? `learning ${taskName(v, s.first)}` : `learning tasks ${s.first} to ${s.last}`, value: signed(s.change), task: s.first, last: s.last });
        level = next;
      });
      joins.x0.push(merged.length + 0.36); joins.x1.push(merged.length + 0.64); joins.y0.push(level); joins.y1.push(level);
      add(merged.length + 1, base, level, css("--level"), false, fmt(v.measures.average_accuracy), { title: words(v).average, value: fmt(v.measures.average_accuracy) });
      const end = merged.length + 1, pixels = (byId("plot-waterfall").clientWidth - 66) / (end + 1.2);
      const every = Math.ceil((merged.some((s) => s.first !== s.last) ? 52 : 26) / pixels), names = new Map([[0, "learned"], [end, "now"]]);
      merged.forEach((s, k) => { if ((k + 1) % every === 0 && Math.min(k + 1, end - k - 1) * pixels > 30) names.set(k + 1, s.first === s.last ? String(s.first) : `${s.first}+`); });
      plot.below[0].ticker.ticks = [...names.keys()];
      plot.below[0].major_label_overrides = names;
      plot.below[0].axis_label = "change of the mean over tasks while learning task";
      const side = Math.max(0.6, 20 / pixels);
      range(plot, -side, end + side, base, Math.min(high + (high - base) * 0.14 + 0.004, 1.2));
      byId("waterfall-about").textContent = `What learning each task added to or took from the tasks before it; the bars sum to the ${words(v).average.replace(" (last row)", "")} exactly.${base > 0 ? ` The axis starts at ${fmt(base, 2)}.` : ""}`;
    }
    fillBars(plot, bars, striped);
    fill(plot, "joins", joins);
    fill(plot, "labels", labels);
  },
  mark(j) {
    const box = { left: [], right: [], bottom: [], top: [] }, k = (this.bars ?? []).findIndex((b) => b.task <= j && j <= b.last);
    if (j >= 0 && k >= 0) {
      const { top, bottom } = part(plots.waterfall, "bars").data_source.data;
      box.left.push(k - 0.4); box.right.push(k + 0.4); box.bottom.push(bottom[k]); box.top.push(top[k]);
    }
    fill(plots.waterfall, "mark", box);
  },
  hover(x) {
    const bar = this.bars?.[Math.round(x)];
    if (!bar) return leave();
    if (bar.task !== undefined) focus(bar.task, bar.last);
    return tip(bar.title, [[bar.task === undefined ? "mean over tasks" : "change of the mean", bar.value]]);
  },
};
