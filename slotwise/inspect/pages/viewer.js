// The viewer: tabs, the slot map on canvases, the arena chart and the table of calls.
"use strict";

const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const start = new URLSearchParams(location.hash.slice(1));
const history_ = DATA.recording ? new SlotHistory(DATA.plan.roles, DATA.recording) : null;
const steps = history_ ? history_.steps : [];
let current = 0, after = start.get("phase") === "after", tab = "";

byId("title").textContent = DATA.plan.title;
byId("subtitle").textContent = history_
  ? `recording ${DATA.recording.name}: ${steps.length} steps, ${Object.keys(DATA.recording.requests).length} requests${DATA.recording.is_cut ? ", cut short" : ""}`
  : `${DATA.plan.programs.length} programs`;
byId("text").textContent = DATA.plan.text;
if (DATA.recording && DATA.recording.crash) {
  const c = DATA.recording.crash;
  byId("notice").textContent = `crashed in step ${c.crash}: ${c.error} at ${c.where}: ${c.message.split("\n")[0]}`;
}

// Drawing at the screen's own resolution.
function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = height + "px";
  canvas.style.width = width + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  return pen;
}

function cell(pen, x, y, size, name, paint) {
  const inner = size - (size > 4 ? 1 : 0);
  if (name === "free") {
    if (size > 4) { pen.strokeStyle = paint.page; pen.strokeRect(x + 0.5, y + 0.5, inner - 1, inner - 1); }
    return;
  }
  pen.fillStyle = paint[name];
  pen.fillRect(x, y, inner, inner);
  if (size < 6) return;
  pen.strokeStyle = pen.fillStyle = name === "committed" || name === "scratch" || name === "rejected" || name === "accepted" ? "#fff" : "#111";
  if (size >= 11) {
    pen.font = `${Math.round(size * 0.72)}px ui-monospace, monospace`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText(LETTERS[name], x + inner / 2, y + inner / 2 + 0.5);
    return;
  }
  // Too small for letters: lines, dots and crosses say the same.
  pen.beginPath();
  if (name === "shared" || name === "rejected" || name === "scratch") { pen.moveTo(x + 1, y + 1); pen.lineTo(x + inner - 1, y + inner - 1); }
  if (name === "rejected" || name === "scratch" || name === "reserved") { pen.moveTo(x + 1, y + inner - 1); pen.lineTo(x + inner - 1, y + 1); }
  if (name === "accepted") { pen.moveTo(x + 1, y + inner / 2); pen.lineTo(x + inner - 1, y + inner / 2); }
  if (name === "cached") pen.rect(x + inner / 2 - 1, y + inner / 2 - 1, 2, 2);
  if (name === "speculative") { pen.moveTo(x + inner / 2, y + 1); pen.lineTo(x + inner / 2, y + inner - 1); }
  pen.stroke();
}

const painted = () => Object.fromEntries([...STATES, "page"].map((name) => [name, colour(name)]));

const maps = [];
function buildRoles() {
  for (const role of DATA.plan.roles) {
    const box = element("div", undefined, "role"), canvas = element("canvas");
    const head = element("div", `${role.role}: ${role.model}`), note = element("div", "", "faint");
    box.append(head, canvas, note);
    byId("roles").append(box);
    const map = { role, canvas, note, cell: 0, columns: 0, slots: null };
    canvas.addEventListener("mousemove", (event) => hover(map, event));
    canvas.addEventListener("mouseleave", () => { byId("hover").textContent = "Hover over a slot."; });
    maps.push(map);
  }
}

// Pages side by side, each a block of its slots in one row with its owner below; as many in a line as fit.
const OWNER = 12;
function drawMap(map, paint) {
  const { role } = map, size = role.page_size, shown = Math.min(role.pages, history_.used[role.role] + 2) + 1;
  const width = Math.max(300, byId("roles").clientWidth);
  let px = 16;
  while (px > 3 && Math.ceil(shown / Math.max(1, Math.floor(width / (size * px + 6)))) * (px + 4 + OWNER) > 640) px--;
  px = Math.max(2, Math.min(px, Math.floor((width - 6) / size)));
  map.cell = px;
  map.columns = Math.max(1, Math.floor(width / (size * px + 6)));
  const lines = Math.ceil(shown / map.columns);
  const pen = fit(map.canvas, width, lines * (px + 4 + OWNER) + 2);
  map.slots = history_.slots(current, after, role);
  const owners = history_.owners(current, after, role);
  for (let page = 0; page < shown; page++) {
    const x0 = (page % map.columns) * (size * px + 6), y0 = Math.floor(page / map.columns) * (px + 4 + OWNER);
    pen.fillStyle = paint.page;
    pen.fillRect(x0, y0 + px, size * px - 1, 1.5);
    for (let i = 0; i < size; i++) {
      const found = map.slots.get(page * size + i);
      cell(pen, x0 + i * px, y0, px, found ? found.state : "free", paint);
    }
    pen.font = "10px system-ui, sans-serif";
    pen.textAlign = "left";
    pen.textBaseline = "top";
    pen.fillStyle = colour("faint");
    pen.fillText(owners.get(page) || "", x0, y0 + px + 3, size * px);
  }
  map.note.textContent = shown <= role.pages
    ? `${role.pages} pages of ${size} slots and a scratch page; ${role.pages + 1 - shown} pages are never used and not drawn`
    : `${role.pages} pages of ${size} slots and a scratch page`;
}

function hover(map, event) {
  const box = map.canvas.getBoundingClientRect(), size = map.role.page_size;
  const x = event.clientX - box.left, y = event.clientY - box.top;
  const column = Math.floor(x / (size * map.cell + 6)), within = Math.floor((x - column * (size * map.cell + 6)) / map.cell);
  const page = Math.floor(y / (map.cell + 4 + OWNER)) * map.columns + column;
  if (within < 0 || within >= size || column >= map.columns || page > map.role.pages) return;
  const slot = page * size + within, found = map.slots.get(slot);
  const lines = [`${map.role.role} slot ${slot}: page ${page}, place ${within}`, found ? found.state : "free"];
  if (found && found.position !== undefined) {
    const token = (history_.tokens[found.sequence] || [])[found.position];
    lines.push(`sequence ${found.sequence ?? "?"} (lane ${found.lane}), position ${found.position}`);
    if (found.state !== "rejected" && token !== undefined) lines.push(`token ${history_.token(token)}`);
    if (found.holders > 1) lines.push(`held by ${found.holders} sequences`);
  }
  byId("hover").textContent = lines.join("\n");
  byId("hover").style.whiteSpace = "pre";
}

function drawLegend(paint) {
  const counts = maps.map((map) => [map.role.role, history_.counts(current, after, map.role)]);
  byId("legend").replaceChildren(...STATES.map((name) => {
    const item = element("li"), sample = element("canvas");
    item.dataset.state = name;
    cell(fit(sample, 16, 16), 0, 0, 16, name, paint);
    item.append(sample, element("span", `${name}: ${counts.map(([role, c]) => `${role} ${c[name]}`).join(", ")}`));
    return item;
  }));
}

// One column a step, or a group of steps where there are more steps than pixels: kept up, rejected down.
function drawStrip(paint) {
  const canvas = byId("strip"), width = canvas.clientWidth || 800, pen = fit(canvas, width, 64);
  canvas.style.width = "100%";
  const columns = Math.min(steps.length, Math.floor(width)), each = width / Math.max(1, columns);
  const kept = (s) => s.tokens.reduce((sum, [, fresh]) => sum + fresh.length, 0);
  const lost = (s) => (s.decode && s.decode.accepted ? s.decode.k.reduce((sum, k, i) => sum + k - Math.min(k, s.decode.accepted[i]), 0) : 0);
  if (!drawStrip.peak) drawStrip.peak = Math.max(1, ...steps.map((s) => Math.max(kept(s), lost(s))));
  for (let c = 0; c < columns; c++) {
    const first = Math.floor((c * steps.length) / columns), last = Math.max(first + 1, Math.floor(((c + 1) * steps.length) / columns));
    let up = 0, down = 0;
    for (let i = first; i < last; i++) { up = Math.max(up, kept(steps[i])); down = Math.max(down, lost(steps[i])); }
    const h = (v) => (v / drawStrip.peak) * 29;
    pen.fillStyle = paint.accepted;
    pen.fillRect(c * each, 32 - h(up), Math.max(1, each - (each > 3 ? 1 : 0)), h(up));
    pen.fillStyle = paint.rejected;
    pen.fillRect(c * each, 33, Math.max(1, each - (each > 3 ? 1 : 0)), h(down));
  }
  pen.strokeStyle = colour("accent");
  pen.lineWidth = 2;
  const x = ((current + 0.5) / Math.max(1, steps.length)) * width;
  pen.beginPath(); pen.moveTo(x, 0); pen.lineTo(x, 64); pen.stroke();
}

function show(index) {
  current = Math.max(0, Math.min(steps.length - 1, index));
  byId("slider").value = current;
  byId("number").value = steps[current].step;
  byId("phase").textContent = after ? "after the outcome" : "before the outcome";
  byId("step-title").textContent = `step ${steps[current].step}`;
  byId("step-text").textContent = history_.describe(current);
  const paint = painted();
  for (const map of maps) drawMap(map, paint);
  drawLegend(paint);
  drawStrip(paint);
  document.documentElement.dataset.step = steps[current].step;
}

// The program tab

const amount = (v, unit) => { for (const p of ["", "K", "M", "G", "T"]) { if (v < 1000) return `${v < 10 && p ? v.toFixed(2) : v < 100 && p ? v.toFixed(1) : Math.round(v)} ${p}${unit}`; v /= 1000; } return v.toFixed(1) + " P" + unit; };
const seconds = (call) => Math.max(call.bytes / (Number(byId("bandwidth").value) * 1e9), call.flops / (Number(byId("gflops").value) * 1e9));
const micro = (s) => (s * 1e6 < 10 ? (s * 1e6).toFixed(2) : (s * 1e6).toFixed(1)) + " us";
let boxes = [];

function drawProgram() {
  const program = DATA.plan.programs[byId("program").selectedIndex], head = element("tr"), body = document.createDocumentFragment();
  for (const name of ["", "op", "kernel", "bytes", "flops", "bound by", "roofline", "call"]) head.append(element("th", name));
  let total = 0;
  program.calls.forEach((call, index) => {
    const line = element("tr"), time = seconds(call), text = element("td", undefined, "mono");
    total += time;
    text.append(call.text, element("span", `${call.kernel}: ${call.why}`, "faint why"), ...call.rejected.map((r) => element("span", "not " + r, "faint why")));
    const bound = call.bytes / (Number(byId("bandwidth").value) * 1e9) >= call.flops / (Number(byId("gflops").value) * 1e9) ? "bytes" : "flops";
    line.append(element("td", index, "num"), element("td", call.op), element("td", call.kernel), element("td", amount(call.bytes, "B"), "num"),
      element("td", amount(call.flops, ""), "num"), element("td", bound), element("td", micro(time), "num"), text);
    body.append(line);
  });
  byId("calls").replaceChildren(head, body);
  const sum = (key) => program.calls.reduce((all, call) => all + call[key], 0);
  byId("total").textContent = `${program.calls.length} calls, ${amount(sum("bytes"), "B")}, ${amount(sum("flops"), "FLOP")}, at least ${micro(total)}`;
  for (const link of byId("loops").querySelectorAll("a")) link.setAttribute("aria-current", link.textContent === program.name);
  drawArena(program);
}

// A line for neighbouring rounds of a loop that run the same programs.
function listLoops() {
  const { loops } = DATA.plan, head = element("tr"), body = document.createDocumentFragment();
  if (!loops.length) return;
  for (const name of ["sequences", "draws with", "rounds", "programs of each round, in order"]) head.append(element("th", name));
  for (const loop of loops) {
    loop.rounds.forEach((round, index) => {
      const line = element("tr"), programs = element("td", undefined, "mono");
      round.programs.forEach((name, place) => programs.append(place ? ", " : "", linkTo(name)));
      const which = round.first === round.last ? round.first : `${round.first} to ${round.last}`;
      line.append(element("td", index ? "" : loop.sequences, "num"), element("td", index ? "" : loop.sampler),
        element("td", which), programs);
      body.append(line);
    });
  }
  byId("loops").querySelector("summary").textContent = `Draft loops: ${loops.length}`;
  byId("loops").querySelector("table").append(head, body);
  byId("loops").hidden = false;
}

function linkTo(program) {
  const link = element("a", program);
  link.href = "#" + new URLSearchParams({ tab: "program", program });
  link.addEventListener("click", (event) => {
    event.preventDefault();
    byId("program").value = program;
    drawProgram();
  });
  return link;
}

function drawArena(program) {
  const canvas = byId("arena"), width = canvas.clientWidth || 900, height = 260, pen = fit(canvas, width, height);
  canvas.style.width = "100%";
  const left = 70, calls = program.calls.length, wide = (width - left - 8) / Math.max(1, calls), tall = (height - 20) / Math.max(1, program.arena);
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = colour("faint");
  pen.fillText("0", 6, 14);
  pen.fillText(amount(program.arena, "B"), 6, height - 10);
  boxes = program.placements.map(([value, offset, bytes, first, last]) => ({ value, offset, bytes, first, last, x: left + first * wide, y: 6 + offset * tall, w: (last - first + 1) * wide, h: Math.max(1, bytes * tall) }));
  boxes.forEach((box, i) => {
    pen.fillStyle = colour(box.value.startsWith("ws") ? "reserved" : i % 2 ? "committed" : "shared");
    pen.fillRect(box.x, box.y, Math.max(1, box.w - 1), Math.max(1, box.h - 1));
    if (box.w > 34 && box.h > 13) { pen.fillStyle = i % 2 && !box.value.startsWith("ws") ? "#fff" : "#111"; pen.fillText(box.value, box.x + 4, box.y + 11); }
  });
}

byId("arena").addEventListener("mousemove", (event) => {
  const rect = byId("arena").getBoundingClientRect(), x = event.clientX - rect.left, y = event.clientY - rect.top;
  const box = boxes.find((b) => x >= b.x && x <= b.x + b.w && y >= b.y && y <= b.y + b.h);
  if (box) byId("arena-hover").textContent = `${box.value}: ${amount(box.bytes, "B")} at offset ${box.offset}, alive from call ${box.first} to ${box.last}`;
});

function choose(name) {
  tab = name;
  for (const button of document.querySelectorAll("nav button")) {
    button.setAttribute("aria-selected", button.dataset.tab === name);
    byId("tab-" + button.dataset.tab).hidden = button.dataset.tab !== name;
  }
  redraw();
}
function redraw() {
  if (tab === "slots") show(current);
  if (tab === "program") drawProgram();
}

for (const program of DATA.plan.programs) byId("program").append(new Option(program.name));
if (start.get("program")) byId("program").value = start.get("program");
if (byId("program").selectedIndex < 0) byId("program").selectedIndex = 0;
byId("bandwidth").value = DATA.bandwidth;
byId("gflops").value = DATA.gflops;
listLoops();
for (const id of ["program", "bandwidth", "gflops"]) byId(id).addEventListener("input", drawProgram);
for (const button of document.querySelectorAll("nav button")) button.addEventListener("click", () => choose(button.dataset.tab));

if (history_ && steps.length) {
  buildRoles();
  byId("slider").max = steps.length - 1;
  byId("slider").addEventListener("input", () => show(Number(byId("slider").value)));
  byId("number").addEventListener("change", () => show(steps.findIndex((s) => s.step >= Number(byId("number").value))));
  byId("first").addEventListener("click", () => show(0));
  byId("back").addEventListener("click", () => show(current - 1));
  byId("forth").addEventListener("click", () => show(current + 1));
  byId("last").addEventListener("click", () => show(steps.length - 1));
  byId("phase").addEventListener("click", () => { after = !after; show(current); });
  byId("strip").addEventListener("click", (event) => {
    const box = byId("strip").getBoundingClientRect();
    show(Math.floor(((event.clientX - box.left) / box.width) * steps.length));
  });
  const page = Math.max(1, Math.round(steps.length / 20));
  const keys = { ArrowLeft: () => show(current - 1), ArrowRight: () => show(current + 1), PageUp: () => show(current - page),
    PageDown: () => show(current + page), Home: () => show(0), End: () => show(steps.length - 1), " ": () => { after = !after; show(current); } };
  addEventListener("keydown", (event) => {
    if (tab !== "slots" || event.ctrlKey || event.altKey || event.metaKey || !keys[event.key]) return;
    if (["number", "search"].includes(event.target.type) || (event.key === " " && event.target.tagName === "BUTTON")) return;
    event.preventDefault();
    keys[event.key]();
  });
  if (start.get("step")) current = Math.max(0, steps.findIndex((s) => s.step >= Number(start.get("step"))));
} else {
  document.querySelector('[data-tab="slots"]').hidden = true;
}
document.addEventListener("themechange", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("resize", redraw);
choose(start.get("tab") || (history_ && steps.length ? "slots" : "program"));
document.documentElement.dataset.ready = "true";
