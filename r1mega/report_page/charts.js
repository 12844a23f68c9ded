"use strict";
const run = JSON.parse(document.getElementById("data").textContent);
const NS = document.getElementById("blank").namespaceURI;
const charts = [];
let smoothing = 0;

// ---- small helpers: everything that comes from the run is written as text, never as markup ----

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function draw(parent, tag, attributes) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}
const has = (metrics, name) => (metrics[name] || []).some((value) => value !== null);

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}
const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + "%");
const seconds = (value) => (value === null || value === undefined ? "–" : number(value) + " s");

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const values = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) values.push(index * step);
  return values;
}
function smooth(values, decay) {
  let total = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    total = decay * total + (1 - decay) * value;
    weight = decay * weight + (1 - decay);
    return total / weight;
  });
}

function response(text) {
  const pre = make("pre", {});
  let inside = "";
  for (const part of text.split(/(<\/?(?:think|answer)>)/)) {
    const tag = part.match(/^<(\/?)(think|answer)>$/);
    if (!tag) { pre.append(make("span", { class: inside }, part)); continue; }
    pre.append(make("span", { class: "tag" }, part));
    inside = tag[1] ? "" : tag[2];
  }
  return pre;
}

// ---- charts: spec.metrics holds columns of equal length, one of them `step` ----
// Charts share the pointer's step, but one that is `apart`, with another run's steps, keeps to itself.

function chart(parent, spec) {
  const { metrics } = spec, steps = metrics.step || [];
  const series = spec.series.filter((entry) => has(metrics, entry.key)).map((entry, index) => {
    const values = metrics[entry.key];
    const sparse = values.filter((value) => value !== null).length < values.length / 2;
    return { ...entry, color: `var(--c${(entry.color ?? index) % 10})`, values, sparse };
  });
  if (!series.length) return;
  const format = spec.format || number;
  const caption = make("figcaption", {}, make("span", { class: "name" }, spec.title));
  const readouts = series.map((entry) => {
    const value = make("b", {});
    caption.append(make("span", { class: entry.label ? "key" : "key alone", style: `--color:${entry.color}` }, entry.label + " ", value));
    return value;
  });
  const figure = make("figure", { class: "card chart" + (spec.hero ? " hero" : "") }, caption);
  if (spec.note) figure.append(make("p", { class: "note" }, spec.note));
  const svg = draw(figure, "svg", { role: "img", "aria-label": spec.title });
  parent.append(figure);
  const state = { spec, steps, series, format, readouts, svg, hovered: null };
  charts.push(state);
  svg.addEventListener("pointermove", (event) => {
    const share = (event.clientX - svg.getBoundingClientRect().left - state.left) / (state.right - state.left);
    hover(state, steps[nearest(steps, state.first + share * (state.last - state.first))]);
  });
  svg.addEventListener("pointerleave", () => hover(state, null));
}

function published(parent, curve) {
  const scale = curve.share ? { format: percent, max: 1 } : {};
  chart(parent, { ...curve, ...scale, apart: true, min: 0, series: [{ key: "value", label: "", color: 1, exact: true }] });
}

// Where the length limit changes: lines in a chart.
function limits(steps, caps) {
  const marks = steps.map((_, index) => index).filter((index) => index && caps[index] && caps[index - 1] && caps[index] !== caps[index - 1]);
  return { marks: marks.map((index) => steps[index]), markNames: marks.map((index) => "limit " + number(caps[index])) };
}

function nearest(steps, step) {
  let best = 0;
  steps.forEach((value, index) => { if (Math.abs(value - step) < Math.abs(steps[best] - step)) best = index; });
  return best;
}

function hover(state, step) {
  for (const other of charts) {
    if (other !== state && (other.spec.apart || state.spec.apart)) continue;
    other.hovered = step;
    mark(other);
  }
}

function mark(state) {
  const last = (values) => values.findLast((value) => value !== null);
  const { steps, hovered } = state, index = hovered === null ? null : nearest(steps, hovered);
  state.series.forEach((entry, position) => {
    const past = entry.sparse ? entry.values.slice(0, index + 1) : [entry.values[index]];
    const value = last(hovered === null ? entry.values : past);
    state.readouts[position].textContent = state.format(value);
  });
  state.cursor.replaceChildren();
  if (index === null) return;
  const x = state.x(steps[index]);
  draw(state.cursor, "line", { x1: x, x2: x, y1: state.top, y2: state.bottom, class: "cursor" });
  const right = x > (state.left + state.right) / 2;
  const text = draw(state.cursor, "text", { x: x + (right ? -6 : 6), y: state.top + 10, "text-anchor": right ? "end" : "start" });
  text.textContent = "step " + steps[index];
  if (state.spec.stacked) return;
  for (const entry of state.series) {
    const value = entry.values[index];
    if (value !== null) draw(state.cursor, "circle", { cx: x, cy: state.y(value), r: 3.5, fill: entry.color });
  }
}

function stack(steps, series) {
  const base = steps.map(() => 0);
  return series.map((entry) => entry.values.map((value, index) => {
    const low = base[index];
    base[index] += value || 0;
    return [low, base[index]];
  }));
}

function range(state, layers) {
  const { spec, series } = state;
  let values = layers ? layers.flat(2) : series.flatMap((entry) => entry.values.filter((value) => value !== null));
  if (spec.level !== undefined && spec.level !== null) values = values.concat(spec.level);
  let low = values.reduce((a, b) => Math.min(a, b), spec.min ?? Infinity);
  let high = values.reduce((a, b) => Math.max(a, b), spec.max ?? -Infinity);
  if (low > 0 && low < 0.5 * high) low = 0;
  if (high === low) { high += Math.abs(high) * 0.1 || 1; low -= Math.abs(low) * 0.1; }
  const room = spec.max === high ? 0 : (high - low) * 0.05;
  return [low, high + room];
}

function render(state) {
  const { spec, steps, series, svg } = state;
  const width = svg.clientWidth || 400, height = spec.hero ? 300 : 190;
  svg.replaceChildren();
  svg.setAttribute("height", height);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  Object.assign(state, { left: 46, right: width - 10, top: 8, bottom: height - 22, first: steps[0], last: steps[steps.length - 1] });
  const layers = spec.stacked ? stack(steps, series) : null;
  const [low, high] = range(state, layers);
  const span = state.last - state.first || 1;
  state.x = (step) => state.left + ((step - state.first) / span) * (state.right - state.left);
  state.y = (value) => state.bottom - ((value - low) / (high - low)) * (state.bottom - state.top);
  const tickText = spec.format === percent ? (value) => number(100 * value) + "%" : number;
  for (const value of ticks(low, high, spec.hero ? 5 : 4)) {
    draw(svg, "line", { x1: state.left, x2: state.right, y1: state.y(value), y2: state.y(value), class: "grid" });
    draw(svg, "text", { x: state.left - 6, y: state.y(value) + 4, "text-anchor": "end" }).textContent = tickText(value);
  }
  for (const value of ticks(state.first, state.first + span, width / 110)) {
    if (Number.isInteger(value)) draw(svg, "text", { x: state.x(value), y: height - 6, "text-anchor": "middle" }).textContent = value;
  }
  if (spec.level !== undefined && spec.level !== null) {
    const y = state.y(spec.level);
    draw(svg, "line", { x1: state.left, x2: state.right, y1: y, y2: y, class: "level" });
    draw(svg, "text", { x: state.right, y: y - 4, "text-anchor": "end" }).textContent = spec.levelName;
  }
  for (const [index, step] of (spec.marks || []).entries()) {
    const x = state.x(step), left = x > (state.left + state.right) / 2;
    draw(svg, "line", { x1: x, x2: x, y1: state.top, y2: state.bottom, class: "level" });
    const name = draw(svg, "text", { x: x + (left ? -4 : 4), y: state.top + 24 + 12 * (index % 3), "text-anchor": left ? "end" : "start" });
    name.textContent = spec.markNames[index];
  }
  series.forEach((entry, index) => layers ? area(state, entry, layers[index]) : line(state, entry));
  state.cursor = draw(svg, "g", {});
  mark(state);
}

function area(state, entry, layer) {
  const { steps } = state;
  const forward = steps.map((step, index) => `${state.x(step)},${state.y(layer[index][1])}`);
  const back = steps.map((step, index) => `${state.x(step)},${state.y(layer[index][0])}`).reverse();
  draw(state.svg, "polygon", { points: forward.concat(back).join(" "), fill: entry.color, opacity: 0.82 });
}

function line(state, entry) {
  const { steps } = state;
  const path = (values) => {
    let text = "", pen = "M";
    values.forEach((value, index) => {
      if (value === null) { if (!entry.sparse) pen = "M"; return; }
      text += `${pen}${state.x(steps[index]).toFixed(1)} ${state.y(value).toFixed(1)}`;
      pen = "L";
    });
    return text;
  };
  const common = { fill: "none", stroke: entry.color, "stroke-linejoin": "round" };
  const bold = { ...common, "stroke-width": 2, "stroke-dasharray": entry.dashed ? "6 4" : "none" };
  if (entry.sparse || entry.exact || smoothing === 0) {
    draw(state.svg, "path", { d: path(entry.values), ...bold });
  } else {
    draw(state.svg, "path", { d: path(entry.values), ...common, "stroke-width": 1, opacity: 0.28 });
    draw(state.svg, "path", { d: path(smooth(entry.values, smoothing)), ...bold });
  }
  if (!entry.sparse && steps.length > 12) return;
  entry.values.forEach((value, index) => {
    if (value !== null) draw(state.svg, "circle", { cx: state.x(steps[index]), cy: state.y(value), r: 3, fill: entry.color });
  });
}

// ---- light and dark, smoothing, width ----

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

function showCharts() {
  const slider = document.getElementById("smoothing");
  smoothing = charts.some((state) => state.steps.length > 40) ? 0.8 : 0;
  slider.value = smoothing;
  slider.addEventListener("input", () => { smoothing = Number(slider.value); charts.forEach(render); });
  charts.forEach(render);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; charts.forEach(render); } });
}
