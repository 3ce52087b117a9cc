// Every worker in a table, which on a narrow screen becomes a list of cards.

import { el, setAttribute, setText } from "./dom.js";
import { stateOf } from "./plan.js";
import { UNKNOWN, count, grouped, integer, share } from "./units.js";

const MOST = 200;
const COLUMNS = [
  "worker",
  "state",
  "running",
  "waiting",
  "blocks in use",
  "in the index",
  "prefill to do",
  "cache hits",
];

/** Draws into one element; rows are kept as long as their worker is there. */
export class WorkerTable {
  constructor(holder, note) {
    this.note = note;
    this.rows = new Map();
    this.body = el("tbody");
    this.empty = el("p", { class: "empty", text: "No worker has joined yet. Start one: kvmesh serve decode." });
    this.table = el(
      "table",
      { class: "workers" },
      el("thead", {}, el("tr", {}, ...COLUMNS.map((name) => el("th", { scope: "col", text: name })))),
      this.body,
    );
    holder.append(this.empty, this.table);
  }

  /** Show workers, in their order; those that are gone too. */
  draw(workers) {
    const shown = workers.slice(0, MOST);
    const alive = workers.filter((worker) => !worker.gone).length;
    setText(this.note, `${count(alive, "workers")}${workers.length > MOST ? `, the first ${MOST} shown` : ""}`);
    this.empty.hidden = shown.length > 0;
    this.table.hidden = !shown.length;
    const ids = new Set(shown.map((worker) => worker.id));
    for (const [id, row] of this.rows) {
      if (!ids.has(id)) {
        row.remove();
        this.rows.delete(id);
      }
    }
    shown.forEach((worker, index) => {
      const row = this.rows.get(worker.id) ?? this.newRow(worker);
      if (this.body.children[index] !== row) this.body.insertBefore(row, this.body.children[index] ?? null);
      update(row, worker);
    });
  }

  newRow(worker) {
    const cells = COLUMNS.map((name, index) =>
      index
        ? el("td", { "data-label": name })
        : el("th", { scope: "row", class: "id" }, el("span", { text: worker.id })),
    );
    cells[1].append(el("span", { class: "state" }));
    cells[4].append(
      el("span", { class: "quantity" }),
      el("meter", { min: 0, max: 1, "aria-label": "share of the blocks in use" }),
    );
    for (const index of [2, 3, 5, 6, 7]) cells[index].append(el("span", { class: "quantity" }));
    const row = el("tr", { "data-worker": worker.id }, ...cells);
    this.rows.set(worker.id, row);
    return row;
  }
}

function update(row, worker) {
  const state = stateOf(worker);
  const unit = worker.role === "prefill" ? "tasks" : "requests";
  const [, stateCell, running, waiting, blocks, indexed, prefill, hits] = row.children;
  setAttribute(row, "class", state);
  setText(stateCell.firstChild, state);
  const told = (value) => (worker.load_unknown ? null : value);
  setText(running.firstChild, count(told(worker.active_requests), unit));
  setText(waiting.firstChild, count(told(worker.waiting_requests), unit));
  const total = integer(worker.total_blocks);
  const used = integer(worker.active_blocks);
  setText(blocks.firstChild, total ? `${told(grouped(used)) ?? UNKNOWN} of ${count(total, "blocks")}` : UNKNOWN);
  const meter = blocks.lastChild;
  meter.hidden = !total || worker.load_unknown;
  if (total) meter.value = used / total;
  const degraded = worker.index_degraded ? ", not trusted" : "";
  setText(indexed.firstChild, `${count(told(integer(worker.indexed_blocks)), "blocks")}${degraded}`);
  setText(prefill.firstChild, count(told(integer(worker.active_prefill_tokens)), "tokens"));
  setText(hits.firstChild, share(told(worker.prefix_hit_rate)));
}
