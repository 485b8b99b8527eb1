// Charts: curves over the steps, as SVG.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 420, HEIGHT = 230, LEFT = 46, RIGHT = 14, TOP = 12, BOTTOM = 26;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function drawn(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function ticks(low, high, most, whole) {
  const raw = (high - low) / most || 1;
  const size = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].map((k) => k * size).find((each) => each >= raw * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step || 0);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const k of [1, 2, 5]) {
      const value = k * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  return found.length > 6 ? found.filter((value) => /^1/.test(value.toExponential())) : found;
}

function number(value, isPercent) {
  if (value === 0) return isPercent ? "0 %" : "0";
  if (isPercent) return `${(100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0)} %`;
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

// A scale from values to pixels: linear, or logarithmic where small values would be lost.
function scaleOf(values, isPercent, mayBeLog) {
  let low = Math.min(...values), high = Math.max(...values);
  const isLog = mayBeLog && low > 0 && high / low > 30;
  if (isLog) {
    [low, high] = [low / 1.15, high * 1.15];
  } else {
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    const bottom = low >= 0 && low < high / 3 ? 0 : low - room;
    [low, high] = [bottom, isPercent && high <= 1 ? Math.min(1, high + room) : high + room];
  }
  const unit = isLog ? (value) => Math.log(value / low) / Math.log(high / low) : (value) => (value - low) / (high - low);
  return {
    isLog,
    ticks: isLog ? logTicks(low, high) : ticks(low, high, 5, false),
    at: (value) => TOP + (1 - unit(value)) * (HEIGHT - TOP - BOTTOM),
  };
}

function colorOf(chart, series, runs) {
  const keys = runs.length > 1 ? runs : [...new Set(chart.series.map((each) => each.name + each.is_right))];
  const place = keys.indexOf(runs.length > 1 ? series.run : series.name + series.is_right);
  return `var(--c${place % 6})`;
}

const DASHES = { false: "", true: "5 3" };

function labelOf(series, runs, chart) {
  const parts = runs.length > 1 ? [series.run] : [];
  if (new Set(chart.series.map((each) => each.name)).size > 1) parts.push(series.name);
  parts.push(series.is_held_out ? "held-out" : "training");
  return parts.join(", ");
}

function chartFigure(chart, runs) {
  const left = chart.series.filter((each) => !each.is_right), right = chart.series.filter((each) => each.is_right);
  const steps = [...new Set(chart.series.flatMap((each) => each.steps))].sort((a, b) => a - b);
  const values = [...left.flatMap((each) => each.values), ...chart.lines.map((line) => line.value)];
  const y = scaleOf(values, chart.is_percent, chart.better === "less");
  const yRight = right.length ? scaleOf(right.flatMap((each) => each.values), false, true) : null;
  const end = yRight ? WIDTH - LEFT + 6 : WIDTH - RIGHT;
  const first = steps[0], last = Math.max(steps.at(-1), first + 1);
  const x = (step) => LEFT + ((step - first) / (last - first)) * (end - LEFT);
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0" });
  svg.setAttribute("aria-label", `${chart.title}. Arrow keys move over the steps.`);

  for (const tick of y.ticks) {
    svg.append(drawn("line", { class: "grid", x1: LEFT, x2: end, y1: y.at(tick), y2: y.at(tick) }));
    svg.append(drawn("text", { x: LEFT - 5, y: y.at(tick) + 4, "text-anchor": "end" }, number(tick, chart.is_percent)));
  }
  for (const tick of yRight ? yRight.ticks : [])
    svg.append(drawn("text", { x: end + 5, y: yRight.at(tick) + 4 }, number(tick, false)));
  for (const tick of ticks(first, last, 5, true))
    svg.append(drawn("text", { x: x(tick), y: HEIGHT - 8, "text-anchor": "middle" }, tick.toLocaleString("en")));
  for (const line of chart.lines)
    svg.append(drawn("line", { x1: LEFT, x2: end, y1: y.at(line.value), y2: y.at(line.value), stroke: "currentColor", "stroke-dasharray": "1 4", "stroke-width": 2 }));
  for (const series of chart.series) {
    const color = colorOf(chart, series, runs), at = (series.is_right ? yRight : y).at;
    const points = series.steps.map((step, i) => [x(step).toFixed(1), at(series.values[i]).toFixed(1)]);
    const style = `fill:none;stroke:${color};stroke-width:${series.is_held_out ? 2 : 1.6}`;
    svg.append(drawn("path", { d: "M" + points.map((point) => point.join(",")).join("L"), style, "stroke-dasharray": DASHES[series.is_held_out] }));
    if (series.is_held_out || points.length === 1)
      for (const [cx, cy] of points.length <= 60 ? points : []) svg.append(drawn("circle", { cx, cy, r: 2.6, style: `fill:${color}` }));
  }
  const cursor = drawn("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);

  const unit = [chart.unit, y.isLog ? "log scale" : "", chart.better ? `${chart.better} is better` : ""].filter(Boolean).join("; ");
  const when = element("p", { class: "soft" });
  const legend = element("ul", { class: "legend" });
  const shown = [...chart.series, ...chart.lines].map((series) => {
    const key = drawn("svg", { viewBox: "0 0 32 8", "aria-hidden": "true" });
    const isLine = !("steps" in series);
    const color = isLine ? "currentColor" : colorOf(chart, series, runs);
    key.append(drawn("line", { x1: 0, x2: 32, y1: 4, y2: 4, style: `stroke:${color};stroke-width:2`, "stroke-dasharray": isLine ? "1 4" : DASHES[series.is_held_out] }));
    if (!isLine && series.is_held_out) key.append(drawn("circle", { cx: 16, cy: 4, r: 3, style: `fill:${color}` }));
    const value = element("span");
    let label = isLine ? series.name : labelOf(series, runs, chart);
    if (series.is_right) label += ` (right axis, ${chart.right_unit})`;
    legend.append(element("li", {}, key, element("span", {}, label), value));
    return { series, value };
  });
  function show(step) {
    cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) for (const key of ["x1", "x2"]) cursor.setAttribute(key, x(step));
    when.textContent = step === null ? "the last values" : `step ${step.toLocaleString("en")}`;
    for (const { series, value } of shown) {
      const at = step === null || !series.steps ? 0 : series.steps.findLastIndex((each) => each <= step);
      const last = !series.steps ? series.value : step === null ? series.values.at(-1) : series.values[at];
      // A curve may have no value at this step: its last one before is shown, with the step that it is of.
      const of = step === null || !series.steps || series.steps[at] === step ? "" : ` (step ${series.steps[at]?.toLocaleString("en")})`;
      value.textContent = at < 0 ? "-" : number(last, chart.is_percent && !series.is_right) + of;
    }
  }
  let place = null;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * WIDTH;
    place = steps.reduce((best, step, i) => (Math.abs(x(step) - px) < Math.abs(x(steps[best]) - px) ? i : best), 0);
    show(steps[place]);
  });
  const leave = () => { place = null; show(null); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    place = Math.min(steps.length - 1, Math.max(0, place === null ? (move > 0 ? 0 : steps.length - 1) : place + move));
    show(steps[place]);
  });
  show(null);
  return element("figure", {}, element("h3", {}, chart.title), element("p", { class: "soft" }, unit), svg, when, legend);
}
