// Recent routing decisions, newest first, each with every term of every candidate that the router sent.

import { el, setAttribute, setText } from "./dom.js";
import { amount, clock, count, figure, integer } from "./units.js";

const SHOWN = 30;
const IN_BLOCKS = new Set(["kv_aware", "least_work"]);
const FIRST = [
  "prefill_cost",
  "decode_cost",
  "request_cost",
  "prefill_blocks",
  "overlap_blocks",
  "credit_blocks",
  "decode_blocks",
  "active_requests",
];
const COUNTED = { _tokens: "tokens", _blocks: "blocks", _requests: "requests", _cost: "blocks", block_size: "tokens" };

/** Draws into one element; `note` says what is not shown, `hold` stops new ones from moving what is being read. */
export class Decisions {
  constructor(holder, note, hold) {
    this.holder = holder;
    this.note = note;
    this.waiting = [];
    this.skipped = 0;
    this.isHeld = false;
    holder.append(el("p", { class: "empty", text: "No request has been routed yet." }));
    hold.addEventListener("click", () => {
      this.isHeld = !this.isHeld;
      setAttribute(hold, "aria-pressed", this.isHeld);
      setText(hold, this.isHeld ? "Go on" : "Hold");
      if (!this.isHeld) this.add({ decisions: [], skipped: 0 });
    });
  }

  /** Take one message of the watch; what it repeats after a new connection is shown once. */
  add({ decisions, skipped }) {
    const known = new Set([...this.waiting.map(keyOf), ...[...this.holder.children].map((item) => item.dataset.key)]);
    this.skipped += integer(skipped);
    this.waiting = [...this.waiting, ...decisions.filter((decision) => !known.has(keyOf(decision)))].slice(-SHOWN);
    if (this.isHeld) return this.say();
    if (this.waiting.length) this.holder.querySelector(":scope > .empty")?.remove();
    for (const decision of this.waiting) this.holder.prepend(itemOf(decision));
    this.waiting = [];
    while (this.holder.children.length > SHOWN) this.holder.lastChild.remove();
    this.say();
  }

  /** Say why there are none at the moment. */
  fail(why) {
    setText(this.note, why);
  }

  say() {
    const parts = ["The newest first; open one to see every term."];
    if (this.isHeld) parts.push(`Held: ${count(this.waiting.length, "decisions")} to come.`);
    if (this.skipped) parts.push(`${count(this.skipped, "decisions")} came too fast to be listed.`);
    setText(this.note, parts.join(" "));
  }
}

/** Return a decision's candidates with every term, and who was none, as elements. */
export function explained(explanation, { candidates, rejected } = {}) {
  const named = new Set(explanation.candidates.flatMap((candidate) => Object.keys(candidate.terms)));
  const terms = [
    ...FIRST.filter((name) => named.has(name)),
    ...[...named].filter((name) => !FIRST.includes(name)).sort(),
  ];
  const head = el(
    "tr",
    {},
    el("th", { scope: "col", text: "candidate" }),
    el("th", { scope: "col", text: "cost" }),
    ...terms.map((name) => el("th", { scope: "col", text: name.replaceAll("_", " ") })),
    el("th", { scope: "col", text: "why not" }),
  );
  const rows = explanation.candidates.map((candidate) => {
    const chosen = candidate.worker_id === explanation.worker_id && candidate.rank === explanation.rank;
    return el(
      "tr",
      { class: chosen ? "chosen" : undefined },
      el("th", { scope: "row", class: "id", text: rankOf(candidate) }),
      el("td", { class: "quantity", text: costOf(candidate.cost, explanation.policy) }),
      ...terms.map((name) =>
        el("td", { class: "quantity", text: name in candidate.terms ? termOf(name, candidate.terms[name]) : "–" }),
      ),
      el("td", { text: chosen ? "chosen" : candidate.lost }),
    );
  });
  const parts = [];
  if (rows.length) {
    parts.push(
      el(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": "Terms of each candidate" },
        el("table", { class: "terms" }, el("thead", {}, head), el("tbody", {}, ...rows)),
      ),
    );
  }
  const hidden = (candidates ?? rows.length) - rows.length;
  if (hidden > 0)
    parts.push(el("p", { class: "note", text: `${count(hidden, "candidates")} of higher cost not shown.` }));
  const out = explanation.rejected.map((worker) => `${worker.worker_id}: ${worker.reason}`);
  if (out.length) {
    const more = (rejected ?? out.length) - out.length;
    parts.push(
      el("p", {
        class: "note",
        text: `No candidates: ${out.join("; ")}${more > 0 ? `; and ${count(more, "workers")} more` : ""}.`,
      }),
    );
  }
  for (const text of [explanation.note, explanation.fallback && `The policy failed: ${explanation.fallback}`]) {
    if (text) parts.push(el("p", { class: "note", text }));
  }
  const knobs = Object.entries(explanation.knobs).map(([name, value]) => `${name} ${figure(value)}`);
  if (knobs.length) parts.push(el("p", { class: "note knobs", text: `Weights: ${knobs.sort().join(", ")}.` }));
  return parts;
}

/** A cost with its unit, which is the policy's own where that is not blocks. */
export function costOf(cost, policy) {
  return amount(cost, IN_BLOCKS.has(policy) ? "blocks" : "by its measure");
}

function itemOf(decision) {
  const { explanation } = decision;
  const prefill = explanation.prefill ? (explanation.prefill.remote ? "prefill remote" : "prefill local") : "";
  const facts = [
    count(explanation.prompt_tokens, "prompt tokens"),
    `${count(decision.overlap_blocks, "blocks")} cached`,
    `cost ${costOf(chosenOf(explanation)?.cost ?? 0, explanation.policy)}`,
    prefill,
  ];
  const at = new Date(decision.decided_at);
  const item = el(
    "details",
    { "data-key": keyOf(decision) },
    el(
      "summary",
      {},
      el("time", { datetime: decision.decided_at, text: clock(at) }),
      el("span", { class: "id", text: rankOf(explanation) }),
      el("span", { class: "facts quantity", text: facts.filter(Boolean).join(" · ") }),
    ),
  );
  item.addEventListener("toggle", () => {
    if (!item.open || item.childElementCount > 1) return;
    const booking = decision.booking
      ? `Request ${decision.booking.request_id}, attempt ${decision.booking.attempt}`
      : "Nothing was booked";
    item.append(
      el("p", {
        class: "note",
        text: `${booking}. Chosen by ${explanation.policy} of ${count(decision.candidate_count, "candidates")}.`,
      }),
      ...explained(explanation, { candidates: decision.candidate_count, rejected: decision.rejected_count }),
    );
  });
  return item;
}

/** A router that was started anew counts from 1 again: its clock tells its decisions from those before. */
function keyOf({ sequence, decided_at }) {
  return `${sequence} ${decided_at}`;
}

function chosenOf(explanation) {
  return explanation.candidates.find(
    (candidate) => candidate.worker_id === explanation.worker_id && candidate.rank === explanation.rank,
  );
}

function rankOf({ worker_id, rank }) {
  return rank ? `${worker_id} rank ${rank}` : worker_id;
}

function termOf(name, value) {
  const unit = Object.entries(COUNTED).find(([ending]) => name.endsWith(ending))?.[1];
  return amount(value, unit ?? "blocks");
}
