// Held-out rows with coloured tokens: filters, order, search, and moving over them.

const ROWS_AT_ONCE = 15;

// Rows of all runs; those with the same text stand under each other.
function collectRows(runs) {
  const found = new Map();
  for (const run of runs.filter((each) => each.tokens)) {
    run.cutoff = cutoffOf(run);
    for (const row of run.tokens.rows) {
      const pieces = piecesOf(run.tokens, row), text = pieces.join("");
      const key = `${row.number}\n${text}`;
      if (!found.has(key)) found.set(key, { number: row.number, length: row.length, numTokens: row.tokens.length, text, pictures: row.pictures ?? [], numPictures: row.num_pictures ?? 0, lines: [] });
      const tokens = predicted(run.tokens, row);
      for (const token of tokens) token.text = pieces[token.place];
      const values = tokens.map((token) => token.value).filter((value) => value !== null);
      const mean = values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);
      found.get(key).lines.push({ run, pieces, tokens, mean, worst: Math.max(0, ...values) });
    }
  }
  return [...found.values()];
}

// The value that one token in fifty reaches.
function cutoffOf(run) {
  const values = run.tokens.rows.flatMap((row) => row.kl ?? row.surprise).filter((value) => value !== null).sort((a, b) => b - a);
  return values[Math.floor(values.length / 50)] ?? Infinity;
}

const FILTERS = {
  worst: ["the worst 2 % of tokens", (token, run) => token.value >= run.cutoff],
  differs: ["the most likely token differs", (token) => token.differs],
  sure: ["the teacher is sure (80 % or more)", (token) => token.isSure],
  missed: ["the teacher is right, the student is not", (token) => token.isMissed],
};

const ORDERS = {
  mean: ["mean of the row, largest first", (a, b) => b.mean - a.mean],
  worst: ["worst token of the row", (a, b) => b.worst - a.worst],
  number: ["order of the data", (a, b) => a.number - b.number],
};

class RowsView {
  constructor(rows, runs, main) {
    this.rows = rows;
    this.runs = runs;
    this.main = main; // the run whose numbers order and filter the rows
    this.choices = []; // the selects of this run
    this.watchers = []; // functions that are called when it changes
    this.active = new Set();
    this.order = "mean";
    this.search = "";
    this.spans = new WeakMap();
    this.list = element("div", { id: "rows" });
    this.count = element("p", { class: "soft", role: "status" });
    this.more = element("button", { type: "button" });
    this.more.addEventListener("click", () => this.show(this.shown + ROWS_AT_ONCE));
    for (const [event, pin] of [["pointerover", false], ["click", true], ["focusin", false]])
      this.list.addEventListener(event, (e) => this.open(e.target.closest?.(".t"), pin, event));
    this.list.addEventListener("pointerleave", () => hidePanel(false));
    this.list.addEventListener("focusout", () => hidePanel(false));
    this.list.addEventListener("keydown", (event) => this.move(event));
    addEventListener("keydown", (event) => event.key === "Escape" && hidePanel(true));
  }

  line(row) {
    return row.lines.find((line) => line.run === this.main) ?? row.lines[0];
  }

  matches(token, run) {
    return [...this.active].every((name) => FILTERS[name][1](token, run));
  }

  tools() {
    const tools = element("div", { class: "tools" });
    if (this.runs.length > 1) tools.append(this.runChoice("Order and filters by"));
    const orders = Object.entries(ORDERS);
    const labels = orders.map(([, [label]]) => label);
    if (this.runs.length > 1) {
      orders.push(["gap", ["", null]]);
      labels.push("difference between the runs");
    }
    tools.append(this.select("Order", labels, (i) => (this.order = orders[i][0])));
    const knows = this.runs.some((run) => run.tokens.rows.some((row) => row.teacher.ids.some((index) => index >= 0)));
    for (const [name, [label]] of Object.entries(FILTERS)) {
      if (name !== "worst" && !knows) continue;
      const box = element("input", { type: "checkbox", name });
      box.addEventListener("change", () => {
        box.checked ? this.active.add(name) : this.active.delete(name);
        this.show();
      });
      tools.append(element("label", {}, box, ` ${label}`));
    }
    const search = element("input", { type: "search", placeholder: "Search the rows", "aria-label": "Search the rows" });
    search.addEventListener("input", () => {
      this.search = search.value.toLowerCase();
      this.show();
    });
    tools.append(search);
    return tools;
  }

  // A label with a select of the run; all of them change together.
  runChoice(label) {
    const choice = this.select(label, this.runs.map((run) => run.name), (i) => {
      this.main = this.runs[i];
      for (const select of this.choices) select.value = i;
      for (const watcher of this.watchers) watcher(this.main);
    });
    const select = choice.querySelector("select");
    select.value = this.runs.indexOf(this.main);
    this.choices.push(select);
    return choice;
  }

  select(label, options, choose) {
    const select = element("select", { "aria-label": label });
    options.forEach((option, i) => select.append(element("option", { value: i }, option)));
    select.addEventListener("change", () => {
      choose(Number(select.value));
      this.show();
    });
    return element("label", {}, `${label} `, select);
  }

  chosen() {
    const gap = (row) => Math.max(...row.lines.map((line) => line.mean)) - Math.min(...row.lines.map((line) => line.mean));
    const compare = this.order === "gap" ? (a, b) => gap(b) - gap(a) : null;
    const key = (row) => ({ number: row.number, mean: this.line(row).mean, worst: this.line(row).worst });
    const isHit = (row) => !this.active.size || this.line(row).tokens.some((token) => this.matches(token, this.main));
    return this.rows
      .filter((row) => (!this.search || row.text.toLowerCase().includes(this.search)) && isHit(row))
      .sort(compare ?? ((a, b) => ORDERS[this.order][1](key(a), key(b))));
  }

  show(most = ROWS_AT_ONCE) {
    hidePanel(true);
    const chosen = this.chosen();
    this.shown = Math.min(most, chosen.length);
    this.list.classList.toggle("filtered", this.active.size > 0);
    this.list.replaceChildren(...chosen.slice(0, this.shown).map((row) => this.article(row)));
    const rest = chosen.length - this.shown;
    this.more.hidden = rest === 0;
    this.more.textContent = `Show ${Math.min(rest, ROWS_AT_ONCE)} more of ${rest}`;
    let text = `${chosen.length} of ${this.rows.length} rows`;
    if (this.active.size) {
      const hits = chosen.reduce((sum, row) => sum + this.line(row).tokens.filter((token) => this.matches(token, this.main)).length, 0);
      text += `, ${hits.toLocaleString("en")} tokens`;
    }
    this.count.textContent = text;
  }

  article(row) {
    const cut = row.length > row.numTokens ? ` (the first ${row.numTokens} of ${row.length})` : "";
    const head = `Row ${row.number}: ${row.numTokens} tokens${cut}`, isAlone = this.runs.length === 1;
    const values = ({ run, mean, worst }) => `mean ${run.tokens.kl_is === null ? "surprise" : "KL"} ${mean.toFixed(3)}, worst ${worst.toFixed(2)}`;
    const article = element("article", { class: "row" }, element("p", { class: "soft" }, isAlone ? `${head}, ${values(row.lines[0])}` : head));
    if (row.pictures.length) {
      const pictures = row.pictures.map((src, i) => element("img", { src, alt: `picture ${i + 1} of row ${row.number}` }));
      const more = row.numPictures - pictures.length;
      article.append(element("p", { class: "pictures" }, ...pictures, ...(more > 0 ? [`and ${more} more`] : [])));
    }
    for (const each of row.lines) {
      if (!isAlone) article.append(element("p", { class: "name" }, `${each.run.name}, ${values(each)}`));
      article.append(this.lineElement(each, `${each.run.name}, row ${row.number}`));
    }
    return article;
  }

  lineElement(line, label) {
    const box = element("div", { class: "line", dir: "auto", role: "group", "aria-label": label });
    const byPlace = new Map(line.tokens.map((token) => [token.place, token]));
    let isFirst = true;
    line.pieces.forEach((piece, place) => {
      const token = byPlace.get(place), text = piece.replace(/\n/g, "↵\n");
      if (!token) {
        if (piece) box.append(element("span", { class: "n" }, text));
        return;
      }
      const names = ["t"];
      if (level(token.value)) names.push(`k${level(token.value)}`);
      if (token.differs) names.push("d");
      if (token.mark === "c") names.push("c");
      if (this.active.size && this.matches(token, line.run)) names.push("hit");
      const span = element("span", { class: names.join(" "), role: "button", tabindex: isFirst ? "0" : "-1" });
      if (this.search && text.toLowerCase().includes(this.search)) span.append(element("mark", {}, text));
      else span.textContent = text;
      this.spans.set(span, { run: line.run, token });
      isFirst = false;
      box.append(span);
    });
    return box;
  }

  open(span, pin, event) {
    const isByKey = event === "focusin" && span?.matches(":focus-visible");
    if (!span || (event === "focusin" && !isByKey) || (pinned && !pin && !isByKey)) return;
    if (event === "pointerover" && isSheet()) return; // it would cover what is pointed at
    const { run, token } = this.spans.get(span);
    if (pin && pinned === span) return hidePanel(true);
    showPanel(span, run, token, isByKey);
    if (pin || pinned) pinned = span;
  }

  move(event) {
    const span = event.target.closest?.(".t");
    if (!span) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.open(span, true, "keydown");
    }
    const line = span.parentElement, isRtl = getComputedStyle(line).direction === "rtl";
    const all = [...line.querySelectorAll(this.active.size ? ".t.hit" : ".t")];
    const moves = { ArrowRight: isRtl ? -1 : 1, ArrowLeft: isRtl ? 1 : -1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !all.length) return;
    event.preventDefault();
    const now = all.indexOf(span);
    const next = all[Math.min(all.length - 1, Math.max(0, now + moves[event.key]))];
    this.focus(next);
  }

  // Puts the focus on a token, which becomes the one stop of Tab in its line.
  focus(span) {
    span.parentElement.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
    span.setAttribute("tabindex", "0");
    span.focus();
  }

  // Shows a row with its token, from a table above, and puts the focus there.
  go(row, line, token) {
    const chosen = this.chosen();
    let place = chosen.indexOf(row);
    if (place < 0) {
      this.active.clear();
      this.search = "";
      document.querySelectorAll(".tools input").forEach((input) => (input.type === "checkbox" ? (input.checked = false) : (input.value = "")));
      place = this.chosen().indexOf(row);
    }
    this.show(Math.max(ROWS_AT_ONCE, place + 1));
    const lines = this.list.children[place].querySelectorAll(".line");
    const spans = lines[row.lines.indexOf(line)].querySelectorAll(".t");
    const span = spans[line.tokens.indexOf(token)];
    this.focus(span);
    span.scrollIntoView({ block: "center" });
    this.open(span, true, "click");
  }
}
