// The slots of a recording at any step. State is rebuilt from recorded changes, starting at the nearest kept snapshot,
// so that ten thousand steps cost a few dozen snapshots and a jump costs at most SNAPSHOT changes.
"use strict";

const SNAPSHOT = 200;
const STATES = ["free", "cached", "committed", "shared", "reserved", "speculative", "accepted", "rejected", "scratch"];
const LETTERS = { free: "", cached: "K", committed: "C", shared: "S", reserved: "R", speculative: "?", accepted: "\u2713", rejected: "\u00d7", scratch: "#" };

class SlotHistory {
  constructor(roles, recording) {
    this.roles = roles;
    this.steps = recording.steps;
    this.requests = recording.requests;
    this.snapshots = [];
    this.texts = recording.texts || {};
    const state = this.empty();
    for (let i = 0; i < this.steps.length; i++) {
      if (i % SNAPSHOT === 0) this.snapshots.push(structuredClone(state));
      this.apply(state, this.steps[i].bound);
      this.apply(state, this.steps[i].after);
      this.seat(state, this.steps[i]);
    }
    // Pages that are never held need not be drawn.
    this.used = {};
    for (const role of roles) this.used[role.role] = 0;
    for (const step of this.steps)
      for (const part of [step.bound, step.after])
        for (const [role, change] of Object.entries(part || {}))
          for (const [page] of change.pages || []) this.used[role] = Math.max(this.used[role], page);
    this.tokens = {};
    for (const [number, request] of Object.entries(recording.requests)) this.tokens[number] = request.prompt.slice();
    for (const step of this.steps) for (const [number, fresh] of step.tokens) (this.tokens[number] ||= []).push(...fresh);
  }

  empty() {
    const state = { roles: {}, lanes: {} };
    for (const role of this.roles) state.roles[role.role] = { pages: {}, tables: {}, marks: {} };
    return state;
  }

  apply(state, changes) {
    for (const [name, change] of Object.entries(changes || {})) {
      const role = state.roles[name];
      for (const [page, holders, cached] of change.pages || []) {
        if (holders || cached) role.pages[page] = [holders, cached];
        else delete role.pages[page];
      }
      for (const [lane, from, pages] of change.tables || []) role.tables[lane] = (role.tables[lane] || []).slice(0, from).concat(pages);
      for (const [lane, committed, reserved] of change.marks || []) role.marks[lane] = [committed, reserved];
    }
  }

  seat(state, step) {
    for (const [number, , lane] of step.sequences || []) {
      for (const [other, owner] of Object.entries(state.lanes)) if (owner === number) delete state.lanes[other];
      if (lane !== null) state.lanes[lane] = number;
    }
  }

  // The state of step `index`; `after` says whether its outcome has been settled.
  at(index, after) {
    const begin = Math.floor(index / SNAPSHOT) * SNAPSHOT;
    const state = structuredClone(this.snapshots[begin / SNAPSHOT]);
    for (let i = begin; i < index; i++) {
      this.apply(state, this.steps[i].bound);
      this.apply(state, this.steps[i].after);
      this.seat(state, this.steps[i]);
    }
    const step = this.steps[index];
    this.apply(state, step.bound);
    if (step.decode) step.decode.lane.forEach((lane, i) => { state.lanes[lane] = step.decode.seq[i]; });
    for (const chunk of step.prefill) state.lanes[chunk.lane] = chunk.seq;
    if (after || !step.bound) { this.apply(state, step.after); if (after) this.seat(state, step); }
    return state;
  }

  // A token as people read it: its id, and its text with what cannot be seen written out.
  token(id) {
    const text = this.texts[id];
    return text === undefined ? String(id) : `${id} ${JSON.stringify(text)}`;
  }

  // Whose each page is, as short text: its sequences, or that it is cached; of pages with no owner there is nothing.
  owners(index, after, role) {
    const state = this.at(index, after), here = state.roles[role.role], found = new Map([[0, "scratch"]]);
    for (const [page, [holders, cached]] of Object.entries(here.pages))
      if (!holders && cached) found.set(Number(page), "cached");
    for (const [lane, table] of Object.entries(here.tables))
      for (const page of table) {
        if (!here.pages[page] || !here.pages[page][0]) continue;
        const owner = state.lanes[lane] === undefined ? `lane ${lane}` : state.lanes[lane];
        found.set(page, found.has(page) ? `${found.get(page)}+${owner}` : typeof owner === "number" ? `seq ${owner}` : owner);
      }
    return found;
  }

  // For one role: what each slot is and whose, as {state, lane, sequence, position, token}; slots that are free are absent.
  slots(index, after, role) {
    const size = role.page_size, state = this.at(index, after), here = state.roles[role.role], found = new Map();
    for (let slot = 0; slot < size; slot++) found.set(slot, { state: "scratch" });
    for (const [page, [holders, cached]] of Object.entries(here.pages))
      if (!holders && cached) for (let i = 0; i < size; i++) found.set(page * size + i, { state: "cached" });
    const decode = this.steps[index].decode;
    for (const [lane, table] of Object.entries(here.tables)) {
      const [committed, reserved] = here.marks[lane] || [0, 0];
      const place = decode ? decode.lane.indexOf(Number(lane)) : -1;
      const length = place >= 0 ? decode.len[place] : Infinity;
      const sequence = state.lanes[lane];
      for (let position = 0; position < reserved && position < table.length * size; position++) {
        const page = table[Math.floor(position / size)];
        const holders = (here.pages[page] || [1])[0];
        let name = holders > 1 ? "shared" : "committed";
        if (position >= committed) name = position >= length ? this.outcome(index, place, position - length, sequence) : "reserved";
        found.set(page * size + (position % size), { state: name, lane: Number(lane), sequence, position, page, holders });
      }
    }
    return found;
  }

  outcome(index, place, draft, sequence) {
    const step = this.steps[index];
    if (!step.decode.accepted) return "speculative";
    const kept = (step.tokens.find(([number]) => number === sequence) || [0, []])[1].length;
    return draft < Math.min(step.decode.accepted[place], kept) ? "accepted" : "rejected";
  }

  counts(index, after, role) {
    const counts = Object.fromEntries(STATES.map((name) => [name, 0]));
    for (const { state } of this.slots(index, after, role).values()) counts[state]++;
    counts.free = (role.pages + 1) * role.page_size - Object.values(counts).reduce((a, b) => a + b, 0);
    return counts;
  }

  describe(index) {
    const step = this.steps[index], lines = [];
    for (const c of step.prefill) lines.push(`sequence ${c.seq}: prefill ${c.role}[${c.begin}..${c.end}) of ${c.known} known`);
    if (step.decode) {
      step.decode.seq.forEach((number, i) => {
        const lane = step.decode.lane[i], spans = [];
        for (const [role, rows] of Object.entries(step.decode.spans))
          for (const [its, begin, end] of rows) if (its === lane) spans.push(`${role}[${begin}..${end})`);
        const fresh = (step.tokens.find(([n]) => n === number) || [0, []])[1];
        lines.push(`sequence ${number}: lane ${lane}, ${step.decode.len[i]} tokens`);
        lines.push(`  reserve ${spans.join(" ")}`);
        if (step.decode.k[i]) lines.push(`  draft   ${((step.decode.drafts || [])[i] || []).map((t) => this.token(t)).join("  ")}`);
        lines.push(`  keep    ${fresh.map((t) => this.token(t)).join("  ") || "none"}  (k ${step.decode.k[i]}, accepted ${(step.decode.accepted || [])[i] ?? "unknown"})`);
      });
    }
    for (const [number, state, lane] of step.sequences || []) lines.push(`sequence ${number}: now ${state}${lane === null ? "" : " in lane " + lane}`);
    for (const [number, reason, error] of step.ended || []) lines.push(`sequence ${number} ended: ${reason}${error ? ": " + error : ""}`);
    for (const [role, l] of Object.entries(step.ledger || {}))
      lines.push(`${role}: pages free ${l.free} + held ${l.held} + cached ${l.cached} = ${l.total}; slots reserved ${l.reserved} = committed ${l.committed} + released ${l.released}`);
    return lines.join("\n");
  }
}
