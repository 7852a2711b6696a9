/* Charts over runs, and what methods report about themselves. */

/* Beyond eight, colors meet other signs, so that no two of 64 look alike. */
const slotColor = (k) => css(`--c${k % 8}`);
const slotMarker = (k) => MARKERS[(k + Math.floor(k / 8)) % 8];
const slotSign = (k) => SIGNS[(k + Math.floor(k / 8)) % 8];
const groupColor = (g) => slotColor(PAGE.groups[g].slot);
const groupMarker = (g) => slotMarker(PAGE.groups[g].slot);

/* Methods are drawn beside those on the same scenario; numbers of others do not compare. */
const scenario = () => PAGE.groups[view().runs[0].group].scenario;
const beside = () => PAGE.groups.map((g, k) => k).filter((k) => PAGE.groups[k].scenario === scenario());
const onTop = () => beside().sort((a, b) => (a === view().runs[0].group) - (b === view().runs[0].group)); // the shown one last
const nearby = (r) => PAGE.groups[r.group].scenario === scenario();

function groupKey(box, extra = []) {
  const shown = beside().slice(0, 24).map((k) => {
    const g = PAGE.groups[k], entry = make("span"), sign = make("b", slotSign(g.slot));
    sign.style.color = groupColor(k);
    entry.append(sign, make("span", `${g.method} (${g.members.length})`));
    return entry;
  });
  box.replaceChildren(...extra, ...shown);
}

function fit(values, pad = 0.08) {
  const finite = values.filter(isNumber);
  if (!finite.length) return [0, 1];
  const low = Math.min(...finite), high = Math.max(...finite), room = Math.max((high - low) * pad, 0.02);
  return [Math.max(low - room, -0.02), Math.min(high + room, 1.02)];
}

const plane = {
  draw() {
    const v = view(), plot = plots.plane, runs = { x: [], y: [], color: [], marker: [], size: [], alpha: [] };
    this.points = [];
    PAGE.runs.forEach((r, k) => {
      const { learning_accuracy: x, stability: y } = r.measures;
      if (!isNumber(x) || !isNumber(y) || !nearby(r)) return;
      const own = v.members.includes(k);
      runs.x.push(x); runs.y.push(y); runs.color.push(groupColor(r.group)); runs.marker.push(groupMarker(r.group));
      runs.size.push(own ? 15 : 10); runs.alpha.push(own ? 0.85 : 0.25);
      this.points.push({ x, y, run: k });
    });
    const tasks = { x: [], y: [] };
    v.learned.forEach((x, j) => {
      const y = v.final[j];
      if (!isNumber(x) || !isNumber(y)) return;
      tasks.x.push(x); tasks.y.push(y);
      this.points.push({ x, y, task: j });
    });
    fill(plot, "runs", runs);
    fill(plot, "tasks", tasks);
    const all = this.points.filter((p) => p.run !== undefined).sort((a, b) => b.x - a.x || b.y - a.y);
    const front = all.filter((p, k) => all.slice(0, k).every((q) => q.y < p.y)).reverse();
    fill(plot, "front", front.length > 1 ? { x: front.map((p) => p.x), y: front.map((p) => p.y) } : { x: [], y: [] });
    const [x0, x1] = fit([...runs.x, ...tasks.x]), [y0, y1] = fit([...runs.y, ...tasks.y]);
    range(plot, x0, x1, y0, y1);
    fill(plot, "diagonal", { x0: [-1], y0: [-1], x1: [2], y1: [2] });
    plot.below[0].axis_label = `plasticity: ${words(v).cell} when learned`;
    plot.left[0].axis_label = `stability: ${words(v).cell} now`;
    empty("plane", this.points.length ? "" : "nothing was evaluated yet");
    byId("plane-about").textContent = `Small dots are tasks of what is shown above, large marks are runs. Below the dashed line ${words(v).cell} was lost since learning. Dotted: no run is both more plastic and more stable.`;
    groupKey(byId("plane-key"));
  },
  near(x, y) {
    const plot = plots.plane, w = plot.x_range.end - plot.x_range.start, h = plot.y_range.end - plot.y_range.start;
    let best = null, distance = 0.05;
    for (const p of this.points) {
      const d = Math.hypot((p.x - x) / w, (p.y - y) / h);
      if (d < distance) [best, distance] = [p, d];
    }
    return best;
  },
  hover(x, y) {
    const v = view(), p = this.near(x, y);
    if (!p) return leave();
    if (p.run !== undefined) {
      const r = PAGE.runs[p.run];
      return tip(`${PAGE.groups[r.group].label}, ${r.label}`, [[words(r).learning, fmt(p.x)], [r.multiLabel ? "stability of label accuracy (old tasks)" : "stability (old tasks)", fmt(p.y)]]);
    }
    focus(p.task, v.rows - 1);
    return tip(taskName(v, p.task), [[`${words(v).cell} when learned`, fmt(p.x)], [`${words(v).cell} now`, fmt(p.y)]]);
  },
  mark(j) {
    const p = (this.points ?? []).find((q) => q.task === j);
    fill(plots.plane, "mark", { x: p ? [p.x] : [], y: p ? [p.y] : [] });
  },
};

const cost = {
  draw() {
    const v = view(), plot = plots.cost, lines = { xs: [], ys: [], color: [], width: [] }, ends = { x: [], y: [], color: [], marker: [], size: [], alpha: [] };
    this.points = [];
    this.ends = [];
    PAGE.runs.forEach((r, k) => {
      if (!nearby(r)) return;
      const own = v.members.includes(k), xs = [], ys = [], rows = [];
      const seconds = new Map(r.cost.map((c) => [c.task, c.train_seconds]));
      let sum = 0, next = 0;
      r.curveRows.forEach((row, at) => {
        for (; next <= row; next++) sum += isNumber(seconds.get(next)) ? seconds.get(next) : NaN;
        if (isNumber(sum) && isNumber(r.curve[at])) { xs.push(sum); ys.push(r.curve[at]); rows.push(row); }
      });
      if (!xs.length) return;
      lines.xs.push(xs); lines.ys.push(ys); lines.color.push(groupColor(r.group)); lines.width.push(own ? 2.5 : 1);
      ends.x.push(xs.at(-1)); ends.y.push(ys.at(-1)); ends.color.push(groupColor(r.group)); ends.marker.push(groupMarker(r.group));
      ends.size.push(own ? 14 : 9); ends.alpha.push(own ? 0.85 : 0.25);
      xs.forEach((x, at) => this.points.push({ x, y: ys[at], run: k, row: rows[at] }));
      this.ends.push({ x: xs.at(-1), y: ys.at(-1), rows: r.rows });
    });
    fill(plot, "lines", lines);
    fill(plot, "runs", ends);
    const most = Math.max(...this.ends.map((p) => p.rows)), front = this.ends.filter((p) => p.rows === most).sort((a, b) => a.x - b.x || b.y - a.y).filter((p, k, all) => all.slice(0, k).every((q) => q.y < p.y));
    fill(plot, "front", front.length > 1 ? { x: front.map((p) => p.x), y: front.map((p) => p.y) } : { x: [], y: [] });
    const top = Math.max(...this.points.map((p) => p.x), 0) || 1, [y0, y1] = fit(this.points.map((p) => p.y));
    range(plot, -0.03 * top, top * 1.06, y0, y1);
    plot.left[0].axis_label = words(v).row;
    empty("cost", this.points.length ? "" : "no training time was recorded");
    groupKey(byId("cost-key"));
  },
  hover(x, y) {
    const plot = plots.cost, w = plot.x_range.end - plot.x_range.start, h = plot.y_range.end - plot.y_range.start;
    let best = null, distance = 0.06;
    for (const p of this.points) {
      const d = Math.hypot((p.x - x) / w, (p.y - y) / h);
      if (d < distance) [best, distance] = [p, d];
    }
    if (!best) return leave();
    const r = PAGE.runs[best.run];
    if (view().members.includes(best.run)) focus(best.row, best.row);
    return tip(`${PAGE.groups[r.group].label}, ${r.label}`, [["after task", String(best.row)], ["training seconds", amount(best.x)], [words(r).row, fmt(best.y)]]);
  },
  mark(j) {
    const own = new Set(view().members), points = (this.points ?? []).filter((p) => p.row === j && own.has(p.run));
    fill(plots.cost, "mark", { x: points.map((p) => p.x), y: points.map((p) => p.y) });
  },
};

/* Bars by task, the mean over the runs that are shown. */
function bars(name, parts, unit) {
  return {
    draw() {
      const v = view(), plot = plots[name], data = { x: [], top: [], bottom: [], color: [] }, striped = [];
      this.byTask = new Map();
      const costs = v.runs.map((r) => new Map(r.cost.map((c) => [c.task, c])));
      for (let j = 0; j < v.tasks; j++) {
        let level = 0;
        for (const p of parts) {
          const value = mean(costs.map((own) => p.value(own.get(j) ?? {})));
          if (!isNumber(value)) continue;
          data.x.push(j); data.bottom.push(level); data.top.push(level + value); data.color.push(css(p.color)); striped.push(p.striped === true);
          level += value;
          this.byTask.set(j, [...(this.byTask.get(j) ?? []), [p.label, value]]);
        }
      }
      this.top = Math.max(...data.top, 0);
      fillBars(plot, data, striped);
      range(plot, -0.6, Math.max(v.tasks, 1) - 0.4, 0, this.top * 1.08 || 1);
      empty(name, !data.x.length ? "not recorded" : this.top > 0 ? "" : name === "parameters" ? "0: no parameter is trained by gradients" : "0 in every task");
    },
    hover(x) {
      const j = Math.round(x), lines = this.byTask?.get(j);
      if (!lines) return leave();
      focus(j, j);
      const kinds = name === "parameters" && view().runs.length === 1 ? Object.entries(view().runs[0].cost.find((c) => c.task === j)?.kinds ?? {}) : [];
      return tip(taskName(view(), j), [...lines.map(([label, value]) => [label, `${amount(value)}${unit}`]), ...kinds.slice(0, 8).map(([k, n]) => [k, amount(n)])]);
    },
    mark(j) {
      const on = this.byTask?.has(j);
      fill(plots[name], "mark", on ? { left: [j - 0.42], right: [j + 0.42], bottom: [0], top: [this.top * 1.04] } : { left: [], right: [], bottom: [], top: [] });
    },
  };
}

const seconds = bars("seconds", [
  { label: "training", value: (c) => c.train_seconds, color: "--c0" },
  { label: "evaluation", value: (c) => c.eval_seconds, color: "--level", striped: true },
], " s");
const parameters = bars("parameters", [{ label: "trainable", value: (c) => c.trainable ?? c.parameters, color: "--c0" }], "");
const memory = bars("memory", [{ label: "peak", value: (c) => (isNumber(c.peak_bytes) ? c.peak_bytes / 2 ** 20 : null), color: "--c0" }], " MiB");

/* The run whose drift is shown: the first one of the choice that was measured. */
const drifted = () => view().runs.find((r) => r.drift);

function driftNote(v) {
  const run = drifted();
  if (!run) return "This run has no measurement of drift.";
  return `Features and confidences on the same probe set after each task.${v.runs.length > 1 ? ` One run: ${run.label}.` : ""}`;
}

/* A panel per quantity that a method reports: a matrix, or series over the stream. */
function panel(index, kind = "panel") {
  const id = `${kind}${index}`;
  return {
    get content() { return kind === "panel" ? view().runs[0].panels[index] : drifted()?.drift[index]; },
    draw() {
      const p = this.content, plot = plots[id], box = byId(`box-${id}`);
      box.hidden = !p;
      if (!p) return;
      box.querySelector("figcaption").textContent = p.unit ? `${p.name}, ${p.unit}` : p.name;
      const lines = { xs: [], ys: [], color: [], dash: [] }, points = { x: [], y: [], color: [], marker: [] };
      const key = box.querySelector(".key, .scale"), numbers = (names) => new Map(p.signed ? names.map((name, k) => [k, name]) : []);
      plot.left[0].ticker.min_interval = p.matrix ? 1 : 0;
      plot.left[0].major_label_overrides = numbers(p.rows ?? []);
      plot.below[0].major_label_overrides = numbers(p.columns ?? []);
      this.points = [];
      if (p.matrix) {
        const [rows, columns] = p.shape, finite = p.matrix.filter(isNumber), values = Float64Array.from(p.matrix, (x) => x ?? NaN);
        const low = Math.min(0, ...finite.slice(0, 5e4)), high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
        range(plot, -0.5, columns - 0.5, rows - 0.5, -0.5);
        const top = stepUp(largest(values)), scale = p.signed ? [[...PAGE.change].reverse(), -top, top] : [cividis, low, high > low ? high : low + 1];
        heat(plot, values, rows, columns, ...scale, p.signed ? (x) => signed(x, 2) : null);
        ramp(key, scale[0], p.signed ? `-${fmt(top, 2)} better` : amount(low), p.signed ? `+${fmt(top, 2)} worse` : amount(high), p.unit || (p.signed ? "" : "value"), false);
        key.className = "scale";
        plot.below[0].axis_label = p.titles[0].includes("$") ? "column" : p.titles[0];
        plot.left[0].axis_label = p.titles[1].includes("$") ? "row" : p.titles[1];
      } else {
        heat(plot, [], 0, 0, cividis, 0, 1, null);
        const labels = [...new Set(p.lines.map((l) => l.label))], single = p.lines.every((l) => l.x.length === 1);
        const inTasks = p.lines.every((l) => isNumber(l.task));
        labels.forEach((label, k) => {
          const own = p.lines.filter((l) => l.label === label).sort((a, b) => (a.task ?? 0) - (b.task ?? 0));
          const pieces = own.map((l) => l.x.map((x, at) => ({
            x: inTasks ? (single ? l.task : l.task - 0.4 + (0.8 * (at + 0.5)) / l.x.length) : x, y: l.y[at], at: x, task: l.task, label })).filter((q) => isNumber(q.y)));
          const drawn = single ? [pieces.flat()] : pieces;
          for (const piece of drawn) {
            if (!piece.length) continue;
            lines.xs.push(piece.map((q) => q.x)); lines.ys.push(piece.map((q) => q.y)); lines.color.push(slotColor(k)); lines.dash.push(DASHES[k % 4]);
            this.points.push(...piece);
            if (piece.length <= 12) for (const q of piece) { points.x.push(q.x); points.y.push(q.y); points.color.push(slotColor(k)); points.marker.push(slotMarker(k)); }
          }
        });
        const xs = this.points.map((q) => q.x), ys = this.points.map((q) => q.y), low = Math.min(...ys), high = Math.max(...ys), room = (high - low) * 0.1 || Math.abs(high) * 0.1 || 1;
        if (xs.length) range(plot, Math.min(...xs) - 0.5, Math.max(...xs) + 0.5, low - room, high + room);
        plot.below[0].axis_label = inTasks ? (single ? (kind === "panel" ? "task" : "after task") : `task, ${p.x_title} within it`) : p.x_title;
        plot.left[0].axis_label = "";
        key.className = "key";
        key.replaceChildren(...labels.filter((l) => l).map((label, k) => {
          const entry = make("span"), sign = make("b", slotSign(k));
          sign.style.color = slotColor(k);
          entry.append(sign, make("span", label));
          return entry;
        }));
      }
      fill(plot, "lines", lines);
      fill(plot, "points", points);
    },
    hover(x, y) {
      const p = this.content, plot = plots[id];
      if (!p) return leave();
      if (p.matrix) {
        const [rows, columns] = p.shape, j = Math.round(x), i = Math.round(y);
        if (i < 0 || j < 0 || i >= rows || j >= columns) return leave();
        return tip(p.name, [[p.titles[0], p.columns[j] ?? String(j)], [p.titles[1], p.rows[i] ?? String(i)], ["value", `${amount(p.matrix[i * columns + j])} ${p.unit}`]]);
      }
      const w = plot.x_range.end - plot.x_range.start, h = plot.y_range.end - plot.y_range.start;
      let best = null, distance = 0.08;
      for (const q of this.points) {
        const d = Math.hypot((q.x - x) / w, (q.y - y) / h);
        if (d < distance) [best, distance] = [q, d];
      }
      if (!best) return leave();
      if (isNumber(best.task)) focus(best.task, best.task);
      return tip(best.label || p.name, [...(isNumber(best.task) ? [["task", taskName(view(), best.task)]] : []), [p.x_title, amount(best.at)], ["value", `${amount(best.y)} ${p.unit}`]]);
    },
    mark(j) {
      const p = this.content, plot = plots[id], on = p && !p.matrix && j >= 0 && p.lines.some((l) => l.task === j);
      fill(plot, "mark", on ? { left: [j - 0.45], right: [j + 0.45], bottom: [plot.y_range.start], top: [plot.y_range.end] } : { left: [], right: [], bottom: [], top: [] });
    },
  };
}

/* Which task predictions fell into, row by row shares, with a slider over the stream. */
const confusion = {
  get list() { return view().runs[0].confusions; },
  draw() {
    const slider = byId("confusion-row"), list = this.list;
    slider.max = String(Math.max(list.length - 1, 0));
    slider.value = slider.max;
    this.show();
  },
  show() {
    const list = this.list, shown = list[Number(byId("confusion-row").value)], plot = plots.confusion;
    empty("confusion", shown ? "" : "this run recorded no confusion");
    if (!shown) return;
    const n = shown.n, all = unpack(shown.counts), values = new Float64Array(n * n).fill(NaN);
    for (let i = 0; i < n; i++) {
      let sum = 0;
      for (let j = 0; j < n; j++) sum += all[i * n + j];
      for (let j = 0; sum > 0 && j < n; j++) values[i * n + j] = all[i * n + j] / sum;
    }
    this.shown = { n, all, values };
    range(plot, -0.5, n - 0.5, n - 0.5, -0.5);
    heat(plot, values, n, n, cividis, 0, 1, (x) => fmt(x, 2));
    byId("confusion-value").textContent = String(shown.after);
    byId("confusion-about").textContent = `Share of each task's test samples that were predicted as a class of each task, after task ${shown.after}.${view().runs.length > 1 ? ` One run: ${view().runs[0].label}.` : ""}`;
    ramp(byId("confusion-scale"), cividis, "0", "1", "share of the true task's samples");
  },
  hover(x, y) {
    const { n, all, values } = this.shown ?? { n: 0 }, j = Math.round(x), i = Math.round(y);
    if (i < 0 || j < 0 || i >= n || j >= n) return leave();
    focus(i, state.row);
    return tip(`true: ${taskName(view(), i)}`, [["predicted", taskName(view(), j)], ["share", fmt(values[i * n + j])], ["samples", amount(all[i * n + j])]]);
  },
  mark(j) {
    const n = this.shown?.n ?? 0;
    fill(plots.confusion, "mark", j >= 0 && j < n ? { left: [-0.5], right: [n - 0.5], bottom: [j - 0.5], top: [j + 0.5] } : { left: [], right: [], bottom: [], top: [] });
  },
};

/* How far predictions lean to the newest task, over the stream. */
const recency = {
  draw() {
    const list = view().runs[0].confusions.filter((c) => isNumber(c.bias)), plot = plots.recency;
    this.points = { x: list.map((c) => c.after), y: list.map((c) => c.bias) };
    fill(plot, "line", this.points);
    fill(plot, "dots", this.points);
    fill(plot, "diagonal", { x0: [-1e4], y0: [0], x1: [1e4], y1: [0] });
    const top = Math.max(...this.points.y, 0.05), low = Math.min(...this.points.y, 0), room = 0.1 * (top - low);
    range(plot, Math.min(...this.points.x, 1) - 0.5, Math.max(...this.points.x, 1) + 0.5, low - room, top + room);
    empty("recency", list.length ? "" : "undefined: it needs two tasks");
  },
  hover(x) {
    const at = Math.round(x), k = this.points.x.indexOf(at);
    if (k < 0) return leave();
    focus(at, at);
    return tip("task recency bias", [["after", taskName(view(), at)], ["value", signed(this.points.y[k])]]);
  },
  mark(j) {
    const k = (this.points?.x ?? []).indexOf(j);
    fill(plots.recency, "mark", k < 0 ? { x: [], y: [] } : { x: [j], y: [this.points.y[k]] });
  },
};
