// The cross-validation report: two tables that filter and sort.
"use strict";

const number = (v) => (v === null ? "-" : v === 0 ? "0" : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5 ? v.toExponential(1) : v.toPrecision(3));
const whole = (v) => (v === null ? "-" : v >= 2 ** 62 ? "NaN" : v.toLocaleString("en"));

const CHECKS = [
  ["op", (c) => c.op], ["kernel", (c) => c.backend + ":" + c.kernel], ["dtype", (c) => c.dtype], ["case", (c) => c.case],
  ["check", (c) => c.check], ["max abs", (c) => c.max_abs, number], ["max rel", (c) => c.max_rel, number],
  ["ULPs", (c) => c.ulps, whole], ["1 - cosine", (c) => (c.cosine === null ? null : 1 - c.cosine), number],
  ["time", (c) => c.seconds, (v) => (v === null ? "-" : (v * 1e6).toFixed(1) + " us")],
  ["verdict", (c) => c.verdict], ["why", (c) => (c.message ? c.rule + ": " + c.message : c.reason)],
];
const PAIRS = [
  ["op", (c) => c.op], ["dtype", (c) => c.dtype], ["case", (c) => c.case], ["one", (c) => c.left], ["another", (c) => c.right],
  ["max abs", (c) => c.max_abs, number], ["ULPs", (c) => c.ulps, whole],
];
const CLASSES = { ok: "good", failed: "bad", "unexpected pass": "bad", waived: "warn", refused: "faint" };
const sorting = { checks: [null, 1], agreements: [null, 1] };

function draw(id, columns, rows) {
  const table = document.getElementById(id);
  const [by, direction] = sorting[id];
  const shown = rows.slice();
  if (by !== null) {
    const value = columns[by][1];
    shown.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === y) return 0;
      if (x === null) return 1;
      if (y === null) return -1;
      return (x < y ? -1 : 1) * direction;
    });
  }
  const head = element("tr");
  columns.forEach(([name], i) => {
    const cell = element("th", name + (by === i ? (direction > 0 ? " \u25b4" : " \u25be") : ""));
    cell.tabIndex = 0;
    const sort = () => { sorting[id] = [i, by === i ? -direction : 1]; drawAll(); };
    cell.addEventListener("click", sort);
    cell.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    head.append(cell);
  });
  const body = document.createDocumentFragment();
  for (const row of shown) {
    const line = element("tr");
    for (const [name, value, format] of columns) {
      const found = value(row);
      line.append(element("td", format ? format(found) : found, format ? "num" : name === "verdict" ? CLASSES[found] : ""));
    }
    body.append(line);
  }
  table.replaceChildren(head, body);
}

function drawAll() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const only = document.getElementById("only").checked;
  const fits = (row) => words.every((word) => JSON.stringify(row).toLowerCase().includes(word));
  const wanted = (row) => !only || ["failed", "unexpected pass", "waived"].includes(row.verdict);
  draw("checks", CHECKS, DATA.checks.filter((row) => fits(row) && wanted(row)));
  draw("agreements", PAIRS, DATA.agreements.filter(fits));
}

const summary = document.getElementById("summary");
summary.append(element("span", DATA.passed ? "passed" : "FAILED", DATA.passed ? "good" : "bad"), " \u2014 " + DATA.summary);
document.getElementById("missing").textContent = Object.entries(DATA.missing).map(([k, v]) => "not here: " + k + ": " + v).join("; ");
document.getElementById("filter").addEventListener("input", drawAll);
document.getElementById("only").addEventListener("change", drawAll);
drawAll();
