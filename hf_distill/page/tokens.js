// What both sides say of a token: reading it from the data, and the panel that shows it.

const LIMITS = [0.05, 0.2, 0.5, 1, 2]; // nats at which the colours begin
const SURE = 800; // thousandths: the teacher is sure of its most likely token
const NUM_LIKELIEST = 5;

// White space made visible, for a token that stands alone.
function visible(text) {
  if (text === "") return "(part of a character)";
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\0-\x1f]/g, (control) => String.fromCharCode(0x2400 + control.charCodeAt(0))).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

function percent(thousandths) {
  if (thousandths === null) return "not known";
  return thousandths === 0 ? "< 0.1 %" : `${(thousandths / 10).toFixed(1)} %`;
}

function level(nats) {
  return nats === null ? 0 : LIMITS.filter((limit) => nats >= limit).length;
}

function nats(value) {
  return value === null ? "not known" : `${value.toFixed(value < 0.1 ? 4 : 2)} nats`;
}

// The texts of a row as they stand in it.
function piecesOf(tokens, row) {
  return row.tokens.map((index, i) => row.pieces[i] ?? tokens.texts[index]);
}

// The n predicted tokens of a row.
function predicted(tokens, row) {
  const values = row.kl ?? row.surprise;
  return row.places.map((place, j) => {
    const likeliest = (side) => {
      const found = [];
      for (let i = NUM_LIKELIEST * j; i < NUM_LIKELIEST * (j + 1); i++)
        if (row[side].ids[i] >= 0) found.push({ index: row[side].ids[i], probability: row[side].probs[i] });
      return found;
    };
    const student = likeliest("student"), teacher = likeliest("teacher");
    const isRight = (side) => side.length > 0 && tokens.texts[side[0].index] === tokens.texts[row.tokens[place]];
    return {
      place, value: values[j], index: row.tokens[place], student, teacher,
      own: { student: row.student.own[j], teacher: row.teacher.own[j] },
      differs: student.length > 0 && teacher.length > 0 && tokens.texts[student[0].index] !== tokens.texts[teacher[0].index],
      isSure: teacher.length > 0 && teacher[0].probability >= SURE,
      isMissed: isRight(teacher) && student.length > 0 && !isRight(student),
      mark: row.marks ? row.marks[j] : null,
    };
  });
}

const MARKS = {
  d: "the student, and the teacher accepted it", c: "the teacher, as its correction",
  s: "the student", t: "the teacher", g: "the data",
};

const panel = document.getElementById("detail"), spoken = document.getElementById("spoken");
let pinned = null; // the token whose panel stays

function sideList(tokens, token, side) {
  const list = element("ol");
  for (const { index, probability } of token[side]) {
    const text = tokens.texts[index], isOwn = text === tokens.texts[token.index];
    const item = element("li", { class: isOwn ? "own" : null, style: `--p:${probability / 10}%` });
    item.append(element("bdi", {}, visible(text) + (isOwn ? " ✓" : "")), element("span", {}, percent(probability)));
    list.append(item);
  }
  if (!token[side].length) list.append(element("li", {}, "not known"));
  return element("div", { class: side }, element("h4", {}, side), list);
}

function fillPanel(run, token) {
  const tokens = run.tokens, label = tokens.kl_is === null ? "surprise of the student" : "KL to the teacher";
  const hint = { estimate: " (an estimate)", "lower bound": " (a lower bound)" }[tokens.kl_is] ?? "";
  const close = element("button", { class: "close", type: "button", "aria-label": "Close" }, "×");
  close.addEventListener("click", () => hidePanel(true));
  const knows = token.teacher.length > 0;
  const own = element("p", {}, `The token itself: student ${percent(token.own.student)}${knows ? `, teacher ${percent(token.own.teacher)}` : ""}.`);
  const parts = [
    close,
    element("h3", {}, element("bdi", {}, visible(token.text))),
    element("p", {}, `${data.runs.length > 1 ? `${run.name}, ` : ""}${label}: ${nats(token.value)}${hint}.`),
    own,
    token.mark ? element("p", {}, `Who wrote it: ${MARKS[token.mark]}.`) : null,
    element("div", { class: "sides" }, sideList(tokens, token, "student"), sideList(tokens, token, "teacher")),
  ];
  panel.replaceChildren(...parts.filter((part) => part !== null));
}

// True where the panel lies at the bottom of the screen: on a phone.
function isSheet() {
  return matchMedia("(max-width: 640px)").matches;
}

function showPanel(span, run, token, speak) {
  document.querySelector(".t.on")?.classList.remove("on");
  span.classList.add("on");
  fillPanel(run, token);
  panel.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  if (!isSheet()) {
    const left = Math.min(Math.max(8, box.left - 20), innerWidth - panel.offsetWidth - 8);
    const isBelow = box.bottom + panel.offsetHeight + 12 < innerHeight || box.top < panel.offsetHeight + 12;
    panel.style.left = `${left + scrollX}px`;
    panel.style.top = `${(isBelow ? box.bottom + 8 : box.top - panel.offsetHeight - 8) + scrollY}px`;
  } else {
    panel.style.left = panel.style.top = "";
    const covered = box.bottom + 12 - (innerHeight - panel.offsetHeight);
    if (covered > 0) scrollBy(0, covered);
  }
  if (!speak) return;
  const first = (side) => (token[side].length ? `${visible(run.tokens.texts[token[side][0].index])} ${percent(token[side][0].probability)}` : "not known");
  spoken.textContent = `${visible(token.text)}, ${nats(token.value)}; student ${first("student")}, teacher ${first("teacher")}`;
}

function hidePanel(always) {
  if (pinned && !always) return;
  pinned = null;
  panel.hidden = true;
  document.querySelector(".t.on")?.classList.remove("on");
}
