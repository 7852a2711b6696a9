/* Methods over the stream and over class orders, and tasks before they are learned. */

const stream = {
  draw() {
    const v = view(), plot = plots.stream, lines = { xs: [], ys: [], color: [], width: [] }, bands = { xs: [], ys: [], color: [] };
    const ends = { x: [], y: [], color: [], marker: [], size: [], alpha: [] };
    this.points = [];
    for (const g of onTop()) {
      const { band, members } = PAGE.groups[g], own = v.runs[0].group === g, color = groupColor(g);
      if (!band.rows.length) continue;
      lines.xs.push(band.rows); lines.ys.push(band.mean); lines.color.push(color); lines.width.push(own ? 3 : 1.5);
      if (band.half.every(isNumber)) {
        const up = band.mean.map((m, k) => m + band.half[k]), down = band.mean.map((m, k) => m - band.half[k]);
        bands.xs.push([...band.rows, ...[...band.rows].reverse()]); bands.ys.push([...up, ...down.reverse()]); bands.color.push(color);
      }
      ends.x.push(band.rows.at(-1)); ends.y.push(band.mean.at(-1)); ends.color.push(color); ends.marker.push(groupMarker(g));
      ends.size.push(own ? 13 : 9); ends.alpha.push(own ? 0.9 : 0.4);
      band.rows.forEach((x, k) => this.points.push({ x, y: band.mean[k], half: band.half[k], group: g, n: members.length }));
    }
    fill(plot, "bands", bands);
    fill(plot, "lines", lines);
    fill(plot, "runs", ends);
    const [y0, y1] = fit(this.points.flatMap((p) => [p.y, ...(isNumber(p.half) ? [Math.max(p.y - p.half, 0), Math.min(p.y + p.half, 1)] : [])]), 0.05);
    const last = Math.max(...this.points.map((p) => p.x), 1), first = Math.min(...this.points.map((p) => p.x), last);
    range(plot, first - 0.02 * last, last * 1.03, y0, y1);
    plot.left[0].axis_label = words(v).row;
    empty("stream", this.points.length ? "" : "nothing was evaluated yet");
    const what = v.multiLabel ? "mAP of the classes seen so far" : "average accuracy over the tasks learned so far";
    byId("stream-about").textContent = PAGE.runs.length === 1 ? `The ${what}, after each task.` : `Mean over the runs of each method${scenario() ? ` on ${scenario()}` : ""} of the ${what}; the band is the 95 % t interval, from 3 runs on.`;
    groupKey(byId("stream-key"));
  },
  hover(x, y) {
    const p = closest(plots.stream, this.points, x, y);
    if (!p) return leave();
    focus(p.x, p.x);
    const lines = [["after task", String(p.x)], [words(view()).row, `${fmt(p.y)}${isNumber(p.half) ? ` ± ${fmt(p.half)}` : ""}`], ["runs", String(p.n)]];
    return tip(PAGE.groups[p.group].label, lines);
  },
  mark(j) {
    const points = (this.points ?? []).filter((p) => p.x === j && p.group === view().runs[0].group);
    fill(plots.stream, "mark", { x: points.map((p) => p.x), y: points.map((p) => p.y) });
  },
};

/* The nearest of some points, none when it is far away. */
function closest(plot, points, x, y) {
  const w = plot.x_range.end - plot.x_range.start, h = plot.y_range.end - plot.y_range.start;
  let best = null, distance = 0.05;
  for (const p of points ?? []) {
    const d = Math.hypot((p.x - x) / w, (p.y - y) / h);
    if (d < distance) [best, distance] = [p, d];
  }
  return best;
}

const orders = {
  draw() {
    if (byId("plot-orders").closest("section").hidden) return;
    const v = view(), plot = plots.orders, lines = { xs: [], ys: [], color: [], width: [] };
    const runs = { x: [], y: [], color: [], marker: [], size: [], alpha: [] };
    this.points = [];
    for (const g of onTop()) {
      const piles = new Map(), own = v.runs[0].group === g;
      for (const k of PAGE.groups[g].members) {
        const r = PAGE.runs[k], y = r.measures[words(v).best];
        if (r.multiLabel !== v.multiLabel || !isNumber(y)) continue;
        runs.x.push(r.order); runs.y.push(y); runs.color.push(groupColor(g)); runs.marker.push(groupMarker(g));
        runs.size.push(own ? 12 : 8); runs.alpha.push(own ? 0.85 : 0.3);
        this.points.push({ x: r.order, y, run: k });
        piles.set(r.order, [...(piles.get(r.order) ?? []), y]);
      }
      const xs = [...piles.keys()].sort((a, b) => a - b);
      if (xs.length < 2) continue;
      lines.xs.push(xs); lines.ys.push(xs.map((x) => mean(piles.get(x)))); lines.color.push(groupColor(g)); lines.width.push(own ? 2.5 : 1);
    }
    fill(plot, "lines", lines);
    fill(plot, "runs", runs);
    const [y0, y1] = fit(runs.y), last = Math.max(...runs.x, 1);
    range(plot, -0.3, last + 0.3, y0, y1);
    plot.left[0].axis_label = words(v).last;
    empty("orders", runs.x.length ? "" : "undefined in all runs");
    byId("orders-about").textContent = "A mark is a run; lines join the means of a method. Orders are numbered by order seed; marks and colors as for the methods over the stream.";
  },
  hover(x, y) {
    const p = closest(plots.orders, this.points, x, y);
    if (!p) return noTip();
    const r = PAGE.runs[p.run];
    return tip(`${PAGE.groups[r.group].label}, ${r.label}`, [["class order", String(p.x)], [words(r).last, fmt(p.y)]]);
  },
  mark() {},
};

const transfer = {
  kinds: [
    { key: "initial", label: "before any training", marker: "circle", sign: "○", color: "--muted", alpha: 0 },
    { key: "before", label: "mean of the evaluations before it was learned (its part of transfer)", marker: "diamond", sign: "◆", color: "--c1", alpha: 0.85 },
    { key: "learned", label: "right after it was learned", marker: "square", sign: "■", color: "--c0", alpha: 0.85 },
  ],
  draw() {
    const v = view(), plot = plots.transfer, points = { x: [], y: [], color: [], marker: [], size: [], alpha: [] }, joins = { x0: [], y0: [], x1: [], y1: [] };
    const early = v.before.some(isNumber) || v.initial.some(isNumber), size = v.tasks > 100 ? 4 : 9;
    this.at = new Map();
    for (let j = 0; early && j < v.tasks; j++) {
      const own = this.kinds.map((kind) => ({ ...kind, value: v[kind.key][j] })).filter((k) => isNumber(k.value));
      for (const k of own) {
        points.x.push(j); points.y.push(k.value); points.color.push(css(k.color)); points.marker.push(k.marker); points.size.push(size); points.alpha.push(k.alpha);
      }
      if (own.length > 1) { joins.x0.push(j); joins.x1.push(j); joins.y0.push(Math.min(...own.map((k) => k.value))); joins.y1.push(Math.max(...own.map((k) => k.value))); }
      if (own.length) this.at.set(j, own);
    }
    fill(plot, "runs", points);
    fill(plot, "joins", joins);
    const [y0, y1] = fit(points.y);
    range(plot, -0.6, Math.max(v.tasks, 1) - 0.4, y0, y1);
    plot.left[0].axis_label = words(v).cell;
    empty("transfer", early ? "" : "no task was evaluated before it was learned");
    byId("transfer-about").textContent = `How well each task was done before it was learned. ${words(v).transfer}: ${fmt(v.measures.transfer)}; ${words(v).forward}: ${fmt(v.measures.forward_transfer)}.`;
    byId("transfer-key").replaceChildren(...this.kinds.map((k) => {
      const entry = make("span"), sign = make("b", k.sign);
      sign.style.color = css(k.color);
      entry.append(sign, make("span", k.label));
      return entry;
    }));
  },
  hover(x) {
    const j = Math.round(x), own = this.at?.get(j);
    if (!own) return leave();
    focus(j, state.row);
    return tip(taskName(view(), j), own.map((k) => [k.key === "before" ? "before it was learned, mean" : k.label, fmt(k.value)]));
  },
  mark(j) {
    const own = this.at?.get(j) ?? [];
    fill(plots.transfer, "mark", { x: own.map(() => j), y: own.map((k) => k.value) });
  },
};
