// The page from its data.

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main"), nav = document.querySelector("nav");

function section(id, title, ...children) {
  main.append(element("h2", { id }, title), ...children.filter((child) => child !== null));
  nav.append(element("a", { href: `#${id}` }, title));
}

// True for text that a line break would spoil: `0.4555`, `83.0%`, `1,099`, `2e-05`.
function isNumber(text) {
  return /^[-+]?[\d.,]+(e[-+]?\d+)?( ?%)?$/.test(text);
}

function tableOf(rows, className = null) {
  if (!rows.length) return null;
  const titles = Object.keys(rows[0]);
  const head = element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title)));
  const body = rows.map((row) => {
    const name = row[""];
    const cells = titles.map((title, i) => (i ? element("td", { class: isNumber(row[title]) ? "number" : null, dir: "auto" }, row[title]) : element("th", { scope: "row" }, row[title])));
    return element("tr", { class: name === "after" ? "is-after" : null }, ...cells);
  });
  return element("div", { class: "scroll" }, element("table", { class: className }, element("thead", {}, head), element("tbody", {}, ...body)));
}

function pairs(list) {
  return element("dl", {}, ...list.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
}

function aboutRun(run) {
  const parts = [data.runs.length > 1 ? element("h3", {}, run.name) : null, pairs(run.about)];
  if (run.warnings.length)
    parts.push(
      element("details", { open: "" }, element("summary", {}, "The run warned"),
        element("ul", { class: "warnings" }, ...run.warnings.map((text) => element("li", {}, text)))),
    );
  if (run.options.length)
    parts.push(element("details", {}, element("summary", {}, `All ${run.options.length} settings`), pairs(run.options)));
  return element("div", {}, ...parts.filter((part) => part !== null));
}

// --------------------------------------------------------------------------- where the distance is

function allTokens(rows, run) {
  return rows.flatMap((row) =>
    row.lines.filter((line) => line.run === run).flatMap((line) => line.tokens.map((token) => ({ row, line, token }))),
  ).filter(({ token }) => token.value !== null);
}

function share(part, whole) {
  return whole > 0 ? `${((100 * part) / whole).toFixed(0)} %` : "-";
}

function sum(tokens) {
  return tokens.reduce((total, { token }) => total + token.value, 0);
}

function textBefore({ line, token }) {
  return line.pieces.slice(Math.max(0, token.place - 8), token.place).join("").replace(/\s+/g, " ");
}

function context(each) {
  const box = element("td", { dir: "auto" });
  box.append(textBefore(each));
  box.append(element("b", {}, visible(each.token.text)));
  return box;
}

// The tokens, the worst first; those that would look the same stand together.
function alikeTokens(all) {
  const found = new Map();
  for (const each of [...all].sort((a, b) => b.token.value - a.token.value)) {
    const key = JSON.stringify([textBefore(each), each.token.text]);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(each);
  }
  return [...found.values()];
}

function likeliestCell(run, list) {
  if (!list.length) return element("td", {}, "not known");
  return element("td", {}, element("bdi", {}, visible(run.tokens.texts[list[0].index])), " ", element("span", { class: "number" }, percent(list[0].probability)));
}

function worstTable(run, all, view, knows) {
  const sides = knows ? ["student", "teacher"] : ["student"];
  const worst = alikeTokens(all).slice(0, 10), areRepeated = worst.some((alike) => alike.length > 1);
  const rows = worst.map((alike) => {
    const each = alike[0], times = areRepeated ? element("td", { class: "number" }, alike.length.toLocaleString("en")) : null;
    const button = element("button", { type: "button" }, each.token.value.toFixed(2));
    button.addEventListener("click", () => view.go(each.row, each.line, each.token));
    return element("tr", {}, element("td", {}, button), element("td", { class: "number" }, String(each.row.number)), times, context(each), ...sides.map((side) => likeliestCell(run, each.token[side])));
  });
  const titles = ["nats", "row", ...(areRepeated ? ["times"] : []), "text, and the token that follows", ...sides.map((side) => `${side} expects`)];
  const head = element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title)));
  return element("div", { class: "scroll" }, element("table", { class: "text" }, element("thead", {}, head), element("tbody", {}, ...rows)));
}

function sharesTable(all, parts, what) {
  const total = sum(all);
  return tableOf(parts.filter(([, part]) => part.length).map(([name, part]) => ({
    "": name,
    "tokens": part.length.toLocaleString("en"),
    "of all tokens": share(part.length, all.length),
    [`of all ${what}`]: share(sum(part), total),
    "mean, nats": (sum(part) / part.length).toFixed(3),
  })));
}

function whatOf(run) {
  return run.tokens.kl_is === null ? "surprise" : "distance";
}

// The run that is shown first: the closest to its teacher; without a KL, the first.
function closestRun(runs, rows) {
  const mean = (run) => sum(allTokens(rows, run)) / allTokens(rows, run).length;
  const means = new Map(runs.map((run) => [run, run.tokens.kl_is === null ? Infinity : mean(run)]));
  return runs.reduce((best, run) => (means.get(run) < means.get(best) ? run : best));
}

function wherePart(run, rows, view) {
  const all = allTokens(rows, run), total = sum(all);
  const what = whatOf(run);
  if (!all.length || !(total > 0)) return [element("p", {}, `There is no ${what} to show.`)];
  const sorted = [...all].sort((a, b) => b.token.value - a.token.value);
  let half = 0, count = 0;
  while (half < total / 2) half += sorted[count++].token.value;
  const parts = [
    ["the most likely token is the same", all.filter(({ token }) => !token.differs)],
    ["it differs", all.filter(({ token }) => token.differs)],
    ["it differs, and the teacher is sure", all.filter(({ token }) => token.differs && token.isSure)],
    ["the teacher is sure (80 % or more)", all.filter(({ token }) => token.isSure)],
    ["the teacher is right, the student is not", all.filter(({ token }) => token.isMissed)],
    ["the first 8 tokens of a row", all.filter(({ token }) => token.place <= 8)],
    ["all later ones", all.filter(({ token }) => token.place > 8)],
  ];
  const byText = new Map();
  for (const each of all) {
    const text = each.token.teacher.length ? visible(run.tokens.texts[each.token.teacher[0].index]) : visible(each.token.text);
    byText.set(text, [...(byText.get(text) ?? []), each]);
  }
  const frequent = [...byText].sort((a, b) => sum(b[1]) - sum(a[1])).slice(0, 8);
  const knows = all.some(({ token }) => token.teacher.length);
  return [
    element("p", {}, what === "distance"
      ? "The distance of a token is KL(teacher ‖ student) of what both sides predicted in its place, in nats; 0 where they predicted the same."
      : "The surprise of a token is -log p, in nats, where p is the probability that the student gave it."),
    element("p", {}, `Half of the ${what} is in ${count.toLocaleString("en")} of ${all.length.toLocaleString("en")} tokens (${share(count, all.length)}). The mean of all tokens is ${(total / all.length).toFixed(4)} nats.`),
    element("h3", {}, "The ten worst tokens"),
    worstTable(run, all, view, knows),
    knows ? element("h3", {}, "Kinds of tokens") : null,
    knows ? sharesTable(all, parts, what) : null,
    element("h3", {}, knows ? `What the teacher expected, where most ${what} is` : `The tokens with the most ${what}`),
    sharesTable(all, frequent, what),
  ].filter((part) => part !== null);
}

function whereSection(runs, rows, view) {
  const box = element("div");
  const fill = (run) => box.replaceChildren(...wherePart(run, rows, view));
  fill(view.main);
  view.watchers.push(fill);
  const what = runs.every((run) => whatOf(run) === "surprise") ? "surprise" : "distance";
  section("where", `Where the ${what} is`, runs.length > 1 ? view.runChoice("Run") : null, box);
}

function scaleLegend(kinds) {
  const what = kinds.has(null) ? "surprise" : "KL";
  const names = [`below ${LIMITS[0]}`, ...LIMITS.map((limit, i) => (i + 1 < LIMITS.length ? `${limit} to ${LIMITS[i + 1]}` : `${limit} and more`))];
  const keys = names.map((name, i) => element("span", {}, element("span", { class: `t k${i}` }, ` ${name} `)));
  const differs = element("span", {}, element("span", { class: "t d" }, " dotted "), " the most likely token differs");
  const given = element("span", {}, element("span", { class: "n" }, "grey"), " given, not predicted");
  return element("div", { class: "scale" }, element("span", {}, `${what}, nats:`), ...keys, kinds.has(null) ? null : differs, given);
}

function rowsSection(runs, rows, view) {
  const kinds = new Set(runs.map((run) => run.tokens.kl_is));
  const notes = [...new Set(runs.flatMap((run) => run.tokens.notes))];
  const intro = kinds.has(null)
    ? "The colour of a token says how much it surprises the student."
    : "The colour of a token says how far the student's prediction of it is from the teacher's: KL(teacher ‖ student).";
  const letters = new Set(runs.flatMap((run) => run.tokens.rows.flatMap((row) => [...(row.marks ?? "")])));
  const correction = letters.has("c") ? ["A token with a ", element("span", { class: "c" }, "line above"), " is the teacher's correction of a draft. "] : [];
  const marks = [..."dcst"].some((letter) => letters.has(letter))
    ? element("p", {}, "These completions were generated in the last evaluation. ", ...correction, "The panel of a token says who wrote it. Probabilities and KL are those at temperature 1, whatever the temperatures at which the completions were sampled.")
    : null;
  const knows = runs.some((run) => run.tokens.rows.some((row) => row.teacher.ids.some((index) => index >= 0)));
  section(
    "rows", "Held-out rows",
    element("p", {}, `${intro} Point at a token, or press it, to see what ${knows ? "both sides" : "the student"} expected. With the keyboard: Tab to a row, then the arrow keys; Enter keeps the panel, Escape closes it.`),
    marks, ...notes.map((note) => element("p", { class: "soft" }, note)),
    scaleLegend(kinds), view.tools(), view.count, view.list, view.more,
  );
  view.show();
}

// ------------------------------------------------------------------------------------------------ all

document.title = `${data.title} · hf_distill report`;
document.querySelector("h1").textContent = data.title;
section("run", data.runs.length > 1 ? "Runs" : "Run", element("div", { class: "runs" }, ...data.runs.map(aboutRun)));
section("results", "Results", ...data.tables.flatMap(({ rows, note }) => [tableOf(rows), note ? element("p", { class: "soft" }, note) : null]));
if (data.columns.length)
  main.append(element("details", {}, element("summary", {}, "What the columns mean"), pairs(data.columns)));
if (!data.tables.length) main.append(element("p", {}, "There were no held-out rows (--eval_dataset) to measure the student on."));
if (data.texts.length) section("texts", "Generated texts", ...data.texts.flatMap(({ rows, note }) => [tableOf(rows, "text"), element("p", { class: "soft" }, note)]));
if (data.settings.length) section("settings", "Settings that differ", ...data.settings.map(({ rows }) => tableOf(rows)));
if (data.charts.length) section("curves", "Curves", element("div", { class: "charts" }, ...data.charts.map((chart) => chartFigure(chart, data.runs.map((run) => run.name)))));
const withRows = data.runs.filter((run) => run.tokens && run.tokens.rows.length);
if (withRows.length) {
  const rows = collectRows(withRows), view = new RowsView(rows, withRows, closestRun(withRows, rows));
  whereSection(withRows, rows, view);
  rowsSection(withRows, rows, view);
} else {
  section("rows", "Held-out rows", element("p", {}, "This report has no rows: none were held out, or the student is split over several processes."));
}
