/* Accuracy inside tasks: a line per task over optimizer steps, the average, task ends, and the deepest dip. */

const inside = {
  draw() {
    const v = view(), plot = plots.inside, run = v.runs.find((r) => r.inside), own = run?.inside;
    const lines = { xs: [], ys: [], color: [], dash: [], width: [] }, rules = { x0: [], y0: [], x1: [], y1: [] }, labels = { x: [], y: [], text: [], color: [] };
    this.own = own;
    this.points = [];
    plot.left[0].axis_label = words(v).cell;
    empty("inside", own ? "" : "this run was not evaluated inside its tasks");
    const few = own && own.lines.length <= MOST_LINES;
    for (const line of few ? own.lines : []) {
      lines.xs.push(line.k.map((k) => own.steps[k])); lines.ys.push(line.y);
      lines.color.push(taskColor(line.task, v.tasks)); lines.dash.push(DASHES[line.task % 4]); lines.width.push(own.lines.length > 20 ? 1.2 : 1.7);
    }
    for (const line of own?.lines ?? []) line.k.forEach((k, n) => this.points.push({ x: own.steps[k], y: line.y[n], task: line.task, during: own.tasks[k] }));
    const heights = this.points.map((p) => p.y), least = heights.reduce((a, b) => Math.min(a, b), 1), y0 = least > 0.35 ? least - 0.06 : -0.03;
    const last = Math.max(own?.steps.at(-1) ?? 1, 1), first = 0, wide = byId("plot-inside").clientWidth - 66;
    let before = first, right = -Infinity;
    for (const [step, task] of own?.ends ?? []) {
      rules.x0.push(step); rules.x1.push(step); rules.y0.push(y0); rules.y1.push(1.06);
      const middle = (before + step) / 2, at = (middle / last) * wide, name = v.tasks <= 12 ? `task ${task}` : String(task), size = 7 * name.length;
      if (at - size / 2 > right) { labels.x.push(middle); labels.y.push(1.055); labels.text.push(name); labels.color.push(css("--muted")); right = at + size / 2 + 8; }
      before = step;
    }
    range(plot, first - 0.01 * last, last * 1.02, y0, 1.06);
    fill(plot, "lines", lines);
    fill(plot, "diagonal", rules);
    fill(plot, "labels", labels);
    const mid = (own?.average ?? []).map((y, k) => ({ x: own.steps[k], y, half: own.half[k] })).filter((p) => isNumber(p.y));
    fill(plot, "line", { x: mid.map((p) => p.x), y: mid.map((p) => p.y) });
    const band = own?.sampled ? mid.filter((p) => isNumber(p.half)) : [];
    fill(plot, "bands", { x: band.map((p) => p.x), low: band.map((p) => Math.max(0, p.y - p.half)), high: band.map((p) => Math.min(1, p.y + p.half)) });
    this.dip(own, plot);
    this.say(own, run, v, few);
  },
  dip(own, plot) {
    const d = own?.dip, x = d ? own.steps[d.at] : 0;
    fill(plot, "dip", d ? { x0: [own.steps[d.from], x], x1: [x, x], y0: [d.level, d.level], y1: [d.level, d.low] } : { x0: [], y0: [], x1: [], y1: [] });
    part(plot, "dip").glyph.line_color = { value: css("--accent") };
    part(plot, "dip_point").glyph.setv({ line_color: { value: css("--accent") }, fill_color: { value: css("--accent") } });
    fill(plot, "dip_point", d ? { x: [x], y: [d.low] } : { x: [], y: [] });
  },
  say(own, run, v, few) {
    const about = byId("inside-about"), box = byId("inside-numbers");
    if (!own) { about.textContent = ""; return box.replaceChildren(); }
    const d = own.dip, parts = [`Evaluated every ${own.every} optimizer steps and at task ends (dashed).`, few ? "A line per task; the thick line is the mean over the tasks so far." : `The line is the mean over the tasks so far; a chosen task shows its own line. ${own.lines.length} tasks.`];
    if (own.sampled) parts.push("Old tasks were drawn at random: the band is the 95 % t interval of the mean over all of them.");
    if (d) parts.push(`Deepest dip (stability gap): ${taskName(v, d.task)} fell from ${fmt(d.level)} to ${fmt(d.low)} while ${taskName(v, d.while)} was learned, ${isNumber(d.back) ? `and was back after ${d.back} steps` : "and did not come back before the next switch"}.`);
    if (!own.whole) parts.push("Some evaluations are left out of the chart, none of the numbers.");
    if (v.multiLabel) parts.push("Every accuracy here is label accuracy; mAP is measured at task ends alone.");
    if (v.runs.length > 1) parts.push(`One run: ${run.label}.`);
    about.textContent = parts.join(" ");
    const table = make("table"), body = make("tbody");
    for (const [key, value, reason] of own.numbers) {
      const line = make("tr");
      line.append(make("th", key), make("td", fmt(value), "n"), make("td", reason, "about"));
      body.append(line);
    }
    table.append(body);
    return box.replaceChildren(table);
  },
  mark(j) {
    const line = this.own?.lines.find((l) => l.task === j);
    const data = { x: line ? line.k.map((k) => this.own.steps[k]) : [], y: line ? line.y : [] };
    fill(plots.inside, "mark", data);
    fill(plots.inside, "mark_points", data.x.length <= MOST_LINES ? data : { x: [], y: [] });
  },
  hover(x, y) {
    const p = closest(plots.inside, this.points, x, y);
    if (!p) return leave();
    focus(p.task, -1);
    const v = view();
    return tip(taskName(v, p.task), [["step", amount(p.x)], ["while learning", taskName(v, p.during)], [words(v).cell, fmt(p.y)]]);
  },
};
