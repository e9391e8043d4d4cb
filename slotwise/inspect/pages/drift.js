// Two plots of relative error on a logarithmic axis: over the ops of one step, and over steps.
"use strict";
const SVG = "http" + "://www.w3.org/2000/svg";  // a name, not an address: nothing is fetched
const FLOOR = 1e-12;
const follower = document.getElementById("follower"), step = document.getElementById("step");
document.getElementById("summary").textContent =
  `${DATA.leader} leads, ${DATA.followers.join(", ")} follow: ${DATA.steps} steps, ${DATA.tokens} tokens`;

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function plot(id, points, label) {
  const svg = document.getElementById(id), width = Math.min(1200, document.body.clientWidth - 40), height = 240, left = 60;
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  svg.replaceChildren();
  if (!points.length) return;
  const logs = points.map((p) => Math.log10(Math.max(FLOOR, p.error ?? 1)));
  const low = Math.floor(Math.min(...logs)), high = Math.max(low + 1, Math.ceil(Math.max(...logs)));
  const x = (i) => left + (i / Math.max(1, points.length - 1)) * (width - left - 20);
  const y = (v) => 15 + ((high - v) / (high - low)) * (height - 45);
  for (let power = low; power <= high; power++) {
    svg.append(shape("line", { x1: left, x2: width - 20, y1: y(power), y2: y(power), stroke: "var(--line)" }));
    svg.append(shape("text", { x: 8, y: y(power) + 4, fill: "var(--faint)", "font-size": 12 }, "1e" + power));
  }
  svg.append(shape("polyline", { points: logs.map((v, i) => `${x(i)},${y(v)}`).join(" "), fill: "none", stroke: "var(--accent)", "stroke-width": 2 }));
  points.forEach((p, i) => {
    const dot = shape("circle", { cx: x(i), cy: y(logs[i]), r: 4, fill: "var(--accent)" });
    dot.append(shape("title", {}, label(p)));
    dot.addEventListener("mouseenter", () => { document.getElementById("hover").textContent = label(p); });
    svg.append(dot);
  });
}

const describe = (d) => `step ${d.step}, ${d.program} call ${d.call} ${d.op}: relative error ${d.error === null ? "infinite" : d.error.toExponential(2)}, 1 - cosine ${(1 - d.cosine).toExponential(2)}`;

function drawAll() {
  const drifts = (DATA.drifts[follower.value] || []).filter((d) => d.program.startsWith("target"));
  const last = new Map();
  for (const d of drifts) last.set(d.step, d);
  plot("steps", [...last.values()], describe);
  plot("depth", drifts.filter((d) => d.step === Number(step.value)), describe);
}

for (const name of DATA.followers) follower.append(new Option(name));
function fillSteps() {
  const numbers = [...new Set((DATA.drifts[follower.value] || []).map((d) => d.step))];
  step.replaceChildren(...numbers.map((n) => new Option(n)));
  step.value = numbers[numbers.length - 1];
  drawAll();
}
follower.addEventListener("change", fillSteps);
step.addEventListener("change", drawAll);
addEventListener("resize", drawAll);
fillSteps();
